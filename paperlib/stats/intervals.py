"""95 % intervals: over examples, over seeds, by a jackknife over groups, and of a ratio."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from paperlib.runs.estimate import Estimate

Points = np.ndarray | Tensor


def to_float64(values: Points) -> Tensor:
    """`values` as a float64 tensor without gradient, on the device where they are."""
    if not torch.is_tensor(values):
        values = torch.from_numpy(np.array(values, dtype=np.float64))  # a copy: torch warns of read-only memory
    return values.detach().double()


def mean_interval(values: Points, unit: str = "") -> Estimate:
    """The mean of independent examples' values (n,), and 1.96 standard errors to both sides.

    For losses of two models on the same examples give the differences. Raises `ValueError` for fewer than two values,
    another shape, and values that are not finite.
    """
    return _around_mean(values, unit, 1.96)


def interval_over_seeds(values: Points | Sequence[float], unit: str = "") -> Estimate:
    """The mean of one number per seed, with Student's 95 % interval over further seeds. Raises as `mean_interval`."""
    return _around_mean(values, unit)


def _around_mean(values: Points | Sequence[float], unit: str, errors: float | None = None) -> Estimate:
    """The mean, and so many standard errors to both sides, or Student's number of them."""
    values = to_float64(values).cpu().numpy()
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(f"an interval takes two or more finite numbers (n,), not {values.shape}")
    half = (errors or _student(len(values))) * values.std(ddof=1) / math.sqrt(len(values))
    return Estimate.from_row((values.mean(), values.mean() - half, values.mean() + half), unit)


def _student(count: int) -> float:
    """The 97.5 % point of Student's t for `count` - 1 degrees of freedom."""
    from scipy.stats import t

    return t.ppf(0.975, count - 1)


def accuracy_gain(right: Points, baseline: Points) -> Estimate:
    """How much more often `right` holds than `baseline`, both bool (n,) on the same examples, in -1 .. 1.

    The interval is that of the mean of n differences, so what both get right, or wrong, does not widen it. Raises
    `ValueError` for other types, shapes that differ, and fewer than two examples.
    """
    right, baseline = np.asarray(right), np.asarray(baseline)
    if right.dtype != bool or baseline.dtype != bool or right.shape != baseline.shape:
        shapes = f"{right.dtype} {right.shape} and {baseline.dtype} {baseline.shape}"
        raise ValueError(f"a gain takes bools on the same examples, not {shapes}")
    return mean_interval(right.astype(float) - baseline)


def ratio_of_means(a: Points, b: Points) -> Estimate:
    """mean(a) / mean(b) of values (n,) twice on the same examples, by the delta method.

    The half width is 1.96 standard errors of the mean of (a - r b) / mean(b), so what moves both does not widen it.
    nan where mean(b) is 0. Raises `ValueError` as `mean_interval`, and for shapes that differ.
    """
    a, b = (to_float64(values).cpu().numpy() for values in (a, b))
    if a.shape != b.shape:
        raise ValueError(f"a ratio takes values twice on the same examples, not {a.shape} and {b.shape}")
    if b.mean() == 0:
        return Estimate.from_row((math.nan,) * 3)
    value = a.mean() / b.mean()
    half = mean_interval((a - value * b) / b.mean()).high
    return Estimate.from_row((value, value - half, value + half))


def jackknife(value: np.ndarray, without: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """95 % interval by a delete-a-group jackknife: a value (...), and what it is without each of G groups (G, ...).

    To value, low and high: v +- t s with s^2 = (G - 1) / G sum_g (v_g - mean of v_g)^2, Student's t of G - 1 degrees of
    freedom.
    """
    half = _student(len(without)) * math.sqrt(len(without) - 1) * without.std(0)
    return value, value - half, value + half
