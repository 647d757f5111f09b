"""Likelihoods against torch.distributions in float64, and where float32 would lose them."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence

from paperlib.nn import likelihoods

SHAPES = [(5,), (5, 7), (5, 3, 4, 2), (1, 7)]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def draw(generator, *shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_gaussian_log_prob(generator, shape):
    x, mean, log_std = draw(generator, 3, *shape)
    expected = Independent(Normal(mean, log_std.exp()), len(shape) - 1).log_prob(x)
    actual = likelihoods.gaussian_log_prob(x, mean, log_std)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_gaussian_kl(generator, shape):
    mean, log_std = draw(generator, 2, *shape)
    dims = len(shape) - 1
    code = Independent(Normal(mean, log_std.exp()), dims)
    prior = Independent(Normal(torch.zeros_like(mean), torch.ones_like(mean)), dims)
    actual = likelihoods.gaussian_kl(mean, log_std)
    torch.testing.assert_close(actual, kl_divergence(code, prior), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_bernoulli_log_prob(generator, shape):
    logits = 3 * draw(generator, *shape)
    bits = torch.bernoulli(torch.full(shape, 0.4), generator=generator)
    expected = Independent(Bernoulli(logits=logits), len(shape) - 1).log_prob(bits.double())
    for x in (bits.double(), bits.to(torch.uint8), bits.bool()):
        actual = likelihoods.bernoulli_log_prob(x, logits)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_bernoulli_of_greys_is_minus_the_cross_entropy():
    p, x = torch.tensor([0.2, 0.7]).double(), torch.tensor([0.25, 0.6]).double()
    expected = (x * p.log() + (1 - x) * (1 - p).log()).sum()
    actual = likelihoods.bernoulli_log_prob(x[None], torch.logit(p)[None])
    torch.testing.assert_close(actual, expected[None], rtol=1e-12, atol=0)


def test_bernoulli_with_large_logits_in_float32():
    logits = torch.tensor([[1e4], [1e4], [-1e4], [-1e4]], requires_grad=True)
    x = torch.tensor([[1.0], [0.0], [1.0], [0.0]])
    result = likelihoods.bernoulli_log_prob(x, logits)
    assert result.tolist() == [0, -1e4, -1e4, 0]
    result.sum().backward()
    assert logits.grad.flatten().tolist() == [0, -1, 1, 0]


@pytest.mark.parametrize("small", [(), (1,), (4,), (1, 4), (5, 1)])
def test_smaller_parameters_count_in_every_dimension(generator, small):
    x, mean = draw(generator, 2, 5, 4)
    log_std = draw(generator, *small)
    whole = log_std.expand(5, 4).contiguous()
    for function, arguments in [
        (likelihoods.gaussian_log_prob, (x, mean)),
        (likelihoods.gaussian_kl, (mean,)),
    ]:
        torch.testing.assert_close(function(*arguments, log_std), function(*arguments, whole))


def test_numbers_as_parameters(generator):
    z = draw(generator, 6, 3)
    expected = Normal(0.5, torch.tensor(math.exp(-1), dtype=torch.float64)).log_prob(z).sum(1)
    actual = likelihoods.gaussian_log_prob(z, 0.5, -1)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    assert likelihoods.gaussian_kl(torch.zeros(6, 3), 0).tolist() == [0] * 6


@pytest.mark.parametrize("small", [(3, 5, 4), (5, 1, 1), (3,)])
def test_parameters_that_do_not_fit_are_refused(generator, small):
    x = draw(generator, 5, 4)
    other = draw(generator, *small)
    for call in [
        lambda: likelihoods.gaussian_log_prob(x, x, other),
        lambda: likelihoods.gaussian_log_prob(x, other, x),
        lambda: likelihoods.gaussian_kl(x, other),
        lambda: likelihoods.bernoulli_log_prob(x, other),
        lambda: likelihoods.sample_gaussian(x, other),
    ]:
        with pytest.raises((ValueError, RuntimeError), match=r"broadcast|must match"):
            call()


def test_kl_of_an_almost_unused_code_in_float32():
    mean, log_std = torch.full((1, 1), 1e-3), torch.full((1, 1), 1e-4)
    exact = likelihoods.gaussian_kl(mean.double(), log_std.double())
    actual = likelihoods.gaussian_kl(mean, log_std).double()
    assert exact.item() == pytest.approx(0.5e-6 + 1e-8, rel=1e-3)
    torch.testing.assert_close(actual, exact, rtol=1e-4, atol=0)


def test_sample_gaussian(generator):
    mean, log_std = draw(generator, 2, 5, 4)
    first, again = (
        likelihoods.sample_gaussian(mean, log_std, generator=torch.Generator().manual_seed(1)) for _ in range(2)
    )
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1), dtype=mean.dtype)
    torch.testing.assert_close(first, mean + log_std.exp() * noise)
    assert torch.equal(first, again)
    assert not torch.equal(first, likelihoods.sample_gaussian(mean, log_std, generator=generator))


def test_sample_gaussian_has_the_moments_and_gradients(generator):
    count = 100_000
    mean = torch.full((count, 1), 2.0, dtype=torch.float64, requires_grad=True)
    log_std = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    sample = likelihoods.sample_gaussian(mean, log_std, generator=generator)
    std = math.exp(-1)
    assert abs(sample.mean().item() - 2) < 4 * std / math.sqrt(count)
    assert abs(sample.std().item() - std) < 4 * std / math.sqrt(2 * count)
    sample.sum().backward()
    assert torch.equal(mean.grad, torch.ones_like(mean))
    torch.testing.assert_close(log_std.grad, (sample - mean).sum())


def test_bits_per_dim():
    # A uniform density over 256 levels costs 8 bits in every dimension.
    nats = torch.full((2,), 3072 * math.log(256), dtype=torch.float64)
    torch.testing.assert_close(likelihoods.bits_per_dim(nats, 3072), torch.full_like(nats, 8))
    assert likelihoods.bits_per_dim(-math.log(2), 1) == -1
    with pytest.raises(ValueError, match="0 dimensions"):
        likelihoods.bits_per_dim(1.0, 0)


def test_no_examples_give_no_numbers():
    none = torch.zeros(0, 7)
    assert likelihoods.gaussian_log_prob(none, none, 0.0).shape == (0,)
    assert likelihoods.gaussian_kl(none, 0.0).shape == (0,)
    assert likelihoods.bernoulli_log_prob(none, none).shape == (0,)


def grid(levels, channels):
    """Every pixel there is, (levels ** channels, channels, 1, 1) in [-1, 1]."""
    values = torch.arange(levels, dtype=torch.float64) * 2 / (levels - 1) - 1
    return torch.cartesian_prod(*[values] * channels).view(-1, channels, 1, 1)


def mix_params(generator, channels, mixtures, spread, *shape):
    """Parameters whose means leave [-1, 1] and whose scales go from below a grey level to above the range."""
    params = spread * draw(generator, 1, likelihoods.mix_logistic_size(mixtures, channels), *(shape or (1, 1)))
    params[:, mixtures:] -= 1
    return params


CASES = [(1, 2), (1, 17), (1, 256), (3, 2), (3, 5), (3, 17)]


@pytest.mark.parametrize(("channels", "levels"), CASES)
@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
def test_mix_logistic_sums_to_one(generator, channels, levels, spread):
    x, params = grid(levels, channels), mix_params(generator, channels, 4, spread)
    log_p = likelihoods.discretized_mix_logistic_log_prob(x, params.expand(len(x), -1, 1, 1), levels=levels)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-11)
    assert log_p.max() < 0


@pytest.mark.parametrize(("channels", "levels"), [(1, 17), (3, 5)])
def test_mix_logistic_against_loops_in_the_paper_layout(generator, channels, levels):
    mixtures, x = 3, grid(levels, channels)
    params = mix_params(generator, channels, mixtures, 0.7)
    actual = likelihoods.discretized_mix_logistic_log_prob(x, params.expand(len(x), -1, 1, 1), levels=levels)

    p = params.flatten().tolist()
    weights = torch.softmax(params.flatten()[:mixtures], 0).tolist()
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


def uniform_params(levels, channels):
    """Mixtures, one for each pixel there is, weighted so that all pixels are equally likely."""
    values = grid(levels, 1).flatten()
    log_scale = math.log(1 / (levels - 1) / 4)
    bins = torch.cat([values, torch.full_like(values, log_scale)]).view(1, 2, levels)
    logits = torch.zeros(levels, levels, dtype=torch.float64).fill_(-1e9).fill_diagonal_(0.0)
    params = torch.cat([logits, bins.flatten(1).expand(levels, -1)], 1).view(levels, -1, 1, 1)
    table = [
        likelihoods.discretized_mix_logistic_log_prob(v.expand(levels).view(-1, 1, 1, 1), params, levels=levels)
        for v in values
    ]  # of a value, under each component
    weights = torch.linalg.solve(torch.stack(table).exp(), torch.full_like(values, 1 / levels))
    assert weights.min() > 0
    joint = torch.cartesian_prod(*[weights.log()] * channels).view(levels**channels, channels).sum(1)
    means = torch.cartesian_prod(*[values] * channels).view(-1, channels)
    parts = [joint]
    for c in range(channels):
        parts += [means[:, c], torch.full_like(joint, log_scale)]
        parts += [torch.zeros_like(joint)] if channels == 3 else []
    return torch.cat(parts).view(1, -1, 1, 1)


@pytest.mark.parametrize(("channels", "levels"), [(1, 256), (1, 17), (3, 4)])
def test_a_uniform_model_costs_the_logarithm_of_the_levels(channels, levels):
    x, params = grid(levels, channels), uniform_params(levels, channels)
    log_p = likelihoods.discretized_mix_logistic_log_prob(x, params.expand(len(x), -1, 1, 1), levels=levels)
    bits = likelihoods.bits_per_dim(-log_p, channels)
    torch.testing.assert_close(bits, torch.full_like(bits, math.log2(levels)), rtol=1e-11, atol=0)


@pytest.mark.parametrize(("channels", "levels"), [(1, 17), (3, 3)])
def test_mix_logistic_samples_as_often_as_probable(generator, channels, levels):
    mixtures, draws = 3, 200_000
    x, params = grid(levels, channels), mix_params(generator, channels, mixtures, 0.6)
    p = likelihoods.discretized_mix_logistic_log_prob(x, params.expand(len(x), -1, 1, 1), levels=levels).exp()
    noise = likelihoods.mix_logistic_noise((draws, 1, 1), mixtures, channels, generator=generator, dtype=torch.float64)
    sample = likelihoods.sample_discretized_mix_logistic(
        params.expand(draws, -1, 1, 1), noise, channels=channels, levels=levels
    )
    grey = ((sample.flatten(1) + 1) * (levels - 1) / 2).round().long()
    torch.testing.assert_close(grey * 2 / (levels - 1) - 1.0, sample.flatten(1), check_dtype=False)
    index = (grey * torch.tensor([levels**c for c in reversed(range(channels))])).sum(1)
    counts = torch.bincount(index, minlength=len(p))
    seen = p * draws > 5
    chi_squared = ((counts - p * draws).square() / (p * draws))[seen].sum().item()
    assert seen.sum() > 10
    assert abs(chi_squared - seen.sum()) < 4 * math.sqrt(2 * seen.sum())
    assert ((counts - p * draws).abs() < 5 * (p * draws).sqrt() + 5).all()


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
    log_p = likelihoods.discretized_mix_logistic_log_prob(x, params[:1])
    assert log_p.exp().item() == pytest.approx(p**channels, rel=2e-3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
def test_mix_logistic_at_extreme_parameters(generator, channels, size):
    for dtype in (torch.float32, torch.float64):
        params = (size * mix_params(generator, channels, 5, 1.0, 8, 8).sign()).to(dtype).requires_grad_()
        x = torch.randint(256, (1, channels, 8, 8), generator=generator) * (2 / 255) - 1
        x[..., 0], x[..., 1] = -1, 1
        log_p = likelihoods.discretized_mix_logistic_log_prob(x.to(dtype), params)
        log_p.sum().backward()
        assert log_p.isfinite().all() and params.grad.isfinite().all()
        assert params.grad.abs().max() > 0


def test_mix_logistic_in_float32_and_half(generator):
    x = torch.randint(256, (4, 3, 5, 6), generator=generator) * (2 / 255) - 1
    params = torch.cat([mix_params(generator, 3, 5, 1.0, 5, 6) for _ in range(4)])
    exact = likelihoods.discretized_mix_logistic_log_prob(x.double(), params)
    actual = likelihoods.discretized_mix_logistic_log_prob(x, params.float())
    assert actual.shape == (4,) and actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=0)
    half = likelihoods.discretized_mix_logistic_log_prob(x, params.bfloat16())
    assert torch.equal(half, likelihoods.discretized_mix_logistic_log_prob(x, params.bfloat16().float()))


def test_mix_logistic_is_causal_in_the_channels(generator):
    x = grid(5, 3)[60:61].requires_grad_()
    params = mix_params(generator, 3, 4, 0.5)
    for c in range(3):
        of_channel = likelihoods._component_log_probs(x, params, 5)[:, c].sum()
        (gradient,) = torch.autograd.grad(of_channel, x)
        assert (gradient.flatten() != 0).tolist() == [k <= c for k in range(3)]


def test_mix_logistic_noise(generator):
    noise = likelihoods.mix_logistic_noise((100_000, 1), 2, 1, generator=generator, dtype=torch.float64)[..., 0]
    mean = torch.tensor([0.5772157, 0.5772157, 0], dtype=torch.float64)
    var = torch.tensor([math.pi**2 / 6, math.pi**2 / 6, math.pi**2 / 3], dtype=torch.float64)
    assert ((noise.mean(0) - mean).abs() < 4 * (var / len(noise)).sqrt()).all()
    torch.testing.assert_close(noise.var(0), var, rtol=0.05, atol=0)
    again = likelihoods.mix_logistic_noise((100_000, 1), 2, 1, generator=torch.Generator().manual_seed(0))[..., 0]
    torch.testing.assert_close(again, noise.float(), rtol=0, atol=0)


def test_mix_logistic_refuses_what_does_not_fit():
    x, params = torch.zeros(2, 3, 4, 4), torch.zeros(2, 20, 4, 4)
    for wrong in (params[:, :19], params[:1], params[..., :3], params[:, :0]):
        with pytest.raises(ValueError, match="do not fit"):
            likelihoods.discretized_mix_logistic_log_prob(x, wrong)
    with pytest.raises(ValueError, match="1 grey levels"):
        likelihoods.discretized_mix_logistic_log_prob(x, params, levels=1)
    with pytest.raises(ValueError, match="2 channels"):
        likelihoods.discretized_mix_logistic_log_prob(x[:, :2], params)


def test_sampling_refuses_what_does_not_fit():
    params, noise = torch.zeros(2, 20, 4, 4), torch.zeros(2, 5, 4, 4)
    draw_from = likelihoods.sample_discretized_mix_logistic
    assert draw_from(params, noise, channels=3).shape == (2, 3, 4, 4)
    for wrong in (params[:, :19], params[:1], params[..., :3], params[:, :0], params[:, :10]):
        with pytest.raises(ValueError, match="do not fit"):
            draw_from(wrong, noise, channels=3)
    for wrong in (noise[:, :4], noise[:1], noise[..., :1], noise[..., 0]):
        with pytest.raises(ValueError, match="do not fit"):
            draw_from(params, wrong, channels=3)
    with pytest.raises(ValueError, match="1 grey levels"):
        draw_from(params, noise, channels=3, levels=1)
    with pytest.raises(ValueError, match="2 channels"):
        draw_from(params, noise, channels=2)
    with pytest.raises(ValueError, match="4 channels"):
        likelihoods.mix_logistic_size(5, 4)
    with pytest.raises(ValueError, match="0 mixtures"):
        likelihoods.mix_logistic_size(0, 3)


# The Gaussian in bins


def test_discretized_gaussian_is_a_distribution_over_the_levels():
    mean = torch.tensor([-40.0, 0.0, 3.3, 8.0, 16.0, 55.0], dtype=torch.float64)
    log_std = torch.tensor([-1.0, 0.5, 2.0, -3.0, 0.0, 1.0], dtype=torch.float64)
    levels = torch.arange(17.0, dtype=torch.float64)[:, None].expand(-1, 6)
    log_p = torch.stack(
        [
            likelihoods.discretized_gaussian_log_prob(levels[:, k : k + 1], mean[k], log_std[k], levels=17)
            for k in range(6)
        ]
    )
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-12)
    assert log_p.isfinite().all()


def test_discretized_gaussian_by_scipy():
    from scipy.stats import norm

    generator = torch.Generator().manual_seed(0)
    x = torch.randint(1, 255, (5, 2, 3), generator=generator).double()
    x[0, 0, 0], x[1, 0, 0] = 0, 255
    mean = 128 + 40 * torch.randn(2, 3, generator=generator, dtype=torch.float64)
    log_std = 3 + torch.randn(2, 3, generator=generator, dtype=torch.float64) / 2
    low, high = x - 0.5, x + 0.5
    low[0, 0, 0], high[1, 0, 0] = -math.inf, math.inf
    std = log_std.exp()
    left, right = (
        norm.cdf(high, mean, std) - norm.cdf(low, mean, std),
        norm.sf(low, mean, std) - norm.sf(high, mean, std),
    )
    mass = np.where(x < mean, left, right)  # each loses its digits on the other side
    expected = torch.from_numpy(mass).log().flatten(1).sum(1)
    actual = likelihoods.discretized_gaussian_log_prob(x, mean, log_std)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_discretized_gaussian_keeps_its_digits_in_the_tails():
    """Twenty deviations out, on either side, where a difference of probabilities near 1 is 0."""
    for x, mean in ((100.0, 80.0), (100.0, 120.0)):
        actual = likelihoods.discretized_gaussian_log_prob(
            torch.tensor([[x]], dtype=torch.float64), torch.tensor([mean]).double(), torch.zeros(1).double()
        )
        grid = torch.linspace(19.5, 20.5, 20_001, dtype=torch.float64)
        density = torch.exp(-(grid.square() - 19.5**2) / 2) / math.sqrt(2 * math.pi)
        expected = torch.trapezoid(density, grid).log() - 19.5**2 / 2
        torch.testing.assert_close(actual[0], expected, rtol=1e-6, atol=0)
