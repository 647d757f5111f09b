"""LMDBs as LSUN packs them, made here; the keys of the subset."""

import fnmatch
import hashlib
import io
import subprocess
import sys
import tomllib
from pathlib import Path

import lmdb
import numpy as np
import pytest
from PIL import Image

from paperlib.data import datasets, image_arrays, lsun
from paperlib.data.__main__ import main
from paperlib.system.errors import UserError
from paperlib.system.files import ROOT

SIDE = 16


def encoded(number):
    """A photograph of sorts, as WebP or JPEG, upright, wide or square, some grey, with odd sizes among them."""
    rng = np.random.default_rng(number)
    height, width = [(48, 48), (31, 50), (67, 32), (33, 33), (16, 90)][number % 5]
    image = Image.fromarray(rng.integers(256, size=(6, 7, 3), dtype=np.uint8)).resize((width, height))
    if number % 7 == 0:
        image = image.convert("L")
    file = io.BytesIO()
    image.save(file, "WEBP" if number % 3 else "JPEG", quality=90)
    return file.getvalue()


def key_of(number):
    return hashlib.sha1(str(number).encode()).hexdigest()


def pack(folder, images):
    """`images` (key: bytes) as an LMDB, put in an order that is not the keys'."""
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=2**26) as opened, opened.begin(write=True) as transaction:
        for key, value in images.items():
            assert transaction.put(key.encode(), value)
    (folder / "lock.mdb").unlink()
    return folder


@pytest.fixture(scope="module")
def images():
    images = {key_of(number): encoded(number) for number in range(40)}
    assert list(images) != sorted(images)
    return images


@pytest.fixture
def packed(images, tmp_path):
    return pack(tmp_path / "lsun" / "bedroom_train_lmdb", images)


@pytest.fixture
def wanted(images, monkeypatch):
    """Ten keys as the subset, in an order of their own."""
    keys = sorted(images)[::4][::-1]
    monkeypatch.setattr(lsun, "subset_keys", lambda: [key.encode() for key in keys])
    return keys


def exported(images, folder):
    """The array of the same images as files in a folder, whose names are the keys."""
    folder.mkdir()
    for key, value in images.items():
        (folder / f"{key}.{'webp' if value[:4] == b'RIFF' else 'jpg'}").write_bytes(value)
    image_arrays.write(folder, folder.with_suffix(".npy"), SIDE)
    return np.load(folder.with_suffix(".npy"))


def write(source, tmp_path, **options):
    path = tmp_path / "out" / "train-images.npy"
    image_arrays.write(source, path, SIDE, **options)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    return np.load(path)


