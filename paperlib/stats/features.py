"""Features of images, in which sets of images are compared: of a small classifier, and of networks left untrained.

The published kernel distance takes the features of an Inception network trained on ImageNet; these need no download.
Their distances are not comparable to published ones.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paperlib.data import datasets
from paperlib.runs import train
from paperlib.system import distributed
from paperlib.system.devices import to_device

BATCH = 250  # images at a time without gradients


class Classifier(nn.Module):
    """Logits of `classes` for images (B, C, H, W) in [-1, 1]: four convolutions, the last two of `width` channels.

    The side is halved three times, so it must be 8 or more. Raises `ValueError` for a width that is no multiple of 16.
    """

    def __init__(self, channels: int, width: int, classes: int) -> None:
        super().__init__()
        if width < 16 or width % 16:
            raise ValueError(f"width is {width}, but must be a multiple of 16")
        self.layers = nn.Sequential(
            *_convolution(channels, width // 4),
            nn.MaxPool2d(2),
            *_convolution(width // 4, width // 2),
            nn.MaxPool2d(2),
            *_convolution(width // 2, width),
            nn.MaxPool2d(2),
            *_convolution(width, width),
        )
        self.classes = nn.Linear(width, classes)

    def features(self, x: Tensor) -> Tensor:
        """The last layer before the classes, a mean over positions: (B, C, H, W) to (B, width), 0 or more."""
        return self.layers(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.classes(self.features(x))


def _convolution(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.GroupNorm(4, outputs), nn.ReLU()]


def fit_classifier(
    dataset: datasets.Dataset,
    directory: Path | str,
    *,
    width: int,
    steps: int,
    batch_size: int,
    seed: int,
    device: torch.device | str,
    provenance: Mapping[str, Any] | None = None,
) -> train.Trained:
    """Train a `Classifier` on the labels of a data set's training images, by cross entropy; see `train.fit`.

    Images are `augmented`, those in colour also mirrored. The history ends with `held_out_cross_entropy`, in nats, and
    `held_out_accuracy`: 73 % on CIFAR-10 for a width of 128 and 4,500 steps of 64, which take about five minutes on one
    core. Raises `ValueError` for a data set without labels.
    """
    if dataset.train.labels is None or dataset.held_out.labels is None:
        raise ValueError(f"{dataset.name} has no labels to learn")
    images, labels, held_out_labels = (
        torch.from_numpy(np.array(part)).to(device)
        for part in (dataset.train.images, dataset.train.labels, dataset.held_out.labels)
    )
    held_out = datasets.to_float(dataset.held_out.images, dataset.levels, device)
    channels = images.shape[-1]

    def batch(rows: Tensor) -> tuple[Tensor, Tensor]:
        rows = to_device(rows, device)
        return augmented(datasets.to_float(images[rows], dataset.levels), mirror=channels == 3), labels[rows]

    def loss(model: nn.Module, inputs: tuple[Tensor, Tensor], progress: train.Progress) -> tuple[Tensor, dict]:
        entropy, accuracy = _scores(model(inputs[0]), inputs[1])
        return entropy, {"accuracy": accuracy}

    def evaluate(model: nn.Module) -> dict[str, Tensor]:
        scores = _scores(torch.cat([model(part) for part in held_out.split(BATCH)]), held_out_labels)
        return dict(zip(("cross_entropy", "accuracy"), scores, strict=True))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(channels, width, int(labels.max()) + 1)
    recipe = train.Recipe(steps, batch_size, learning_rate=2e-3, schedule="cosine", evaluate_every=max(1, steps // 10))
    options = {"seed": seed, "device": device, "evaluate": evaluate, "provenance": provenance, "name": "classifier"}
    return train.fit(model, loss, batch, len(images), recipe, directory, **options)


def _scores(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy in nats, and accuracy."""
    return F.cross_entropy(logits, labels), (logits.argmax(1) == labels).float().mean()


