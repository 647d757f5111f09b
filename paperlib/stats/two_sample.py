"""How far apart two sets of points lie, with an interval. For u of one distribution and v of another,

    (a)  E k(u, u') + E k(v, v') - 2 E k(u, v)   over independent pairs
    (b)  k(u, v) = (u.v / d + 1)^3     `kernel_distance`, the KID of Binkowski et al. 2018 (arXiv 1801.01401)
    (c)  k(u, v) = -|u - v|            `energy_distance`, 2 E|u - v| - E|u - u'| - E|v - v'|
    (d)  k(u, v) = exp(-|u - v|^2 / (2 s^2))   `gaussian_mmd`, with v of N(0, I) in D dimensions:
         E_v k(u, v) = (s^2 / (s^2 + 1))^(D/2) exp(-|u|^2 / (2 (s^2 + 1))),   E_uv k(u, v) = (s^2 / (s^2 + 2))^(D/2)

(a) is estimated without bias by means over pairs, a point and itself left out, so it may come out below 0. (b) sees
moments up to the third, (c) all that differs. Intervals leave the g-th of GROUPS groups of both sets out, see
`intervals.jackknife`; a bootstrap draws points twice, and their k(u, u) makes every resample come out too far. For
equal distributions they are wide: hardly ever above 0, below it up to one time in fifteen.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from paperlib.runs.estimate import Estimate
from paperlib.stats.intervals import Points, jackknife, to_float64

GROUPS = 20  # of consecutive rows, for the jackknife
PAIRS = 2**22  # of points, handled at a time: 32 MiB in float64
SCALES = (0.25, 1, 4)  # s^2 / D of `gaussian_mmd`, as |u - v|^2 is 2 D on average under N(0, I)


def kernel_distance(a: Points, b: Points, *, together: tuple[int, int] = (1, 1)) -> Estimate:
    """The squared distance (a) of two independent sets of features under the kernel (b): (n, d) and (m, d).

    In float64, time O((n + m)^2 d), memory bounded. The kernel wants entries of order 1 (see `features.extractor`).

    Rows must be in random order, or those that depend on each other lie in one group of the jackknife. `together` says
    how many consecutive rows of either set belong together, such as late states of one chain: pairs among them are left
    out too, so that the value stays unbiased.
    Raises `ValueError` for shapes that do not fit, fewer than two rows a group, rows that belong together in two
    groups, and values that are not finite.
    """
    return _estimate(_every(a, b, _cubic, together=together))


def energy_distance(a: Points, b: Points) -> Estimate:
    """The energy distance (c) of two sets of points, (n, d) and (m, d), in their unit: 0 for equal distributions only.

    Rows, cost, interval and errors as in `kernel_distance`.
    """
    return _estimate(_every(a, b, _minus_length, centre=True))


def kernel_distance_ratio(a: Points, b: Points, reference: Points) -> Estimate:
    """The `kernel_distance` of `a` to a reference over that of `b`: features (n, d), (m, d) and (r, d).

    The jackknife leaves the g-th group of all three out, so that what the reference does to both cancels. Means little
    where the second distance is within its interval of 0. Raises as there.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        return _estimate(_every(a, reference, _cubic) / _every(b, reference, _cubic))


def kernel_distance_difference(
    a: Points, b: Points, reference: Points, *, together: tuple[int, int] = (1, 1)
) -> Estimate:
    """The `kernel_distance` of `a` to a reference less that of `b`, paired as in `kernel_distance_ratio`.

    `together` as there, of `a` and of `b`. Raises as there.
    """
    units = [(unit, 1) for unit in together]
    return _estimate(_every(a, reference, _cubic, together=units[0]) - _every(b, reference, _cubic, together=units[1]))


def spectral_distance(a: Points, b: Points, *, least: float = 0.0) -> Estimate:
    """Root mean square difference of two sets' log mean power over frequencies: spectra (n, K) and (m, K), in nats.

    `least`, such as the power of rounding to grey levels, is added to the means before the logarithm. Chance
    differences count, so it comes out above 0. Rows as in `kernel_distance`. Raises `ValueError` for shapes that do not
    fit, fewer rows than groups, and values that are not finite.
    """
    logs = []
    for points in _checked(a, b, rows=1):
        groups = points.tensor_split(GROUPS)
        sums = torch.stack([group.sum(0) for group in groups])
        left = len(points) - torch.tensor([[len(group)] for group in groups]).to(points)
        means = torch.cat([points.mean(0)[None], (sums.sum(0) - sums) / left])
        logs.append(torch.log(means + least).cpu().numpy())
    return _estimate(np.sqrt(np.square(logs[0] - logs[1]).mean(1)))


def _cubic(u: Tensor, v: Tensor) -> Tensor:
    """The kernel (b)."""
    return (u @ v.mT / u.shape[1] + 1) ** 3


def _minus_length(u: Tensor, v: Tensor) -> Tensor:
    """The kernel of (c)."""
    return -torch.cdist(u, v, compute_mode="use_mm_for_euclid_dist")


