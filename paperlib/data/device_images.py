"""A data set on the device that trains: uint8 images, scaled batch by batch, so that no pixel is widened in advance."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from paperlib.data import datasets
from paperlib.system.devices import to_device

MOST_BYTES = 4 * 2**30  # all of LSUN at 64 pixels is 37 GB


@dataclass(frozen=True)
class Images:
    """Images uint8 (N, S, S, C), labels (N,) or None; a NumPy array as `train` is read a batch at a time."""

    dataset: datasets.Dataset
    train: Tensor | np.ndarray
    labels: Tensor | None
    held_out: Tensor
    held_out_labels: Tensor | None

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1

    @property
    def device(self) -> torch.device:
        return self.held_out.device

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, S, S)."""
        side, _, channels = self.train.shape[1:]
        return channels, side, side

    def batch(self, rows: Tensor) -> Tensor:
        """Training images, uint8 (B, S, S, C) on the device, of int64 rows (B,)."""
        if torch.is_tensor(self.train):
            return self.train[to_device(rows, self.device)]
        order = rows.cpu().argsort()  # a disk likes to be read in its own order
        images = torch.from_numpy(self.train[rows.cpu()[order].numpy()])
        return to_device(images[order.argsort()], self.device)

    def to_float(self, images: Tensor) -> Tensor:
        """(B, C, S, S) in [-1, 1] of uint8 (B, S, S, C)."""
        return datasets.to_float(images, self.dataset.levels)

    def to_uint8(self, x: Tensor) -> Tensor:
        """The inverse of `to_float`, on the CPU."""
        return torch.from_numpy(datasets.to_uint8(x, self.dataset.levels))

    def __repr__(self) -> str:
        channels, side, _ = self.shape
        colour = "grey" if channels == 1 else "colour"
        counts = f"{len(self.train):,} training and {len(self.held_out):,} held-out images"
        if not len(self.train):
            counts = "no images at hand"
        return f"{self.dataset.name}: {counts}, {side} x {side} pixels, {colour}, {self.dataset.levels} levels"


def load(dataset: datasets.Dataset, device: torch.device | str, *, training_set: bool = True) -> Images:
    """`dataset` on `device`; training images of more than `MOST_BYTES`, or without `training_set`, stay on disk."""

    def moved(array: np.ndarray | None) -> Tensor | None:
        return None if array is None else torch.from_numpy(np.array(array)).to(device)

    train, held_out = dataset.train, dataset.held_out
    images = moved(train.images) if training_set and train.images.nbytes <= MOST_BYTES else train.images
    return Images(dataset, images, moved(train.labels), moved(held_out.images), moved(held_out.labels))
