"""The incremental sampler against full passes of the network, one per pixel."""

import copy
import statistics
import time

import pytest
import torch
from test_pixelcnn import images, network

from paperlib.nn import pixelcnn_sampler
from paperlib.nn.likelihoods import mix_logistic_noise, sample_discretized_mix_logistic
from paperlib.nn.pixelcnn_sampler import Sampler, draw_by_full_passes

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


@pytest.mark.parametrize("arguments", CASES)
def test_draws_the_same_images_as_one_full_pass_per_pixel(arguments):
    net, x, h = case(*arguments)
    sampler = Sampler(net, len(x), *x.shape[2:])
    for seed in (3, 4):  # the second on buffers that are no longer empty
        noise = noise_for(net, x, seed)
        drawn = sampler.draw(h, noise=noise)
        assert torch.equal(drawn, draw_by_full_passes(net, noise, h))
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


def small(batch=2):
    net, x, _ = case(1, 8, 8, batch, {"levels": 17}, None)
    return net, x, Sampler(net, batch, 8, 8)


def test_a_seed_gives_an_image_and_images_train():
    net, _, sampler = small()
    first, again, other = (sampler.draw(generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    grey = (first + 1) * 8
    torch.testing.assert_close(grey, grey.round())
    assert grey.min() >= 0 and grey.max() <= 16
    net(first).sum().backward()  # refused for what inference mode made


def test_samples_follow_the_model():
    """One network, many draws: each pixel's mean agrees with that over images drawn by full passes."""
    net, x, _ = case(1, 4, 4, 2_000, {"levels": 4}, None)
    drawn = Sampler(net, len(x), 4, 4).draw(generator=torch.Generator().manual_seed(0), progress=False)
    slow = draw_by_full_passes(net, noise_for(net, x, 5))
    error = (drawn.var(0) + slow.var(0)).div(len(x)).sqrt()
    assert ((drawn.mean(0) - slow.mean(0)).abs() < 4.5 * error + 1e-9).all()


def test_the_weights_are_those_of_its_making():
    net, _, sampler = small()
    noise = noise_for(net, torch.empty(2, 1, 8, 8))
    before = sampler.draw(noise=noise)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
    assert torch.equal(sampler.draw(noise=noise), before)
    assert not torch.equal(Sampler(net, 2, 8, 8).draw(noise=noise), before)


def test_a_vector_a_map_and_a_vector_again():
    net, x, _ = case(1, 8, 8, 2, {}, (3, 2, 2))
    sampler, noise = Sampler(net, 2, 8, 8), noise_for(net, x)
    generator = torch.Generator().manual_seed(1)
    for shape in [(2, 3), (2, 3, 4, 4), (2, 3), (2, 3, 8, 8)]:
        h = torch.randn(shape, generator=generator).double()
        torch.testing.assert_close(sampler.teacher_forced(x, h), net(x, h).detach(), rtol=0, atol=1e-12)
        again = sample_discretized_mix_logistic(
            net(sampler.draw(h, noise=noise), h).detach(), noise, channels=1, levels=256
        )
        assert torch.equal(again, sampler.draw(h, noise=noise))


def test_interrupted_it_leaves_at_once_and_can_be_used_again(monkeypatch):
    net, x, sampler = small()
    noise = noise_for(net, x)
    whole, threads, calls = sampler.draw(noise=noise), torch.get_num_threads(), []
    monkeypatch.setattr(pixelcnn_sampler, "sample_discretized_mix_logistic", lambda *a, **k: interrupt(calls, a, k))
    with pytest.raises(KeyboardInterrupt):
        sampler.draw(noise=noise)
    assert len(calls) == 20 and torch.get_num_threads() == threads
    monkeypatch.undo()
    assert torch.equal(sampler.draw(noise=noise), whole)


def interrupt(calls, arguments, settings):
    """In the middle of the third row."""
    calls.append(0)
    if len(calls) == 20:
        raise KeyboardInterrupt
    return sample_discretized_mix_logistic(*arguments, **settings)


def test_progress_is_shown_where_asked(monkeypatch, capsys):
    _, _, sampler = small()
    seen = []
    real = pixelcnn_sampler.tqdm
    monkeypatch.setattr(pixelcnn_sampler, "tqdm", lambda rows, **told: seen.append(told) or real(rows, **told))
    sampler.draw()
    sampler.draw(progress=False)
    assert [told.get("disable") for told in seen] == [None, True]
    assert not capsys.readouterr().err  # TQDM_DISABLE is set for tests


def test_what_does_not_fit_is_refused():
    net, x, sampler = small()
    noise = noise_for(net, x)
    with pytest.raises(ValueError, match="not both"):
        sampler.draw(noise=noise, generator=torch.Generator())
    with pytest.raises(ValueError, match="noise of shape"):
        sampler.draw(noise=noise[:, :-1])
    with pytest.raises(ValueError, match="h is given"):
        sampler.draw(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="was made for"):
        sampler.teacher_forced(x[:1])
    for sizes in [(2, 6, 8), (2, 8, 6), (0, 8, 8)]:
        with pytest.raises(ValueError, match="multiples of 4"):
            Sampler(net, *sizes)
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match=r"call \.float\(\)"):
            Sampler(copy.deepcopy(net).to(dtype), 2, 8, 8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("arguments", CASES)
def test_on_cuda_recorded_rows_give_the_same(arguments):
    net, x, h = case(*arguments)
    noise = noise_for(net, x)
    on_cpu = Sampler(net, len(x), *x.shape[2:]).draw(h, noise=noise)
    h = None if h is None else h.cuda()
    sampler = Sampler(net.cuda(), len(x), *x.shape[2:])
    for _ in range(2):  # recording, then replaying
        assert torch.equal(sampler.draw(h, noise=noise.cuda()).cpu(), on_cpu)
    params = net(x.cuda(), h).detach()
    torch.testing.assert_close(sampler.teacher_forced(x.cuda(), h), params, rtol=0, atol=1e-10)


@pytest.mark.slow
def test_speed_side_by_side_with_one_full_pass_per_pixel(capsys):
    """Batch 16 at 32 x 32 x 3, 2 blocks, 40 filters: medians of five, full passes timed on five of 1,024 pixels.

    About 490 times on two idle cores; the limit here is one that a busy machine keeps.
    """
    x = images(16, 3, 32, 32).float()
    net = network(images(4, 3, 16, 16), blocks=2, filters=40, mixtures=10).float()
    sampler = Sampler(net, 16, 32, 32)
    sampler.draw(progress=False)
    draws, passes = [], []
    with torch.inference_mode():
        net(x)
        for _ in range(5):
            began = time.perf_counter()
            sampler.draw(progress=False)
            between = time.perf_counter()
            net(x)
            passes.append(time.perf_counter() - between)
            draws.append(between - began)
    draw, full = statistics.median(draws), 32 * 32 * statistics.median(passes)
    with capsys.disabled():
        print(f"\n{draw:.3f} s a batch against {full:.0f} s by full passes: {full / draw:.0f} times")
    assert full / draw > 100
