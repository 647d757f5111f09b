"""The archives are small here, of the real formats, and torchvision is told their checksums."""

import functools
import gzip
import hashlib
import http.server
import io
import pickle
import shutil
import struct
import sys
import tarfile
import threading

import numpy as np
import pytest

from paperlib.data import datasets, downloads
from paperlib.system.errors import UserError
from paperlib.system.files import data_root

REAL = data_root() / "MNIST" / "raw"
FILES = tuple(f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
NOWHERE = "file:///nowhere/"
RNG = np.random.default_rng(0)
MNIST = {
    "train": (
        RNG.integers(256, size=(20, 28, 28), dtype=np.uint8),
        np.arange(20, dtype=np.uint8) % 10,
    ),
    "test": (RNG.integers(256, size=(7, 28, 28), dtype=np.uint8), np.arange(7, dtype=np.uint8)),
}
CIFAR = {
    "train": (RNG.integers(256, size=(50, 32, 32, 3), dtype=np.uint8), np.arange(50) % 10),
    "test": (RNG.integers(256, size=(6, 32, 32, 3), dtype=np.uint8), np.arange(6)),
}


def md5(content):
    return hashlib.md5(content).hexdigest()


def idx(array):
    """MNIST's format: two zero bytes, type 8, the number of axes, then each size big-endian."""
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
    return gzip.compress(head + array.tobytes())


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERLIB_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def mnist(root, monkeypatch):
    """The folder with four archives; the mirror leads nowhere."""
    kind = downloads._torchvision().datasets.MNIST
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    contents = [idx(array) for part in MNIST.values() for array in part]
    for file, content in zip(FILES, contents, strict=True):
        (raw / file).write_bytes(content)
    sums = [(file, md5(content)) for file, content in zip(FILES, contents, strict=True)]
    assert [file for file, _ in kind.resources] == [FILES[k] for k in range(4)]
    monkeypatch.setattr(kind, "resources", sums)
    monkeypatch.setattr(kind, "mirrors", [NOWHERE])
    return raw


@pytest.fixture
def cifar(root, monkeypatch):
    """The archive with six pickled batches; its address leads nowhere."""
    kind = downloads._torchvision().datasets.CIFAR10
    images, labels = CIFAR["train"]
    batches = {f"data_batch_{k + 1}": (images[10 * k : 10 * k + 10], labels[10 * k : 10 * k + 10]) for k in range(5)}
    batches["test_batch"] = CIFAR["test"]
    files = {
        name: pickle.dumps({"data": x.transpose(0, 3, 1, 2).reshape(len(x), -1), "labels": y.tolist()})
        for name, (x, y) in batches.items()
    }
    files["batches.meta"] = pickle.dumps({"label_names": list("abcdefghij")})
    root.mkdir()
    archive = root / kind.filename
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"{kind.base_folder}/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    monkeypatch.setattr(kind, "url", NOWHERE)
    monkeypatch.setattr(kind, "tgz_md5", md5(archive.read_bytes()))
    monkeypatch.setattr(kind, "train_list", [[name, md5(files[name])] for name in files if name[:4] == "data"])
    monkeypatch.setattr(kind, "test_list", [["test_batch", md5(files["test_batch"])]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(files["batches.meta"])})
    return archive


def complaint(name="mnist"):
    with pytest.raises(UserError) as caught:
        datasets.load(name)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(f"run python -m paperlib.data prepare {name}")
    return text


def test_mnist_is_prepared_on_first_use(mnist, root):
    dataset = datasets.load("mnist")
    for part, want in ((dataset.train, MNIST["train"]), (dataset.held_out, MNIST["test"])):
        np.testing.assert_array_equal(part.images, want[0][..., None])
        np.testing.assert_array_equal(part.labels, want[1])
    assert isinstance(dataset.train.images, np.memmap)
    for file in FILES:
        (mnist / file).unlink()
    assert datasets.load("mnist").describe() == dataset.describe()
    names = {path.name for path in (root / "prepared" / "mnist").glob("[!.]*")}
    assert names == {f"{part}-{kind}.npy" for part in MNIST for kind in ("images", "labels")}


def test_cifar10_is_prepared_on_first_use(cifar):
    dataset = datasets.load("cifar10")
    images, labels = CIFAR["train"]
    parts = (
        (dataset.train, images[:45], labels[:45]),
        (dataset.held_out, images[45:], labels[45:]),
        (dataset.test, *CIFAR["test"]),
    )
    for part, want_images, want_labels in parts:
        np.testing.assert_array_equal(part.images, want_images)
        np.testing.assert_array_equal(part.labels, want_labels)
    assert dataset.source.endswith("only the first 6 of the 10,000 test images")


def test_half_of_an_unpacked_copy_is_not_trusted(mnist):
    """What a run that was killed while unpacking leaves."""
    whole = gzip.decompress((mnist / FILES[0]).read_bytes())
    for file in FILES:
        unpacked = gzip.decompress((mnist / file).read_bytes())
        (mnist / file).with_suffix("").write_bytes(unpacked[: len(unpacked) // 2])
    np.testing.assert_array_equal(datasets.load("mnist").train.images[..., 0], MNIST["train"][0])
    assert (mnist / FILES[0]).with_suffix("").read_bytes() == whole


def test_missing_archives(root, monkeypatch):
    monkeypatch.setattr(downloads._torchvision().datasets.MNIST, "mirrors", [NOWHERE])
    text = complaint()
    for file in FILES:
        assert f"{file} is missing" in text
    assert f"into {root / 'MNIST' / 'raw'} and run" in text
    assert datasets._missing("mnist"), "nothing may look prepared"


def cut_short(content):
    return content[:-100]


def with_a_bit_turned(content):
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("damage", [cut_short, with_a_bit_turned])
def test_damaged_archives_are_named(mnist, damage):
    (mnist / FILES[2]).write_bytes(damage((mnist / FILES[2]).read_bytes()))
    text = complaint()
    assert f"in {mnist} {FILES[2]} is damaged (wrong checksum)" in text
    assert text.count("is damaged") == 1


def test_a_damaged_cifar10_archive_is_named(cifar):
    cifar.write_bytes(cut_short(cifar.read_bytes()))
    assert f"in {cifar.parent} {cifar.name} is damaged (wrong checksum)" in complaint("cifar10")


def test_archives_that_cannot_be_unpacked(mnist, monkeypatch):
    utils = downloads._torchvision().datasets.utils

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(utils, "extract_archive", full)
    text = complaint()
    assert "cannot be unpacked (OSError: [Errno 28] No space left on device)" in text


def test_damaged_archives_are_downloaded_again(mnist, tmp_path, monkeypatch):
    mirror = tmp_path / "mirror"
    shutil.copytree(mnist, mirror)
    (mnist / FILES[0]).write_bytes(b"half")
    (mnist / FILES[3]).unlink()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=mirror)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        kind = downloads._torchvision().datasets.MNIST
        monkeypatch.setattr(kind, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        dataset = datasets.load("mnist")
        server.shutdown()
    np.testing.assert_array_equal(dataset.train.images[..., 0], MNIST["train"][0])
    np.testing.assert_array_equal(dataset.held_out.labels, MNIST["test"][1])


def test_only_the_known_import_error_is_mended(tmp_path, monkeypatch):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms is odd')")
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="nms is odd"):
        downloads._torchvision()


def test_transforms_and_grids_work_too():
    torchvision = downloads._torchvision()
    import torch
    from torchvision.transforms import v2

    assert torchvision.utils.make_grid(torch.zeros(4, 3, 8, 8), nrow=2).shape == (3, 22, 22)
    assert v2.functional.horizontal_flip(torch.arange(3).reshape(1, 1, 3)).tolist() == [[[2, 1, 0]]]


@pytest.mark.skipif(not (REAL / FILES[0]).exists(), reason="the real archives are not at hand")
def test_the_real_mnist(root):
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in FILES:
        shutil.copy(REAL / file, raw)
    dataset = datasets.load("mnist")
    assert dataset.train.images.shape == (60_000, 28, 28, 1)
    assert dataset.held_out.images.shape == (10_000, 28, 28, 1)
    # Published with the set: it begins 5, 0, 4, 1, 9; mean 0.1307, deviation 0.3081.
    assert dataset.train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert np.bincount(dataset.train.labels).tolist() == [*(5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)]
    assert dataset.train.images.mean(dtype=np.float64) / 255 == pytest.approx(0.1307, abs=5e-5)
    assert dataset.train.images.std(dtype=np.float64) / 255 == pytest.approx(0.3081, abs=5e-5)
