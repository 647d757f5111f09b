"""The incremental sampler against full passes of the network, one per pixel."""

import pytest
import torch
from test_pixelcnn import images, network

from paperlib.likelihoods import mix_logistic_noise, sample_discretized_mix_logistic
from paperlib.pixelcnn_sampler import Sampler

# channels, height, width, batch, settings, shape of h
CASES = [
    (3, 8, 8, 2, {}, None),
    (1, 4, 4, 3, {"levels": 17}, None),
    (1, 8, 8, 5, {"levels": 17, "blocks": 2}, (3,)),
    (3, 12, 8, 1, {"blocks": 3, "filters": 5}, None),
    (3, 8, 16, 2, {"blocks": 2, "mixtures": 1}, (4, 2, 2)),
    (1, 16, 4, 2, {"filters": 9}, (2, 16, 4)),
    (3, 4, 20, 3, {"blocks": 2}, (4, 1, 5)),
]


def case(channels, height, width, batch, settings, h_shape):
    generator = torch.Generator().manual_seed(7)
    h = torch.randn(batch, *h_shape, generator=generator).double() if h_shape else None
    x = images(batch, channels, height, width, settings.get("levels", 256))
    net = network(x, h, dropout=0.5, conditioning=h_shape[0] if h_shape else 0, **settings)
    with torch.no_grad():  # away from what initialisation gives
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).double())
    return net, x, h


def noise_for(net, x, seed=3):
    batch, channels, height, width = x.shape
    generator = torch.Generator().manual_seed(seed)
    shape, mixtures = (batch, height, width), net.settings.mixtures
    return mix_logistic_noise(shape, mixtures, channels, generator=generator, dtype=torch.float64)


def one_full_pass_per_pixel(net, x, h, noise):
    """The definition of sampling, as slow as it is plain."""
    result = torch.zeros_like(x)
    settings = net.settings
    with torch.no_grad():
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                params = net(result, h)[:, :, i, j]
                draw = sample_discretized_mix_logistic(
                    params, noise[:, :, i, j], channels=settings.channels, levels=settings.levels
                )
                result[:, :, i, j] = draw
    return result


@pytest.mark.parametrize("arguments", CASES)
def test_draws_the_same_images_as_one_full_pass_per_pixel(arguments):
    net, x, h = case(*arguments)
    sampler = Sampler(net, len(x), *x.shape[2:])
    for seed in (3, 4):  # the second on buffers that are no longer empty
        noise = noise_for(net, x, seed)
        drawn = sampler.draw(h, noise=noise)
        assert torch.equal(drawn, one_full_pass_per_pixel(net, x, h, noise))
    assert drawn.unique().numel() > 5


@pytest.mark.parametrize("arguments", CASES)
def test_redrawing_every_pixel_from_one_full_pass_gives_the_same(arguments):
    net, x, h = case(*arguments)
    noise = noise_for(net, x)
    drawn = Sampler(net, len(x), *x.shape[2:]).draw(h, noise=noise)
    with torch.no_grad():
        params = net(drawn, h)
    settings = net.settings
    again = sample_discretized_mix_logistic(params, noise, channels=settings.channels, levels=settings.levels)
    assert torch.equal(again, drawn)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("arguments", CASES)
def test_teacher_forced_parameters(arguments, dtype, tolerance):
    net, x, h = case(*arguments)
    net, x, h = net.to(dtype), x.to(dtype), None if h is None else h.to(dtype)
    with torch.no_grad():
        expected = net(x, h)
    actual = Sampler(net, len(x), *x.shape[2:]).teacher_forced(x, h)
    assert expected.abs().max() > 1
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
