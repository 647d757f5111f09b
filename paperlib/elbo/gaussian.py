"""The ELBO of linear-Gaussian models, and what a factored Gaussian decoder costs, in closed form.

float64, in nats; h is the differential entropy, q in (5) a mixture of K Gaussians in D dimensions. As in notebook 01:

    (2')  L = -KL(p(x) || p_theta(x)) - E_p(x) KL(q(z|x) || p_theta(z|x)) - h(p)
    (5)   min over factored Gaussians N of KL(q || N) = J(q) + 1/2 log(prod v / |Sigma|)

with Sigma the covariance of q, v its diagonal, and J(q) = h(N(., Sigma)) - h(q) the negentropy.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, kl_divergence

from paperlib.nn import likelihoods


@dataclass(frozen=True)
class LinearGaussian:
    """Data p(x) = N(mean, cov), encoder q(z|x) = N(enc x + enc_bias, enc_cov), decoder p(x|z) = N(dec z + dec_bias,
    dec_cov); the prior is N(0, I) in d dimensions."""

    mean: Tensor  # (D,)
    cov: Tensor  # (D, D)
    enc: Tensor  # (d, D)
    enc_bias: Tensor  # (d,)
    enc_cov: Tensor  # (d, d)
    dec: Tensor  # (D, d)
    dec_bias: Tensor  # (D,)
    dec_cov: Tensor  # (D, D)


def centred(cov: Tensor) -> MultivariateNormal:
    """N(0, cov) for a covariance (D, D)."""
    return MultivariateNormal(torch.zeros(len(cov), dtype=cov.dtype), cov)


def linear_elbo(m: LinearGaussian) -> Tensor:
    """L by its definition (1): E_q(x,z) log p(x|z) - E_p(x) KL(q(z|x) || N(0, I))."""
    code_mean = m.enc @ m.mean + m.enc_bias
    # the error x - dec z - dec_bias is (I - dec enc) x - dec noise - ...
    left = torch.eye(len(m.mean), dtype=m.mean.dtype) - m.dec @ m.enc
    error_cov = left @ m.cov @ left.T + m.dec @ m.enc_cov @ m.dec.T
    error_mean = m.mean - m.dec @ code_mean - m.dec_bias
    second = error_cov + torch.outer(error_mean, error_mean)
    log_p = -0.5 * len(m.mean) * likelihoods.LOG_2PI - 0.5 * torch.logdet(m.dec_cov)
    log_p = log_p - 0.5 * torch.trace(torch.linalg.solve(m.dec_cov, second))
    rate = torch.trace(m.enc_cov + m.enc @ m.cov @ m.enc.T) + code_mean @ code_mean - len(code_mean)
    return log_p - 0.5 * (rate - torch.logdet(m.enc_cov))


def linear_elbo_from_evidence(m: LinearGaussian) -> Tensor:
    """L by (2'), from p_theta(x) = N(dec_bias, dec dec' + dec_cov) and the posterior p_theta(z|x)."""
    data, evidence = MultivariateNormal(m.mean, m.cov), MultivariateNormal(m.dec_bias, m.dec @ m.dec.T + m.dec_cov)
    gain = torch.linalg.solve(evidence.covariance_matrix, m.dec).T  # posterior mean: gain (x - dec_bias)
    posterior = centred(torch.eye(m.dec.shape[1], dtype=m.dec.dtype) - gain @ m.dec)
    # The mean of q(z|x) minus that of the posterior is apart x + const; its spread over x adds to the KL.
    apart = m.enc - gain
    of_means = MultivariateNormal(apart @ m.mean + m.enc_bias + gain @ m.dec_bias, m.enc_cov)
    spread = torch.trace(torch.linalg.solve(posterior.covariance_matrix, apart @ m.cov @ apart.T))
    posterior_kl = kl_divergence(of_means, posterior) + 0.5 * spread
    return -kl_divergence(data, evidence) - posterior_kl - data.entropy()


def estimate_elbo(m: LinearGaussian, samples: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """The ELBO of a factored model as training estimates it, from one z per x: mean and standard error, in nats."""
    noise = torch.randn(samples, len(m.mean), generator=generator, dtype=torch.float64)
    x = m.mean + noise @ torch.linalg.cholesky(m.cov).T
    code_mean, code_log_std = x @ m.enc.T + m.enc_bias, 0.5 * m.enc_cov.diagonal().log()
    z = likelihoods.sample_gaussian(code_mean, code_log_std, generator=generator)
    log_p = likelihoods.gaussian_log_prob(x, z @ m.dec.T + m.dec_bias, 0.5 * m.dec_cov.diagonal().log())
    elbos = log_p - likelihoods.gaussian_kl(code_mean, code_log_std)
    return elbos.mean(), elbos.std() / math.sqrt(samples)


def random_linear_gaussian(generator: Generator, x: int, z: int, factored: bool = False) -> LinearGaussian:
    """A random model of x in `x` and z in `z` dimensions, data of std about 1; `factored` with diagonal covariances."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def covariance(size: int, diagonal: bool) -> Tensor:
        if diagonal:
            return torch.diag((0.5 * normal(size)).exp())
        root = normal(size, size)
        return root @ root.T / size + 0.2 * torch.eye(size, dtype=torch.float64)

    data = normal(x), covariance(x, False)
    encoder = normal(z, x) / x**0.5, 0.3 * normal(z), 0.3 * covariance(z, factored)
    decoder = normal(x, z) / z**0.5, normal(x), 2.0 * covariance(x, factored)
    return LinearGaussian(*data, *encoder, *decoder)


