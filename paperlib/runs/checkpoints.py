"""Two generations of a checkpoint in a folder, read without ever running code from them.

`last.pt` is the newest and `previous.pt` the one before it; a kill at any moment leaves at least one of them whole.
They hold tensors, numbers, strings, lists and dicts, and load with `weights_only=True`.
"""

import os
import pickle
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from paperlib.system.errors import UserError
from paperlib.system.files import atomic_write

FORMAT = "paperlib checkpoint 1"


def write(directory: Path, content: dict[str, Any]) -> None:
    """Make `content` the last checkpoint in `directory`, and the last one the previous.

    Raises `UserError` when the disk is full or the folder cannot be written; the last one stays.
    """
    last = directory / "last.pt"
    with atomic_write(last) as partial:
        with partial.open("wb") as file:
            try:
                torch.save({"format": FORMAT, **content}, file)
            except RuntimeError as error:  # torch hides that the disk is full
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
        if last.exists():
            os.replace(last, directory / "previous.pt")


def read(directory: Path) -> dict[str, Any] | None:
    """The newest whole checkpoint in `directory`, on the CPU; None where there is none.

    A damaged last one gives way to the previous, with a line on stderr. Raises `UserError` when none that is
    there is whole, and for a file that holds more than tensors and plain values.
    """
    damaged = []
    for path in (directory / "last.pt", directory / "previous.pt"):
        if not path.exists():
            continue
        if (content := _load(path)) is not None:
            if damaged:
                print(f"{directory / damaged[0]} is damaged: continuing from {path.name}", file=sys.stderr)
            return content
        damaged.append(path.name)
    if damaged:
        raise UserError(
            f"no whole checkpoint in {directory} ({' and '.join(damaged)} damaged): delete the "
            f"folder, or run with --fresh, to start over"
        )
    return None


def differences(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two flat dicts, as "name old -> new"."""
    return [
        f"{key} {was.get(key, 'absent')} -> {now.get(key, 'absent')}"
        for key in dict.fromkeys([*was, *now])
        if was.get(key) != now.get(key)
    ]


def shapes(weights: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of a state dict."""
    return {key: tuple(value.shape) for key, value in weights.items() if torch.is_tensor(value)}


def _load(path: Path) -> dict[str, Any] | None:
    """The content of one file, None if it is damaged; `UserError` if it is whole but not ours."""
    # torch does not compare checksums in reading, so the archive is tested first.
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return None
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors and plain values, so it was not loaded: if it is not "
            f"yours, delete it; otherwise run with --fresh to start over"
        ) from error
    except PermissionError as error:
        raise UserError(f"cannot read {path}: allow reading it and run again") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError):
        return None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(
            f"{path} is not a checkpoint of this version: delete the folder, or run with --fresh, to start over"
        )
    return content
