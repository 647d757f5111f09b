import io

import numpy as np
import pytest
from PIL import Image

from paperlib.data import image_arrays
from paperlib.system.errors import UserError

RNG = np.random.default_rng(0)


def photograph(rng, height=48, width=48):
    """Something with large and small structure: noise at several scales."""
    image = sum(rng.random((k, k, 3)).repeat(48 // k, 0).repeat(48 // k, 1) / k for k in (2, 4, 8, 16))
    image = (255 * (image - image.min()) / np.ptp(image)).astype(np.uint8)
    return np.asarray(Image.fromarray(image).resize((width, height)))


@pytest.fixture
def folder(tmp_path):
    """Six images, in the order in which they are read: name to array."""
    shapes = {"a.png": (40, 60), "c.webp": (60, 40), "z.bmp": (48, 48)}
    shapes |= {"B/10.png": (20, 30), "B/9.PNG": (33, 32), "d/1.png": (16, 16)}
    images = {name: photograph(RNG, *shape) for name, shape in shapes.items()}
    for name, image in images.items():
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path, lossless=True)
    for name in ("notes.txt", "._a.png"):
        (tmp_path / "images" / name).write_text("no image")
    return tmp_path / "images", images


def squares(images, side):
    """Written again: the crop by slicing, the resize by Pillow."""
    resized = []
    for image in images:
        n = min(image.shape[:2])
        top, left = (image.shape[0] - n) // 2, (image.shape[1] - n) // 2
        square = Image.fromarray(image[top : top + n, left : left + n])
        resized.append(np.asarray(square.resize((side, side), Image.Resampling.LANCZOS)))
    return np.stack(resized)


def write(source, tmp_path, side=16, **options):
    path = tmp_path / "out" / "train-images.npy"
    image_arrays.write(source, path, side, **options)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    return np.load(path)


def complaint(source, tmp_path, **options):
    (tmp_path / "out" / "train-images.npy").unlink(missing_ok=True)
    with pytest.raises(UserError) as caught:
        write(source, tmp_path, **options)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").glob("*")), "nothing may be left behind"
    return str(caught.value)


def test_grey_transparent_and_turned_images(tmp_path):
    image, exif = photograph(RNG, 32, 32), Image.Exif()
    grey = Image.fromarray(image).convert("L")
    grey.save(tmp_path / "1.png")
    Image.fromarray(image).convert("RGBA").save(tmp_path / "2.png")
    exif[0x0112] = 6  # to be shown after a quarter turn clockwise
    Image.fromarray(np.rot90(image, 1).copy()).save(tmp_path / "3.png", exif=exif)
    want = [np.asarray(grey)[..., None].repeat(3, 2), image, image]
    np.testing.assert_array_equal(write(tmp_path, tmp_path, side=32), want)


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_sixteen_bits_are_scaled_and_deeper_pixels_refused_by_name(tmp_path, capsys, ending):
    grey = photograph(RNG, 32, 32)[..., 0]
    Image.fromarray(grey.astype(np.uint16) * 257 + 40).save(tmp_path / f"a.{ending}")
    np.testing.assert_array_equal(write(tmp_path, tmp_path, side=32)[0], grey[..., None].repeat(3, 2))
    Image.fromarray(grey / np.float32(255)).save(tmp_path / "b.tiff")
    Image.fromarray(grey.astype(np.int32)).save(tmp_path / "c.tiff")
    assert len(write(tmp_path, tmp_path, side=32)) == 1
    said = capsys.readouterr().err
    assert "left out 2 of 3 images: b.tiff (pixels of mode F have no known scale" in said and "c.tiff (" in said


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_sound_pixels_in_damaged_exif_are_taken(tmp_path):
    """The field ImageWidth as text, beside an orientation: Pillow cannot write such EXIF again."""
    image, turned = photograph(RNG, 32, 32), Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(np.rot90(image, 1).copy()).save(tmp_path / "a.png", exif=turned)
    exif = bytes(turned.tobytes())
    odd = (
        exif[:6]
        + b"MM\0*\0\0\0\x08\0\x02"
        + b"\x01\0\0\x02\0\0\0\x0340\0\0"
        + b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    )
    Image.fromarray(np.rot90(image, 1).copy()).save(tmp_path / "b.png", exif=odd)
    Image.fromarray(image).save(tmp_path / "c.png", exif=exif[:6] + b"MM\0*\xff\xff\xff\xff")
    np.testing.assert_array_equal(write(tmp_path, tmp_path, side=32), [image] * 3)


def test_links_are_followed_once_and_what_is_left_is_told(folder, tmp_path, capsys):
    source, images = folder
    for place in (".ipynb_checkpoints", ".thumbnails/large"):
        (source / place).mkdir(parents=True)
        Image.fromarray(images["z.bmp"]).save(source / place / "z.png")
    Image.fromarray(images["z.bmp"]).save(tmp_path / "elsewhere.png")
    (elsewhere := tmp_path / "other").mkdir()
    (tmp_path / "elsewhere.png").rename(elsewhere / "e.png")
    (source / "d" / "link").symlink_to(elsewhere)
    (source / "d" / "round").symlink_to(source)
    (source / "x.gif").write_bytes(b"")
    written = write(source, tmp_path)
    np.testing.assert_array_equal(written, squares([*images.values(), images["z.bmp"]], 16))
    assert capsys.readouterr().err.startswith("taking 7 images; not looked at: 1 .gif, 1 .txt, 3 hidden")


def test_a_folder_in_the_order_of_names_without_broken_images(folder, tmp_path, capsys):
    source, images = folder
    written = write(source, tmp_path)
    assert written.dtype == np.uint8
    np.testing.assert_array_equal(written, squares(images.values(), 16))
    assert "left out" not in capsys.readouterr().err
    whole = (source / "c.webp").read_bytes()
    (source / "c.webp").write_bytes(whole[: len(whole) // 2])
    (source / "B" / "9.PNG").write_bytes(b"")
    for name in ("2.jpg", "3.jpg"):
        (source / "d" / name).write_text("<html>not found</html>")
    good = [image for name, image in images.items() if name not in ("c.webp", "B/9.PNG")]
    np.testing.assert_array_equal(write(source, tmp_path), squares(good, 16))
    first, said = capsys.readouterr().err.strip().split("\n")
    assert first == "taking 8 images; not looked at: 1 .txt, 1 hidden"
    assert said.startswith("left out 4 of 8 images: c.webp (") and "B/9.PNG (" in said and said.endswith("and 1 more")
    size = (tmp_path / "out" / "train-images.npy").stat().st_size
    assert size == 128 + len(good) * 16 * 16 * 3, "the room of the broken ones is given back"


def test_shortening_keeps_the_first_images(tmp_path):
    images, file = RNG.integers(256, size=(1000, 2, 2, 3), dtype=np.uint8), tmp_path / "a.npy"
    for count in (999, 100, 9, 1):
        array = image_arrays._new_array(file, images.shape)
        array[:] = images
        image_arrays._shorten(file, array, count)
        np.testing.assert_array_equal(np.load(file), images[:count])


def test_an_array_is_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(image_arrays, "_CHUNK", 3)
    images = RNG.integers(256, size=(10, 16, 16, 3), dtype=np.uint8)
    np.save(tmp_path / "a.npy", images)
    np.testing.assert_array_equal(write(tmp_path / "a.npy", tmp_path), images)


def test_arrays_that_do_not_fit_or_cannot_be_read(tmp_path):
    file = tmp_path / "a.npy"
    for shape in ((3, 16, 16), (3, 3, 16, 16), (3, 32, 32, 3), (), (0, 16, 16, 3)):
        np.save(file, np.zeros(shape, np.uint8))
        assert f"{file} is uint8 {shape}, not uint8 (N, 16, 16, 3)" in complaint(file, tmp_path)
    np.save(file, np.array([{}], object))
    assert f"cannot read {file} (" in complaint(file, tmp_path)
    np.save(file, np.zeros((3, 16, 16, 3), np.uint8))
    for length in (-1, 50, 0):
        file.write_bytes(file.read_bytes()[:length])
        assert f"cannot read {file} (" in complaint(file, tmp_path)


def test_a_full_disk_is_an_error_at_the_start(folder, tmp_path, monkeypatch):
    """Without the reservation, writing to a memory map on a full disk would kill the process."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_arrays.os, "posix_fallocate", full)
    monkeypatch.setattr(image_arrays, "_central_square", lambda *_: pytest.fail("began to write"))
    assert "no space left to write" in complaint(folder[0], tmp_path)


def test_near_copies_follow_their_definition_and_are_one_photograph_twice(monkeypatch):
    """Against correlations of block means written out in float64, on pairs around the threshold, mirrored or not."""
    monkeypatch.setattr(image_arrays, "_CHUNK", 7)
    rng = np.random.default_rng(1)
    among, strangers = (np.stack([photograph(rng) for _ in range(40)]) for _ in range(2))
    share = np.linspace(0.5, 1, 40)[:, None, None, None]
    images = (share * among + (1 - share) * strangers).astype(np.uint8)
    images[1::2] = images[1::2, :, ::-1]
    Image.fromarray(among[20]).save(file := io.BytesIO(), "JPEG", quality=60)
    cropped = np.asarray(Image.fromarray(among[14][1:, 1:]).resize((48, 48)))
    copies = [among[0], np.asarray(Image.open(file))[:, ::-1], (among[13] * 0.8 + 20).astype(np.uint8), cropped]
    among[17] = 7  # of one grey
    others = [among[15].transpose(1, 0, 2), 255 - among[16], among[17]]
    images = np.concatenate([images, copies, others])

    def blocks(pixels):
        means = pixels.reshape(-1, 16, 3, 16, 3, 3).mean((2, 4)).reshape(len(pixels), -1)
        means -= means.mean(1, keepdims=True)
        return means / np.linalg.norm(means, axis=1, keepdims=True).clip(1e-9)

    want = np.maximum(blocks(images) @ blocks(among).T, blocks(images[:, :, ::-1]) @ blocks(among).T).max(1)
    want = want > image_arrays.NEAR
    assert 5 < want[:40].sum() < 36 and want[40:].tolist() == [True] * 4 + [False] * 3
    np.testing.assert_array_equal(image_arrays.near_copies(images, among), want)