def matched(cov: Tensor, correlation: float) -> LinearGaussian:
    """The best model of N(0, cov), x (D,) and z (D,): q(z) = N(0, I) and p(x|z) = q(x|z), so L = -h(p), whatever
    `correlation`, in [0, 1), each dimension of z has with one whitened coordinate of x."""
    root, rest = torch.linalg.cholesky(cov), 1 - correlation**2
    eye, zero = torch.eye(len(cov), dtype=cov.dtype), torch.zeros(len(cov), dtype=cov.dtype)
    encoder, decoder = (correlation * torch.linalg.inv(root), zero, rest * eye), (correlation * root, zero, rest * cov)
    return LinearGaussian(zero, cov, *encoder, *decoder)


def mixture(weights: Tensor, means: Tensor, covs: Tensor) -> MixtureSameFamily:
    """A mixture of K Gaussians: weights (K,), scaled to sum to one, means (K, D), covs (K, D, D)."""
    return MixtureSameFamily(Categorical(weights), MultivariateNormal(means, covs))


def covariance(q: MixtureSameFamily) -> Tensor:
    """The covariance of a mixture, (D, D)."""
    weights, parts = q.mixture_distribution.probs, q.component_distribution
    apart = parts.mean - q.mean
    between = torch.einsum("k,ki,kj->ij", weights, apart, apart)
    return torch.einsum("k,kij->ij", weights, parts.covariance_matrix) + between


def entropy(q: MixtureSameFamily) -> Tensor:
    """h(q) of a mixture by Gauss-Hermite quadrature under each component, 120 nodes to a dimension."""
    points, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(120))
    dims, parts = q.event_shape[0], q.component_distribution
    nodes = torch.cartesian_prod(*[points] * dims).reshape(-1, dims)
    mass = torch.cartesian_prod(*[weights / weights.sum()] * dims).reshape(-1, dims).prod(-1)
    x = parts.mean[:, None] + nodes @ parts.scale_tril.mT
    return -q.mixture_distribution.probs @ (q.log_prob(x) @ mass)


def grid(q: MixtureSameFamily) -> tuple[Tensor, Tensor]:
    """250 even steps to a dimension over 9 std of each component: points (N, D), and probabilities that sum to one."""
    parts = q.component_distribution
    low, high = (parts.mean - 9 * parts.stddev).amin(0), (parts.mean + 9 * parts.stddev).amax(0)
    axes = [torch.linspace(float(a), float(b), 250, dtype=torch.float64) for a, b in zip(low, high, strict=True)]
    x = torch.cartesian_prod(*axes).reshape(-1, len(axes))
    return x, q.log_prob(x).exp() * ((high - low) / 249).prod()


def factored_price(q: MixtureSameFamily) -> tuple[Tensor, Tensor]:
    """The two parts of (5) from the covariance and the entropy of q: negentropy, and the price of correlation."""
    cov = covariance(q)
    return centred(cov).entropy() - entropy(q), 0.5 * (cov.diagonal().log().sum() - torch.logdet(cov))


def fit_factored(q: MixtureSameFamily) -> tuple[Tensor, Tensor, Tensor]:
    """The factored Gaussian that maximises E_q log N, by L-BFGS on a grid that knows no moments of q: its mean (D,),
    std (D,) and KL(q || N)."""
    x, mass = grid(q)

    def loss(parameters: Tensor) -> Tensor:
        return -(mass @ likelihoods.gaussian_log_prob(x, *parameters))

    best = _minimise(loss, torch.stack([x[mass.argmax()], torch.zeros_like(x[0])]))
    return best[0], best[1].exp(), loss(best) + mass @ q.log_prob(x)


class BinnedFit(NamedTuple):
    """A Gaussian in bins: its mean and std in grey levels, and KL(q || it) in nats."""

    mean: float
    std: float
    kl: float


def fit_binned(q: Tensor) -> tuple[BinnedFit, BinnedFit]:
    """The binned Gaussian with the moments of a table q (levels,), and the nearest one, by L-BFGS from there."""
    levels = torch.arange(len(q), dtype=torch.float64)
    mean = q @ levels
    moments = torch.stack([mean, 0.5 * (q @ (levels - mean) ** 2).log()])

    def loss(parameters: Tensor) -> Tensor:
        log_p = likelihoods.discretized_gaussian_log_prob(levels, *parameters, levels=len(q))
        return torch.special.xlogy(q, q).sum() - q @ log_p

    def fit(parameters: Tensor) -> BinnedFit:
        return BinnedFit(float(parameters[0]), float(parameters[1].exp()), float(loss(parameters)))

    return fit(moments), fit(_minimise(loss, moments))


def _minimise(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The minimiser of a smooth `loss` of one tensor by L-BFGS from `start`, to about 1e-9 in each parameter."""
    parameters = start.clone().requires_grad_()
    options = {"max_iter": 200, "tolerance_grad": 1e-12, "tolerance_change": 0, "line_search_fn": "strong_wolfe"}
    optimiser = torch.optim.LBFGS([parameters], **options)

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss(parameters)
        value.backward()
        return value

    for _ in range(3):
        optimiser.step(closure)
    return parameters.detach()
