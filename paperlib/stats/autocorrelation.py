"""How long Markov chains remember: with f_t the features at time t of 0 .. T-1, and covariances over chains,

    (a)  sum_t tr cov(f_t, f_(t+l))  /  sum_t [tr cov(f_t) + tr cov(f_(t+l))] / 2,   both over t = 0 .. T-1-l.

Chains are compared with each other at the same times, so that a drift that all share is no memory.
"""

from collections.abc import Sequence

import numpy as np
import torch

from paperlib.runs.estimate import Estimate
from paperlib.stats.intervals import Points, jackknife, to_float64
from paperlib.stats.two_sample import to_points


def autocorrelation(
    states: Points, lags: Sequence[int], mean: Points | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Equation (a) with its 95 % interval: features (T, N, d) of N independent chains to three (len(lags),).

    With a `mean` (d,), such as that of the data, chains are compared with it, not with each other: second moments
    around it take the place of covariances, and what all chains share counts.

    Values, lows and highs, by a jackknife over chains. 1 for chains that stand still, 0 for states that are independent
    of those `lag` before. nan where the chains never differ from one another. Raises `ValueError` for another shape,
    fewer than 3 chains, values that are not finite, no lags, and a lag outside 1 .. T-1.
    """
    states = to_float64(states).cpu().numpy()
    if states.ndim != 3 or states.shape[1] < 3 or 0 in states.shape:
        raise ValueError(f"states are (T, N, d) of 3 chains or more, not {states.shape}")
    if not np.isfinite(states).all():
        raise ValueError("states hold values that are not finite")
    steps, chains, _ = states.shape
    wrong = [lag for lag in lags if not 1 <= lag < steps]
    if wrong or not len(lags):
        raise ValueError(f"lags {wrong} of chains of {steps} states: they go from 1 to {steps - 1}")
    if mean is None:
        x = states - states[:, :1]  # exactly 0 where all chains agree
        x -= x.mean(1, keepdims=True)
    else:
        mean = to_float64(mean).cpu().numpy()
        if mean.shape != states.shape[2:] or not np.isfinite(mean).all():
            raise ValueError(f"a mean is finite and (d,), here {states.shape[2:]}, not {mean.shape}")
        x = states - mean
    squares = np.einsum("tnd,tnd->tn", x, x)
    shared = [np.einsum("tnd,tnd->n", x[:-lag], x[lag:]) for lag in lags]
    own = [(squares[:-lag] + squares[lag:]).sum(0) / 2 for lag in lags]
    parts = np.array([shared, own])  # (2, len(lags), N): what each chain adds to the covariances and to the variances
    total = parts.sum(2)
    # Without chain i the means over chains move too: a covariance loses N / (N - 1) times what the chain adds to it.
    share = chains / (chains - 1) if mean is None else 1.0
    without = total[:, None] - share * parts.transpose(0, 2, 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return jackknife(total[0] / total[1], without[0] / without[1])


def pair_correlation(a: Points, b: Points) -> Estimate:
    """Equation (a) for pairs, such as starts and ends of chains: features (N, d) and (N, d), T = 2 and lag 1.

    Raises `ValueError` as `autocorrelation`, and for shapes that differ.
    """
    a, b = to_points(a), to_points(b)
    if a.shape != b.shape:
        raise ValueError(f"pairs need equal shapes, not {tuple(a.shape)} and {tuple(b.shape)}")
    return Estimate.from_row([number[0] for number in autocorrelation(torch.stack([a, b]), [1])])


def integrated_time(correlations: Points, least: float = 0.05) -> float:
    """The integrated autocorrelation time in steps, 1 + 2 sum_l rho_l, of correlations (L,) at lags 1 .. L.

    The sum ends before the first that is below `least`, for the noise of the others. A time of 1 is that of independent
    states; one that is not much less than L is a lower bound.
    """
    rho = to_float64(correlations).cpu().numpy()
    below = np.flatnonzero(rho < least)
    return float(1 + 2 * rho[: below[0] if len(below) else len(rho)].sum())
