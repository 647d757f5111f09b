"""MNIST and CIFAR-10 from their original archives, through torchvision's own loaders."""

import contextlib
import io
import socket
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from paperlib.system.errors import UserError
from paperlib.system.files import data_root

NAMES = ("mnist", "cifar10")


def read(name: str, command: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The parts "train" and "test" of `name`: images uint8 (N, H, W, C) and labels uint8 (N,).

    Archives that are missing or fail their checksum are downloaded. Raises `UserError` where that fails, naming the
    files, their folder and the `command` to run when they are there.
    """
    datasets = _torchvision().datasets
    kind = datasets.MNIST if name == "mnist" else datasets.CIFAR10
    folder, sums = _archives(name, kind)
    states = {file: _state(folder / file, md5, datasets.utils) for file, md5 in sums.items()}
    if name == "mnist":
        # torchvision trusts an unpacked copy unseen, and a killed run may have left half of one.
        for file, state in states.items():
            if state == "sound":
                (folder / file).with_suffix("").unlink(missing_ok=True)
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # torchvision sets none
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            train, test = (kind(data_root(), train=flag, download=True) for flag in (True, False))
    except Exception as error:  # whatever urllib, gzip, tarfile, pickle and torch raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        bad = [f"{file} is {state}" for file, state in states.items() if state != "sound"]
        if not bad:
            raise UserError(
                f"the archives of {name!r} in {folder} cannot be unpacked ({reason}): "
                f"make room and allow writing there, then run {command}"
            ) from error
        raise UserError(
            f"data set {name!r} cannot be had: in {folder} {', '.join(bad)}, and download failed "
            f"({reason}); put {', '.join(sums)} into {folder} and run {command}"
        ) from error
    finally:
        socket.setdefaulttimeout(patience)
    return {"train": _arrays(train), "test": _arrays(test)}


def _torchvision() -> ModuleType:
    """The package, imported in spite of missing operators.

    Beside a CPU build of torch from another source its compiled part does not load, and the import stops at the first
    operator that its Python part describes. Data sets and transforms need none.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
        signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", signature)
        import torchvision
    import torchvision.datasets

    return torchvision


def _archives(name: str, kind: type) -> tuple[Path, dict[str, str]]:
    """The folder of the archives, and the MD5 of each."""
    if name == "mnist":
        return data_root() / "MNIST" / "raw", dict(kind.resources)
    return data_root(), {kind.filename: kind.tgz_md5}


def _state(path: Path, md5: str, utils: ModuleType) -> str:
    if not path.is_file():
        return "missing"
    try:
        return "sound" if utils.check_integrity(path, md5) else "damaged (wrong checksum)"
    except OSError as error:
        return f"unreadable ({error.strerror})"


def _arrays(dataset) -> tuple[np.ndarray, np.ndarray]:
    images = np.asarray(dataset.data)
    images = images[..., None] if images.ndim == 3 else images
    return images, np.asarray(dataset.targets).astype(np.uint8)
