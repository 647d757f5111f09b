"""The aggregate posterior q(z) of N codes, and the distribution q(x|z) that a decoder is asked to match.

With the encoder q(z|x_n) = N(mean_n, diag exp(2 log_std_n)) at every training point,

    q(z)   = 1/N sum_n q(z|x_n)                                the aggregate posterior
    q(x|z) = sum_n w_n(z) delta(x - x_n),  w_n(z) = q(z|x_n) / sum_m q(z|x_m)
    I_q    = E_n E_{z~q(z|x_n)} [log q(z|x_n) - log q(z)]      never above log N

Over all N x M pairs, in nats. Exponents come from float64 matrix products, a tile at a time. A code for which few
points weigh (within `REACH` nats of the heaviest) is finished from differences, (z - mean) and (x - E[x]), so nothing
cancels. Where many weigh, sums over all points are matrix products, in float32 when the result can bear it:
E[(x-c)^2] - (E[x]-c)^2 loses a share E[(x-c)^2] / Var of the accuracy. So the heaviest points of a code stay out of the
products and are added by differences from m = E[x], as are the sums S over the others, by
S[(x-m)^2] = S[(x-c)^2] - 2 (m-c) S[x-c] + (m-c)^2 S[1], which the others alone can spoil. Each entry is checked for it,
and those that lost too much are done again in float64, about other centres c, and at last from differences.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from paperlib.nn.likelihoods import LOG_2PI, gaussian_log_prob, sample_gaussian

REACH = 80.0  # nats; all points further below the heaviest have less than N exp(-80) of the weight
FLOOR = 2 * math.exp(-REACH)  # weights up to here, relative to the heaviest, count as none
ROWS, COLUMNS = 1024, 2048  # a tile of pairs: 16 MiB in float64, which stays in the cache
FEW = 512  # points, or N / 128: up to here differences beat matrix products
NEAREST = 8  # points of a code that stay out of matrix products, each the heaviest of PART
PART = 128
GATHERED = 2**20  # numbers gathered at a time for differences: 8 MiB
LARGEST = 1e50  # of a code, so that its square over a variance does not overflow
ORDINARY = 2.0**20  # ranges of a pixel from 1 / ORDINARY to ORDINARY have float32 squares; others are scaled first

Tiles = Iterator[tuple[slice, Tensor]]  # some points, and the weights (M, C) of these for M codes


@dataclass(frozen=True)
class Codes:
    """The encoded training set: `mean` (N, D) and `log_std` that broadcasts to it, in float64; `codes[rows]` a part.

    Raises `ValueError` for shapes that do not fit, no points, and values that are not finite (means up to 1e50,
    |log_std| up to 100).
    """

    mean: Tensor
    log_std: Tensor

    def __post_init__(self) -> None:
        mean = self.mean.detach().double().contiguous()
        if mean.ndim != 2 or 0 in mean.shape:
            raise ValueError(f"code means are (N, D) with N and D above 0, not {tuple(mean.shape)}")
        log_std = torch.as_tensor(self.log_std, device=mean.device).detach().double()
        try:
            log_std = log_std.expand(mean.shape).contiguous()
        except RuntimeError as error:
            shapes = f"{tuple(log_std.shape)} does not broadcast to means {tuple(mean.shape)}"
            raise ValueError(f"log_std {shapes}") from error
        if not bool((mean.abs() <= LARGEST).all() & (log_std.abs() <= 100).all()):
            raise ValueError("code means or stds are not finite, or absurdly large")
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "log_std", log_std)

    def __len__(self) -> int:
        return len(self.mean)

    def __getitem__(self, part: slice | Tensor) -> "Codes":
        return Codes(self.mean[part], self.log_std[part])


@dataclass(frozen=True)
class Conditional:
    """q(x|z) at M codes, float64. Shapes: P is the shape of one training point, K labels.

    `mean` E_q[x|z] (M, *P); `variance` Var_q[x|z] per pixel (M, *P), or None where not asked for; `trace` its sum (M,);
    `log_q` log q(z) in nats (M,); `ess` the effective sample size 1 / sum w^2 (M,), from 1 to N; `labels` the label
    mixture (M, K), or None without labels.
    """

    mean: Tensor
    variance: Tensor | None
    trace: Tensor
    log_q: Tensor
    ess: Tensor
    labels: Tensor | None


class Information(NamedTuple):
    """I_q(x;z), its standard error over training points, its ceiling log N; all in nats."""

    nats: float
    standard_error: float
    ceiling: float


@torch.no_grad()
def log_density(z: Tensor, codes: Codes) -> Tensor:
    """log q(z) in nats at codes `z` (M, D): `(M,)`, float64. O(M N D) time, memory bounded.

    Right to 1e-6 nats, or to float64's own 15 digits where |log q| is beyond 1e9 (a code very far from all data).
    Raises `ValueError` for codes of another width, or not finite.
    """
    z, table = _checked(z, codes), _Table(codes)
    result = z.new_empty(len(z))
    for block in _slices(len(z), ROWS):
        top, total = _peak_and_total(z[block], table)
        result[block] = top + total.log() - math.log(len(codes))
    return result


def _peak_and_total(z: Tensor, table: "_Table") -> tuple[Tensor, Tensor]:
    """The largest exponent of codes z (M, D) and the sum of exp(exponent - largest) over all points, (M,) each."""
    top, many, bundles = _heavy(z, table, table.width)
    total = torch.empty_like(top)
    for rows, _, _, peak, sums in bundles:
        top[rows], total[rows] = peak, sums
    if len(many):
        total[many] = sum(w.sum(1) for _, w in _weights(z[many], table, top[many]))
    return top, total


@torch.no_grad()
def log_weights(z: Tensor, codes: Codes) -> Tensor:
    """log w_n(z) in nats for codes `z` (M, D), each row's exp sums to 1: `(M, N)` at once, in float64."""
    return torch.log_softmax(_Table(codes).differences(_checked(z, codes), slice(None)), dim=1)


