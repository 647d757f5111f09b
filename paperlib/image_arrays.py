"""Many images in one .npy file: written from a folder or another array, searched for near-copies.

All works through memory maps and in chunks, so that three million images need little memory.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from PIL import Image, ImageOps
from torch.nn.functional import adaptive_avg_pool2d, normalize
from tqdm import tqdm

from paperlib.errors import UserError
from paperlib.paths import replacing

ENDINGS = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
NEAR = 0.9
_CHUNK = 2048


def write(source: Path, path: Path, side: int) -> None:
    """Write `source` to `path` as uint8 (N, side, side, 3), whole or not at all.

    `source` is a folder, read with its subfolders in the order of their names: each image is turned
    as its EXIF orientation says, cropped to the central square and resized (Lanczos). Images that
    cannot be read are left out, and one line on stderr says which. Or `source` is an .npy file of
    uint8 (N, side, side, 3), which is checked and copied.

    Raises `UserError` where `source` is neither, has no good image, or `path` cannot be written.
    """
    if side < 1:
        raise UserError(f"--side is {side}, but takes a number of pixels, 1 or more")
    if source.suffix == ".npy" and source.is_file():
        _copy(source, path, side)
    elif not source.is_dir():
        what = "is no .npy file" if source.exists() else "does not exist"
        raise UserError(f"{source} {what}: --source takes a folder of images or an .npy file")
    elif (source / "data.mdb").exists():
        raise UserError(
            f"{source} holds an LMDB, which cannot be read: export its images, "
            f"since --source takes a folder of images or an .npy file"
        )
    else:
        _write_folder(source, path, side)


def open_array(path: Path) -> np.memmap:
    """The array in the .npy file `path`, memory-mapped for reading.

    Raises `ValueError` for a file of another format, cut short or of Python objects; `OSError`.
    """
    return npy.open_memmap(path, mode="r")


def near_copies(images: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Which of `images` (M, H, W, C) have a near-copy, maybe mirrored, in `among` (N, H, W, C).

    Returns bool (M,). Near-copies are images whose 16 x 16 colour thumbnails correlate by more than
    `NEAR`. In 10,000 LSUN bedrooms 38 pairs do. Looked at, those above 0.907 were one photograph
    twice (recompressed, recoloured, mirrored, cropped a little). From there down to 0.865 all were
    two rooms, but for one pair at 0.874.
    """
    wanted = torch.cat([_thumbnails(images), _thumbnails(images[:, :, ::-1])])
    best = torch.full((len(wanted),), -1.0)
    for chunk in _chunks(among, "looking for near-copies"):
        best = torch.maximum(best, (wanted @ _thumbnails(chunk).T).amax(1))
    return (best.reshape(2, len(images)).amax(0) > NEAR).numpy()


def _thumbnails(images: np.ndarray) -> torch.Tensor:
    """Unit vectors (N, 768), whose inner products are correlations; 0 for an image of one grey."""
    pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).to(torch.float32)
    thumbnails = adaptive_avg_pool2d(pixels, 16).flatten(1)
    return normalize(thumbnails - thumbnails.mean(1, keepdim=True), dim=1)


def _chunks(images: np.ndarray, label: str) -> Iterator[np.ndarray]:
    with tqdm(total=len(images), desc=label, unit="image", delay=2) as bar:
        for first in range(0, len(images), _CHUNK):
            chunk = images[first : first + _CHUNK]
            yield chunk
            bar.update(len(chunk))


def _copy(source: Path, path: Path, side: int) -> None:
    try:
        images = open_array(source)
    except (ValueError, OSError) as error:
        raise UserError(f"cannot read {source} ({error}): name a sound .npy file") from error
    fits = images.dtype == np.uint8 and images.ndim == 4 and images.shape[1:] == (side, side, 3)
    if not fits or not len(images):
        raise UserError(
            f"{source} is {images.dtype} {images.shape}, not uint8 (N, {side}, {side}, 3): "
            f"name another file, or its --side"
        )
    with replacing(path) as partial:
        copy = _new_array(partial, images.shape)
        first = 0
        for chunk in _chunks(images, "copying"):
            copy[first : first + len(chunk)] = chunk
            first += len(chunk)
        copy.flush()


def _write_folder(source: Path, path: Path, side: int) -> None:
    files = _image_files(source)
    if not files:
        raise UserError(f"{source} holds no images ({' '.join(ENDINGS)}): name a folder that does")
    bad = []
    with replacing(path) as partial:
        images = _new_array(partial, (len(files), side, side, 3))
        count = 0
        for file in tqdm(files, desc="resizing", unit="image", delay=2):
            try:
                images[count] = _central_square(source / file, side)
                count += 1
            except (
                OSError,
                ValueError,
                SyntaxError,
                Image.DecompressionBombError,
            ) as error:  # what Pillow raises
                bad.append(f"{file} ({type(error).__name__})")
        images.flush()
        if not count:
            raise UserError(
                f"none of the {len(files)} images in {source} can be read, {bad[0]} the first: name another folder"
            )
        if bad:
            _shorten(partial, count)
    if bad:
        more = "" if len(bad) <= 3 else f" and {len(bad) - 3} more"
        print(
            f"left out {len(bad)} of {len(files)} images: {', '.join(bad[:3])}{more}",
            file=sys.stderr,
        )


def _image_files(folder: Path) -> list[str]:
    """Paths within `folder` in the order of names, a folder's files before its subfolders."""
    found = []
    for place, folders, names in os.walk(folder):
        folders.sort()
        names = [name for name in names if name[0] != "." and name.lower().endswith(ENDINGS)]
        found += [os.path.relpath(os.path.join(place, name), folder) for name in sorted(names)]
    return found


def _central_square(file: Path, side: int) -> np.ndarray:
    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    square = min(image.size)
    left, top = (image.width - square) // 2, (image.height - square) // 2
    image = image.crop((left, top, left + square, top + square))
    return np.asarray(image.resize((side, side), Image.Resampling.LANCZOS))


def _new_array(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """A writable memory map that takes its room at once: a full disk is an error, not a crash."""
    array = npy.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _shorten(path: Path, count: int) -> None:
    """Keep the first `count` images: numpy pads the header, so the count can change in place."""
    with path.open("rb+") as file:
        npy.read_magic(file)
        shape, _, _ = npy.read_array_header_1_0(file)
        start = file.tell()
        file.seek(0)
        shape = (count, *shape[1:])
        npy.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        if file.tell() != start:
            raise RuntimeError(f"the header of {path} changed its length")
        file.truncate(start + int(np.prod(shape, dtype=np.int64)))
