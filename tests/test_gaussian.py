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
        entropy = gaussian.gaussian_entropy(model.cov)
        assert float(value + entropy) < 0
        without = gaussian.linear_elbo_from_evidence(model, entropy_term=False)
        torch.testing.assert_close(without - value, entropy, rtol=0, atol=1e-10)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.95])
def test_the_best_model_reaches_minus_h_whatever_z_knows(correlation):
    cov = gaussian.random_linear_gaussian(generator(1), x=3, z=3).cov * 1e-4
    model = gaussian.matched(cov, correlation)
    best = -gaussian.gaussian_entropy(cov)
    assert float(best) > 0, "the example should have a positive L"
    torch.testing.assert_close(gaussian.linear_elbo(model), best, rtol=0, atol=1e-11)
    for field in ("enc", "enc_cov", "dec", "dec_cov", "dec_bias", "enc_bias"):
        moved = replace(model, **{field: getattr(model, field) * 1.01 + (1e-4 if "bias" in field else 0)})
        if not torch.equal(getattr(moved, field), getattr(model, field)):
            assert float(gaussian.linear_elbo(moved)) < float(best), field


def test_kl_of_full_gaussians_against_samples():
    a = gaussian.random_linear_gaussian(generator(2), x=3, z=3)
    b = gaussian.random_linear_gaussian(generator(3), x=3, z=3)
    p = torch.distributions.MultivariateNormal(a.mean, a.cov)
    q = torch.distributions.MultivariateNormal(b.mean, b.cov)
    wanted = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(gaussian.gaussian_kl_full(a.mean, a.cov, b.mean, b.cov), wanted)
    torch.testing.assert_close(gaussian.gaussian_entropy(a.cov), p.entropy())


MIXTURE = gaussian.Mixture(
    torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
    torch.tensor([[0.0, 0.0], [2.0, 2.0], [3.0, -1.0]], dtype=torch.float64),
    torch.tensor([[[0.4, 0.2], [0.2, 0.3]], [[0.5, -0.3], [-0.3, 0.6]], [[0.2, 0], [0, 0.3]]], dtype=torch.float64),
)


def test_mixture_density_moments_and_entropy():
    reference = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(MIXTURE.weights),
        torch.distributions.MultivariateNormal(MIXTURE.means, MIXTURE.covs),
    )
    x, mass = MIXTURE.grid(250)
    torch.testing.assert_close(MIXTURE.log_prob(x), reference.log_prob(x))
    assert float(mass.sum()) == pytest.approx(1, abs=1e-12)
    mean, cov = MIXTURE.moments()
    torch.testing.assert_close(mass @ x, mean, rtol=0, atol=1e-11)
    apart = x - mean
    torch.testing.assert_close((mass[:, None] * apart).T @ apart, cov, rtol=0, atol=1e-11)
    assert float(MIXTURE.entropy()) == pytest.approx(-float(mass @ MIXTURE.log_prob(x)), abs=1e-6)


def test_the_best_factored_gaussian_and_its_price():
    mean, variances, price = gaussian.fit_factored(MIXTURE, points=200)
    true_mean, cov = MIXTURE.moments()
    torch.testing.assert_close(mean, true_mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(variances, cov.diagonal(), rtol=0, atol=1e-6)
    closed = gaussian.factored_price(MIXTURE)
    assert float(price) == pytest.approx(float(closed.total), abs=1e-6)
    assert closed.negentropy > 0.1
    assert closed.correlation > 1e-3


def test_a_correlated_gaussian_pays_for_its_correlation_alone():
    """With correlation c in two dimensions that is -1/2 log(1 - c^2): the mutual information of the pixels."""
    for c in (0.0, 0.5, -0.9):
        q = gaussian.Mixture(
            torch.ones(1, dtype=torch.float64),
            torch.tensor([[1.0, -2.0]], dtype=torch.float64),
            torch.tensor([[[2.0, c * 2**0.5], [c * 2**0.5, 1.0]]], dtype=torch.float64),
        )
        closed = gaussian.factored_price(q)
        assert float(closed.negentropy) == pytest.approx(0, abs=1e-10)
        assert float(closed.correlation) == pytest.approx(-0.5 * math.log(1 - c * c), abs=1e-12)
        assert float(gaussian.fit_factored(q, points=200)[2]) == pytest.approx(float(closed.total), abs=1e-7)


def test_binned_gaussian_is_a_distribution_with_open_ends():
    for mean, std in ((3.0, 0.2), (-4.0, 1.0), (12.0, 2.0), (3.5, 30.0)):
        log_p = gaussian.binned_log_prob(torch.tensor(mean).double(), torch.tensor(std).double().log(), 8)
        assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-12)
        assert torch.isfinite(log_p[1:-1]).all()
        normal = torch.distributions.Normal(torch.tensor(mean).double(), torch.tensor(std).double())
        inner = normal.cdf(torch.tensor(4.5).double()) - normal.cdf(torch.tensor(3.5).double())
        assert float(log_p[4].exp()) == pytest.approx(float(inner), abs=1e-14)


def test_in_bins_the_moments_are_not_the_best():
    """Searched on a grid of means and deviations, without gradients: the binned optimum is elsewhere, and cheaper."""
    q = torch.tensor([0.7, 0.2, 0.1, 0, 0, 0, 0, 0], dtype=torch.float64)
    found = gaussian.fit_binned(q)
    assert found.moments[:2] == pytest.approx((0.4, math.sqrt(0.44)))
    entropy = -float(torch.special.xlogy(q, q).sum())
    table = {
        (mean / 20, std / 20): -entropy
        - float(
            q @ gaussian.binned_log_prob(torch.tensor(mean / 20).double(), torch.tensor(std / 20).double().log(), 8)
        )
        for mean in range(-40, 41)
        for std in range(8, 60)
    }
    (mean, std), least = min(table.items(), key=lambda item: item[1])
    assert found.best[2] <= least < found.best[2] + 1e-3
    assert (mean, std) == pytest.approx(found.best[:2], abs=0.06)
    assert found.moments[2] - found.best[2] > 0.05
    assert found.best[0] < 0, "the best mean lies beyond the black end"
