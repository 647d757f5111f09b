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

    Archives that are missing or fail their checksum are downloaded. Where that fails a `UserError` names them and the
    `command` to run when they are there.
    """
    datasets = _torchvision().datasets
    if name == "mnist":
        kind, folder, sums = datasets.MNIST, data_root() / "MNIST" / "raw", dict(datasets.MNIST.resources)
    else:
        kind, folder, sums = datasets.CIFAR10, data_root(), {datasets.CIFAR10.filename: datasets.CIFAR10.tgz_md5}
    states = {file: _state(folder / file, md5, datasets.utils) for file, md5 in sums.items()}
    for file, state in states.items():
        if name == "mnist" and state == "sound":
            # torchvision trusts an unpacked copy unseen, and a killed run may have left half of one.
            (folder / file).with_suffix("").unlink(missing_ok=True)
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