def augmented(x: Tensor, *, mirror: bool, reach: int | None = None) -> Tensor:
    """Images (B, C, H, W), each moved by up to `reach` pixels, and half of them mirrored if `mirror`.

    Without a `reach`, by up to 1/8 of its height and width. Whole pixels; what comes in at a border repeats it. The
    moves come from torch's global generator.
    """
    count, _, height, width = x.shape
    down, right = (height // 8, width // 8) if reach is None else (reach, reach)
    windows = F.pad(x, (right, right, down, down), mode="replicate").unfold(2, height, 1).unfold(3, width, 1)
    top, left = (distributed.randint(2 * reach + 1, (count,), device=x.device) for reach in (down, right))
    x = windows[torch.arange(count, device=x.device), :, top, left]
    if mirror:
        x = torch.where(distributed.rand((count, 1, 1, 1), device=x.device) < 0.5, x.flip(3), x)
    return x


class RandomNetwork(nn.Module):
    """A convolutional network that is never trained: its weights are a function of `seed` alone, and are buffers.

    Three convolutions of 3 x 3 with stride 2, of 16, 32 and 64 channels, each followed by a ReLU; Gaussian weights of
    variance 2 / inputs. torch's global generator is not touched.
    """

    def __init__(self, seed: int, channels: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for k, (inputs, outputs) in enumerate(itertools.pairwise((channels, 16, 32, 64))):
            weight = torch.randn(outputs, inputs, 3, 3, generator=generator) * math.sqrt(2 / (9 * inputs))
            self.register_buffer(f"weight{k}", weight)

    def features(self, x: Tensor) -> Tensor:
        """Mean, then std, over positions of each channel of each layer: (B, C, H, W) to (B, 224)."""
        moments = []
        for weight in self.buffers():
            x = F.relu(F.conv2d(x, weight, stride=2, padding=1))
            moments += [x.mean((2, 3)), x.std((2, 3), correction=0)]
        return torch.cat(moments, 1)


class Thumbnails(nn.Module):
    """Nothing learned and nothing drawn: means over a grid of 8 x 8, which see colour and layout alone."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("where", torch.zeros(0), persistent=False)  # on the device that this is moved to

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, 64 C)."""
        return F.adaptive_avg_pool2d(x, 8).flatten(1)

    forward = features


@torch.no_grad()
def raw_features(network: nn.Module, images: np.ndarray | Tensor, levels: int) -> Tensor:
    """`network.features` of images, uint8 (N, H, W, C) of `levels` grey levels, some at a time: (N, d) float64, CPU.

    The network sees them in [-1, 1], on its own device and in evaluation mode. Raises `TypeError` and `ValueError` as
    `datasets.to_unit`, and `ValueError` for no images.
    """
    if not len(images):
        raise ValueError("there are no images")
    device = next(itertools.chain(network.parameters(), network.buffers())).device
    training = network.training
    network.eval()
    starts = range(0, len(images), BATCH)
    parts = [network.features(datasets.to_float(images[i : i + BATCH], levels, device)).double().cpu() for i in starts]
    network.train(training)
    return torch.cat(parts)


@torch.no_grad()
def predicted(classifier: Classifier, images: np.ndarray | Tensor, levels: int) -> np.ndarray:
    """The class that a `Classifier` gives to each image, uint8 (N, H, W, C) of `levels` grey levels: int64 (N,).

    Raises as `raw_features`.
    """
    device = classifier.classes.weight.device
    logits = classifier.classes(raw_features(classifier, images, levels).float().to(device))
    return logits.argmax(1).numpy(force=True)


Extractor = Callable[[np.ndarray | Tensor], Tensor]  # images, uint8 (N, H, W, C), to features (N, d), float64, CPU


def extractor(network: nn.Module, reference: np.ndarray | Tensor, levels: int) -> Extractor:
    """What makes features of `network` with mean 0 and std 1 on the `reference` images, uint8 (N, H, W, C).

    Features that do not vary there are only centred. Use the training images, and one extractor for all sets that are
    to be compared.
    """
    raw = raw_features(network, reference, levels)
    mean, std = raw.mean(0), raw.std(0, correction=0)
    std = torch.where(std > 1e-6 * mean.abs(), std, 1.0)
    return lambda images: (raw_features(network, images, levels) - mean) / std
