"""Gaussians against quadrature, samples and search; E2 and E4 of notebook 01 try the closed forms on more models."""

import math

import pytest
import torch

from paperlib.elbo import examples, gaussian

F64 = {"dtype": torch.float64}


def test_a_scalar_model_by_quadrature():
    """L from its definition as a double integral, on a grid: no Gaussian formula but the density."""
    m, s2, a, c, v, b, e, r = 0.4, 1.7, 0.6, -0.3, 0.5, 1.1, 0.2, 0.8
    shapes = ((1,), (1, 1), (1, 1), (1,), (1, 1), (1, 1), (1,), (1, 1))
    tables = (torch.full(shape, value, **F64) for shape, value in zip(shapes, (m, s2, a, c, v, b, e, r), strict=True))
    model = gaussian.LinearGaussian(*tables)

    def log_n(x, mean, variance):
        return -0.5 * ((x - mean) ** 2 / variance + math.log(2 * math.pi * variance))

    x, z = torch.linspace(-13, 13, 900, **F64)[:, None], torch.linspace(-9, 9, 900, **F64)[None]
    encoder = log_n(z, a * x + c, v)
    joint = (log_n(x, m, s2) + encoder).exp() * float((x[1] - x[0]) * (z[0, 1] - z[0, 0]))
    assert float(joint.sum()) == pytest.approx(1, abs=1e-12)
    by_grid = float((joint * (log_n(x, b * z + e, r) + log_n(z, 0, 1) - encoder)).sum())
    for elbo in (gaussian.linear_elbo, gaussian.linear_elbo_from_evidence):
        assert float(elbo(model)) == pytest.approx(by_grid, abs=1e-10)


def test_the_estimator_is_within_its_standard_errors_and_sees_a_missing_term():
    model = gaussian.random_linear_gaussian(torch.Generator().manual_seed(3), x=4, z=2, factored=True)
    mean, error = gaussian.estimate_elbo(model, 50_000, torch.Generator().manual_seed(4))
    assert abs(mean - gaussian.linear_elbo(model)) < 4 * error
    assert error < 0.05, "an error of the size of a forgotten constant must show"


@pytest.mark.parametrize("c", [0.0, -0.9])
def test_a_correlated_gaussian_pays_for_its_correlation_alone(c):
    """With correlation c in two dimensions that is -1/2 log(1 - c^2): the mutual information of the pixels."""
    cov = torch.tensor([[[2.0, c * 2**0.5], [c * 2**0.5, 1.0]]], **F64)
    q = gaussian.mixture(torch.ones(1, **F64), torch.tensor([[1.0, -2.0]], **F64), cov)
    negentropy, correlation = gaussian.factored_price(q)
    assert float(negentropy) == pytest.approx(0, abs=1e-10)
    assert float(correlation) == pytest.approx(-0.5 * math.log(1 - c * c), abs=1e-12)


def test_the_covariance_of_a_mixture_by_its_grid():
    """All of it: in the sum that E4 checks, what is off the diagonal cancels."""
    q = examples.pictures([0, 1, 4])
    x, mass = gaussian.grid(q)
    apart = x - mass @ x
    torch.testing.assert_close(gaussian.covariance(q), (mass[:, None] * apart).T @ apart, rtol=0, atol=1e-10)


def test_in_bins_the_moments_are_not_the_best():
    """Searched on a grid of means and stds, by differences of cdfs: the optimum in bins is elsewhere, and cheaper."""
    q = torch.tensor([0.7, 0.2, 0.1, 0, 0, 0, 0, 0], **F64)
    of_moments, best = gaussian.fit_binned(q)
    assert of_moments[:2] == pytest.approx((0.4, math.sqrt(0.44)))
    means, stds = torch.arange(-40, 41).double()[:, None, None] / 20, torch.arange(8, 60).double()[:, None] / 20
    below = torch.distributions.Normal(means, stds).cdf(torch.tensor([0.5, 1.5, 2.5], **F64))
    kl = (torch.special.xlogy(q, q).sum() - below.diff(dim=-1, prepend=torch.zeros(81, 52, 1)).log() @ q[:3]).flatten()
    least = int(kl.argmin())
    assert best.kl <= kl[least] < best.kl + 1e-3
    assert (float(means[least // 52]), float(stds[least % 52])) == pytest.approx(best[:2], abs=0.06)
    assert of_moments.kl - best.kl > 0.05
    assert best.mean < 0, "the best mean lies beyond the black end"