@torch.no_grad()
def heaviest(z: Tensor, codes: Codes, k: int) -> tuple[Tensor, Tensor]:
    """The `k` training points that codes `z` (M, D) stand for, heaviest first: indices and w_n(z), both `(M, k)`.

    Raises `ValueError` for `k` outside 1 .. N.
    """
    if not 1 <= k <= len(codes):
        raise ValueError(f"the {k} heaviest of {len(codes)} points")
    z, table = _checked(z, codes), _Table(codes)
    weights = z.new_empty(len(z), k)
    indices = torch.empty_like(weights, dtype=torch.long)
    for block in _slices(len(z), max(1, min(ROWS, GATHERED // (k * table.width)))):
        best = z.new_empty(len(z[block]), 0)
        points = indices.new_empty(len(z[block]), 0)
        exact = table.is_coarse(z[block])
        for columns in _slices(len(codes), COLUMNS):
            tile = table.exponents(z[block], columns, exact)
            value, place = tile.topk(min(k, tile.shape[1]), dim=1)
            best, points = torch.cat([best, value], 1), torch.cat([points, place + columns.start], 1)
            best, place = best.topk(min(k, best.shape[1]), dim=1)
            points = points.gather(1, place)
        exponents, place = table.differences(z[block], points).sort(dim=1, descending=True, stable=True)
        indices[block] = points.gather(1, place)
        # Not by way of log q(z), of which at a far code so many digits are whole nats that the weights are lost.
        top, total = _peak_and_total(z[block], table)
        weights[block] = (exponents - top[:, None]).exp() / total[:, None]
    return indices, weights


@torch.no_grad()
def conditional(
    z: Tensor, codes: Codes, x: Tensor, labels: Tensor | None = None, *, per_pixel: bool = True
) -> Conditional:
    """Mean and variance of q(x|z) at codes `z` (M, D), its labels, effective size, and log q(z).

    `x` (N, ...) are the training points in the order of `codes`, bool, uint8 or floating, in whatever unit the results
    should have; they may lie on another device. `labels` (N,) are integers from 0 to K - 1. Without `per_pixel` only
    the trace of the variance is made, in about half the time.

    Variances are right to 1e-5 relative, down to 1e-28 of the pixels' range squared; means to 1e-6 of that range. Where
    the range is beyond 2^-20 to 2^20, the points are copied in float64 and scaled. Raises `ValueError` for shapes or
    labels that do not fit.
    """
    z, table = _checked(z, codes), _Table(codes)
    if len(x) != len(codes) or (labels is not None and labels.shape != (len(codes),)):
        raise ValueError(f"{len(codes)} codes, but {len(x)} points or other labels")
    if labels is not None and int(labels.min()) < 0:
        raise ValueError("labels are integers from 0")
    one_hot = z.new_empty(len(x), 0)
    if labels is not None:
        one_hot = torch.nn.functional.one_hot(labels.to(z.device, torch.long)).double()
    flat = x.detach().reshape(len(x), -1)
    flat = flat.to(torch.uint8) if flat.dtype == torch.bool else flat
    flat, unit = _in_ordinary_units(flat)
    count, pixels = len(z), flat.shape[1]
    result = Conditional(
        mean=z.new_empty(count, pixels),
        variance=z.new_empty(count, pixels if per_pixel else 1),
        trace=z.new_empty(count),
        log_q=z.new_empty(count),
        ess=z.new_empty(count),
        labels=z.new_empty(count, one_hot.shape[1]),
    )
    for block in _slices(count, ROWS):
        top, many, bundles = _heavy(z[block], table, max(table.width, pixels))
        for rows, points, weights, peak, total in bundles:
            result.log_q[rows + block.start] = peak + total.log() - math.log(len(codes))
            _fill_by_differences(result, rows + block.start, points, weights, flat, one_hot)
        if len(many):
            _fill_by_products(result, many + block.start, z[block][many], table, top[many], flat, one_hot)
    variance = result.variance.mul_(unit).mul_(unit)
    return replace(
        result,
        mean=result.mean.mul_(unit).reshape(count, *x.shape[1:]),
        variance=variance.reshape(count, *x.shape[1:]) if per_pixel else None,
        trace=variance.sum(1),
        labels=None if labels is None else result.labels,
    )


def _in_ordinary_units(x: Tensor) -> tuple[Tensor, float]:
    """Points (N, P) in a unit in which squares of differences fit float32, and that unit, a power of 2."""
    if not x.is_floating_point() or not x.numel():
        return x, 1.0
    extent = float(x.amax().double() - x.amin().double())
    if extent == 0 or 1 / ORDINARY <= extent <= ORDINARY:
        return x, 1.0
    unit = 2.0 ** (math.frexp(extent)[1] - 1)
    return x.double() / unit, unit


def _fill_by_differences(
    result: Conditional, rows: Tensor, points: Tensor, weights: Tensor, x: Tensor, one_hot: Tensor
) -> None:
    """The rows (R,) of `result` for which few `points` (R, K) weigh, by `weights` (R, K) that sum to 1."""
    result.ess[rows] = 1 / weights.square().sum(1)
    result.labels[rows] = (weights[:, None] @ one_hot[points])[:, 0]
    near = x[points.to(x.device)].to(weights.device, torch.float64)
    base = near[:, :1].clone()  # so that where all agree the variance is exactly 0
    shift = weights[:, None] @ near.sub_(base)
    result.mean[rows] = (base + shift)[:, 0]
    near.sub_(shift).square_()
    near = near if result.variance.shape[1] == near.shape[2] else near.sum(2, keepdim=True)
    result.variance[rows] = (weights[:, None] @ near)[:, 0]


@torch.no_grad()
def mutual_information(
    codes: Codes, *, points: int | None = None, generator: torch.Generator | None = None
) -> Information:
    """I_q(x;z) in nats, by a code from each training point, or from `points` of them, against all N.

    Unbiased for the N points at hand, taken as equally likely; for the data behind them it is a lower bound that stops
    at log N. The standard error is over the points drawn (nan for one of several). `generator` is on the device of the
    codes. Raises `ValueError` for `points` outside 1 .. N.
    """
    points, part = len(codes) if points is None else points, codes
    if not 1 <= points <= len(codes):
        raise ValueError(f"{points} of {len(codes)} points")
    if points < len(codes):
        part = codes[torch.randperm(len(codes), generator=generator, device=codes.mean.device)[:points]]
    z = sample_gaussian(part.mean, part.log_std, generator=generator)
    gain = gaussian_log_prob(z, part.mean, part.log_std) - log_density(z, codes)
    error = gain.std().item() / math.sqrt(len(part)) if len(part) > 1 else math.nan
    return Information(gain.mean().item(), 0.0 if len(codes) == 1 else error, math.log(len(codes)))


def _checked(z: Tensor, codes: Codes) -> Tensor:
    if z.ndim != 2 or z.shape[1] != codes.mean.shape[1]:
        raise ValueError(f"codes are (M, {codes.mean.shape[1]}), not {tuple(z.shape)}")
    z = z.detach().to(codes.mean)
    if not bool((z.abs() <= LARGEST).all()):
        raise ValueError("codes are not finite, or absurdly large")
    return z


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


class _Table:
    """The codes as the right-hand side of a matrix product that gives log q(z|x_n).

    -1/2 sum_d ((z_d - m_d) / s_d)^2 + log normaliser is linear in (z^2, z, 1), taken about the centre of the means.
    """

    def __init__(self, codes: Codes) -> None:
        self.codes = codes
        self.width = codes.mean.shape[1]
        self.centre = codes.mean.mean(0)
        mean = codes.mean - self.centre
        self.inverse = torch.exp(-codes.log_std)
        precision = self.inverse.square()
        scaled = precision * mean
        self.norm = -codes.log_std.sum(1) - 0.5 * self.width * LOG_2PI
        offset = self.norm - 0.5 * (scaled * mean).sum(1)
        ones = torch.ones_like(offset)
        self.features = torch.cat([precision, scaled, offset[:, None], ones[:, None]], 1)
        self.farthest, self.sharpest = mean.abs().amax(0), precision.amax(0)
        self.tile = mean.new_empty(ROWS * COLUMNS)  # new memory for each tile would cost more than what is put there

    def rounding(self, z: Tensor) -> Tensor:
        """Bound `(M,)` of the rounding, in nats, of a matrix product's exponents."""
        terms = self.sharpest * ((z - self.centre).abs() + self.farthest).square()
        return 2 * torch.finfo(z.dtype).eps * terms.sum(1)

    def is_coarse(self, z: Tensor) -> bool:
        return bool((self.rounding(z) > 1e-7).any())

    def exponents(self, z: Tensor, columns: slice, exact: bool, top: Tensor | None = None) -> Tensor:
        """log q(z|x_n) - top: (M, D) to (M, C), up to the next call; `exact` by differences, slowly."""
        if exact:
            tile = self.differences(z, columns)
            return tile if top is None else tile.sub_(top[:, None])
        z = z - self.centre
        ones = torch.ones_like(z[:, :1])
        shift = torch.zeros_like(ones) if top is None else -top[:, None]
        left, right = torch.cat([-0.5 * z.square(), z, ones, shift], 1), self.features[columns]
        out = self.tile[: len(left) * len(right)].view(len(left), len(right))
        return torch.mm(left, right.T, out=out)

    def differences(self, z: Tensor, points: slice | Tensor) -> Tensor:
        """log q(z|x_n) from (z - mean), for a slice of points or each code's own (M, K): (M, K)."""
        result = 0
        for mean, inverse, code in zip(self.codes.mean.T, self.inverse.T, z.T, strict=True):
            result += (code[:, None] - mean[points]).mul_(inverse[points]).square_()
        return result.mul_(-0.5).add_(self.norm[points])


def _heavy(z: Tensor, table: _Table, width: int) -> tuple[Tensor, Tensor, Iterator]:
    """For codes `z` (M, D) the largest exponents (M,), the rows for which many points weigh, and, for the others,
    bundles of (rows (R,), points (R, K), weights (R, K) that sum to 1, largest exponent (R,), sum of
    exp(exponent - largest) (R,)), small enough to gather (R, K, width).
    """
    count = len(table.codes)
    limit = max(FEW, count // 128)
    reach = REACH + 2 * table.rounding(z)
    tiles = list(_slices(count, COLUMNS))
    peaks = torch.stack([table.exponents(z, columns, False).amax(1) for columns in tiles], 1)
    top = peaks.amax(1)
    counts = torch.zeros(len(z), dtype=torch.long, device=z.device)
    hits = []
    for columns, peak in zip(tiles, peaks.T, strict=True):
        rows = ((counts <= limit) & (peak >= top - reach)).nonzero()[:, 0]
        if not len(rows):
            continue
        weighs = table.exponents(z[rows], columns, False) >= (top - reach)[rows, None]
        counts[rows] += weighs.sum(1)
        few = (counts[rows] <= limit).nonzero()[:, 0]
        row, column = weighs[few].nonzero(as_tuple=True)
        hits.append(torch.stack([rows[few[row]], column + columns.start]))
    many = (counts > limit).nonzero()[:, 0]
    if len(many) and table.is_coarse(z[many]):
        exact = [table.exponents(z[many], columns, True).amax(1) for columns in tiles]
        top[many] = torch.stack(exact).amax(0)
    return top, many, _bundles(z, table, counts, limit, torch.cat(hits, 1), width)


def _bundles(z: Tensor, table: _Table, counts: Tensor, limit: int, hits: Tensor, width: int) -> Iterator:
    """Rows with at most `limit` of the `hits` (2, Q), those with about equally many together."""
    hits = hits[:, counts[hits[0]] <= limit]
    points = hits[1, hits[0].argsort(stable=True)]
    counts = torch.where(counts <= limit, counts, 0)
    start = counts.cumsum(0) - counts
    size = 1
    while size < 2 * limit:
        alike = ((counts > size // 2) & (counts <= size)).nonzero()[:, 0]
        for part in _slices(len(alike), max(1, GATHERED // (size * width))):
            rows = alike[part]
            place = torch.arange(int(counts[rows].max()), device=z.device)
            padding = place >= counts[rows, None]
            chosen = points[(start[rows, None] + place).masked_fill(padding, 0)]
            exponents = table.differences(z[rows], chosen).masked_fill_(padding, -torch.inf)
            peak = exponents.amax(1)
            weights = exponents.sub_(peak[:, None]).exp_()
            total = weights.sum(1)
            yield rows, chosen, weights / total[:, None], peak, total
        size *= 2


def _weights(z: Tensor, table: _Table, top: Tensor, without: Tensor | None = None) -> Tiles:
    """exp(log q(z|x_n) - top), each tile in the memory of the one before; 0 at each code's points `without` (M, K)."""
    exact = table.is_coarse(z)
    for columns in _slices(len(table.codes), COLUMNS):
        # Far below, weights would be denormal numbers, which are slow; exp(-REACH) is as good as 0.
        tile = table.exponents(z, columns, exact, top).clamp_(min=-REACH).exp_()
        if without is not None:
            row, rank = ((without >= columns.start) & (without < columns.stop)).nonzero(as_tuple=True)
            tile[row, without[row, rank] - columns.start] = 0
        yield columns, tile


def _nearest(z: Tensor, table: _Table) -> Tensor:
    """About the `NEAREST` heaviest points of each code, the heaviest of parts of the list: (M, K)."""
    tops, points = [], []
    for columns in _slices(len(table.codes), COLUMNS):
        tile = table.exponents(z, columns, False)
        for part in _slices(tile.shape[1], PART):
            value, place = tile[:, part].max(1)
            tops.append(value)
            points.append(place + columns.start + part.start)
    chosen = torch.stack(tops, 1).topk(min(NEAREST, len(tops)), dim=1).indices
    return torch.stack(points, 1).gather(1, chosen)


def _fill_by_products(
    result: Conditional, rows: Tensor, z: Tensor, table: _Table, top: Tensor, x: Tensor, one_hot: Tensor
) -> None:
    """The rows (R,) of `result` for codes `z` (R, D) for which many points weigh; `top` are the largest exponents.

    Each round does again the entries whose variance is below `share` of the moments it was made of, and so mostly
    rounding. Pixels that agree at black or white for all that weighs are right in the rounds centred there.
    """
    every, per_pixel = torch.arange(x.shape[1], device=z.device), result.variance.shape[1] == x.shape[1]
    mean, variance = z.new_empty(len(z), len(every)), z.new_empty(len(z), result.variance.shape[1])
    undone, totals = torch.ones_like(variance, dtype=torch.bool), None
    nearest = _nearest(z, table)
    heavy = (table.differences(z, nearest) - top[:, None]).exp()
    for dtype, centre, share in _rounds(x):
        left = undone.any(1).nonzero()[:, 0]
        if not len(left):
            break
        pixels = undone.any(0).nonzero()[:, 0] if per_pixel else every
        about = centre().to(z.device)[pixels]
        tiles = _weights(z[left], table, top[left], nearest[left])
        first, second, *rest = _sums(tiles, x, pixels, about, dtype, one_hot, per_pixel)
        totals = totals or rest
        for part in _slices(len(left), max(1, GATHERED // (heavy.shape[1] * len(pixels)))):
            rows_here, entries = left[part], (left[part, None], pixels if per_pixel else every[:1])
            near = x[nearest[rows_here].to(x.device)][..., pixels.to(x.device)].to(z.device, torch.float64).sub_(about)
            sums = first[part], second[part], rest[0][part, None]
            shift, spread, bound = _moments(*sums, near, heavy[rows_here], per_pixel)
            mean[rows_here[:, None], pixels] = shift + about
            variance[entries] = torch.where(undone[entries], spread, variance[entries])
            undone[entries] &= spread < share * bound
    for row in undone.any(1).nonzero()[:, 0]:
        by_differences = _variance(_weights(z[row, None], table, top[row, None]), x, mean[row], per_pixel)
        variance[row, undone[row]] = by_differences[undone[row]]
    total, squares, labelled = totals
    total, squares = total + heavy.sum(1), squares + heavy.square().sum(1)
    labelled = labelled + (heavy[:, None] @ one_hot[nearest])[:, 0]
    result.mean[rows], result.variance[rows] = mean, variance
    result.log_q[rows], result.ess[rows] = top + total.log() - math.log(len(table.codes)), total.square() / squares
    result.labels[rows] = labelled / total[:, None]


def _moments(
    first: Tensor, second: Tensor, total: Tensor, near: Tensor, heavy: Tensor, per_pixel: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (R, P), variance (R, P) or trace (R, 1), and the moment whose rounding the variance carries.

    `first` (R, P), `second` and `total` (R, 1) are sums about a centre over all points but K of each code, which are at
    `near` (R, K, P) from that centre, destroyed here, and weigh `heavy` (R, K). The error of S[(x-m)^2], for products
    right to e, is at most 3 e times the greater of S[(x-c)^2] and (m-c)^2 S[1].
    """
    whole, weights = total + heavy.sum(1, keepdim=True), heavy[:, None]
    base = near[:, :1].clone()  # so that where all agree the variance is exactly 0
    near -= base
    base = base[:, 0]
    shift = (first - total * base + (weights @ near)[:, 0]) / whole
    mean = base + shift
    by_differences = (weights @ near.sub_(shift[:, None]).square_())[:, 0]
    square, cross = mean.square(), mean * first
    if not per_pixel:
        by_differences, square, cross = (values.sum(1, keepdim=True) for values in (by_differences, square, cross))
    spread = by_differences + (second - 2 * cross + total * square)
    return mean, spread / whole, torch.maximum(second, total * square) / whole


def _variance(weights: Tiles, x: Tensor, mean: Tensor, per_pixel: bool) -> Tensor:
    """Var_q[x|z] (P,) or its trace (1,) at one code, by differences from its `mean` (P,)."""
    total = squares = 0
    for columns, (w,) in weights:
        points = (w > FLOOR).nonzero()[:, 0]
        near = x[columns][points.to(x.device)].to(w.device, torch.float64)
        total += w.sum()
        squares += w[points] @ near.sub_(mean).square_()
    return (squares if per_pixel else squares.sum(0, keepdim=True)) / total


def _rounds(x: Tensor) -> Iterator[tuple[torch.dtype, Callable[[], Tensor], float]]:
    """What `_fill_by_products` tries in turn: precision, centre (P,), and the share that it needs, such that three
    times an error of 5e-7 or 1e-15 of the moments (see `_moments`) stays below 1e-5 of the variance.
    """
    sample = x[:: max(1, len(x) // 1024)]
    # Reduced precision, where it has been asked for, would be used for float32 products too.
    single = torch.get_float32_matmul_precision() == "highest" and not x.is_cuda
    if single and not torch.is_autocast_enabled("cpu"):
        yield torch.float32, lambda: sample.median(0).values, 0.2
    yield torch.float64, lambda: x.amin(0), 1e-9
    yield torch.float64, lambda: x.amax(0), 1e-9


def _sums(
    weights: Tiles, x: Tensor, pixels: Tensor, centre: Tensor, dtype: torch.dtype, one_hot: Tensor, per_pixel: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weighted sums of x - centre, its square, 1, the weight itself, and labels; in float64."""
    first = second = total = squares = labelled = 0
    for columns, w in weights:
        total = total + w.sum(1)
        squares = squares + torch.linalg.vecdot(w, w)
        labelled = labelled + w @ one_hot[columns]
        near = x[columns] if len(pixels) == x.shape[1] else x[columns][:, pixels.to(x.device)]
        weigh = w.amax(0) > FLOOR
        if 2 * int(weigh.sum()) < len(near):
            w, near = w[:, weigh], near[weigh.to(near.device)]
        # Centred before it is rounded: float64 images may differ by less than float32 can tell.
        near = near.to(w.device, torch.promote_types(near.dtype, dtype)) - centre
        near, w = near.to(dtype), w.to(dtype)
        first = first + (w @ near).double()
        near.square_()
        second = second + (w @ (near if per_pixel else near.sum(1, keepdim=True))).double()
    return first, second, total, squares, labelled
