"""Where things lie, as absolute paths, and how a file gets there whole or not at all.

The roots below can be moved by an environment variable. A relative value counts from the repository, never from the
working directory, because papermill, nbval and JupyterLab each start a notebook in another one.
"""

import errno
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

import paperlib
from paperlib.system.errors import UserError

ROOT = Path(paperlib.__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"

LOCK = ".lock"  # a file in a folder that is worked in; it says by which process, and may stay when none does

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_MENDABLE = (  # errors of the system that a reader can mend, and what is said of them
    (
        {errno.ENOSPC, errno.EDQUOT, errno.EFBIG},
        "no space left to write {}: free some space (or move the folder with a PAPERLIB_ variable, see "
        "docs/running.md) and run the same command again; nothing finished was lost",
    ),
    ({errno.EACCES, errno.EPERM, errno.EROFS}, "cannot write {}: {}; allow writing there and run again"),
    ({errno.ENOENT}, "cannot write {}: no such folder can be made there; choose another"),
    ({errno.EISDIR}, "cannot write {}: a folder stands where a file is needed; move it away"),
    ({errno.EEXIST, errno.ENOTDIR}, "cannot write {}: a file stands where a folder is needed; move it away"),
)


def _root(variable: str, default: str) -> Path:
    return (ROOT / expanded(os.environ.get(variable) or default)).resolve()


def expanded(path: str | Path) -> Path:
    """`path` with its `~` written out. Raises `UserError` where nobody has a home of that name."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path} names a home that is not known: write the folder out, from /") from error


data_root = partial(_root, "PAPERLIB_DATA", "data")
runs_root = partial(_root, "PAPERLIB_RUNS", "runs")
results_root = partial(_root, "PAPERLIB_RESULTS", "results")
figures_root = partial(_root, "PAPERLIB_FIGURES", "figures")


def make_folder(path: Path) -> Path:
    """Create `path` with its parents and return it; a `UserError` where that is not allowed."""
    with os_errors_as_user_error(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a path beside `path`, with the same ending; the file written there takes the place of `path` at the end.

    A kill at any moment, or an error within, leaves the old file or the new one. Raises `UserError` when the disk is
    full or the folder cannot be written.
    """
    make_folder(path.parent)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        with os_errors_as_user_error(path):
            yield partial
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Delete `folder` where there is one. Raises `UserError` while a process works in it, and where that fails."""
    if not folder.exists():
        return
    gone = folder.with_name(f".{folder.name}.{os.getpid()}.deleted")
    with os_errors_as_user_error(folder):
        with ExitStack() as held:
            for lock in sorted(folder.rglob(LOCK)):
                held.enter_context(locked(lock.parent, "training"))
            os.replace(folder, gone)  # at once, so that nobody finds half of it
        shutil.rmtree(gone)


@contextmanager
def locked(folder: Path, doing: str, patience: float = 3.0) -> Iterator[None]:
    """Within, no other process is in a block like this for the same folder. The system ends the lock with the process.

    Where the file system has no locks a line on stderr says so, and work goes on.

    Waits for `patience` seconds, as a notebook's kernel that lost its parent takes a moment to end. Then raises
    `UserError`, where `doing` says what the other does, such as "training".
    """
    path = make_folder(folder) / LOCK
    lock = FileLock(path, timeout=patience)
    try:
        with os_errors_as_user_error(path):
            lock.acquire()
    except Timeout:
        who = path.read_text(encoding="utf-8").strip() or "?"
        raise UserError(
            f"process {who} is {doing} in {folder}: wait until it is done (running again then uses what it made), or "
            f"end it"
        ) from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        print(f"no locks on the file system of {folder}: let no second process work there", file=sys.stderr)
    try:
        with os_errors_as_user_error(path):
            path.write_text(f"{os.getpid()}\n", encoding="utf-8")
        yield
    finally:
        lock.release()


@contextmanager
def os_errors_as_user_error(path: Path) -> Iterator[None]:
    """Turn the system's errors that a reader can mend, met while writing `path`, into a `UserError`."""
    try:
        yield
    except OSError as error:
        for numbers, said in _MENDABLE:
            if error.errno in numbers:
                raise UserError(said.format(path, error.strerror)) from error
        raise


def load_json(path: Path) -> Any:
    """The content of a JSON file; a `UserError` names a file that is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and run again") from error


def write_json(path: Path, content: Any) -> None:
    """Write `content` as `plain` leaves it. Raises `UserError` as `atomic_write` does."""
    with atomic_write(path) as file:
        file.write_text(json.dumps(plain(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def plain(value: Any) -> Any:
    """`value` in types that JSON has; a float that is no number becomes null."""
    if hasattr(value, "tolist"):  # of NumPy or torch
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
