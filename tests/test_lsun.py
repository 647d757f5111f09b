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
from test_image_arrays import complaint, write

from paperlib.data import datasets, image_arrays, lsun
from paperlib.data.__main__ import main
from paperlib.system.errors import UserError
from paperlib.system.files import ROOT

SIDE = 16  # as `write` writes


def encoded(number):
    """A photograph of sorts, as WebP or JPEG, upright or wide."""
    image = Image.fromarray(np.random.default_rng(number).integers(256, size=(6, 7, 3), dtype=np.uint8))
    image.resize((50, 31 + number)).save(file := io.BytesIO(), "WEBP" if number % 3 else "JPEG", quality=90)
    return file.getvalue()


def key_of(number):
    return hashlib.sha1(str(number).encode()).hexdigest()


def pack(folder, images):
    """`images` (key: bytes) as an LMDB."""
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=2**26) as opened, opened.begin(write=True) as transaction:
        for key, value in images.items():
            assert transaction.put(key.encode(), value)
    (folder / "lock.mdb").unlink()
    return folder


@pytest.fixture(scope="module")
def images():
    return {key_of(number): encoded(number) for number in range(40)}


@pytest.fixture
def packed(images, tmp_path):
    return pack(tmp_path / "lsun" / "bedroom_train_lmdb", images)


@pytest.fixture
def wanted(images, monkeypatch):
    """Ten keys as the subset, in an order of their own."""
    keys = sorted(images)[::4][::-1]
    monkeypatch.setattr(lsun, "subset_keys", lambda: [key.encode() for key in keys])
    return keys


def squares(images, keys):
    """What `test_image_arrays` compares with squares of its own, of the images with these keys in turn."""
    return np.stack([image_arrays._central_square(io.BytesIO(images[key]), SIDE) for key in keys])


def test_the_same_pixels_as_from_files_in_the_order_of_keys(images, packed, tmp_path):
    want = squares(images, sorted(images))
    assert list(images) != sorted(images) and len(np.unique(want.reshape(40, -1), axis=0)) == 40
    for source in (packed, packed.parent):
        np.testing.assert_array_equal(write(source, tmp_path), want)
    assert [file.name for file in packed.iterdir()] == ["data.mdb"], "reading leaves no file behind"


def test_the_command_and_a_subset_in_its_own_order(images, packed, wanted, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PAPERLIB_DATA", str(tmp_path / "data"))
    words = ["data", "prepare", "lsun_bedroom", "--source", packed.parent, "--side", SIDE, "--subset"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    main()
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'data' / 'prepared' / 'lsun_bedroom'}\n" and "10 images to train with" in said.err
    written = np.load(Path(said.out.strip()) / "train-images.npy")
    np.testing.assert_array_equal(written, squares(images, wanted))


def test_the_keys_of_the_subset():
    digest = hashlib.sha256(b"\n".join(lsun.subset_keys())).hexdigest()
    assert digest == "9d7c74742361d6652792ca0bb7b7434b4447d2ea409065ec96d02345b95751c0"
    described = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert any(fnmatch.fnmatch(lsun._KEYS.name, pattern) for pattern in described["paperlib.data"]), "it is packaged"


def test_images_that_cannot_be_read_are_named(images, wanted, tmp_path, capsys):
    cut, empty = wanted[0], sorted(images)[1]
    images = {**images, cut: images[cut][:100], empty: b""}
    packed = pack(tmp_path / "lmdb", images)
    np.testing.assert_array_equal(write(packed, tmp_path), squares(images, sorted({*images} - {cut, empty})))
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"left out 2 of 40 images: {empty} (UnidentifiedImageError), {cut} (")
    assert said.endswith("; copy or unpack the LMDB again to have them") and "\n" not in said
    text = complaint(packed, tmp_path, subset=True)
    assert text.startswith(f"the image {cut} (") and text.endswith("cannot be read: copy or unpack the LMDB again")