def complaint(source, tmp_path, **options):
    with pytest.raises(UserError) as caught:
        write(source, tmp_path, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert not list((tmp_path / "out").glob("*")), "nothing may be left behind"
    return text


def test_the_same_pixels_as_from_a_folder_in_the_order_of_keys(images, packed, tmp_path):
    want = np.stack([image_arrays._central_square(io.BytesIO(images[key]), SIDE) for key in sorted(images)])
    np.testing.assert_array_equal(exported(images, tmp_path / "files"), want)
    assert len(np.unique(want.reshape(40, -1), axis=0)) == 40
    np.testing.assert_array_equal(write(packed, tmp_path), want)
    np.testing.assert_array_equal(write(packed.parent, tmp_path), want)
    assert [file.name for file in packed.iterdir()] == ["data.mdb"], "reading leaves no file behind"


def test_the_subset_in_its_own_order(images, packed, wanted, tmp_path):
    found = write(packed, tmp_path, subset=True)
    everything = dict(zip(sorted(images), exported(images, tmp_path / "files"), strict=True))
    np.testing.assert_array_equal(found, np.stack([everything[key] for key in wanted]))


def test_the_command(images, packed, wanted, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PAPERLIB_DATA", str(tmp_path / "data"))
    words = ["prepare", "lsun_bedroom", "--source", packed.parent, "--side", SIDE, "--subset"]
    monkeypatch.setattr(sys, "argv", ["data", *map(str, words)])
    main()
    folder = Path(capsys.readouterr().out.strip())
    found = np.load(folder / "train-images.npy")
    assert len(found) == len(wanted) == 10
    np.testing.assert_array_equal(found, write(packed, tmp_path, subset=True))


def test_the_keys_of_the_subset():
    keys = lsun.subset_keys()
    assert len(keys) == len(set(keys)) == 10_000
    assert keys == sorted(keys)
    assert keys[0] == b"000038527b455eaccd15e623f2e229ecdbceba2b"
    assert keys[-1] == b"080b38dace1673e981f27abcf7b13cc32c93ea9b"
    digest = hashlib.sha256(b"\n".join(keys)).hexdigest()
    assert digest == "9d7c74742361d6652792ca0bb7b7434b4447d2ea409065ec96d02345b95751c0"


def test_an_installed_package_has_the_keys():
    described = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert any(fnmatch.fnmatch(lsun._KEYS.name, pattern) for pattern in described["package-data"]["paperlib.data"])


def test_images_that_cannot_be_read_are_named(images, wanted, tmp_path, capsys):
    cut, empty = wanted[0], sorted(images)[1]
    images = {**images, cut: images[cut][:100], empty: b""}
    packed = pack(tmp_path / "lmdb", images)
    found = write(packed, tmp_path)
    sound = {key: value for key, value in images.items() if key not in (cut, empty)}
    np.testing.assert_array_equal(found, exported(sound, tmp_path / "files"))
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert said.startswith(f"left out 2 of 40 images: {empty} (UnidentifiedImageError), {cut} (")
    assert said.endswith("; copy or unpack the LMDB again to have them")
    (tmp_path / "out" / "train-images.npy").unlink()
    text = complaint(packed, tmp_path, subset=True)
    assert text.startswith(f"the image {cut} (")
    assert text.endswith("cannot be read: copy or unpack the LMDB again")


def test_an_lmdb_of_other_things(tmp_path):
    packed = pack(tmp_path / "lmdb", {"a": b"no image", "\xe9": b"no image"})
    assert f"none of the 2 images in {packed} can be read, a (" in complaint(packed, tmp_path)


def test_keys_that_are_missing(images, wanted, tmp_path):
    part = {key: value for key, value in images.items() if key not in wanted[2:5]}
    text = complaint(pack(tmp_path / "lmdb", part), tmp_path, subset=True)
    assert "lacks 3 of the 10 images of the subset" in text
    assert "name the whole bedroom_train_lmdb" in text


def test_a_subset_of_something_else(images, packed, tmp_path, monkeypatch):
    exported(images, tmp_path / "files")
    assert "is no LMDB: --subset takes" in complaint(tmp_path / "files.npy", tmp_path, subset=True)
    monkeypatch.setenv("PAPERLIB_DATA", str(tmp_path / "data"))
    with pytest.raises(UserError, match="'mnist' takes no --subset"):
        datasets.prepare("mnist", subset=True)
    assert not (tmp_path / "data").exists()


def test_which_lmdb_is_meant(images, packed, tmp_path):
    assert "the folder of LSUN's LMDB" in complaint(packed / "data.mdb", tmp_path)
    assert "is no LMDB" in complaint(tmp_path, tmp_path, subset=True)  # two levels above it
    picture = packed.parent / "a.jpg"
    picture.write_bytes(images[key_of(0)])
    assert f"holds images and an LMDB: name {packed}," in complaint(packed.parent, tmp_path)


def test_an_empty_lmdb(tmp_path):
    assert "is an LMDB without images" in complaint(pack(tmp_path / "lmdb", {}), tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello", bytes(5000), b"x" * 100_000])
def test_a_file_that_is_no_lmdb(tmp_path, content):
    folder = tmp_path / "lmdb"
    folder.mkdir()
    (folder / "data.mdb").write_bytes(content)
    text = complaint(folder, tmp_path)
    assert f"cannot read {folder / 'data.mdb'} (" in text
    assert text.count(str(folder)) == 1


@pytest.fixture
def large(tmp_path):
    """An LMDB of 2 MB: overflow pages, several leaves."""
    images = {key_of(number): encoded(number) + bytes(8000) for number in range(200)}
    return pack(tmp_path / "lmdb", images)


def test_a_file_cut_short(large, tmp_path):
    file = large / "data.mdb"
    whole = file.read_bytes()
    assert len(write(large, tmp_path)) == 200
    (tmp_path / "out" / "train-images.npy").unlink()
    for length in (2 * 4096, len(whole) // 2):
        file.write_bytes(whole[:length])
        text = complaint(large, tmp_path)
        assert f"{file} is cut short ({length:,} of {len(whole):,} bytes): copy or unpack" in text
    file.write_bytes(whole[:-4096])  # little, but the last image; LMDB would be killed by a signal
    text = complaint(large, tmp_path)
    assert f"{file} is damaged: reading it ended after" in text
    assert "of 200 images (exit code -" in text


@pytest.mark.parametrize("subset", [False, True])
def test_a_file_with_a_hole(large, tmp_path, monkeypatch, subset):
    """Pages of zeros, as an interrupted copy may leave them, on which LMDB aborts or gives an error."""
    monkeypatch.setattr(lsun, "subset_keys", lambda: [key_of(number).encode() for number in range(200)])
    file = large / "data.mdb"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2].ljust(len(whole), b"\0"))
    assert f"{file} is damaged: reading it ended after" in complaint(large, tmp_path, subset=subset)


def test_a_reader_that_ends_early_without_an_error(packed, tmp_path, monkeypatch):
    """As where a damaged tree leads past some images: the array may not end in black ones."""
    monkeypatch.setattr(lsun, "_READER", lsun._READER.replace("else cursor:", "else [*cursor][:7]:"))
    assert "reading it ended after 7 of 40 images (exit code 0)" in complaint(packed, tmp_path)


def test_without_the_package(packed, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    assert "the package lmdb is missing: run pip install" in complaint(packed, tmp_path)


def test_a_kill_on_the_way_leaves_the_old_array(images, packed, tmp_path):
    path = tmp_path / "out" / "train-images.npy"
    old = write(packed, tmp_path)
    script = f"""
import os, signal
from pathlib import Path
from paperlib.data import image_arrays

square, seen = image_arrays._central_square, []

def killed_at_the_20th(file, side):
    seen.append(file)
    if len(seen) == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return 255 - square(file, side)

image_arrays._central_square = killed_at_the_20th
image_arrays.write(Path({str(packed)!r}), Path({str(path)!r}), {SIDE})
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert [file.suffix for file in path.parent.iterdir()].count(".npy") == 2, "it had begun to write"
    np.testing.assert_array_equal(np.load(path), old)


def test_an_interrupt_ends_the_reader_too(packed, tmp_path, monkeypatch):
    readers = []
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: readers.append(start(*a, **k)) or readers[-1])

    def interrupted(file, side):
        raise KeyboardInterrupt

    monkeypatch.setattr(image_arrays, "_central_square", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(packed, tmp_path)
    assert len(readers) == 1
    assert readers[0].returncode is not None
    assert not list((tmp_path / "out").iterdir())


def test_images_are_drawn_as_they_are_needed(packed):
    """Of millions, few may wait in memory."""
    drawn = []

    def images():
        for key, value in lsun.read(packed)[1]:
            drawn.append(key)
            yield key, io.BytesIO(value)

    squares = image_arrays._squares(images(), SIDE, threads=1)
    next(squares)
    assert len(drawn) == 5
    assert len(list(squares)) == 39
