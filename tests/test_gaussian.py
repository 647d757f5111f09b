"""Linear-Gaussian closed forms against one-dimensional quadrature and against samples; the price of a factored fit."""

import math
from dataclasses import replace

import pytest
import torch

from paperlib.elbo import gaussian


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def scalar(value, *shape):
    return torch.full(shape, float(value), dtype=torch.float64)


def test_a_scalar_model_by_quadrature():
    """L from its definition as a double integral, on a grid: no Gaussian formula but the density."""
    m, s2, a, c, v, b, e, r = 0.4, 1.7, 0.6, -0.3, 0.5, 1.1, 0.2, 0.8
    model = gaussian.LinearGaussian(
        scalar(m, 1), scalar(s2, 1, 1), scalar(a, 1, 1), scalar(c, 1), scalar(v, 1, 1),
        scalar(b, 1, 1), scalar(e, 1), scalar(r, 1, 1),
    )  # fmt: skip

    def log_n(x, mean, variance):
        return -0.5 * ((x - mean) ** 2 / variance + math.log(2 * math.pi * variance))

    x = torch.linspace(-13, 13, 900, dtype=torch.float64)[:, None]
    z = torch.linspace(-9, 9, 900, dtype=torch.float64)[None]
    cell = float((x[1] - x[0]) * (z[0, 1] - z[0, 0]))
    encoder = log_n(z, a * x + c, v)
    joint = (log_n(x, m, s2) + encoder).exp() * cell
    assert float(joint.sum()) == pytest.approx(1, abs=1e-12)
    by_grid = (joint * (log_n(x, b * z + e, r) + log_n(z, 0, 1) - encoder)).sum()
    assert float(gaussian.linear_elbo(model)) == pytest.approx(float(by_grid), abs=1e-10)
    assert float(gaussian.linear_elbo_from_evidence(model)) == pytest.approx(float(by_grid), abs=1e-10)


def test_both_sides_agree_and_stay_below_minus_h():
    for seed in range(50):
        model = gaussian.random_linear_gaussian(generator(seed), x=4, z=3)
        value = gaussian.linear_elbo(model)
        torch.testing.assert_close(value, gaussian.linear_elbo_from_evidence(model), rtol=0, atol=1e-10)
        assert float(value + gaussian.centred(model.cov).entropy()) < 0


def test_the_estimator_is_within_its_standard_errors_and_sees_a_missing_term():
    model = gaussian.random_linear_gaussian(generator(3), x=4, z=2, factored=True)
    mean, error = gaussian.estimate_elbo(model, 50_000, generator(4))
    assert abs(mean - gaussian.linear_elbo(model)) < 4 * error
    assert error < 0.05, "an error of the size of a forgotten constant must show"


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.95])
def test_the_best_model_reaches_minus_h_whatever_z_knows(correlation):
    cov = gaussian.random_linear_gaussian(generator(1), x=3, z=3).cov * 1e-4
    model = gaussian.matched(cov, correlation)
    best = -gaussian.centred(cov).entropy()
    assert float(best) > 0, "the example should have a positive L"
    torch.testing.assert_close(gaussian.linear_elbo(model), best, rtol=0, atol=1e-11)
    for field in ("enc", "enc_cov", "dec", "dec_cov", "dec_bias", "enc_bias"):
        moved = replace(model, **{field: getattr(model, field) * 1.01 + (1e-4 if "bias" in field else 0)})
        if not torch.equal(getattr(moved, field), getattr(model, field)):
            assert float(gaussian.linear_elbo(moved)) < float(best), field


MIXTURE = gaussian.mixture(
    torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
    torch.tensor([[0.0, 0.0], [2.0, 2.0], [3.0, -1.0]], dtype=torch.float64),
    torch.tensor([[[0.4, 0.2], [0.2, 0.3]], [[0.5, -0.3], [-0.3, 0.6]], [[0.2, 0], [0, 0.3]]], dtype=torch.float64),
)


def test_moments_and_entropy_of_a_mixture_by_its_grid():
    x, mass = gaussian.grid(MIXTURE)
    assert float(mass.sum()) == pytest.approx(1, abs=1e-12)
    mean = mass @ x
    torch.testing.assert_close(mean, MIXTURE.mean, rtol=0, atol=1e-11)
    covariance = (mass[:, None] * (x - mean)).T @ (x - mean)
    torch.testing.assert_close(covariance, gaussian.covariance(MIXTURE), rtol=0, atol=1e-11)
    assert float(gaussian.entropy(MIXTURE)) == pytest.approx(-float(mass @ MIXTURE.log_prob(x)), abs=1e-6)


def test_the_best_factored_gaussian_and_its_price():
    mean, std, price = gaussian.fit_factored(MIXTURE)
    torch.testing.assert_close(mean, MIXTURE.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(std**2, gaussian.covariance(MIXTURE).diagonal(), rtol=0, atol=1e-6)
    closed = gaussian.factored_price(MIXTURE)
    assert float(price) == pytest.approx(float(sum(closed)), abs=1e-6)
    assert closed.negentropy > 0.1 and closed.correlation > 1e-3


@pytest.mark.parametrize("c", [0.0, -0.9])
def test_a_correlated_gaussian_pays_for_its_correlation_alone(c):
    """With correlation c in two dimensions that is -1/2 log(1 - c^2): the mutual information of the pixels."""
    q = gaussian.mixture(
        torch.ones(1, dtype=torch.float64),
        torch.tensor([[1.0, -2.0]], dtype=torch.float64),
        torch.tensor([[[2.0, c * 2**0.5], [c * 2**0.5, 1.0]]], dtype=torch.float64),
    )
    closed = gaussian.factored_price(q)
    assert float(closed.negentropy) == pytest.approx(0, abs=1e-10)
    assert float(closed.correlation) == pytest.approx(-0.5 * math.log(1 - c * c), abs=1e-12)
    assert float(gaussian.fit_factored(q)[2]) == pytest.approx(float(closed.correlation), abs=1e-7)


def test_in_bins_the_moments_are_not_the_best():
    """Searched on a grid of means and stds, by differences of cdfs: the optimum in bins is elsewhere, and cheaper."""
    q = torch.tensor([0.7, 0.2, 0.1, 0, 0, 0, 0, 0], dtype=torch.float64)
    of_moments, best = gaussian.fit_binned(q)
    assert of_moments[:2] == pytest.approx((0.4, math.sqrt(0.44)))
    means, stds = torch.arange(-40, 41).double()[:, None, None] / 20, torch.arange(8, 60).double()[:, None] / 20
    below = torch.distributions.Normal(means, stds).cdf(torch.tensor([0.5, 1.5, 2.5]).double())
    kl = (torch.special.xlogy(q, q).sum() - below.diff(dim=-1, prepend=torch.zeros(81, 52, 1)).log() @ q[:3]).flatten()
    least = int(kl.argmin())
    assert best.kl <= kl[least] < best.kl + 1e-3
    assert (float(means[least // 52]), float(stds[least % 52])) == pytest.approx(best[:2], abs=0.06)
    assert of_moments.kl - best.kl > 0.05
    assert best.mean < 0, "the best mean lies beyond the black end"