def _estimate(every: np.ndarray) -> Estimate:
    """The value and its interval, of a value from all points and from those without each group: (1 + G,)."""
    return Estimate.from_row(jackknife(every[0], every[1:]))


@torch.no_grad()
def _every(
    a: Points,
    b: Points,
    kernel: Callable[[Tensor, Tensor], Tensor],
    centre: bool = False,
    together: tuple[int, int] = (1, 1),
) -> np.ndarray:
    """Equation (a) of all points, then without each group: (1 + G,).

    `centre` takes a common mean out first, for kernels that do not change but by rounding.
    """
    a, b = _checked(a, b, rows=2)
    for points, unit in zip((a, b), together, strict=True):
        if unit > 1 and (len(points) % (GROUPS * unit) or len(points) == GROUPS * unit):
            raise ValueError(f"{len(points)} points, {unit} of which belong together, do not make {GROUPS} groups")
    if centre:
        mean = torch.cat([a, b]).mean(0)
        a, b = a - mean, b - mean
    own = [_all_and_without(_sums(x, x, kernel, unit), x) for x, unit in zip((a, b), together, strict=True)]
    (aa, n), (bb, m) = own
    ab, _ = _all_and_without(_sums(a, b, kernel), a)
    return aa / (n * (n - together[0])) + bb / (m * (m - together[1])) - 2 * ab / (n * m)


def _checked(a: Points, b: Points, rows: int) -> tuple[Tensor, Tensor]:
    """Both sets in float64, with at least `rows` points in each group."""
    a, b = to_points(a), to_points(b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"points of {a.shape[1]} and of {b.shape[1]} dimensions have no distance")
    if min(len(a), len(b)) < rows * GROUPS:
        raise ValueError(f"{GROUPS} groups of {len(a)} and {len(b)} points: it takes {rows} in each")
    return a, b


def _sums(a: Tensor, b: Tensor, kernel: Callable[[Tensor, Tensor], Tensor], unit: int = 1) -> np.ndarray:
    """Sums of the kernel over pairs of groups, (G, G); where `b` is `a`, without those among `unit` points in a row."""
    which = torch.arange(len(b), device=b.device) // unit
    columns, start = a.new_zeros(GROUPS, len(b)), 0
    for g, group in enumerate(a.tensor_split(GROUPS)):
        for rows in group.split(max(1, PAIRS // len(b))):
            values = kernel(rows, b)
            if b is a:
                values[which[start : start + len(rows), None] == which] = 0
            columns[g] += values.sum(0)
            start += len(rows)
    return torch.stack([part.sum(1) for part in columns.tensor_split(GROUPS, 1)], 1).cpu().numpy()


def _all_and_without(sums: np.ndarray, points: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The sum over all pairs, then that without each of G groups; and how many of `points` are left: both (1 + G,)."""
    without = sums.sum() - sums.sum(0) - sums.sum(1) + sums.diagonal()
    sizes = np.array([len(group) for group in points.tensor_split(GROUPS)])
    return np.append(sums.sum(), without), np.append(len(points), len(points) - sizes).astype(float)


def to_points(points: Points) -> Tensor:
    """`points` (n, d) in float64. Raises `ValueError` for another shape and for values that are not finite."""
    points = to_float64(points)
    if points.ndim != 2 or 0 in points.shape:
        raise ValueError(f"points are (n, d) with n and d above 0, not {tuple(points.shape)}")
    if not bool(points.isfinite().all()):
        raise ValueError("points hold values that are not finite")
    return points


def gaussian_mmd(z: Tensor) -> Tensor:
    """The squared distance (a) of a batch `z` (B, D) from N(0, I), with (d) in place of a second sample: a scalar.

    The mean over kernels with s^2 = D times each of SCALES. Unbiased over independent rows, so below 0 about half the
    time where these are N(0, I). Differentiable; in the type of `z`, half precision widened, also under autocast. Time
    and memory O(B^2). Raises `ValueError` for another shape and fewer than two rows.
    """
    if z.ndim != 2 or len(z) < 2 or not z.shape[1]:
        raise ValueError(f"a batch is (B, D) with B above 1 and D above 0, not {tuple(z.shape)}")
    count, dims = z.shape
    with torch.autocast(z.device.type, enabled=False):
        z = z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
        norms = z.square().sum(1)
        # From differences: products of vectors far from 0 lose all digits of float32, and the exponential explodes.
        apart = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist").square()
        total = z.new_zeros(())
        for s2 in (dims * scale for scale in SCALES):
            kernel = torch.exp(apart / (-2 * s2))
            within = (kernel.sum() - kernel.diagonal().sum()) / (count * (count - 1))
            across = (s2 / (s2 + 1)) ** (dims / 2) * torch.exp(norms / (-2 * (s2 + 1))).mean()
            total = total + within - 2 * across + (s2 / (s2 + 2)) ** (dims / 2)
    return total / len(SCALES)
