"""Named data sets as uint8 arrays with explicit splits, and the only place where pixels are scaled.

Held out are of `digits` 297 of 1,797, stratified; of `photos` the patches in the right fifth of each photograph; of
`mnist` and `mnist24` the test images; of `cifar10` the last 5,000 training images; of `lsun_bedroom` and `own_images`
the last tenth, 500 at most, less near-copies of others; those of `own_images` in random order, always the same. The
first two come with scikit-learn, the others are memory-mapped from `prepared/<name>/` below `data_root()`, where
`prepare` writes them once.
"""

import contextlib
import hashlib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy

from paperlib.data import downloads, image_arrays
from paperlib.system.errors import UserError
from paperlib.system.files import atomic_write, data_root, expanded, locked

SETS = {
    "digits": "UCI handwritten digits (Alpaydin and Kaynak 1998), from scikit-learn",
    "photos": "patches of two photographs, from scikit-learn, CC BY 2.0: "
    "china.jpg by danielbuechele (flickr.com/photos/danielbuechele/6061409035), "
    "flower.jpg by vultilion (flickr.com/photos/vultilion/6056698931)",
    "mnist": "MNIST (LeCun, Cortes, Burges)",
    "mnist24": "MNIST (LeCun, Cortes, Burges), the middle 24 x 24 pixels, 16 grey levels",
    "cifar10": "CIFAR-10 (Krizhevsky 2009)",
    "lsun_bedroom": "LSUN bedroom (Yu et al. 2015), central squares",
    "own_images": "a reader's own images, central squares",
}
PREPARED = {"mnist": (28, 1), "cifar10": (32, 3), "lsun_bedroom": (None, 3), "own_images": (None, 3)}  # side, channels
MADE_OF = {"mnist24": "mnist"}  # read from the files of another
_HASH_WHOLE = 2**30  # bytes
_HASH_SAMPLE = 4096  # images
_Images = np.ndarray | torch.Tensor


