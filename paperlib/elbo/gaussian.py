"""The ELBO of linear-Gaussian models, and what a factored Gaussian decoder costs, in closed form.

The equation numbers are those of notebook 01. Everything is float64 and in nats; for densities a log-probability may be
positive, and h is the differential entropy.

    (2')  L = -KL(p(x) || p_theta(x)) - E_p(x) KL(q(z|x) || p_theta(z|x)) - h(p)
    (5)   min over factored Gaussians N of KL(q || N) = J(q) + 1/2 log(prod v / |Sigma|)

with Sigma the covariance of q, v its diagonal, and J(q) = h(N(., Sigma)) - h(q) the negentropy.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class LinearGaussian:
    """Data, encoder and decoder that are Gaussian with linear means; the prior is N(0, I) over d codes.

    p(x)   = N(mean, cov)              mean (D,), cov (D, D)
    q(z|x) = N(enc x + enc_bias, enc_cov)   enc (d, D), enc_bias (d,), enc_cov (d, d)
    p(x|z) = N(dec z + dec_bias, dec_cov)   dec (D, d), dec_bias (D,), dec_cov (D, D)
    """

    mean: Tensor
    cov: Tensor
    enc: Tensor
    enc_bias: Tensor
    enc_cov: Tensor
    dec: Tensor
    dec_bias: Tensor
    dec_cov: Tensor


def gaussian_entropy(cov: Tensor) -> Tensor:
    """h(N(., cov)) of a (D, D) covariance: 1/2 log |2 pi e cov|."""
    return 0.5 * (cov.shape[-1] * (1 + LOG_2PI) + torch.logdet(cov))


def gaussian_kl_full(mean_q: Tensor, cov_q: Tensor, mean_p: Tensor, cov_p: Tensor) -> Tensor:
    """KL(N(mean_q, cov_q) || N(mean_p, cov_p)) for means (D,) and full covariances (D, D)."""
    apart = mean_q - mean_p
    quadratic = torch.trace(torch.linalg.solve(cov_p, cov_q))
    quadratic = quadratic + apart @ torch.linalg.solve(cov_p, apart)
    return 0.5 * (quadratic - len(mean_q) + torch.logdet(cov_p) - torch.logdet(cov_q))


def linear_elbo(model: LinearGaussian) -> Tensor:
    """L by its definition (1): E_q(x,z) log p(x|z) - E_p(x) KL(q(z|x) || N(0, I))."""
    m = model
    code_mean = m.enc @ m.mean + m.enc_bias
    spread = m.enc @ m.cov @ m.enc.T
    # the error x - dec z - dec_bias is (I - dec enc) x - dec noise - ...
    left = torch.eye(len(m.mean), dtype=m.mean.dtype) - m.dec @ m.enc
    error_cov = left @ m.cov @ left.T + m.dec @ m.enc_cov @ m.dec.T
    error_mean = m.mean - m.dec @ code_mean - m.dec_bias
    second = error_cov + torch.outer(error_mean, error_mean)
    log_p = -0.5 * len(m.mean) * LOG_2PI - 0.5 * torch.logdet(m.dec_cov)
    log_p = log_p - 0.5 * torch.trace(torch.linalg.solve(m.dec_cov, second))
    rate = torch.trace(m.enc_cov + spread) + code_mean @ code_mean - len(code_mean)
    return log_p - 0.5 * (rate - torch.logdet(m.enc_cov))


def linear_elbo_from_evidence(model: LinearGaussian, entropy_term: bool = True) -> Tensor:
    """L by (2'), from p_theta(x) = N(dec_bias, dec dec' + dec_cov) and the posterior p_theta(z|x).

    `entropy_term=False` leaves out -h(p), as the post does.
    """
    m = model
    evidence_cov = m.dec @ m.dec.T + m.dec_cov
    gain = torch.linalg.solve(evidence_cov, m.dec).T  # posterior mean: gain (x - dec_bias)
    posterior_cov = torch.eye(m.dec.shape[1], dtype=m.dec.dtype) - gain @ m.dec
    apart = m.enc - gain
    apart_mean = apart @ m.mean + m.enc_bias + gain @ m.dec_bias
    posterior_kl = gaussian_kl_full(
        apart_mean, m.enc_cov, torch.zeros_like(apart_mean), posterior_cov
    ) + 0.5 * torch.trace(torch.linalg.solve(posterior_cov, apart @ m.cov @ apart.T))
    bound = -gaussian_kl_full(m.mean, m.cov, m.dec_bias, evidence_cov) - posterior_kl
    return bound - gaussian_entropy(m.cov) if entropy_term else bound


def random_linear_gaussian(
    generator: torch.Generator, x: int, z: int, scale: float = 1.0, factored: bool = False
) -> LinearGaussian:
    """A random model of `x` dimensions with `z` codes, its data of deviation about `scale`.

    With `factored`, encoder and decoder have diagonal covariances, like the networks of the other notebooks.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def covariance(size: int, diagonal: bool) -> Tensor:
        if diagonal:
            return torch.diag((0.5 * normal(size)).exp())
        root = normal(size, size)
        return root @ root.T / size + 0.2 * torch.eye(size, dtype=torch.float64)

    return LinearGaussian(
        mean=scale * normal(x),
        cov=scale**2 * covariance(x, False),
        enc=normal(z, x) / (scale * x**0.5),
        enc_bias=0.3 * normal(z),
        enc_cov=0.3 * covariance(z, factored),
        dec=scale * normal(x, z) / z**0.5,
        dec_bias=scale * normal(x),
        dec_cov=2.0 * scale**2 * covariance(x, factored),
    )


