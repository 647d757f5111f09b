"""Var q(x|z) and I_q(x;z) over all pairs, against the way they are usually written: tiles of all pairs in NumPy.

    python benchmarks/aggregates.py

N = 60,000 training points of 784 pixels, M = 1,000 codes. The tiled way takes log q(z|x_n) from squared differences in
float32, tile by tile, as a matrix of M x N x D numbers does not fit into memory; that of I_q is timed on a part of the
codes and extrapolated. Errors are relative to a computation in float64 for a few codes.
"""

import statistics

import numpy as np
import torch
from timing import options, ratio, seconds, side_by_side, write

from paperlib import aggregate

POINTS, CODES, PIXELS, TILE = 60_000, 1_000, 784, 50


def main() -> None:
    asked = options(__doc__)
    points, codes = (3_000, 100) if asked.quick else (POINTS, CODES)
    cases = [(2, 0.1)] if asked.quick else [(d, s) for d in (2, 10, 50) for s in (1.0, 0.1, 0.01)]
    x = np.random.default_rng(0).integers(256, size=(points, PIXELS), dtype=np.uint8)
    rows = []
    for dims, deviation in cases:
        generator = torch.Generator().manual_seed(0)
        mean = torch.randn(points, dims, generator=generator, dtype=torch.float64)
        table = aggregate.Codes(mean, torch.full((dims,), deviation).log())
        z = table.mean[:codes] + deviation * torch.randn(codes, dims, generator=generator, dtype=torch.float64)
        rows.append(_variance(asked, table, z, x, dims, deviation))
        rows.append(_information(asked, table, dims, deviation))
    columns = ["quantity", "dimensions", "deviation", "s", "tiled NumPy (s)", "times", "error", "error of NumPy"]
    notes = [f"N = {points:,}, {codes:,} codes for Var q, all N for I_q; tiled I_q extrapolated from 200 codes"]
    write("aggregates", columns, rows, notes, asked)


def _variance(asked, table, z, x, dims, deviation):
    tensor, few = torch.from_numpy(x), slice(0, 20)
    works = {
        "ours": lambda: aggregate.conditional(z, table, tensor),
        "tiled": lambda: tiled_variance(z.numpy(), table.mean.numpy(), deviation, x),
    }
    times = side_by_side(works, asked.device, max(1, asked.rounds // 2))
    exact = exact_variance(z[few].numpy(), table.mean.numpy(), deviation, x)
    ours, tiled = works["ours"]().variance[few].numpy(), works["tiled"]()[few]
    medians = [statistics.median(times[name]) for name in ("ours", "tiled")]
    errors = [_error(one, exact) for one in (ours, tiled)]
    return ["Var q(x|z)", dims, deviation, *medians, ratio(times["tiled"], times["ours"]), *errors]


def _information(asked, table, dims, deviation):
    count = len(table)
    draw = torch.Generator().manual_seed(1)
    ours = seconds(lambda: aggregate.mutual_information(table, generator=draw), asked.device)
    few = min(200, count)
    z = table.mean[:few] + deviation * torch.randn(few, dims, generator=draw, dtype=torch.float64)
    tiled = seconds(lambda: tiled_log_density(z.numpy(), table.mean.numpy(), deviation), asked.device) * count / few
    exact = exact_log_density(z[:20].numpy(), table.mean.numpy(), deviation)
    errors = [
        float(np.abs(found - exact).max())
        for found in (
            aggregate.log_density(z[:20], table).numpy(),
            tiled_log_density(z[:20].numpy(), table.mean.numpy(), deviation),
        )
    ]
    return ["I_q(x;z)", dims, deviation, ours, tiled, tiled / ours, *errors]


def _error(found, exact):
    return float(np.abs(found - exact).max() / exact.max())


# The usual way


def tiled_weights(z, mean, deviation):
    """Rows of q(z|x_n), up to what cancels, tile by tile of codes, in float32: (TILE, N)."""
    mean = mean.astype(np.float32)
    for first in range(0, len(z), TILE):
        part = z[first : first + TILE].astype(np.float32)
        square = np.zeros((len(part), len(mean)), np.float32)
        for d in range(mean.shape[1]):
            square += ((part[:, d, None] - mean[:, d]) / np.float32(deviation)) ** 2
        yield np.exp(-0.5 * square)


def tiled_variance(z, mean, deviation, x):
    pixels, found = x.astype(np.float32), []
    with np.errstate(all="ignore"):
        for weights in tiled_weights(z, mean, deviation):
            weights = weights / weights.sum(1, keepdims=True)
            found.append(weights @ pixels**2 - (weights @ pixels) ** 2)
    return np.concatenate(found)


def tiled_log_density(z, mean, deviation):
    """log q(z) in nats."""
    constant = 0.5 * mean.shape[1] * np.log(2 * np.pi * deviation**2)
    with np.errstate(all="ignore"):
        return np.concatenate([np.log(one.mean(1)) - constant for one in tiled_weights(z, mean, deviation)])


# In float64, the long way


def exact_weights(z, mean, deviation):
    log = -0.5 * (((z[:, None] - mean) / deviation) ** 2).sum(2)
    top = log.max(1, keepdims=True)
    return np.exp(log - top), top[:, 0]


def exact_variance(z, mean, deviation, x):
    weights, _ = exact_weights(z, mean, deviation)
    weights /= weights.sum(1, keepdims=True)
    pixels = x.astype(np.float64)
    return np.stack([row @ (pixels - row @ pixels) ** 2 for row in weights])


def exact_log_density(z, mean, deviation):
    weights, top = exact_weights(z, mean, deviation)
    return np.log(weights.mean(1)) + top - 0.5 * mean.shape[1] * np.log(2 * np.pi * deviation**2)


if __name__ == "__main__":
    main()
