"""The incremental sampler against full passes of the network, one per pixel."""

import pytest
import torch
from test_pixelcnn import images, network

from paperlib.nn import pixelcnn_sampler
from paperlib.nn.likelihoods import mix_logistic_noise, sample_discretized_mix_logistic
from paperlib.nn.pixelcnn_sampler import Sampler, draw_by_full_passes
from paperlib.system import files

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
    sizes = (len(x), *x.shape[2:]), net.settings.mixtures, x.shape[1]
    return mix_logistic_noise(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def redrawn(net, drawn, noise, h=None):
    """Every pixel once more, from one full pass over the finished image."""
    sizes = {"channels": net.settings.channels, "levels": net.settings.levels}
    return sample_discretized_mix_logistic(net(drawn, h).detach(), noise, **sizes)


@pytest.mark.parametrize("arguments", CASES)
def test_images_and_teacher_forced_parameters_are_those_of_full_passes(arguments):
    net, x, h = case(*arguments)
    sampler = Sampler(net, len(x), *x.shape[2:])
    for seed in (3, 4):  # the second on buffers that are no longer empty
        noise = noise_for(net, x, seed)
        drawn = sampler.draw(h, noise=noise)
        assert torch.equal(drawn, draw_by_full_passes(net, noise, h))
        assert torch.equal(drawn, redrawn(net, drawn, noise, h))
    assert drawn.unique().numel() > 5
    for dtype, tolerance in [(torch.float64, 1e-12), (torch.float32, 1e-5)]:
        net, x, h = net.to(dtype), x.to(dtype), None if h is None else h.to(dtype)
        expected = net(x, h).detach()
        actual = Sampler(net, len(x), *x.shape[2:]).teacher_forced(x, h)
        assert expected.abs().max() > 1
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_a_vector_a_map_and_a_vector_again():
    net, x, _ = case(1, 8, 8, 2, {}, (3, 2, 2))
    sampler, noise = Sampler(net, 2, 8, 8), noise_for(net, x)
    generator = torch.Generator().manual_seed(1)
    for shape in [(2, 3), (2, 3, 4, 4), (2, 3), (2, 3, 8, 8)]:
        h = torch.randn(shape, generator=generator).double()
        torch.testing.assert_close(sampler.teacher_forced(x, h), net(x, h).detach(), rtol=0, atol=1e-12)
        drawn = sampler.draw(h, noise=noise)
        assert torch.equal(drawn, redrawn(net, drawn, noise, h))


@pytest.mark.parametrize("arguments", CASES[1:6])
def test_below_rows_that_are_given_the_others_are_drawn(arguments):
    net, x, h = case(*arguments)
    noise, sampler = noise_for(net, x), Sampler(net, len(x), *x.shape[2:])
    for rows in (1, 3):
        drawn = sampler.draw(h, noise=noise, top=x[:, :, :rows])
        assert torch.equal(drawn[:, :, :rows], x[:, :, :rows])
        assert torch.equal(drawn[:, :, rows:], redrawn(net, drawn, noise, h)[:, :, rows:])


@pytest.fixture
def small():
    """A network, images, noise, a sampler and the images that it draws from the noise."""
    net, x, _ = case(1, 8, 8, 2, {"levels": 17}, None)
    sampler, noise = Sampler(net, 2, 8, 8), noise_for(net, x)
    return net, x, noise, sampler, sampler.draw(noise=noise)


def test_a_seed_gives_grey_levels_that_train_and_the_weights_stay_those_of_the_making(small):
    net, _, noise, sampler, drawn = small
    assert torch.equal(sampler.draw(generator=torch.Generator().manual_seed(3)), drawn)
    grey = (drawn + 1) * 8
    torch.testing.assert_close(grey, grey.round().clamp(0, 16))
    net(drawn).sum().backward()  # refused for what inference mode made
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
    assert torch.equal(sampler.draw(noise=noise), drawn)
    assert not torch.equal(Sampler(net, 2, 8, 8).draw(noise=noise), drawn)


def test_interrupted_it_leaves_at_once_and_can_be_used_again(small, monkeypatch):
    _, _, noise, sampler, whole = small
    threads, calls = torch.get_num_threads(), []

    def interrupt(*arguments, **settings):  # in the middle of the third row
        calls.append(0)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return sample_discretized_mix_logistic(*arguments, **settings)

    monkeypatch.setattr(pixelcnn_sampler, "sample_discretized_mix_logistic", interrupt)
    torch.set_num_threads(2)
    with pytest.raises(KeyboardInterrupt):
        sampler.draw(noise=noise)
    assert len(calls) == 20 and torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    monkeypatch.undo()
    assert torch.equal(sampler.draw(noise=noise), whole)


def test_progress_is_shown_where_asked(small, monkeypatch, capsys):
    sampler, told, real = small[3], [], pixelcnn_sampler.tqdm
    monkeypatch.setattr(pixelcnn_sampler, "tqdm", lambda rows, **options: told.append(options) or real(rows, **options))
    sampler.draw()
    sampler.draw(progress=False)
    assert [options.get("disable") for options in told] == [None, True]
    assert not capsys.readouterr().err  # TQDM_DISABLE is set for tests


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net, x, noise, one: one.draw(noise=noise, generator=torch.Generator()), "not both"),
        (lambda net, x, noise, one: one.draw(noise=noise[:, :-1]), "noise of shape"),
        (lambda net, x, noise, one: one.draw(torch.zeros(2, 3)), "h is given"),
        (lambda net, x, noise, one: one.teacher_forced(x[:1]), "was made for"),
        (lambda net, x, noise, one: Sampler(net, 2, 6, 8), "multiples of 4"),
        (lambda net, x, noise, one: Sampler(net, 2, 8, 6), "multiples of 4"),
        (lambda net, x, noise, one: Sampler(net, 0, 8, 8), "multiples of 4"),
        (lambda net, x, noise, one: Sampler(net.bfloat16(), 2, 8, 8), r"call \.float\(\)"),
    ],
)
def test_what_does_not_fit_is_refused(small, call, message):
    with pytest.raises(ValueError, match=message):
        call(*small[:4])


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
def test_it_is_far_faster_than_one_full_pass_per_pixel(monkeypatch):
    """Batch 16 at 32 x 32 x 3: about 490 times on two idle cores; the limit here is one that a busy machine keeps."""
    monkeypatch.syspath_prepend(str(files.ROOT / "benchmarks"))
    from timing import ratio, side_by_side

    x = images(16, 3, 32, 32).float()
    net = network(images(4, 3, 16, 16), blocks=2, filters=40, mixtures=10).float()
    sampler = Sampler(net, 16, 32, 32)
    with torch.inference_mode():
        works = {"image": lambda: sampler.draw(progress=False), "pass": lambda: net(x)}
        times = side_by_side(works, torch.device("cpu"), 5)
    assert 32 * 32 * ratio(times["pass"], times["image"]) > 100
