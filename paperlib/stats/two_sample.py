"""How far apart two sets of points lie, with an interval.

Sets a (n, d) and b (m, d) are samples of two distributions. Their squared distance under a kernel k is

    (a)  E k(u, u') + E k(v, v') - 2 E k(u, v),   u, u' of the first and v, v' of the second, all independent,

estimated without bias by means over all pairs, a point and itself left out, so it may come out below 0. Two kernels:

    (b)  k(u, v) = (u.v / d + 1)^3     `kernel_distance`, the KID of Binkowski et al. 2018 (arXiv 1801.01401)
    (c)  k(u, v) = -|u - v|            `energy_distance`, 2 E|u - v| - E|u - u'| - E|v - v'|

The kernel (b) sees moments up to the third and nothing else, (c) all that differs.

Intervals come from a jackknife. Both sets are cut into G groups; with D_g the estimate from all points but those of
the g-th group of either set,

    (d)  D +- t s,   s^2 = (G - 1) / G sum_g (D_g - mean of D_g)^2,

t Student's 97.5 % point for G - 1 degrees of freedom. It costs no second kernel: D_g takes nothing but the sums of k
over pairs of groups. A bootstrap will not do. It draws points twice, their pairs put k(u, u) into a mean that is to be
without it, and every resample comes out too far by about [E k(u, u) - E k(u, u')] / n for each set, which near equality
is no less than the estimate's own error. For equal distributions s^2 is twice the variance on average, so (d) hardly
ever lies above 0 where there is nothing to find; where few directions carry all variance it may lie below 0 one time in
fifteen.

A batch z can be held against N(0, I) itself, `gaussian_mmd`: for k(u, v) = exp(-|u - v|^2 / (2 s^2)) the integrals are
those of a product of Gaussians in D dimensions, u fixed or u, v of N(0, I),

    (e)  E_v k(u, v) = (s^2 / (s^2 + 1))^(D/2) exp(-|u|^2 / (2 (s^2 + 1))),   E_uv k(u, v) = (s^2 / (s^2 + 2))^(D/2):

k is (2 pi s^2)^(D/2) times the density of N(v, s^2 I) at u. Averaging over v adds 1 to s^2 in the density, at u and
mean 0; averaging over u adds 1 again, at 0.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from paperlib.runs.estimate import Estimate
from paperlib.stats.intervals import Points, jackknife

PAIRS = 2**22  # of points, handled at a time: 32 MiB in float64


# Two samples


def kernel_distance(a: Points, b: Points, *, groups: int = 20, together: tuple[int, int] = (1, 1)) -> Estimate:
    """The squared distance (a) of two sets of features under the polynomial kernel (b): (n, d) and (m, d).

    In float64, time O((n + m)^2 d), memory bounded. The kernel wants entries of order 1 (see `features.Extractor`); in
    which unit decides how much the third moments count.

    The interval (d) takes consecutive rows as a group: the rows of each set must be in random order, or, where some
    depend on each other, lie in one group. `together` says how many consecutive rows of either set belong together,
    such as late states of one chain: pairs among them are left out as a row's pair with itself is, so that the value
    stays unbiased. The sets must be independent of one another.
    Raises `ValueError` for shapes that do not fit, fewer than two groups, fewer than two rows a group, rows that belong
    together in two groups, and values that are not finite.
    """
    return _estimate(_every(a, b, _cubic, groups, together=together))


def energy_distance(a: Points, b: Points, *, groups: int = 20) -> Estimate:
    """The energy distance (c) of two sets of points, (n, d) and (m, d), in their unit: 0 for equal distributions only.

    Rows, cost, interval and errors as in `kernel_distance`.
    """
    return _estimate(_every(a, b, _minus_length, groups, centre=True))


def kernel_distance_ratio(a: Points, b: Points, reference: Points, *, groups: int = 20) -> Estimate:
    """The `kernel_distance` of `a` to a reference over that of `b`: features (n, d), (m, d) and (r, d).

    The jackknife leaves the g-th group of all three out, so that what the reference does to both cancels. Means little
    where the second distance is within its interval of 0. Raises as there.
    """
    every_a, every_b = (_every(points, reference, _cubic, groups) for points in (a, b))
    return _estimate(every_a / every_b)


def spectral_distance(a: Points, b: Points, *, least: float = 0.0, groups: int = 20) -> Estimate:
    """Root mean square difference of two sets' log mean power over frequencies: spectra (n, K) and (m, K), in nats.

    `least`, such as the power of rounding to grey levels, is added to the means before the logarithm. 0 for equal
    means; chance differences count too, so it comes out above 0, as sets of photographs show. Interval by (d), rows as
    in `kernel_distance`. Raises `ValueError` for shapes that do not fit and for fewer rows than groups.
    """
    a, b = to_points(a), to_points(b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"spectra of {a.shape[1]} and of {b.shape[1]} frequencies have no distance")
    if groups < 2 or min(len(a), len(b)) < groups:
        raise ValueError(f"{groups} groups of {len(a)} and {len(b)} spectra: it takes 2 groups, and 1 in each")
    logs = []
    for points in (a, b):
        sums = torch.stack([part.sum(0) for part in points.tensor_split(groups)])
        sizes = torch.tensor([len(part) for part in points.tensor_split(groups)], dtype=points.dtype)[:, None]
        means = torch.cat([points.mean(0)[None], (sums.sum(0) - sums) / (len(points) - sizes.to(points.device))])
        logs.append(torch.log(means + least).cpu().numpy())
    return _estimate(np.sqrt(np.square(logs[0] - logs[1]).mean(1)))


def _cubic(u: Tensor, v: Tensor) -> Tensor:
    """The kernel (b)."""
    return (u @ v.mT / u.shape[1] + 1) ** 3


def _minus_length(u: Tensor, v: Tensor) -> Tensor:
    """The kernel of (c)."""
    return -torch.cdist(u, v, compute_mode="use_mm_for_euclid_dist")


def _estimate(every: np.ndarray) -> Estimate:
    """The value and its interval (d), of a value from all points and from those without each group: (1 + G,)."""
    return Estimate.from_row(jackknife(every[0], every[1:]))


@torch.no_grad()
def _every(
    a: Points,
    b: Points,
    kernel: Callable[[Tensor, Tensor], Tensor],
    groups: int,
    centre: bool = False,
    together: tuple[int, int] = (1, 1),
) -> np.ndarray:
    """Equation (a) of all points, then without each group: (1 + G,).

    `centre` takes a common mean out first, for kernels that do not change but by rounding.
    """
    a, b = to_points(a), to_points(b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"points of {a.shape[1]} and of {b.shape[1]} dimensions have no distance")
    if groups < 2 or min(len(a), len(b)) < 2 * groups:
        raise ValueError(f"{groups} groups of {len(a)} and {len(b)} points: it takes 2 groups, and 2 points in each")
    for points, unit in zip((a, b), together, strict=True):
        if unit > 1 and (len(points) % (groups * unit) or len(points) == groups * unit):
            raise ValueError(f"{len(points)} points, {unit} of which belong together, do not make {groups} groups")
    if centre:
        mean = torch.cat([a, b]).mean(0)
        a, b = a - mean, b - mean
    own = [_all_and_without(_sums(x, x, kernel, groups, unit), x) for x, unit in zip((a, b), together, strict=True)]
    (aa, n), (bb, m) = own
    ab, _ = _all_and_without(_sums(a, b, kernel, groups), a)
    return aa / (n * (n - together[0])) + bb / (m * (m - together[1])) - 2 * ab / (n * m)


def _sums(a: Tensor, b: Tensor, kernel: Callable[[Tensor, Tensor], Tensor], groups: int, unit: int = 1) -> np.ndarray:
    """Sums of the kernel over pairs of groups, (G, G); where `b` is `a`, without those among `unit` points in a row."""
    which = torch.arange(len(b), device=b.device) // unit
    columns, start = a.new_zeros(groups, len(b)), 0
    for g, group in enumerate(a.tensor_split(groups)):
        for rows in group.split(max(1, PAIRS // len(b))):
            values = kernel(rows, b)
            if b is a:
                values[which[start : start + len(rows), None] == which] = 0
            columns[g] += values.sum(0)
            start += len(rows)
    return torch.stack([part.sum(1) for part in columns.tensor_split(groups, 1)], 1).cpu().numpy()


def _all_and_without(sums: np.ndarray, points: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The sum over all pairs, then that without each of G groups; and how many of `points` are left: both (1 + G,)."""
    without = sums.sum() - sums.sum(0) - sums.sum(1) + sums.diagonal()
    sizes = np.array([len(group) for group in points.tensor_split(len(sums))])
    return np.append(sums.sum(), without), np.append(len(points), len(points) - sizes).astype(float)


