"""Features of digits: what they are a function of, their scale, and which sets of images they tell apart."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F

from paperlib.data import datasets
from paperlib.stats import features
from paperlib.stats.features import Classifier, RandomNetwork, augmented, extractor, fit_classifier, raw_features
from paperlib.stats.two_sample import kernel_distance


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits")


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    before = torch.random.get_rng_state()
    result = fit_classifier(
        digits,
        tmp_path_factory.mktemp("classifier"),
        width=64,
        steps=200,
        batch_size=64,
        seed=0,
        device="cpu",
        provenance={"revision": "abc"},
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    return result


# The classifier


def test_the_classifier_learns_held_out_digits(digits, trained):
    row = trained.history[-1]
    assert trained.steps == row["step"] == 200 and trained.provenance == {"revision": "abc"}
    assert row["held_out_accuracy"] > 0.9
    with torch.no_grad():
        logits = trained.model(datasets.to_float(digits.held_out.images, 17))
    labels = torch.from_numpy(digits.held_out.labels)
    assert row["held_out_accuracy"] == pytest.approx((logits.argmax(1) == labels).double().mean().item(), rel=1e-6)
    entropy = -logits.double().log_softmax(1)[torch.arange(len(labels)), labels].mean().item()
    assert row["held_out_cross_entropy"] == pytest.approx(entropy, rel=1e-4)
    assert next(key for key in row if key.startswith("held_out")) == "held_out_cross_entropy"  # what is watched


def test_a_classifier_is_a_function_of_its_seed(digits, tmp_path):
    def weights(seed, folder):
        torch.manual_seed(len(folder))
        settings = {"width": 16, "steps": 3, "batch_size": 8, "device": "cpu"}
        return fit_classifier(digits, tmp_path / folder, seed=seed, **settings).model.state_dict()

    first, again, other = weights(1, "a"), weights(1, "bcd"), weights(2, "efghi")
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["layers.0.weight"], other["layers.0.weight"])


def test_the_classifier_on_colour_images():
    torch.manual_seed(0)
    model, x = Classifier(3, 128, classes=7), torch.rand(5, 3, 32, 32) * 2 - 1
    found = model.features(x)
    assert found.shape == (5, 128) and model(x).shape == (5, 7) and (found >= 0).all()
    torch.testing.assert_close(model(x), F.linear(found, model.classes.weight, model.classes.bias))
    torch.testing.assert_close(found, model.layers(x).flatten(2).mean(2))
    torch.testing.assert_close(model(x[:1]), model(x)[:1])  # images do not mix
    with pytest.raises(ValueError, match="multiple of 16"):
        Classifier(3, 40)


def test_colour_images_are_mirrored_and_grey_ones_are_not(digits, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(features, "augmented", lambda x, mirror: (seen.append(mirror), x)[1])
    for channels in (1, 3):
        parts = [datasets.Split(p.images.repeat(channels, 3), p.labels // 4) for p in (digits.train, digits.held_out)]
        settings = {"width": 16, "steps": 1, "batch_size": 8, "seed": 0, "device": "cpu"}
        some = datasets.Dataset("some", *parts, levels=17, source="")
        assert fit_classifier(some, tmp_path / str(channels), **settings).model.classes.out_features == 3
    assert seen == [False, True]


@pytest.mark.parametrize("mirror", [False, True])
def test_images_are_moved_by_up_to_an_eighth(mirror):
    """Each result is one of all moves, and all moves come."""
    torch.manual_seed(0)
    image = torch.rand(3, 8, 16)
    moves = {}
    for down in range(-1, 2):
        for right in range(-2, 3):
            rows, columns = (torch.arange(8) + down).clamp(0, 7), (torch.arange(16) + right).clamp(0, 15)
            moved = image[:, rows][:, :, columns]
            moves |= {(down, right, False): moved} | ({(down, right, True): moved.flip(2)} if mirror else {})
    every = torch.stack(list(moves.values()))
    count = 200 * len(moves)
    found = augmented(image.expand(count, -1, -1, -1), mirror=mirror)
    distance = torch.cdist(found.flatten(1), every.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    assert (distance.min(1).values == 0).all()
    shares = torch.bincount(distance.argmin(1), minlength=len(moves))
    assert ((shares - 200).abs() < 5 * math.sqrt(200)).all()


def test_each_image_keeps_its_place():
    x = torch.arange(20.0)[:, None, None, None].expand(20, 1, 8, 8)
    torch.testing.assert_close(augmented(x, mirror=True), x)


def test_images_are_moved_as_far_as_asked():
    x = torch.arange(64.0).reshape(1, 1, 8, 8).expand(200, -1, -1, -1)
    assert torch.equal(augmented(x, mirror=False, reach=0), x)
    torch.manual_seed(0)
    moved = augmented(x, mirror=False, reach=2)[:, 0, 4, 4]
    assert set(moved.tolist()) == {8.0 * row + column for row in range(2, 7) for column in range(2, 7)}


def test_thumbnails_are_means_over_a_grid():
    x = torch.randn(2, 3, 16, 16)
    found = features.Thumbnails(4)(x)
    assert found.shape == (2, 48)
    torch.testing.assert_close(found[1, 16 + 4 + 2], x[1, 1, 4:8, 8:12].mean())
    pictures = torch.randint(256, (30, 16, 16, 3), dtype=torch.uint8)
    assert extractor(features.Thumbnails(), pictures)(pictures).shape == (30, 192)


def test_images_without_labels_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no labels"):
        fit_classifier(datasets.load("photos", 8), tmp_path, width=16, steps=1, batch_size=1, seed=0, device="cpu")


# The random network


def test_the_random_network_is_a_function_of_its_seed_alone():
    before = torch.random.get_rng_state()
    first = RandomNetwork(3, channels=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    again, other = RandomNetwork(3, channels=3), RandomNetwork(4, channels=3)
    x = torch.rand(4, 3, 16, 16)
    assert torch.equal(first(x), again(x)) and not torch.allclose(first(x), other(x))
    assert not list(first.parameters())


def test_the_features_of_the_random_network_layer_by_layer():
    network, images, expected = RandomNetwork(0, channels=3, width=32), torch.rand(5, 3, 8, 8) * 2 - 1, []
    x = images
    for channels, weight in zip((8, 16, 32), network.buffers(), strict=True):
        assert weight.shape == (channels, x.shape[1], 3, 3)
        patches = F.unfold(x, 3, padding=1, stride=2)
        flat = (weight.flatten(1) @ patches).clamp(min=0)
        expected += [flat.mean(2), (flat - flat.mean(2, keepdim=True)).square().mean(2).sqrt()]
        x = flat.unflatten(2, (x.shape[2] // 2, -1))
    torch.testing.assert_close(network.features(images), torch.cat(expected, 1), rtol=1e-4, atol=1e-5)


def test_layers_of_the_random_network_keep_the_size_of_what_they_see():
    """Weights of variance 2 / inputs: the mean square does not vanish or explode, but for what borders of 0 take."""
    torch.manual_seed(0)
    x, squares = torch.randn(4, 3, 64, 64), []
    for weight in RandomNetwork(0, channels=3, width=256).buffers():
        assert weight.var().item() == pytest.approx(2 / (9 * weight.shape[1]), rel=0.1)
        x = F.relu(F.conv2d(x, weight, stride=2, padding=1))
        squares.append(x.square().mean().item())
    assert 0.7 < min(squares) and max(squares) < 1.3


# Extraction


def test_raw_features_are_the_networks_in_order(digits, monkeypatch):
    network, images = RandomNetwork(0, channels=1, width=16).train(), digits.train.images[:25]
    whole = raw_features(network, images, 17)
    assert whole.dtype == torch.float64 and whole.shape == (25, 56) and network.training
    torch.testing.assert_close(whole, network.features(datasets.to_float(images, 17)).double())
    monkeypatch.setattr(features, "BATCH", 10)
    torch.testing.assert_close(raw_features(network, images, 17), whole)
    torch.testing.assert_close(raw_features(network, torch.from_numpy(images), 17), whole)
    assert not torch.allclose(raw_features(network, images, 256), whole)
    with pytest.raises(ValueError, match="no images"):
        raw_features(network, images[:0], 17)
    with pytest.raises(TypeError, match="uint8"):
        raw_features(network, images.astype(float), 17)


def test_raw_features_are_those_of_evaluation(digits):
    class Noisy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1))

        def features(self, x):
            return F.dropout(self.scale * x.flatten(1), 0.5, self.training)

    network, images = Noisy(), digits.train.images[:5]
    expected = datasets.to_float(images, 17).flatten(1).double()
    torch.testing.assert_close(raw_features(network, images, 17), expected)
    assert not raw_features(network, images, 17).requires_grad and network.training


@pytest.mark.parametrize("which", ["random", "trained"])
def test_an_extractor_standardises(digits, trained, which):
    network = trained.model if which == "trained" else RandomNetwork(0, channels=1)
    extract = extractor(network, digits.train.images, 17)
    reference, raw = extract(digits.train.images), raw_features(network, digits.train.images, 17)
    varies = raw.std(0) > 1e-5
    assert varies.double().mean() > 0.6 and reference.isfinite().all()
    torch.testing.assert_close(reference.mean(0), torch.zeros(raw.shape[1]).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(reference.std(0, correction=0)[varies], torch.ones(int(varies.sum())).double())
    found = raw_features(network, digits.held_out.images, 17)
    expected = (found - raw.mean(0))[:, varies] / raw.std(0, correction=0)[varies]
    torch.testing.assert_close(extract(digits.held_out.images)[:, varies], expected)


def blurred(images):
    return gaussian_filter(images.astype(float), (0, 1, 1, 0)).round().astype(np.uint8)


def shuffled(images):
    """The four quarters of each image in a random order."""
    rng, result = np.random.default_rng(0), images.copy()
    for image in result:
        quarters = [image[y : y + 4, x : x + 4].copy() for y in (0, 4) for x in (0, 4)]
        for k, which in enumerate(rng.permutation(4)):
            image[4 * (k // 2) : 4 * (k // 2) + 4, 4 * (k % 2) : 4 * (k % 2) + 4] = quarters[which]
    return result


@pytest.mark.parametrize("which", ["random", "trained"])
@pytest.mark.parametrize("spoiled", [blurred, shuffled])
def test_spoiled_digits_are_farther_than_training_digits(digits, trained, which, spoiled):
    network = trained.model if which == "trained" else RandomNetwork(0, channels=1)
    extract = extractor(network, digits.train.images, 17)
    images, held_out = map(np.random.default_rng(0).permutation, (digits.train.images, digits.held_out.images))
    near, far = (kernel_distance(extract(some), extract(held_out)) for some in (images, spoiled(images)))
    assert near.low < 0 < near.high and far.value > near.high + 0.2
    if which == "random":  # a classifier's features, and with them the interval, explode far from what it has seen
        assert far.low > 0
