"""Gaussian priors that fit: for each step, of all Gaussians, the one with the least KL from the encoder's codes.

    (11)  p(z) = N(m, C),   m = E z,   C = E z z^T - m m^T,   z ~ q(z) = E_x q(z|x)

For any Gaussian p, E KL(q(z|x) || p) = I_q(x; z) + KL(q(z) || N(m, C)) + KL(N(m, C) || p): the last term is what a
Gaussian prior with other moments costs, and it alone depends on p.
"""

import torch
from torch import Tensor, nn

from paperlib.system import distributed

WEIGHT = 0.005  # of a batch in the running moments, once 1 / batches is less


class FittedPrior(nn.Module):
    """Equation (11) with running moments over batches, for codes of D dimensions; at first N(0, I).

    In float64, as the covariance is a difference and its inverse multiplies what it lost.
    """

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dims, dtype=torch.float64))
        self.register_buffer("second", torch.eye(dims, dtype=torch.float64))  # E z z^T
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, mean: Tensor, log_std: Tensor) -> None:
        """Move the moments towards those of a batch of q(z|x): means and log stds (B, D)."""
        first, second = moments(mean, log_std)
        self.batches += 1
        weight = (1 / self.batches).clamp(min=WEIGHT)
        for running, value in ((self.mean, first), (self.second, second)):
            running.lerp_(distributed.mean(value).to(running), weight.to(running))

    def covariance(self) -> Tensor:
        """C (D, D)."""
        return self.second.double() - torch.outer(self.mean.double(), self.mean.double())

    def kl(self, mean: Tensor, log_std: Tensor, part: slice = slice(None)) -> Tensor:
        """KL(q(z|x) || p(z)) of a batch in nats, (B, D) twice to (B,); of some dimensions alone with `part`."""
        mean, log_std = mean.double()[:, part], log_std.double()[:, part]
        root = torch.linalg.cholesky_ex(self.covariance()[part, part]).L
        scaled = torch.linalg.solve_triangular(root, (mean - self.mean.double()[part]).mT, upper=False)
        precision = torch.cholesky_inverse(root).diagonal()
        spread = (2 * log_std).exp() @ precision - 2 * log_std.sum(1) + 2 * root.diagonal().log().sum()
        return 0.5 * (scaled.square().sum(0) + spread - mean.shape[1])

    def sample(self, noise: Tensor) -> Tensor:
        """Codes of standard Gaussian noise (B, D)."""
        root = torch.linalg.cholesky_ex(self.covariance()).L
        return (self.mean.double() + noise.double() @ root.mT).to(noise.dtype)


def moments(mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    """E z (D,) and E z z^T (D, D) over q(z|x) with means and log stds (B, D), in float64."""
    mean, variance = mean.double(), (2 * log_std.double()).exp()
    return mean.mean(0), mean.mT @ mean / len(mean) + torch.diag(variance.mean(0))


def gaussian_gap(mean: Tensor, log_std: Tensor, prior: FittedPrior | None = None) -> Tensor:
    """KL(N(m, C) || p) in nats, m and C the moments of these q(z|x), (B, D) twice: what other moments of p cost.

    p is N(0, I) unless given.
    """
    first, second = moments(mean, log_std)
    q = torch.distributions.MultivariateNormal(first, second - torch.outer(first, first))
    location, covariance = (torch.zeros_like(first), torch.eye(len(first)).to(second))
    if prior is not None:
        location, covariance = prior.mean.double(), prior.covariance()
    return torch.distributions.kl_divergence(q, torch.distributions.MultivariateNormal(location, covariance))