def test_lmdbs_of_other_things_and_what_is_none(images, wanted, tmp_path):
    others = pack(tmp_path / "others", {"a": b"no image", "\xe9": b"no image"})
    assert f"none of the 2 images in {others} can be read, a (" in complaint(others, tmp_path)
    part = pack(tmp_path / "part", {key: value for key, value in images.items() if key not in wanted[2:5]})
    text = complaint(part, tmp_path, subset=True)
    assert "lacks 3 of the 10 images of the subset: name the whole bedroom_train_lmdb" in text
    assert "is an LMDB without images" in complaint(pack(tmp_path / "empty", {}), tmp_path)
    file = tmp_path / "no lmdb" / "data.mdb"
    file.parent.mkdir()
    for content in (b"", b"hello", bytes(5000), b"x" * 100_000):
        file.write_bytes(content)
        text = complaint(file.parent, tmp_path)
        assert text.startswith(f"cannot read {file} (") and text.count(str(file.parent)) == 1


def test_which_source_is_meant(images, packed, tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", np.zeros((1, SIDE, SIDE, 3), np.uint8))
    for source in (tmp_path / "a.npy", tmp_path):  # this is two levels above the LMDB
        assert "is no LMDB: --subset takes" in complaint(source, tmp_path, subset=True)
    monkeypatch.setenv("PAPERLIB_DATA", str(tmp_path / "data"))
    with pytest.raises(UserError, match="'mnist' takes no --subset"):
        datasets.prepare("mnist", subset=True)
    assert not (tmp_path / "data").exists()
    assert "the folder of LSUN's LMDB" in complaint(packed / "data.mdb", tmp_path)
    (packed.parent / "a.jpg").write_bytes(images[key_of(0)])
    assert f"holds images and an LMDB: name {packed}," in complaint(packed.parent, tmp_path)


def test_a_file_cut_short_or_with_a_hole(tmp_path, monkeypatch):
    """Of 2 MB: overflow pages, several leaves. LMDB is killed by a signal or aborts where it does not give an error."""
    large = {key_of(number): encoded(number % 50) + bytes(8000) for number in range(200)}
    file = (folder := pack(tmp_path / "lmdb", large)) / "data.mdb"
    whole = file.read_bytes()
    assert len(write(folder, tmp_path)) == 200
    for length in (2 * 4096, len(whole) // 2):
        file.write_bytes(whole[:length])
        said = f"{file} is cut short ({length:,} of {len(whole):,} bytes): copy or unpack"
        assert said in complaint(folder, tmp_path)
    file.write_bytes(whole[:-4096])  # little, but the last image
    text = complaint(folder, tmp_path)
    assert f"{file} is damaged: reading it ended after" in text and "of 200 images (exit code -" in text
    monkeypatch.setattr(lsun, "subset_keys", lambda: [key.encode() for key in large])
    file.write_bytes(whole[: len(whole) // 2].ljust(len(whole), b"\0"))  # as an interrupted copy may leave it
    for subset in (False, True):
        assert f"{file} is damaged: reading it ended after" in complaint(folder, tmp_path, subset=subset)


def test_a_reader_that_ends_early_without_an_error(packed, tmp_path, monkeypatch):
    """As where a damaged tree leads past some images: the array may not end in black ones."""
    monkeypatch.setattr(lsun, "_READER", lsun._READER.replace("else cursor:", "else [*cursor][:7]:"))
    assert "reading it ended after 7 of 40 images (exit code 0)" in complaint(packed, tmp_path)


def test_an_interrupt_leaves_the_old_array_and_ends_the_reader(packed, tmp_path, monkeypatch):
    old, start, readers = write(packed, tmp_path), subprocess.Popen, []
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: readers.append(start(*a, **k)) or readers[-1])

    def interrupted(file, side):
        raise KeyboardInterrupt

    monkeypatch.setattr(image_arrays, "_central_square", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(packed, tmp_path)
    assert len(readers) == 1 and readers[0].returncode is not None
    (left,) = (tmp_path / "out").iterdir()
    np.testing.assert_array_equal(np.load(left), old)


def test_images_are_drawn_as_they_are_needed(packed, monkeypatch):
    """Of millions, few may wait in memory."""
    monkeypatch.setattr(image_arrays, "_THREADS", 1)
    drawn = []
    images = ((drawn.append(key), io.BytesIO(value)) for key, value in lsun.read(packed)[1])
    next(squares := image_arrays._squares(images, SIDE))
    assert len(drawn) == 5 and len(list(squares)) == 39
