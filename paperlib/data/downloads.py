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
MNIST_UNPACKED = {  # MD5 of what the archives hold, which torchvision reads unseen where it is there
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def read(name: str, command: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The parts "train" and "test" of `name`: images uint8 (N, H, W, C) and labels uint8 (N,).

    Archives that are missing or fail their checksum are downloaded. Where that fails a `UserError` names them and the
    `command` to run when they are there; so it does for an unpacked file of MNIST that is another's.
    """
    datasets = _torchvision().datasets
    if name == "mnist":
        kind, folder, sums = datasets.MNIST, data_root() / "MNIST" / "raw", dict(datasets.MNIST.resources)
    else:
        kind, folder, sums = datasets.CIFAR10, data_root(), {datasets.CIFAR10.filename: datasets.CIFAR10.tgz_md5}
    states = {file: _state(folder / file, md5, datasets.utils) for file, md5 in sums.items()}
    if name == "mnist":
        states = {file: _with_unpacked(folder / file, state, datasets.utils, command) for file, state in states.items()}
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # torchvision sets none
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            train, test = (kind(data_root(), train=flag, download=True) for flag in (True, False))
    except Exception as error:  # whatever urllib, gzip, tarfile, pickle and torch raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        bad = [f"{file} is {state}" for file, state in states.items() if state != "sound"]
        if bad:
            what = f"data set {name!r} cannot be had: in {folder} {', '.join(bad)}, and download failed ({reason})"
            raise UserError(f"{what}; put {', '.join(sums)} into {folder} and run {command}") from error
        what = f"the archives of {name!r} in {folder} cannot be unpacked ({reason})"
        raise UserError(f"{what}: make room and allow writing there, then run {command}") from error
    finally:
        socket.setdefaulttimeout(patience)
    return {
        part: (np.asarray(x.data).reshape(*x.data.shape[:3], -1), np.asarray(x.targets, dtype=np.uint8))
        for part, x in (("train", train), ("test", test))
    }


def _with_unpacked(archive: Path, state: str, utils: ModuleType, command: str) -> str:
    """The state of an archive of MNIST or, where there is one, of its unpacked copy; half of a copy is removed."""
    unpacked = archive.with_suffix("")
    found = _state(unpacked, MNIST_UNPACKED[unpacked.name], utils)
    if found in ("missing", "sound"):
        return state if found == "missing" else found
    if state != "sound":
        raise UserError(f"{unpacked} is not MNIST's file ({found}): move it away and run {command}")
    unpacked.unlink()  # what a run left that was killed while unpacking
    return state


def _torchvision() -> ModuleType:
    """The package, also where its compiled part, which data sets do not need, does not load beside another torch."""
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


def _state(path: Path, md5: str, utils: ModuleType) -> str:
    if not path.is_file():
        return "missing"
    try:
        return "sound" if utils.check_integrity(path, md5) else "damaged (wrong checksum)"
    except OSError as error:
        return f"unreadable ({error.strerror})"