@dataclass(frozen=True, eq=False)
class Split:
    """`images`: uint8 (N, H, W, C), maybe a read-only memory map; `labels`: int64 (N,), or None."""

    images: np.ndarray
    labels: np.ndarray | None = None

    def __getitem__(self, rows: slice | np.ndarray) -> "Split":
        return Split(self.images[rows], None if self.labels is None else self.labels[rows])

    def describe(self) -> dict:
        """Count, shape, and the SHA-256 of the images' bytes in C order, above 1 GiB of 4,096 images only."""
        images, rows, hashed = self.images, np.arange(len(self.images)), "all images"
        if images.nbytes > _HASH_WHOLE:
            rows = np.linspace(0, len(images) - 1, _HASH_SAMPLE).round().astype(np.int64)
            hashed = f"{_HASH_SAMPLE} evenly spaced images"
        digest = hashlib.sha256()
        for chunk in np.array_split(rows, len(rows) // 1024 + 1):
            digest.update(np.ascontiguousarray(images[chunk]))
        description = {"count": len(images), "shape": list(images.shape[1:])}
        description |= {"sha256": digest.hexdigest(), "hashed": hashed}
        if self.labels is not None:
            description["labels_sha256"] = hashlib.sha256(self.labels.astype(np.uint8)).hexdigest()
        return description


@dataclass(frozen=True, eq=False)
class Dataset:
    """`levels` of grey, 16, 17 or 256; `train` and `held_out` share no image; `test` is CIFAR-10's, otherwise None."""

    name: str
    train: Split
    held_out: Split
    levels: int
    source: str
    test: Split | None = None

    def describe(self) -> dict:
        """What a run records of its data."""
        parts = {"train": self.train, "held_out": self.held_out, "test": self.test}
        parts = {key: part.describe() for key, part in parts.items() if part is not None}
        return {"name": self.name, "source": self.source, "levels": self.levels, "parts": parts}


def without_images(described: Mapping[str, Any]) -> Dataset:
    """A data set of no images, of the shape and grey levels of the one that `Dataset.describe` described."""
    empty = Split(np.empty((0, *described["parts"]["train"]["shape"]), dtype=np.uint8))
    return Dataset(described["name"], empty, empty, described["levels"], described["source"])


def load(name: str, side: int | None = None) -> Dataset:
    """The data set called `name`, one of `SETS`; MNIST and CIFAR-10 are prepared on first use.

    `side` is the patch size of `photos`, from 4 to 128 pixels (default 32); patches lie half a side apart. For another
    set it only demands images of that size. Raises `UserError` for an unknown name and data that is missing or unfit.
    """
    _check_name(name)
    if name == "photos":
        return _photos(32 if side is None else side)
    dataset = _digits() if name == "digits" else _read_prepared(MADE_OF.get(name, name))
    dataset = _middle(dataset) if name == "mnist24" else dataset
    own_side = dataset.train.images.shape[1]
    if side not in (None, own_side):
        raise UserError(f"images of {name!r} are {own_side} pixels a side, not {side}: leave out side")
    return dataset


def to_unit(images: _Images, levels: int = 256, device: torch.device | str | None = None) -> torch.Tensor:
    """uint8 (N, H, W, C) to float32 (N, C, H, W) in [0, 1]: grey level k is k / (levels - 1).

    The bytes move to `device` before they are widened. Raises `TypeError` for another type, `ValueError` for another
    number of dimensions and, of images on the CPU, a pixel of `levels` or more: to look, a GPU would have to wait.
    """
    if not torch.is_tensor(images):
        # A copy, since torch warns of memory that it may not write to, such as a memory map's.
        images = torch.from_numpy(np.array(images))
    if images.dtype != torch.uint8:
        raise TypeError(f"images are {images.dtype}, not uint8")
    if images.ndim != 4:
        raise ValueError(f"images have shape {tuple(images.shape)}, not (N, H, W, C)")
    if levels < 256 and images.numel() and not images.is_cuda and (top := int(images.max())) >= levels:
        raise ValueError(f"a pixel is {top}, but {levels} grey levels end at {levels - 1}")
    images = images.to(device).permute(0, 3, 1, 2).contiguous()
    return images.to(torch.float32).div_(levels - 1)


def to_float(images: _Images, levels: int = 256, device: torch.device | str | None = None) -> torch.Tensor:
    """As `to_unit`, but in [-1, 1]."""
    return to_unit(images, levels, device).mul_(2).sub_(1)


def from_unit(images: torch.Tensor, levels: int = 256) -> np.ndarray:
    """Float (N, C, H, W) in [0, 1] to the nearest level, uint8 (N, H, W, C). Raises `ValueError` for shape or nan."""
    if images.ndim != 4:
        raise ValueError(f"images have shape {tuple(images.shape)}, not (N, C, H, W)")
    images = images.detach().to(torch.float32)
    if bool(images.isnan().any()):
        raise ValueError("images hold values that are not numbers")
    grey = (images * (levels - 1)).round().clamp(0, levels - 1).to(torch.uint8)
    return grey.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def to_uint8(images: torch.Tensor, levels: int = 256) -> np.ndarray:
    """As `from_unit`, for images in [-1, 1]: the inverse of `to_float`."""
    return from_unit((images.detach().to(torch.float32) + 1) / 2, levels)


def prepare(name: str, source: str | Path | None = None, side: int = 64, subset: bool = False) -> Path:
    """Write the arrays of `name` into `data_root()/prepared/<name>`, each whole or not at all, and return that folder.

    `mnist` and `cifar10` come from the original archives below `data_root()`, or by download; the others from `source`,
    which with `subset` is as in `image_arrays.write`. Raises `UserError`.
    """
    _check_name(name)
    if name in MADE_OF:
        raise UserError(f"data set {name!r} is made of {MADE_OF[name]}: prepare that")
    if name not in PREPARED:
        raise UserError(f"data set {name!r} comes with scikit-learn: there is nothing to prepare")
    if name in downloads.NAMES and source is not None:
        raise UserError(f"{name!r} takes no --source: its archives belong below {data_root()}")
    if name != "lsun_bedroom" and subset:
        raise UserError(f"{name!r} takes no --subset: it is for lsun_bedroom")
    if name in downloads.NAMES:
        _prepare_original(name, again=True)
    elif source is None:
        raise UserError(f"say where the images are: {_command(name)}")
    else:
        image_arrays.write(expanded(source), _folder(name) / "train-images.npy", side, subset)
    return _folder(name)


def whereabouts(name: str) -> str:
    """In words: where the data set is, or "missing"."""
    name = MADE_OF.get(name, name)
    if name not in PREPARED:
        return "with scikit-learn"
    return "missing" if _missing(name) else f"in {_folder(name)}"


def _check_name(name: str) -> None:
    if name not in SETS:
        raise UserError(f"unknown data set {name!r}: choose from {', '.join(SETS)}")


# Sets that come with scikit-learn


def _digits() -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    full = Split(digits.images.astype(np.uint8)[..., None], digits.target.astype(np.int64))
    parts = train_test_split(np.arange(len(full.labels)), test_size=297, stratify=full.labels, random_state=0)
    return Dataset("digits", *(full[np.sort(rows)] for rows in parts), levels=17, source=SETS["digits"])


def _photos(side: int) -> Dataset:
    from sklearn.datasets import load_sample_images

    if not 4 <= side <= 128:
        raise UserError(f"photos come in patches of 4 to 128 pixels a side, not {side}")
    photographs = load_sample_images().images
    cut = photographs[0].shape[1] * 4 // 5
    train, held_out = (
        Split(np.concatenate([_patches(photograph[:, part], side) for photograph in photographs]))
        for part in (slice(cut), slice(cut, None))
    )
    return Dataset("photos", train, held_out, levels=256, source=SETS["photos"])


def _patches(image: np.ndarray, side: int) -> np.ndarray:
    windows = np.lib.stride_tricks.sliding_window_view(image, (side, side), axis=(0, 1))
    windows = windows[:: side // 2, :: side // 2].transpose(0, 1, 3, 4, 2)
    return np.ascontiguousarray(windows).reshape(-1, side, side, image.shape[2])


# Prepared sets


def _middle(mnist: Dataset) -> Dataset:
    """MNIST at a quarter of a CIFAR image's cost: 2 pixels off at each side, and the upper 4 of 8 bits. The test digits
    are in random order: MNIST's own begins with the easier half.
    """
    mixed = mnist.held_out[np.random.default_rng(0).permutation(len(mnist.held_out.labels))]
    parts = (Split(part.images[:, 2:26, 2:26] >> 4, part.labels) for part in (mnist.train, mixed))
    return Dataset("mnist24", *parts, levels=16, source=SETS["mnist24"])


def _folder(name: str) -> Path:
    return data_root() / "prepared" / name


def _command(name: str) -> str:
    source = "" if name in downloads.NAMES else " --source FOLDER (of images or an LMDB, or FILE.npy)"
    return f"python -m paperlib.data prepare {name}{source}"


def _missing(name: str) -> list[str]:
    files = ["train-images.npy"]
    if name in downloads.NAMES:
        files += ["train-labels.npy", "test-images.npy", "test-labels.npy"]
    return [file for file in files if not (_folder(name) / file).is_file()]


def _read_prepared(name: str) -> Dataset:
    if missing := _missing(name):
        if name not in downloads.NAMES:
            raise UserError(f"{_folder(name)} has no {', '.join(missing)}; write it with {_command(name)}")
        _prepare_original(name)
    full, source = _read_split(name, "train"), SETS[name]
    test = _read_split(name, "test") if name in downloads.NAMES else None
    if name == "mnist":
        return Dataset(name, full, test, levels=256, source=source)
    if (count := len(full.images)) < 2:
        raise UserError(f"{_folder(name)} holds 1 image, too few: write more with {_command(name)}")
    first = count - min(5000 if name == "cifar10" else 500, max(1, count // 10))
    train, held_out = full[:first], full[first:]
    if name != "cifar10":
        copies = _near_copies(name, train.images, held_out.images)
        if copies.all():
            raise UserError(
                f"{_folder(name)} holds nothing to hold out: its last {len(copies)} images are near-copies of others; "
                f"write other images with {_command(name)}"
            )
        source += f"; held out: the last {len(copies)}, less {copies.sum()} near-copies of training images"
        kept = np.flatnonzero(~copies)
        # Names put like beside like, and intervals take groups of neighbours; LSUN's keys are in no order.
        held_out = held_out[np.random.default_rng(0).permutation(kept) if name == "own_images" else kept]
    elif len(test.images) < 10_000:
        source += f"; test: only the first {len(test.images):,} of the 10,000 test images"
    return Dataset(name, train, held_out, levels=256, source=source, test=test)


def _prepare_original(name: str, again: bool = False) -> None:
    with locked(_folder(name), "preparing data", patience=math.inf):  # processes that train together ask at once
        if not again and not _missing(name):
            return
        print(f"preparing {name} in {_folder(name)}", file=sys.stderr)
        for part, arrays in downloads.read(name, _command(name)).items():
            for kind, array in zip(("images", "labels"), arrays, strict=True):
                image_arrays.save(_folder(name) / f"{part}-{kind}.npy", array)


def _near_copies(name: str, train: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Which of `last` have a near-copy in `train`: looked for once, which takes minutes for millions, and kept."""
    kept, file = _folder(name) / "near-copies.json", (_folder(name) / "train-images.npy").stat()
    key = {"bytes": file.st_size, "changed_ns": file.st_mtime_ns, "above": image_arrays.NEAR}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError):
        content = json.loads(kept.read_text(encoding="utf-8"))
        if content["key"] == key:
            copies = np.zeros(len(last), dtype=bool)
            copies[np.array(content["copies"], dtype=np.int64)] = True
            return copies
    copies = image_arrays.near_copies(last, among=train)
    with contextlib.suppress(UserError, OSError), atomic_write(kept) as partial:  # else next time
        partial.write_text(json.dumps({"key": key, "copies": np.flatnonzero(copies).tolist()}), encoding="utf-8")
    return copies


def _read_split(name: str, part: str) -> Split:
    file, (side, channels) = f"{part}-images.npy", PREPARED[name]
    images = _read_array(name, file)
    sides = (side, side) if side else images.shape[1:2] * 2
    if images.dtype != np.uint8 or images.shape[1:] != (*sides, channels) or not len(images):
        wanted = f"{side or 'side'} x {side or 'side'} x {channels}"
        raise _unfit(name, file, f"is {images.dtype} {images.shape}, not uint8 images {wanted}")
    if name not in downloads.NAMES:
        return Split(images)
    file = f"{part}-labels.npy"
    labels = _read_array(name, file)
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise _unfit(name, file, f"is {labels.dtype} {labels.shape}, not the labels of {len(images)} images")
    if labels.min() < 0 or labels.max() > 9:
        raise _unfit(name, file, f"holds labels from {labels.min()} to {labels.max()}, not 0 to 9")
    return Split(images, np.array(labels, dtype=np.int64))


def _read_array(name: str, file: str) -> np.ndarray:
    try:
        return npy.open_memmap(_folder(name) / file, mode="r")
    except ValueError as error:
        raise _unfit(name, file, f"is damaged ({error})") from error
    except OSError as error:
        raise UserError(f"cannot read {_folder(name) / file}: {error.strerror}; allow reading it") from error


def _unfit(name: str, file: str, what: str) -> UserError:
    return UserError(f"{_folder(name) / file} {what}: write it again with {_command(name)}")
