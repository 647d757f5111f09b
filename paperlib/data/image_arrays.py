"""Many images in one .npy file, written and searched for near-copies in chunks, so that millions need little memory."""

import collections
import contextlib
import io
import math
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from PIL import ExifTags, Image
from torch.nn.functional import adaptive_avg_pool2d, normalize
from tqdm import tqdm

from paperlib.data import lsun
from paperlib.system.errors import UserError
from paperlib.system.files import atomic_write

ENDINGS = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
NEAR = 0.9
_CHUNK = 2048
_THREADS = min(8, os.cpu_count() or 1)
_Encoded = Path | io.BytesIO
_Named = Iterable[tuple[str, _Encoded]]


def write(source: Path, path: Path, side: int, subset: bool = False) -> None:
    """Write `source` to `path` as uint8 (N, side, side, 3), whole or not at all.

    `source` is an .npy file of that kind, a folder of images with its subfolders, hidden ones left out, in the order of
    names, or an LMDB of LSUN, or a folder that holds just one, in the order of keys. Images are turned as their EXIF
    orientation says, cropped to the central square and resized (Lanczos). Those that cannot be read are left out, and a
    line on stderr says which. With `subset` all of those that `lsun.subset_keys` names are needed, and no others read.
    Raises `UserError` where `source` is none of these, has no good image, or `path` cannot be written.
    """
    if side < 1:
        raise UserError(f"--side is {side}, but takes a number of pixels, 1 or more")
    array = source.suffix == ".npy" and source.is_file()
    if not array and not source.is_dir():
        what = f"{source} is no .npy file" if source.exists() else f"{source} does not exist"
        raise UserError(f"{what}: --source takes a folder of images, the folder of LSUN's LMDB or an .npy file")
    folder = None if array else lsun.find(source)
    if subset and not folder:
        raise UserError(f"{source} is no LMDB: --subset takes LSUN's bedroom_train_lmdb as --source")
    if array:
        return _copy(source, path, side)
    files, left = ([], "") if folder == source else _image_files(source)
    if not folder:
        if not files:
            raise UserError(f"{source} holds no images ({' '.join(ENDINGS)}): name a folder that does")
        print(f"taking {len(files)} images" + (f"; not looked at: {left}" if left else ""), file=sys.stderr)
        return _write_squares(((file, source / file) for file in files), len(files), source, path, side)
    if files:
        raise UserError(f"{source} holds images and an LMDB: name {folder}, or a folder of images alone")
    total, images = lsun.read(folder, lsun.subset_keys() if subset else ())
    with contextlib.closing(images):
        encoded = ((key, io.BytesIO(value)) for key, value in images)
        _write_squares(encoded, total, folder, path, side, lsun.AGAIN, all_of_them=subset)


def save(path: Path, array: np.ndarray) -> None:
    """Write a uint8 array to the .npy file `path`, whole or not at all. Raises `UserError`."""
    with atomic_write(path) as partial:
        copy = _new_array(partial, array.shape)
        for part in _slices(len(array), "copying"):
            copy[part] = array[part]
        copy.flush()