def to_points(points: Points) -> Tensor:
    """`points` (n, d) in float64. Raises `ValueError` for another shape and for values that are not finite."""
    points = to_float64(points)
    if points.ndim != 2 or 0 in points.shape:
        raise ValueError(f"points are (n, d) with n and d above 0, not {tuple(points.shape)}")
    if not bool(points.isfinite().all()):
        raise ValueError("points hold values that are not finite")
    return points


def to_float64(values: Points) -> Tensor:
    """`values` as a float64 tensor without gradient, on the device where they are."""
    if not torch.is_tensor(values):
        values = torch.from_numpy(np.array(values, dtype=np.float64))  # a copy: torch warns of read-only memory
    return values.detach().double()


# A batch and the standard Gaussian


def gaussian_mmd(z: Tensor, scales: Sequence[float] = (0.25, 1, 4)) -> Tensor:
    """The squared distance (a) of a batch `z` (B, D) from N(0, I), with (e) in place of a second sample: a scalar.

    The mean over Gaussian kernels with s^2 = D times each of `scales`, as |u - v|^2 is 2 D on average under N(0, I).
    Unbiased over independent rows, so below 0 about half the time where these are N(0, I). Differentiable; in the type
    of `z`, half precision widened, also under autocast. Time and memory O(B^2). Raises `ValueError` for another shape,
    fewer than two rows, and scales that are none or not above 0.
    """
    if z.ndim != 2 or len(z) < 2 or not z.shape[1]:
        raise ValueError(f"a batch is (B, D) with B above 1 and D above 0, not {tuple(z.shape)}")
    if not scales or not all(0 < scale < math.inf for scale in scales):
        raise ValueError(f"scales are positive numbers, not {tuple(scales)}")
    count, dims = z.shape
    with torch.autocast(z.device.type, enabled=False):
        z = z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
        norms = z.square().sum(1)
        apart = norms[:, None] + norms - 2 * z @ z.mT
        total = z.new_zeros(())
        for s2 in (dims * scale for scale in scales):
            kernel = torch.exp(apart / (-2 * s2))
            within = (kernel.sum() - kernel.diagonal().sum()) / (count * (count - 1))
            across = (s2 / (s2 + 1)) ** (dims / 2) * torch.exp(norms / (-2 * (s2 + 1))).mean()
            total = total + within - 2 * across + (s2 / (s2 + 2)) ** (dims / 2)
    return total / len(scales)
