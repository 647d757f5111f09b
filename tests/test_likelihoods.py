"""Likelihoods against torch.distributions in float64, and where float32 would lose them."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence

from paperlib import likelihoods

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
        lambda: likelihoods.sample_gaussian(x, x, noise=other),
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
    mean, log_std, noise = draw(generator, 3, 5, 4)
    sample = likelihoods.sample_gaussian(mean, log_std, noise=noise)
    torch.testing.assert_close(sample, mean + log_std.exp() * noise)

    first, again = (
        likelihoods.sample_gaussian(mean, log_std, generator=torch.Generator().manual_seed(1)) for _ in range(2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, likelihoods.sample_gaussian(mean, log_std, generator=generator))
    with pytest.raises(ValueError, match="not both"):
        likelihoods.sample_gaussian(mean, log_std, generator=generator, noise=noise)


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