def near_copies(images: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Which of `images` (M, H, W, C) have a near-copy, maybe mirrored, in `among` (N, H, W, C): bool (M,).

    Near-copies are images whose 16 x 16 colour thumbnails correlate by more than `NEAR`. In 10,000 LSUN bedrooms, by
    eye, all pairs above 0.907 were one photograph twice, and all from there to 0.865 two rooms, but one at 0.874.
    """
    wanted = torch.cat([_thumbnails(images), _thumbnails(images[:, :, ::-1])])
    best = torch.full((len(wanted),), -1.0)
    for part in _slices(len(among), "looking for near-copies"):
        best = torch.maximum(best, (wanted @ _thumbnails(among[part]).T).amax(1))
    return (best.reshape(2, len(images)).amax(0) > NEAR).numpy()


def _thumbnails(images: np.ndarray) -> torch.Tensor:
    """Unit vectors (N, 768), whose inner products are correlations; 0 for an image of one grey."""
    pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).to(torch.float32)
    thumbnails = adaptive_avg_pool2d(pixels, 16).flatten(1)
    return normalize(thumbnails - thumbnails.mean(1, keepdim=True), dim=1)


def _slices(count: int, label: str) -> Iterator[slice]:
    with tqdm(range(0, count, _CHUNK), desc=label, unit="image", unit_scale=_CHUNK, delay=2) as firsts:
        yield from (slice(first, first + _CHUNK) for first in firsts)


def _copy(source: Path, path: Path, side: int) -> None:
    try:
        images = npy.open_memmap(source, mode="r")
    except (ValueError, OSError) as error:
        raise UserError(f"cannot read {source} ({error}): name a sound .npy file") from error
    if images.dtype != np.uint8 or images.shape[1:] != (side, side, 3) or not len(images):
        wanted = f"uint8 (N, {side}, {side}, 3)"
        raise UserError(f"{source} is {images.dtype} {images.shape}, not {wanted}: name another file, or its --side")
    save(path, images)


def _write_squares(
    images: _Named, total: int, source: Path, path: Path, side: int, advice: str = "", all_of_them: bool = False
) -> None:
    """Write the squares of `total` images; those that cannot be read are left out, or an error, with `advice`."""
    bad, count = [], 0
    with atomic_write(path) as partial:
        array = _new_array(partial, (total, side, side, 3))
        for name, square in tqdm(_squares(images, side), desc="resizing", unit="image", total=total, delay=2):
            if isinstance(square, np.ndarray):
                array[count] = square
                count += 1
                continue
            bad.append(f"{name} ({_why(square)})")
            if all_of_them:
                raise UserError(f"the image {bad[0]} in {source} cannot be read: {advice}")
        array.flush()
        if not count:
            none = f"none of the {total} images in {source} can be read"
            raise UserError(f"{none}, {bad[0]} the first: name another folder")
        if bad:
            _shorten(partial, array, count)
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        advice = advice and f"; {advice} to have them"
        print(f"left out {len(bad)} of {total} images: {', '.join(bad[:3])}{more}{advice}", file=sys.stderr)


def _squares(images: _Named, side: int) -> Iterator[tuple[str, np.ndarray | Exception]]:
    """The square of each image in turn, or why it cannot be read. Pillow works in several threads at once."""
    Image.init()  # where two threads open a first image together, one may not find its format
    waiting = collections.deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for name, image in images:
            waiting.append((name, pool.submit(_central_square, image, side)))
            if len(waiting) > 4 * _THREADS:
                name, square = waiting.popleft()
                yield name, square.result()
        for name, square in waiting:
            yield name, square.result()


def _central_square(file: _Encoded, side: int) -> np.ndarray | Exception:
    try:
        with Image.open(file) as opened:
            turn, image = _turn(opened), _eight_bits(opened).convert("RGB")
            image = image if turn is None else image.transpose(turn)
        square = min(image.size)
        left, top = (image.width - square) // 2, (image.height - square) // 2
        image = image.crop((left, top, left + square, top + square))
        return np.asarray(image.resize((side, side), Image.Resampling.LANCZOS))
    except Exception as error:  # Pillow's readers raise whatever a damaged file leads them to
        return error


def _why(error: Exception) -> str:
    """A few words of an error of Pillow's, or of ours."""
    return " ".join(str(error).split())[:80] if type(error) is ValueError else type(error).__name__


def _eight_bits(image: Image.Image) -> Image.Image:
    """`image`, 16-bit grey scaled to 8, as Pillow cuts it off at 255. Raises `ValueError` for other deep pixels."""
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.rint(np.asarray(image, dtype=np.float64) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known scale: convert them to 8 bits")
    return image


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What shows `image` as its EXIF orientation says; None where that is damaged, as the pixels may be sound."""
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # Pillow's reader of EXIF raises whatever a damaged one leads it to
        return None


_TURNS = dict(
    enumerate(
        (
            Image.Transpose.FLIP_LEFT_RIGHT,
            Image.Transpose.ROTATE_180,
            Image.Transpose.FLIP_TOP_BOTTOM,
            Image.Transpose.TRANSPOSE,
            Image.Transpose.ROTATE_270,
            Image.Transpose.TRANSVERSE,
            Image.Transpose.ROTATE_90,
        ),
        start=2,
    )
)


def _image_files(folder: Path) -> tuple[list[str], str]:
    """Paths within `folder` in the order of names, a folder's files before its subfolders, linked ones too; and what
    was left, by count and reason, or nothing.
    """
    paths, seen, left = [], set(), collections.Counter()
    for place, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(place))
        hidden = [name for name in folders if name[0] == "."]
        again = [name for name in folders if os.path.realpath(os.path.join(place, name)) in seen]
        folders[:] = sorted(set(folders) - {*hidden, *again})
        images = [name for name in names if name[0] != "." and name.lower().endswith(ENDINGS)]
        paths += [os.path.relpath(os.path.join(place, name), folder) for name in sorted(images)]
        left["hidden"] += len(hidden) + sum(name[0] == "." for name in names)
        for name in set(names) - set(images):
            left[os.path.splitext(name)[1].lower() or "without ending"] += name[0] != "."
    reasons = [f"{count} {reason}" for reason, count in sorted(left.items()) if count]
    return paths, ", ".join(reasons)


def _new_array(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """A writable memory map that takes its room at once: a full disk is an error, not a crash."""
    array = npy.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _shorten(path: Path, array: np.memmap, count: int) -> None:
    """Keep the first `count` images: numpy pads the header, so the count can change in place."""
    shape = (count, *array.shape[1:])
    with path.open("rb+") as file:
        npy.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        if file.tell() != array.offset:
            raise RuntimeError(f"the header of {path} changed its length")
        file.truncate(array.offset + math.prod(shape))
