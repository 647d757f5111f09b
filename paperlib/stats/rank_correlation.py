"""How far one quantity follows another when others are held fixed, by ranks."""

import math
from collections.abc import Sequence

import numpy as np


def rank_residuals(values: Sequence[np.ndarray], controls: Sequence[np.ndarray] = ()) -> np.ndarray:
    """Ranks of each of `values`, less what a line in the ranks of `controls` predicts: k of (n,) to (k, n).

    Raises `ValueError` for lengths that differ, values that are not finite, and too few observations.
    """
    from scipy.stats import rankdata

    columns = [np.asarray(column, dtype=np.float64) for column in (*values, *controls)]
    if any(column.shape != columns[0].shape or column.ndim != 1 for column in columns):
        raise ValueError(f"one number per observation for each: shapes are {[column.shape for column in columns]}")
    if len(columns[0]) < len(controls) + 3:
        raise ValueError(f"{len(columns[0])} observations are too few for {len(controls)} controls")
    if not all(np.isfinite(column).all() for column in columns):
        raise ValueError("ranks of values that are not finite mean nothing: leave these observations out")
    ranks = rankdata(np.stack(columns), axis=-1)
    ranks -= ranks.mean(-1, keepdims=True)
    of_values, of_controls = ranks[: len(values)], ranks[len(values) :]
    return of_values - of_values @ np.linalg.pinv(of_controls, rcond=1e-6) @ of_controls


def partial_rank_correlation(
    a: np.ndarray | Sequence[float], b: np.ndarray | Sequence[float], controls: Sequence[np.ndarray] = ()
) -> float:
    """Spearman's correlation of `a` and `b` (n,) with each of `controls` (n,) held fixed, in [-1, 1].

    The correlation of their `rank_residuals`; nan where these are nothing but rounding, since the controls, or being
    constant, say all about `a` or `b`. Raises `ValueError` as there.
    """
    residuals = rank_residuals((a, b), controls)
    products, everything = residuals @ residuals.T, (len(residuals[0]) ** 3 - len(residuals[0])) / 12
    variances = np.diagonal(products)
    if (variances <= 1e-10 * everything).any():
        return math.nan
    return float(np.clip(products[0, 1] / math.sqrt(variances.prod()), -1, 1))


def correlation_interval(correlation: float, count: int, controls: int) -> tuple[float, float]:
    """95 % interval of a `partial_rank_correlation` over `count` independent observations with so many `controls`.

    By Fisher's transform: atanh(r) has a variance of about 1.06 / (count - controls - 3) (Fieller, Hartley and Pearson,
    1957). Raises `ValueError` for too few observations.
    """
    if count < controls + 4:
        raise ValueError(f"{count} observations are too few for an interval with {controls} controls")
    centre, half = np.arctanh(correlation), 1.96 * math.sqrt(1.06 / (count - controls - 3))
    return float(np.tanh(centre - half)), float(np.tanh(centre + half))