def matched(cov: Tensor, correlation: float) -> LinearGaussian:
    """The best model of N(0, cov), x (D,) and z (D,): q(z) = N(0, I) and p(x|z) = q(x|z), so L = -h(p).

    Each code has `correlation`, in [0, 1), with one whitened coordinate of x; L does not depend on it.
    """
    root = torch.linalg.cholesky(cov)
    eye, zero = torch.eye(len(cov), dtype=cov.dtype), torch.zeros(len(cov), dtype=cov.dtype)
    return LinearGaussian(
        mean=zero,
        cov=cov,
        enc=correlation * torch.linalg.inv(root),
        enc_bias=zero,
        enc_cov=(1 - correlation**2) * eye,
        dec=correlation * root,
        dec_bias=zero,
        dec_cov=(1 - correlation**2) * cov,
    )


@dataclass(frozen=True)
class Mixture:
    """q(x|z) as a mixture of K Gaussians: weights (K,), means (K, D), covs (K, D, D)."""

    weights: Tensor
    means: Tensor
    covs: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        """log q(x), (N, D) to (N,)."""
        apart = x[:, None] - self.means
        squared = (apart * torch.linalg.solve(self.covs, apart[..., None])[..., 0]).sum(-1)
        log_norm = 0.5 * (x.shape[1] * LOG_2PI + torch.logdet(self.covs))
        return torch.logsumexp(self.weights.log() - log_norm - 0.5 * squared, dim=1)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean (D,) and covariance (D, D)."""
        mean = self.weights @ self.means
        apart = self.means - mean
        between = torch.einsum("k,ki,kj->ij", self.weights, apart, apart)
        return mean, torch.einsum("k,kij->ij", self.weights, self.covs) + between

    def entropy(self, nodes: int = 120) -> Tensor:
        """h(q) by Gauss-Hermite quadrature under each component, `nodes` to a dimension."""
        points, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(nodes))
        dims = self.means.shape[1]
        grid = torch.cartesian_prod(*[points] * dims).reshape(-1, dims)
        mass = torch.cartesian_prod(*[weights / weights.sum()] * dims).reshape(-1, dims).prod(-1)
        roots = torch.linalg.cholesky(self.covs)
        parts = [
            -weight * (mass @ self.log_prob(mean + grid @ root.T))
            for weight, mean, root in zip(self.weights, self.means, roots, strict=True)
        ]
        return torch.stack(parts).sum()

    def grid(self, points: int = 500, reach: float = 9.0) -> tuple[Tensor, Tensor]:
        """An even grid over all components: points (points**D, D) and the probability of each, summing to one."""
        deviations = self.covs.diagonal(dim1=1, dim2=2).sqrt()
        low = (self.means - reach * deviations).amin(0)
        high = (self.means + reach * deviations).amax(0)
        axes = [torch.linspace(float(a), float(b), points, dtype=torch.float64) for a, b in zip(low, high, strict=True)]
        x = torch.cartesian_prod(*axes).reshape(-1, len(axes))
        return x, self.log_prob(x).exp() * ((high - low) / (points - 1)).prod()


@dataclass(frozen=True)
class Price:
    """The two parts of (5), in nats: `negentropy` (shape of q) and `correlation` (1/2 log prod v / |Sigma|)."""

    negentropy: Tensor
    correlation: Tensor

    @property
    def total(self) -> Tensor:
        return self.negentropy + self.correlation


def factored_price(q: Mixture) -> Price:
    """What the best factored Gaussian loses against `q`, by (5) from the moments and the entropy of q."""
    _, cov = q.moments()
    correlation = 0.5 * (cov.diagonal().log().sum() - torch.logdet(cov))
    return Price(gaussian_entropy(cov) - q.entropy(), correlation)


def fit_factored(q: Mixture, points: int = 500) -> tuple[Tensor, Tensor, Tensor]:
    """The factored Gaussian that maximises E_q log N, found by L-BFGS on a grid that knows no moments of q.

    Returns its mean (D,), variances (D,) and KL(q || N), summed over the grid.
    """
    x, mass = q.grid(points)
    start = x[mass.argmax()]

    def loss(parameters: Tensor) -> Tensor:
        mean, log_var = parameters[0], parameters[1]
        log_n = -0.5 * ((x - mean) ** 2 / log_var.exp() + log_var + LOG_2PI).sum(-1)
        return -(mass @ log_n)

    best = minimise(loss, torch.stack([start, torch.zeros_like(start)]))
    return best[0], best[1].exp(), loss(best) + mass @ q.log_prob(x)


def binned_log_prob(mean: Tensor, log_std: Tensor, levels: int) -> Tensor:
    """log of a Gaussian's mass in bins of width one around 0, ..., levels - 1, the outer two open: (levels,).

    The Gaussian cousin of the discretised logistic of PixelCNN++.
    """
    edges = torch.arange(levels - 1, dtype=torch.float64) + 0.5
    scaled = (edges - mean) * torch.exp(-log_std)
    lower, upper = torch.special.log_ndtr(scaled), torch.special.log_ndtr(-scaled)
    # between two edges the smaller pair of tails keeps its digits
    left = lower[1:] + torch.log(-torch.expm1(lower[:-1] - lower[1:]))
    right = upper[:-1] + torch.log(-torch.expm1(upper[1:] - upper[:-1]))
    inner = torch.where(scaled[1:] + scaled[:-1] < 0, left, right)
    return torch.cat([lower[:1], inner, upper[-1:]])


@dataclass(frozen=True)
class Binned:
    """Mean, deviation and KL(q || binned Gaussian) in nats, with the moments of q and at the optimum."""

    moments: tuple[float, float, float]
    best: tuple[float, float, float]


def fit_binned(q: Tensor) -> Binned:
    """The binned Gaussian nearest to the table q (levels,), found by L-BFGS, beside the one with q's moments."""
    levels = torch.arange(len(q), dtype=torch.float64)
    mean = q @ levels
    moments = torch.stack([mean, 0.5 * (q @ (levels - mean) ** 2).log()])

    def loss(parameters: Tensor) -> Tensor:
        return torch.special.xlogy(q, q).sum() - q @ binned_log_prob(*parameters, len(q))

    def described(parameters: Tensor) -> tuple[float, float, float]:
        return float(parameters[0]), float(parameters[1].exp()), float(loss(parameters))

    return Binned(described(moments), described(minimise(loss, moments)))


def minimise(loss, start: Tensor) -> Tensor:
    """The minimiser of a smooth `loss` of one tensor by L-BFGS from `start`, to about 1e-9 in each parameter."""
    parameters = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [parameters],
        max_iter=200,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss(parameters)
        value.backward()
        return value

    for _ in range(3):
        optimiser.step(closure)
    return parameters.detach()
