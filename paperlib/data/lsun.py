"""LSUN's LMDBs: folders that hold `data.mdb`, from keys (40 hexadecimal digits) to images as WebP or JPEG.

The subset is 10,000 of the 3,033,042 images of `bedroom_train`, in the order of their keys; see docs/running.md.
"""

import contextlib
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from paperlib.system.errors import UserError

_KEYS = Path(__file__).with_name("lsun_bedroom_keys.bin")  # 20 bytes each
AGAIN = "copy or unpack the LMDB again"
_OPTIONS = {"readonly": True, "create": False, "lock": False, "readahead": False}
# Where a page is damaged or missing, LMDB ends the process. So it is another process that reads.
_READER = f"""
import lmdb, pickle, sys
keys = sys.stdin.buffer.read().split()
with lmdb.open(sys.argv[1], **{_OPTIONS}) as opened, opened.begin() as transaction:
    cursor = transaction.cursor()
    missing = sum(not cursor.set_key(key) for key in keys)
    pickle.dump(missing, sys.stdout.buffer)
    for pair in ((key, transaction.get(key)) for key in keys) if keys else cursor:
        pickle.dump(pair, sys.stdout.buffer)
"""


def subset_keys() -> list[bytes]:
    """The keys of the subset, in its order."""
    digits = _KEYS.read_bytes().hex().encode()
    return [digits[first : first + 40] for first in range(0, len(digits), 40)]


def find(source: Path) -> Path | None:
    """The LMDB that the folder `source` is, or that lies in it, or None; a `UserError` where several do."""
    if (source / "data.mdb").exists():
        return source
    folders = sorted(file.parent for file in source.glob("*/data.mdb"))
    if len(folders) > 1:
        names = ", ".join(folder.name for folder in folders)
        raise UserError(f"{source} holds {len(folders)} LMDBs ({names}): name one of them")
    return folders[0] if folders else None


def read(folder: Path, keys: Sequence[bytes] = ()) -> tuple[int, Iterator[tuple[str, bytes]]]:
    """The number of images in the LMDB, and the key and encoded image of each, in the order of keys or of `keys`.

    Raises `UserError` for no LMDB or one without images and, while images are drawn, for missing keys and damage.
    """
    import lmdb

    file = folder / "data.mdb"
    try:
        with lmdb.open(str(folder), **_OPTIONS) as opened:
            stat, pages = opened.stat(), opened.info()["last_pgno"] + 1
    except lmdb.Error as error:
        reason = str(error).removeprefix(f"{folder}: ")
        raise UserError(f"cannot read {file} ({reason}): {AGAIN}") from error
    size, full = file.stat().st_size, stat["psize"] * pages
    if size < 0.99 * full:  # of a sound one a few pages may be missing, which were freed before they were written
        raise UserError(f"{file} is cut short ({size:,} of {full:,} bytes): {AGAIN}")
    if not stat["entries"]:
        raise UserError(f"{folder} is an LMDB without images: name another folder")
    total = len(keys) or stat["entries"]
    return total, _stream(folder, keys, total)


def _stream(folder: Path, keys: Sequence[bytes], total: int) -> Iterator[tuple[str, bytes]]:
    words, pipe = [sys.executable, "-c", _READER, str(folder)], subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as reader:
        with reader.stdin as keys_wanted:
            keys_wanted.write(b" ".join(keys))
        count = 0
        with contextlib.suppress(EOFError, pickle.UnpicklingError):
            if missing := pickle.load(reader.stdout):  # noqa: S301 - the reader is our own
                lacks = f"{folder} lacks {missing:,} of the {total:,} images of the subset"
                raise UserError(f"{lacks}: name the whole bedroom_train_lmdb")
            while True:
                key, value = pickle.load(reader.stdout)  # noqa: S301
                yield key.decode("ascii", "backslashreplace"), value
                count += 1
        if reader.wait() or count != total:
            raise UserError(
                f"{folder / 'data.mdb'} is damaged: reading it ended after {count:,} of {total:,} images "
                f"(exit code {reader.returncode}); {AGAIN}"
            )
