"""The archives are small here, of the real formats, and torchvision is told their checksums."""

import functools
import gzip
import hashlib
import http.server
import io
import json
import os
import pickle
import shutil
import struct
import sys
import tarfile
import threading
import warnings

import numpy as np
import pytest
from test_datasets import complaint

from paperlib.data import datasets, downloads
from paperlib.system.errors import UserError
from paperlib.system.files import data_root

REAL = data_root() / "MNIST" / "raw"
FILES = tuple(f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
KINDS = downloads._torchvision().datasets


def noise(count, *shape):
    return np.random.default_rng(count).integers(256, size=(count, *shape), dtype=np.uint8), np.arange(count) % 10


MNIST = {"train": noise(20, 28, 28), "test": noise(7, 28, 28)}
CIFAR = {"train": noise(50, 32, 32, 3), "test": noise(6, 32, 32, 3)}


def md5(content):
    return hashlib.md5(content).hexdigest()


def idx(array):
    """MNIST's format: two zero bytes, type 8, the number of axes, then each size big-endian."""
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
    return gzip.compress(head + array.astype(np.uint8).tobytes())


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The data root; the mirrors lead nowhere."""
    monkeypatch.setenv("PAPERLIB_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(KINDS.MNIST, "mirrors", ["file:///nowhere/"])
    monkeypatch.setattr(KINDS.CIFAR10, "url", "file:///nowhere/")
    return tmp_path / "data"


@pytest.fixture
def mnist(root, monkeypatch):
    """The folder with four archives."""
    (raw := root / "MNIST" / "raw").mkdir(parents=True)
    assert tuple(file for file, _ in KINDS.MNIST.resources) == FILES
    contents = {file: idx(array) for file, array in zip(FILES, [*MNIST["train"], *MNIST["test"]], strict=True)}
    for file, content in contents.items():
        (raw / file).write_bytes(content)
    monkeypatch.setattr(KINDS.MNIST, "resources", [(file, md5(content)) for file, content in contents.items()])
    unpacked = {file.removesuffix(".gz"): md5(gzip.decompress(content)) for file, content in contents.items()}
    monkeypatch.setattr(downloads, "MNIST_UNPACKED", unpacked)
    return raw


@pytest.fixture
def cifar(root, monkeypatch):
    """The archive with six pickled batches."""
    kind, (images, labels) = KINDS.CIFAR10, CIFAR["train"]
    batches = {f"data_batch_{k + 1}": (images[10 * k : 10 * k + 10], labels[10 * k : 10 * k + 10]) for k in range(5)}
    files = {
        name: pickle.dumps({"data": x.transpose(0, 3, 1, 2).reshape(len(x), -1), "labels": y.tolist()})
        for name, (x, y) in (batches | {"test_batch": CIFAR["test"]}).items()
    }
    files["batches.meta"] = pickle.dumps({"label_names": list("abcdefghij")})
    root.mkdir(exist_ok=True)
    with tarfile.open(archive := root / kind.filename, "w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"{kind.base_folder}/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    monkeypatch.setattr(kind, "tgz_md5", md5(archive.read_bytes()))
    monkeypatch.setattr(kind, "train_list", [[name, md5(files[name])] for name in batches])
    monkeypatch.setattr(kind, "test_list", [["test_batch", md5(files["test_batch"])]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(files["batches.meta"])})
    return archive


def equal(split, images, labels):
    return np.array_equal(split.images, images.reshape(split.images.shape)) and np.array_equal(split.labels, labels)


def test_mnist_is_prepared_on_first_use(mnist, root):
    """Also beside half of an unpacked copy, as a run that was killed while unpacking leaves."""
    for file in FILES:
        unpacked = gzip.decompress((mnist / file).read_bytes())
        (mnist / file).with_suffix("").write_bytes(unpacked[: len(unpacked) // 2])
    dataset = datasets.load("mnist", side=28)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        datasets.to_unit(dataset.train.images).add_(1)
    assert isinstance(dataset.train.images, np.memmap) and not dataset.train.images.flags.writeable
    assert equal(dataset.train, *MNIST["train"]) and equal(dataset.held_out, *MNIST["test"])
    assert (dataset.train.labels.dtype, dataset.test, dataset.levels) == (np.int64, None, 256)
    description, folder = dataset.describe(), root / "prepared" / "mnist"
    (folder / "test-images.npy").write_bytes(b"damaged")
    assert datasets.prepare("mnist") == folder
    shutil.rmtree(mnist)
    assert datasets.load("mnist").describe() == description
    names = {path.name for path in folder.glob("[!.]*")}
    assert names == {f"{part}-{kind}.npy" for part in MNIST for kind in ("images", "labels")}


@pytest.mark.parametrize("archive", ["missing", "damaged", "sound"])
def test_unpacked_files_are_taken_only_where_they_are_the_right_ones(mnist, archive):
    for file in FILES:
        (mnist / file).with_suffix("").write_bytes(gzip.decompress((mnist / file).read_bytes()))
    first = mnist / FILES[0]
    if archive == "missing":
        first.unlink()
    elif archive == "damaged":
        first.write_bytes(b"half")
    assert equal(datasets.load("mnist").train, *MNIST["train"])
    first.with_suffix("").write_bytes(gzip.decompress(idx(noise(19, 28, 28)[0])))
    if archive == "sound":
        datasets.prepare("mnist")
        assert equal(datasets.load("mnist").train, *MNIST["train"])
        return
    with pytest.raises(UserError, match=f"{first.stem} is not MNIST's file .* move it away and run python -m"):
        datasets.prepare("mnist")
    assert first.with_suffix("").exists(), "nobody's file is deleted"


def test_cifar10_is_prepared_on_first_use(cifar):
    dataset = datasets.load("cifar10")
    images, labels = CIFAR["train"]
    assert equal(dataset.train, images[:45], labels[:45]) and equal(dataset.held_out, images[45:], labels[45:])
    assert equal(dataset.test, *CIFAR["test"])
    assert dataset.source.endswith("test: only the first 6 of the 10,000 test images")
    description = dataset.describe()
    assert json.loads(json.dumps(description)) == description
    assert list(description["parts"]) == ["train", "held_out", "test"]
    assert description["parts"]["held_out"] == {
        "count": 5,
        "shape": [32, 32, 3],
        "sha256": hashlib.sha256(images[45:].tobytes()).hexdigest(),
        "hashed": "all images",
        "labels_sha256": hashlib.sha256(labels[45:].astype(np.uint8)).hexdigest(),
    }


def test_missing_archives(root):
    text = complaint("mnist")
    assert all(f"{file} is missing" in text for file in FILES)
    assert text.endswith(f"into {root / 'MNIST' / 'raw'} and run python -m paperlib.data prepare mnist")
    assert datasets._missing("mnist"), "nothing may look prepared"


def test_damaged_archives_are_named(mnist, cifar):
    for name, archive in (("mnist", mnist / FILES[2]), ("cifar10", cifar)):
        archive.write_bytes(archive.read_bytes()[:-1] + b"\x99")
        text = complaint(name)
        assert f"in {archive.parent} {archive.name} is damaged (wrong checksum)" in text
        assert text.count("is damaged") == 1


@pytest.mark.parametrize(
    ("place", "function", "said"),
    [
        (KINDS.utils, "extract_archive", r"cannot be unpacked (OSError: [Errno 28] No space left on device)"),
        (os, "posix_fallocate", "no space left to write"),
    ],
)
def test_a_full_disk(mnist, monkeypatch, place, function, said):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(place, function, full)
    assert said in complaint("mnist")


def test_damaged_archives_are_downloaded_again(mnist, tmp_path, monkeypatch):
    mirror = shutil.copytree(mnist, tmp_path / "mirror")
    (mnist / FILES[0]).write_bytes(b"half")
    (mnist / FILES[3]).unlink()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=mirror)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(KINDS.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        dataset = datasets.load("mnist")
        server.shutdown()
    assert equal(dataset.train, *MNIST["train"]) and equal(dataset.held_out, *MNIST["test"])


def test_only_the_known_import_error_is_mended(tmp_path, monkeypatch):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms is odd')")
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="nms is odd"):
        downloads._torchvision()


@pytest.mark.skipif(not (REAL / FILES[0]).exists(), reason="the real archives are not at hand")
def test_the_real_mnist(root):
    (raw := root / "MNIST" / "raw").mkdir(parents=True)
    for file in FILES:
        shutil.copy(REAL / file, raw)
    dataset = datasets.load("mnist")
    assert len(dataset.held_out.images) == 10_000
    # Published with the set: it begins 5, 0, 4, 1, 9; mean 0.1307, std 0.3081.
    assert dataset.train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert np.bincount(dataset.train.labels).tolist() == [*(5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)]
    mean, std = (measure(dataset.train.images, dtype=np.float64) / 255 for measure in (np.mean, np.std))
    assert (mean, std) == pytest.approx((0.1307, 0.3081), abs=5e-5)
