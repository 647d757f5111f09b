"""Features of digits: what they are a function of, their scale, and which sets of images they tell apart."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from paperlib.data import datasets
from paperlib.pixelvae.measurements import blurred, patches_shuffled
from paperlib.stats import features
from paperlib.stats.features import Classifier, RandomNetwork, augmented, extractor, fit_classifier, raw_features
from paperlib.stats.two_sample import kernel_distance

SHORT = {"width": 16, "steps": 1, "batch_size": 8, "seed": 0, "device": "cpu"}


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits")


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    settings = SHORT | {"width": 64, "steps": 200, "batch_size": 64, "provenance": {"revision": "abc"}}
    return fit_classifier(digits, tmp_path_factory.mktemp("classifier"), **settings)


@pytest.fixture(params=["random", "trained"])
def network(request, trained):
    return trained.model if request.param == "trained" else RandomNetwork(0, channels=1)


# The classifier


def test_the_classifier_learns_held_out_digits(digits, trained):
    row = trained.history[-1]
    assert trained.steps == row["step"] == 200 and trained.provenance == {"revision": "abc"}
    with torch.no_grad():
        logits = trained.model(datasets.to_float(digits.held_out.images, 17)).numpy()
    labels = digits.held_out.labels
    assert 0.9 < row["held_out_accuracy"] == pytest.approx((logits.argmax(1) == labels).mean(), rel=1e-6)
    entropy = F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels)).item()
    assert row["held_out_cross_entropy"] == pytest.approx(entropy, rel=1e-4)
    assert next(key for key in row if key.startswith("held_out")) == "held_out_cross_entropy", "what is watched"


def test_a_classifier_is_a_function_of_its_seed(digits, tmp_path):
    def weights(seed, folder):
        torch.manual_seed(len(folder))
        before = torch.random.get_rng_state()
        model = fit_classifier(digits, tmp_path / folder, **SHORT | {"seed": seed, "steps": 3}).model
        assert torch.equal(torch.random.get_rng_state(), before)
        return model.state_dict()

    first, again, other = weights(1, "a"), weights(1, "bcd"), weights(2, "efghi")
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["layers.0.weight"], other["layers.0.weight"])


def test_the_classifier_on_colour_images():
    model, x = Classifier(3, 128, classes=7), torch.rand(5, 3, 32, 32) * 2 - 1
    pooled = model.features(x)
    assert pooled.shape == (5, 128) and (pooled >= 0).all()
    torch.testing.assert_close(pooled, model.layers(x).flatten(2).mean(2))
    torch.testing.assert_close(model(x), F.linear(pooled, model.classes.weight, model.classes.bias))
    torch.testing.assert_close(model(x[:1]), model(x)[:1])  # images do not mix


def test_colour_images_are_mirrored_and_grey_ones_are_not(digits, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(features, "augmented", lambda x, mirror: (seen.append(mirror), x)[1])
    for channels in (1, 3):
        parts = [datasets.Split(p.images.repeat(channels, 3), p.labels // 4) for p in (digits.train, digits.held_out)]
        some = datasets.Dataset("some", *parts, levels=17, source="")
        assert fit_classifier(some, tmp_path / str(channels), **SHORT).model.classes.out_features == 3
    assert seen == [False, True]


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("reach", [None, 0, 2])
def test_images_are_moved_by_up_to_an_eighth_or_as_far_as_asked(mirror, reach):
    """Each result is one of all moves of the image in its place, and all moves come."""
    torch.manual_seed(0)
    image, every = torch.randperm(3 * 8 * 16).float().reshape(3, 8, 16), []
    tall, wide = (1, 2) if reach is None else (reach, reach)
    for down in range(-tall, tall + 1):
        for right in range(-wide, wide + 1):
            rows, columns = (torch.arange(8) + down).clamp(0, 7), (torch.arange(16) + right).clamp(0, 15)
            moved = image[:, rows][:, :, columns]
            every += [moved, moved.flip(2)] if mirror else [moved]
    place = 1000.0 * torch.arange(200 * len(every))[:, None, None, None]
    images = augmented(image + place, mirror=mirror, reach=reach) - place
    distance = torch.cdist(
        images.flatten(1), torch.stack(every).flatten(1), compute_mode="donot_use_mm_for_euclid_dist"
    )
    assert (distance.min(1).values == 0).all()
    shares = torch.bincount(distance.argmin(1), minlength=len(every))
    assert ((shares - 200).abs() < 5 * math.sqrt(200)).all()


def test_what_cannot_be_trained_is_refused(digits, tmp_path):
    with pytest.raises(ValueError, match="no labels"):
        fit_classifier(datasets.load("photos", 8), tmp_path, **SHORT)
    with pytest.raises(ValueError, match="multiple of 16"):
        fit_classifier(digits, tmp_path, **SHORT | {"width": 40})


# Networks without training


def test_the_random_network_is_a_function_of_its_seed_alone():
    before = torch.random.get_rng_state()
    first = RandomNetwork(3, channels=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    again, other = (dict(RandomNetwork(seed, channels=3).named_buffers()) for seed in (3, 4))
    for name, weight in first.named_buffers():
        assert torch.equal(weight, again[name]) and not torch.allclose(weight, other[name])
        assert weight.var().item() == pytest.approx(2 / (9 * weight.shape[1]), rel=0.1)  # what is seen keeps its size
    assert not list(first.parameters())


def test_the_features_of_the_random_network_layer_by_layer():
    network, images, expected = RandomNetwork(0, channels=3), torch.rand(5, 3, 8, 8) * 2 - 1, []
    x = images
    for channels, weight in zip((16, 32, 64), network.buffers(), strict=True):
        assert weight.shape == (channels, x.shape[1], 3, 3)
        patches = F.unfold(x, 3, padding=1, stride=2)
        flat = (weight.flatten(1) @ patches).clamp(min=0)
        expected += [flat.mean(2), (flat - flat.mean(2, keepdim=True)).square().mean(2).sqrt()]
        x = flat.unflatten(2, (x.shape[2] // 2, -1))
    torch.testing.assert_close(network.features(images), torch.cat(expected, 1), rtol=1e-4, atol=1e-5)


def test_thumbnails_are_means_over_a_grid():
    x = torch.randn(2, 3, 16, 16)
    seen = features.Thumbnails()(x)
    torch.testing.assert_close(seen, x.unflatten(3, (8, 2)).unflatten(2, (8, 2)).mean((3, 5)).flatten(1))
    pictures = torch.randint(256, (30, 16, 16, 3), dtype=torch.uint8)
    assert extractor(features.Thumbnails(), pictures, 256)(pictures).shape == (30, 192)


# Extraction


def test_raw_features_are_the_networks_in_evaluation_in_order(digits, monkeypatch):
    class Noisy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1))

        def features(self, x):
            return F.dropout(self.scale * x.flatten(1), 0.5, self.training)

    network, images = Noisy(), digits.train.images[:25]
    expected = datasets.to_float(images, 17).flatten(1).double()
    for batch in (250, 10):
        monkeypatch.setattr(features, "BATCH", batch)
        for given in (images, torch.from_numpy(images)):
            torch.testing.assert_close(raw_features(network, given, 17), expected)
    assert not raw_features(network, images, 17).requires_grad and network.training
    with pytest.raises(ValueError, match="no images"):
        raw_features(network, images[:0], 17)
    with pytest.raises(TypeError, match="uint8"):
        raw_features(network, images.astype(float), 17)


def test_an_extractor_standardises(digits, network):
    extract = extractor(network, digits.train.images, 17)
    reference, held_out = (raw_features(network, part.images, 17) for part in (digits.train, digits.held_out))
    varies = reference.std(0) > 1e-5
    std = torch.where(varies, reference.std(0, correction=0), 1.0)
    assert varies.double().mean() > 0.6
    torch.testing.assert_close(extract(digits.held_out.images), (held_out - reference.mean(0)) / std)


@pytest.mark.parametrize(
    "spoiled", [blurred, lambda pictures: patches_shuffled(pictures, torch.Generator().manual_seed(0))]
)
def test_spoiled_digits_are_farther_than_training_digits(digits, network, spoiled):
    extract = extractor(network, digits.train.images, 17)
    order = np.random.default_rng(0).permutation
    images, held_out = (torch.from_numpy(order(part.images)) for part in (digits.train, digits.held_out))
    near, far = (kernel_distance(extract(some), extract(held_out)) for some in (images, spoiled(images)))
    assert near.low < 0 < near.high and far.value > near.high + 0.2
