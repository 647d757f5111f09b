"""Likelihoods against torch.distributions, scipy and loops in float64, and where float32 would lose them."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from paperlib.nn import likelihoods
from paperlib.nn.likelihoods import discretized_mix_logistic_log_prob as mix_log_prob


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def draw(generator, *shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("shape", "small"),
    [((5,), (5,)), ((5, 3, 4, 2), (5, 3, 4, 2)), ((1, 7), (7,)), ((0, 7), ())]
    + [((5, 4), small) for small in [(), (1,), (4,), (1, 4), (5, 1)]],
)
def test_gaussians_and_bits_against_torch(generator, shape, small):
    """Of every shape, with a std and logits that may be smaller."""
    x, mean, log_std = draw(generator, *shape), draw(generator, *shape), draw(generator, *small)
    whole = log_std.expand(shape)
    code, prior = Normal(mean, whole.exp()), Normal(torch.zeros_like(mean), torch.ones_like(mean))
    bits = torch.bernoulli(torch.full(shape, 0.4), generator=generator)
    cases = [
        (likelihoods.gaussian_log_prob(x, mean, log_std), code.log_prob(x)),
        (likelihoods.gaussian_kl(mean, log_std), kl_divergence(code, prior)),
    ]
    for pixels in (bits.double(), bits.to(torch.uint8), bits.bool(), torch.rand(shape, generator=generator).double()):
        cost = F.binary_cross_entropy_with_logits(whole, pixels.double(), reduction="none")
        cases.append((likelihoods.bernoulli_log_prob(pixels, log_std), -cost))
    for actual, expected in cases:
        expected = expected.flatten(1).sum(1) if expected.ndim > 1 else expected
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_bernoulli_with_large_logits_in_float32():
    logits = torch.tensor([[1e4], [1e4], [-1e4], [-1e4]], requires_grad=True)
    result = likelihoods.bernoulli_log_prob(torch.tensor([[1.0], [0.0], [1.0], [0.0]]), logits)
    assert result.tolist() == [0, -1e4, -1e4, 0]
    result.sum().backward()
    assert logits.grad.flatten().tolist() == [0, -1, 1, 0]


@pytest.mark.parametrize("small", [(3, 5, 4), (5, 1, 1), (3,)])
def test_parameters_that_do_not_fit_are_refused(generator, small):
    x, other = draw(generator, 5, 4), draw(generator, *small)
    of_two = (likelihoods.gaussian_kl, likelihoods.bernoulli_log_prob, likelihoods.sample_gaussian)
    calls = [(likelihoods.gaussian_log_prob, x, x, other), (likelihoods.gaussian_log_prob, x, other, x)]
    for function, *arguments in calls + [(function, x, other) for function in of_two]:
        with pytest.raises((ValueError, RuntimeError), match=r"broadcast|must match"):
            function(*arguments)


def test_numbers_as_parameters(generator):
    z = draw(generator, 6, 3)
    expected = Normal(0.5, torch.tensor(math.exp(-1), dtype=torch.float64)).log_prob(z).sum(1)
    torch.testing.assert_close(likelihoods.gaussian_log_prob(z, 0.5, -1), expected, rtol=1e-12, atol=0)


def test_kl_of_an_unused_and_an_almost_unused_code_in_float32():
    assert likelihoods.gaussian_kl(torch.zeros(6, 3), 0).tolist() == [0] * 6
    mean, log_std = torch.full((1, 1), 1e-3), torch.full((1, 1), 1e-4)
    exact = likelihoods.gaussian_kl(mean.double(), log_std.double())
    assert exact.item() == pytest.approx(0.5e-6 + 1e-8, rel=1e-3)
    torch.testing.assert_close(likelihoods.gaussian_kl(mean, log_std).double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("small", [(), (4,), (5, 4)])
def test_sample_gaussian_is_mean_and_scaled_noise_with_its_gradients(generator, small):
    mean, log_std = draw(generator, 5, 4).requires_grad_(), draw(generator, *small).requires_grad_()
    sample = likelihoods.sample_gaussian(mean, log_std, generator=torch.Generator().manual_seed(1))
    expected = mean + log_std.exp() * draw(torch.Generator().manual_seed(1), 5, 4)
    torch.testing.assert_close(sample, expected)
    gradients = (torch.autograd.grad(one.square().sum(), [mean, log_std]) for one in (sample, expected))
    torch.testing.assert_close(*gradients)


def test_bits_per_dim():
    # A uniform density over 256 levels costs 8 bits in every dimension.
    nats = torch.full((2,), 3072 * math.log(256), dtype=torch.float64)
    torch.testing.assert_close(likelihoods.bits_per_dim(nats, 3072), torch.full_like(nats, 8))
    assert likelihoods.bits_per_dim(-math.log(2), 1) == -1
    with pytest.raises(ValueError, match="0 dimensions"):
        likelihoods.bits_per_dim(1.0, 0)


# Mixtures of logistics


def mix_params(generator, channels, mixtures, spread, *shape):
    """Parameters whose means leave [-1, 1] and whose scales go from below a grey level to above the range."""
    params = spread * draw(generator, 1, likelihoods.mix_logistic_size(mixtures, channels), *(shape or (1, 1)))
    params[:, mixtures:] -= 1
    return params


def every_pixel(generator, channels, levels, mixtures, spread):
    """Each pixel there is, (levels ** channels, channels, 1, 1) in [-1, 1], parameters, and its log p under them."""
    values = torch.arange(levels, dtype=torch.float64) * 2 / (levels - 1) - 1
    x = torch.cartesian_prod(*[values] * channels).view(-1, channels, 1, 1)
    params = mix_params(generator, channels, mixtures, spread)
    return x, params, mix_log_prob(x, params.expand(len(x), -1, 1, 1), levels=levels)


@pytest.mark.parametrize(("channels", "levels"), [(1, 2), (1, 17), (1, 256), (3, 2), (3, 5), (3, 17)])
@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
def test_mix_logistic_sums_to_one(generator, channels, levels, spread):
    log_p = every_pixel(generator, channels, levels, 4, spread)[-1]
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-11)
    assert log_p.max() < 0


@pytest.mark.parametrize(("channels", "levels"), [(1, 17), (3, 5)])
def test_mix_logistic_against_loops_in_the_paper_layout(generator, channels, levels):
    x, params, actual = every_pixel(generator, channels, levels, mixtures := 3, 0.7)
    p, weights = params.flatten().tolist(), torch.softmax(params.flatten()[:mixtures], 0).tolist()
    block = {1: 2, 3: 3}[channels] * mixtures  # of one channel

    def cdf(t):
        return 1 / (1 + math.exp(-t))

    def entry(channel, kind, k):
        return p[mixtures + channel * block + kind * mixtures + k]

    for row, log_p in zip(x.flatten(1).tolist(), actual.tolist(), strict=True):
        total = 0.0
        for k in range(mixtures):
            product = weights[k]
            for c, value in enumerate(row):
                mean, half = entry(c, 0, k), 1 / (levels - 1)
                if c == 1:
                    mean += math.tanh(entry(0, 2, k)) * row[0]
                if c == 2:
                    mean += math.tanh(entry(1, 2, k)) * row[0] + math.tanh(entry(2, 2, k)) * row[1]
                scale = math.exp(entry(c, 1, k))
                above = 1.0 if value > 1 - half else cdf((value + half - mean) / scale)
                below = 0.0 if value < -1 + half else cdf((value - half - mean) / scale)
                product *= above - below
            total += product
        assert log_p == pytest.approx(math.log(total), abs=1e-9)


@pytest.mark.parametrize(("channels", "levels"), [(1, 17), (3, 3)])
def test_mix_logistic_samples_as_often_as_probable(generator, channels, levels):
    draws = 200_000
    x, params, log_p = every_pixel(generator, channels, levels, 3, 0.6)
    expected = draws * log_p.exp()
    noise = likelihoods.mix_logistic_noise((draws, 1, 1), 3, channels, generator=generator, dtype=torch.float64)
    params = params.expand(draws, -1, 1, 1)
    sample = likelihoods.sample_discretized_mix_logistic(params, noise, channels=channels, levels=levels).flatten(1)
    grey = ((sample + 1) * (levels - 1) / 2).round().long()
    torch.testing.assert_close(grey * 2 / (levels - 1) - 1.0, sample, check_dtype=False)
    index = (grey * torch.tensor([levels**c for c in reversed(range(channels))])).sum(1)
    error = (torch.bincount(index, minlength=len(x)) - expected).abs()
    often = expected > 5
    chi_squared = (error.square() / expected)[often].sum().item()
    assert often.sum() > 10 and abs(chi_squared - often.sum()) < 4 * math.sqrt(2 * often.sum())
    assert (error < 5 * expected.sqrt() + 5).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_mix_logistic_samples_no_narrower_than_the_limit(generator, channels):
    """Log-scales of -9, means exp(-7) above the lower edge of level 100: level 99 has F(-1), not F(-exp(2))."""
    draws, edge = 100_000, (100 - 0.5) * 2 / 255 - 1
    channel = [edge + math.exp(-7), -9.0] + [0.0] * (channels == 3)
    params = torch.tensor([0.0, *channel * channels], dtype=torch.float64).expand(draws, -1)
    noise = likelihoods.mix_logistic_noise((draws,), 1, channels, generator=generator, dtype=torch.float64)
    sample = likelihoods.sample_discretized_mix_logistic(params, noise, channels=channels)
    p = 1 / (1 + math.e)
    below = (sample < edge).double().mean(0)
    assert ((below - p).abs() < 5 * math.sqrt(p * (1 - p) / draws)).all(), below
    x = torch.full((1, channels), 99 * 2 / 255 - 1, dtype=torch.float64)
    assert mix_log_prob(x, params[:1]).exp().item() == pytest.approx(p**channels, rel=2e-3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mix_logistic_at_extreme_parameters(generator, channels, size, dtype):
    params = (size * mix_params(generator, channels, 5, 1.0, 8, 8).sign()).to(dtype).requires_grad_()
    x = torch.randint(256, (1, channels, 8, 8), generator=generator) * (2 / 255) - 1
    x[..., 0], x[..., 1] = -1, 1
    log_p = mix_log_prob(x.to(dtype), params)
    log_p.sum().backward()
    assert log_p.isfinite().all() and params.grad.isfinite().all()
    assert params.grad.abs().max() > 0


def test_mix_logistic_in_float32_and_half(generator):
    x = torch.randint(256, (4, 3, 5, 6), generator=generator) * (2 / 255) - 1
    params = torch.cat([mix_params(generator, 3, 5, 1.0, 5, 6) for _ in range(4)])
    exact, actual = mix_log_prob(x.double(), params), mix_log_prob(x, params.float())
    torch.testing.assert_close(actual, exact.float(), rtol=1e-5, atol=0)
    assert torch.equal(mix_log_prob(x, params.bfloat16()), mix_log_prob(x, params.bfloat16().float()))


def test_mix_logistic_noise_has_its_moments_and_is_the_same_in_float32(generator):
    noise = likelihoods.mix_logistic_noise((100_000, 1), 2, 1, generator=generator, dtype=torch.float64)[..., 0]
    mean = torch.tensor([0.5772157, 0.5772157, 0], dtype=torch.float64)
    var = torch.tensor([1 / 6, 1 / 6, 1 / 3], dtype=torch.float64) * math.pi**2
    assert ((noise.mean(0) - mean).abs() < 4 * (var / len(noise)).sqrt()).all()
    torch.testing.assert_close(noise.var(0), var, rtol=0.05, atol=0)
    again = likelihoods.mix_logistic_noise((100_000, 1), 2, 1, generator=torch.Generator().manual_seed(0))[..., 0]
    torch.testing.assert_close(again, noise.float(), rtol=0, atol=0)


def test_mix_logistic_refuses_what_does_not_fit():
    x, params, noise = torch.zeros(2, 3, 4, 4), torch.zeros(2, 20, 4, 4), torch.zeros(2, 5, 4, 4)
    sample = partial(likelihoods.sample_discretized_mix_logistic, channels=3)
    assert mix_log_prob(x, params).shape == (2,) and sample(params, noise).shape == x.shape
    wrong_params = (params[:, :19], params[:1], params[..., :3], params[:, :0])
    wrong_noise = (noise[:, :4], noise[:1], noise[..., :1], noise[..., 0])
    unfit = [partial(mix_log_prob, x, wrong) for wrong in wrong_params]
    unfit += [partial(sample, wrong, noise) for wrong in wrong_params]
    unfit += [partial(sample, params, wrong) for wrong in wrong_noise]
    one_level = [partial(mix_log_prob, x, params, levels=1), partial(sample, params, noise, levels=1)]
    two_channels = [partial(mix_log_prob, x[:, :2], params), partial(sample, params, noise, channels=2)]
    refused = {"do not fit": unfit, "1 grey levels": one_level, "2 channels": two_channels}
    for told, calls in (refused | {"0 mixtures": [partial(likelihoods.mix_logistic_size, 0, 3)]}).items():
        for call in calls:
            with pytest.raises(ValueError, match=told):
                call()


def test_the_mass_of_every_grey_level_under_a_gaussian():
    """By scipy, also where a difference of probabilities near 1 would be 0; finite where scipy's underflows."""
    mean = torch.tensor([-40.0, 0.0, 3.3, 8.0, 16.0, 55.0], dtype=torch.float64)
    log_std = torch.tensor([-1.0, 0.5, 2.0, -3.0, 0.0, 1.0], dtype=torch.float64)
    x = torch.arange(17.0, dtype=torch.float64)[:, None].expand(-1, 6)
    log_p = likelihoods.discretized_gaussian_log_prob(
        x.reshape(-1, 1), mean.repeat(17)[:, None], log_std.repeat(17)[:, None], levels=17
    ).view(17, 6)
    together = likelihoods.discretized_gaussian_log_prob(x, mean, log_std, levels=17)
    torch.testing.assert_close(together, log_p.sum(1))
    assert log_p.isfinite().all()
    torch.testing.assert_close(log_p.exp().sum(0), torch.ones_like(mean), rtol=0, atol=1e-12)
    low, high = np.where(x == 0, -np.inf, x - 0.5), np.where(x == 16, np.inf, x + 0.5)
    gaussian = norm(mean, log_std.exp())
    left, right = gaussian.cdf(high) - gaussian.cdf(low), gaussian.sf(low) - gaussian.sf(high)
    mass = np.where(x < mean, left, right)  # each loses its digits on the other side
    kept = mass > 1e-300
    assert (mass[kept] < 1e-20).sum() > 5
    np.testing.assert_allclose(log_p.numpy()[kept], np.log(mass[kept]), rtol=1e-9, atol=1e-9)
