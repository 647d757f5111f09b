"""Several processes that train as one would: the same noise for the same samples, and sums over all.

Each of `world` processes has a slice of every batch. All draw the noise of the whole batch, from equal streams, and
keep their slice; so it is the noise that one process draws, and a training can go on with another number of processes.
Outside `share`, which `train.fit` puts around the loss, and with one process, the functions below are torch's own.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from paperlib.system.errors import UserError

_place = (0, 1)  # rank and world within `share`


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Within, the processes that torchrun started know of each other: by NCCL for "cuda", by gloo for "cpu"."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(f"WORLD_SIZE is set, but not {', '.join(missing)}: start by torchrun, or unset WORLD_SIZE")
    backend = "gloo"
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)
        backend = "nccl"
    dist.init_process_group(backend, timeout=timedelta(minutes=30))  # others wait while the first one evaluates
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """Which process this is, from 0, and how many there are: (0, 1) where there is one."""
    several = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if several else (0, 1)


@contextmanager
def share(rank: int, world: int) -> Iterator[None]:
    """Within, the first dimension of what is drawn is this process's slice of a batch of `world` equal slices."""
    global _place
    before, _place = _place, (rank, world)
    try:
        yield
    finally:
        _place = before


def randn(shape: Sequence[int], **options: Any) -> Tensor:
    """`torch.randn` of the samples of this process; `options` are torch's. With a generator, torch's own."""
    return _drawn(torch.randn, shape, options)


def rand(shape: Sequence[int], **options: Any) -> Tensor:
    """`torch.rand` likewise."""
    return _drawn(torch.rand, shape, options)


def randint(high: int, shape: Sequence[int], **options: Any) -> Tensor:
    """`torch.randint` from 0 likewise."""
    return _drawn(lambda size, **options: torch.randint(high, size, **options), shape, options)


def _drawn(draw: Any, shape: Sequence[int], options: dict[str, Any]) -> Tensor:
    rank, world = _place
    if world == 1 or options.get("generator") is not None:
        return draw(tuple(shape), **options)
    count = shape[0]
    return draw((world * count, *shape[1:]), **options)[rank * count : (rank + 1) * count]


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` whose mask belongs to the samples."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        return x * (rand(x.shape, device=x.device) >= self.p) / (1 - self.p)


def mean(value: Tensor) -> Tensor:
    """The mean over processes within `share`, without gradient; else `value`."""
    if _place[1] == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / _place[1]


def gathered(z: Tensor) -> Tensor:
    """All processes' `z` (B, ...) within `share`, (world B, ...), with gradients; else `z`.

    A loss that is no mean over samples is then the same function of all z in each process, and the mean of gradients
    that DistributedDataParallel takes is the gradient of that function.
    """
    if _place[1] == 1:
        return z
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(z.contiguous()))
