"""Var q(x|z) and I_q(x;z) over all pairs, against the way they are usually written: tiles of all pairs in NumPy.

    python benchmarks/aggregates.py

Ours runs on the device asked for, the usual way always on the CPU.
N = 60,000 training points of 784 pixels, M = 1,000 codes. The usual way repeats codes and means to (tile, N, D),
subtracts, squares, sums and takes exp, in NumPy's float64. For I_q it makes all N x N densities at once; that is timed
on 100 of the codes and extrapolated, as is its memory. Errors are against differences in float64 with the largest
exponent taken out, for a few codes: over the square of a pixel's range, and in nats for log q(z). That of the usual way
is nan where all weights of a code vanish.
"""

import math
import statistics

import numpy as np
import torch
from timing import matrix_rate, options, peak_memory, ratio, seconds, side_by_side, write

from paperlib.stats import aggregate_posterior

POINTS, CODES, PIXELS = 60_000, 1_000, 784
TILE = 2**26  # numbers in an array of (codes, N, D): 0.5 GiB


def main() -> None:
    asked = options(__doc__)
    points, codes = (3_000, 100) if asked.quick else (POINTS, CODES)
    columns = ["quantity", "dimensions", "deviation", "s", "usual (s)", "times", "GiB", "usual (GiB)"]
    limit = 4 * points * codes * PIXELS / matrix_rate(asked.device)
    notes = [
        f"Var q where all points weigh: two products of weights and pixels alone take {limit:.2f} s at the matrix rate",
        f"N = {points:,}; {codes:,} codes for Var q, all N for I_q, whose usual way is extrapolated from 100",
        "GiB: held at most beyond what was held before; errors: Var q over a squared pixel range, log q(z) in nats",
    ]
    write("aggregates", [*columns, "error", "usual error"], _rows(asked, points, codes), notes, asked)


def _rows(asked, points, codes):
    cases = [(2, 0.1)] if asked.quick else [(d, s) for d in (2, 10, 50) for s in (1.0, 0.1, 0.01)]
    x = np.random.default_rng(0).integers(256, size=(points, PIXELS), dtype=np.uint8)
    for dims, std in cases:
        generator = torch.Generator().manual_seed(0)
        mean = torch.randn(points, dims, generator=generator, dtype=torch.float64)
        z = mean[:codes] + std * torch.randn(codes, dims, generator=generator, dtype=torch.float64)
        z, mean = z.to(asked.device), mean.to(asked.device)
        table = aggregate_posterior.Codes(mean, torch.full((dims,), std).log())
        yield _variance(asked, table, z, x, dims, std)
        yield _information(asked, table, dims, std)


def _variance(asked, table, z, x, dims, std):
    tensor, few, computed = torch.from_numpy(x).to(asked.device), slice(0, 20), {}
    on_cpu = z.numpy(force=True), table.mean.numpy(force=True)
    works = {
        "ours": lambda: computed.update(
            ours=aggregate_posterior.conditional(z, table, tensor).variance.numpy(force=True)
        ),
        "usual": lambda: computed.update(usual=usual_variance(*on_cpu, std, x)),
    }
    places = {"ours": asked.device, "usual": torch.device("cpu")}
    memory = [peak_memory(work, places[name]) for name, work in works.items()]
    times = side_by_side(works, asked.device, max(1, asked.rounds // 2), warm=False)
    exact = exact_variance(on_cpu[0][few], on_cpu[1], std, x)
    errors = [float(np.abs(one[few] - exact).max() / 255**2) for one in computed.values()]
    medians = [statistics.median(times[name]) for name in works]
    return ["Var q(x|z)", dims, std, *medians, ratio(times["usual"], times["ours"]), *memory, *errors]


def _information(asked, table, dims, std):
    count, draw = len(table), torch.Generator(asked.device).manual_seed(1)
    times = []
    memory = peak_memory(
        lambda: times.append(
            seconds(lambda: aggregate_posterior.mutual_information(table, generator=draw), asked.device)
        ),
        asked.device,
    )
    few = min(100, count)
    noise = torch.randn(few, dims, generator=draw, dtype=torch.float64, device=asked.device)
    z = table.mean[:few] + std * noise
    on_cpu, mean = z.numpy(force=True), table.mean.numpy(force=True)
    usual = seconds(lambda: usual_log_density(on_cpu, mean, std), asked.device) * count / few
    exact = exact_log_density(on_cpu[:20], mean, std)
    ours = aggregate_posterior.log_density(z[:20], table).numpy(force=True)
    theirs = usual_log_density(on_cpu[:20], mean, std)
    errors = [float(np.abs(one - exact).max()) for one in (ours, theirs)]
    whole = 8 * count**2 / 2**30
    return ["I_q(x;z)", dims, std, times[0], usual, usual / times[0], memory, whole, *errors]


# The usual way


def usual_weights(z, mean, std):
    """Tiles of exp(-|z - mean|^2 / 2 std^2): (tile, N) each."""
    tile = max(1, TILE // mean.size)
    for first in range(0, len(z), tile):
        part = np.repeat(z[first : first + tile, None], len(mean), axis=1)
        yield np.exp(-0.5 * np.sum(((part - mean) / std) ** 2, axis=2))


def usual_variance(z, mean, std, x):
    pixels, variances = x.astype(np.float64), []
    square = pixels**2
    with np.errstate(all="ignore"):
        for weights in usual_weights(z, mean, std):
            weights = weights / weights.sum(1, keepdims=True)
            variances.append(weights @ square - (weights @ pixels) ** 2)
    return np.concatenate(variances)


def usual_log_density(z, mean, std):
    """log q(z) in nats."""
    constant = 0.5 * mean.shape[1] * math.log(2 * math.pi * std**2)
    with np.errstate(all="ignore"):
        return np.concatenate([np.log(one.mean(1)) - constant for one in usual_weights(z, mean, std)])


# In float64, the long way


def exact_weights(z, mean, std):
    log = -0.5 * (((z[:, None] - mean) / std) ** 2).sum(2)
    top = log.max(1, keepdims=True)
    return np.exp(log - top), top[:, 0]


def exact_variance(z, mean, std, x):
    weights, _ = exact_weights(z, mean, std)
    weights /= weights.sum(1, keepdims=True)
    pixels = x.astype(np.float64)
    return np.stack([row @ (pixels - row @ pixels) ** 2 for row in weights])


def exact_log_density(z, mean, std):
    weights, top = exact_weights(z, mean, std)
    return np.log(weights.mean(1)) + top - 0.5 * mean.shape[1] * math.log(2 * math.pi * std**2)


if __name__ == "__main__":
    main()
