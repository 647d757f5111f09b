"""The Markov chain z ~ q(z|x), x' ~ p(x|z) on a finite set: where it rests, how fast, and with a wrong decoder.

Tables are those of one `finite.Finite`, a kernel is (X, X), and distances are total variation. As in notebook 01:

    (7)  K(x, x') = sum_z q(z|x) p(x'|z)
    (8)  eigenvalues of K = squared singular values of M(x, z) = q(x,z) / sqrt(p(x) q(z)),  where p(x|z) = q(x|z)
    (9)  TV(K^n(x, .), p) -> 1/2 lambda^n |f(x)| E_p|f|,  lambda and f the second eigenvalue and its function
    (10) TV(pi, p) <= sqrt(1/2 E_q(z) KL(q(x|z) || p(x|z))) / (1 - tau),  tau Dobrushin's coefficient of the chain run
    (11) TV(pi, p) <= sqrt(1/2 E_q(z) KL(q(x|z) || p(x|z)) / (1 - lambda))  to first order in the decoder's error
"""

from dataclasses import dataclass

import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor


def transition(q_z_given_x: Tensor, p_x_given_z: Tensor) -> Tensor:
    """The kernel (7): row x holds the distribution of the next state."""
    return q_z_given_x @ p_x_given_z


def stationary(kernel: Tensor) -> Tensor:
    """pi (X,) with pi K = pi. Raises `ValueError` where the chain falls apart, so that there is more than one."""
    size = len(kernel)
    system = torch.cat([kernel.T - torch.eye(size, dtype=kernel.dtype), torch.ones(1, size, dtype=kernel.dtype)])
    if int(torch.linalg.matrix_rank(system[:-1], atol=1e-13)) < size - 1:
        raise ValueError("the chain has more than one stationary distribution: its states fall apart")
    right = torch.zeros(size + 1, 1, dtype=kernel.dtype)
    right[-1] = 1
    return torch.linalg.lstsq(system, right, driver="gelsd").solution[:, 0]


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """Between distributions over the last dimension, (...)."""
    return 0.5 * (p - q).abs().sum(-1)


def dobrushin(kernel: Tensor) -> Tensor:
    """The greatest total variation between two rows of a kernel."""
    return total_variation(kernel[:, None], kernel[None]).max()


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues (X,), falling from 1, and the second eigenfunction (X,) with E_p f = 0 and E_p f^2 = 1."""

    eigenvalues: Tensor
    slowest: Tensor

    @property
    def gap(self) -> Tensor:
        return 1 - self.eigenvalues[1]


def spectrum(p_x: Tensor, q_z_given_x: Tensor) -> Spectrum:
    """Eigenvalues of the chain with p(x|z) = q(x|z), by (8); a code never used is left out.

    Raises `ValueError` for fewer than two data points, and for one of probability 0.
    """
    if len(p_x) < 2 or bool((p_x <= 0).any()):
        raise ValueError(f"a spectrum takes two or more data points, each of positive probability, not {p_x.tolist()}")
    q_xz = p_x[:, None] * q_z_given_x
    q_xz = q_xz[:, q_xz.sum(0) > 0]
    left, values, _ = torch.linalg.svd(q_xz / torch.sqrt(p_x[:, None] * q_xz.sum(0)))
    eigenvalues = torch.zeros(len(p_x), dtype=p_x.dtype)
    eigenvalues[: len(values)] = values**2
    return Spectrum(eigenvalues, left[:, 1] / p_x.sqrt())


def maximal_correlation(q_xz: Tensor) -> Tensor:
    """The greatest correlation of any f(x) with any g(z) under a joint table (X, Z), by alternating conditional
    expectations g = E[f|z], f = E[g|x], each with mean 0 and variance 1 (Breiman and Friedman, 1985).

    Rows and columns of probability 0 do not count; 0 where x says nothing about z, as where one of them is constant."""
    q_xz = q_xz[q_xz.sum(1) > 0][:, q_xz.sum(0) > 0]
    p_x, q_z = q_xz.sum(1), q_xz.sum(0)

    def standard(f: Tensor, weights: Tensor) -> Tensor:
        f = f - weights @ f
        std = torch.sqrt(weights @ f**2)
        return f / std if std > 0 else f

    f = torch.randn(len(p_x), generator=torch.Generator().manual_seed(0), dtype=q_xz.dtype)
    correlation = torch.tensor(-1.0, dtype=q_xz.dtype)
    for _ in range(20_000):
        g = standard((f @ q_xz) / q_z, q_z)
        f = standard((q_xz @ g) / p_x, p_x)
        last, correlation = correlation, f @ q_xz @ g
        if correlation - last < 1e-15:
            break
    return correlation


def components(q_xz: Tensor) -> Tensor:
    """The connected component of each x, (X,) whole numbers from 0, when x and z are joined wherever q(x,z) > 0."""
    joined = (q_xz > 0).double()
    return torch.from_numpy(connected_components((joined @ joined.T).numpy(), directed=False)[1]).long()


def distances(kernel: Tensor, p: Tensor, steps: int) -> Tensor:
    """Total variation to `p` (X,) after 0, ..., `steps` steps from the worst start: (steps + 1,)."""
    power, worst = torch.eye(len(kernel), dtype=kernel.dtype), []
    for _ in range(steps + 1):
        worst.append(total_variation(power, p).max())
        power = power @ kernel
    return torch.stack(worst)


def predicted_distances(p_x: Tensor, spectrum: Spectrum, steps: int) -> Tensor:
    """What (9) predicts for the worst start after 0, ..., `steps` steps: (steps + 1,). No constant is fitted."""
    f = spectrum.slowest.abs()
    powers = spectrum.eigenvalues[1] ** torch.arange(steps + 1, dtype=p_x.dtype)
    return 0.5 * powers * f.max() * (p_x @ f)


def stationary_bound(decoder_kl: Tensor, tau: Tensor) -> Tensor:
    """The right side of (10) for `decoder_kl` = E_q(z) KL(q(x|z) || p(x|z)) in nats; above 1 it says nothing."""
    return torch.sqrt(0.5 * decoder_kl) / (1 - tau)


def first_order_bound(decoder_kl: Tensor, gap: Tensor) -> Tensor:
    """The right side of (11), `gap` = 1 - lambda of the chain with p(x|z) = q(x|z); only for small `decoder_kl`."""
    return torch.sqrt(0.5 * decoder_kl / gap)
