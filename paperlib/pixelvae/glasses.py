"""Claim G1: what a factored Gaussian makes of p(x | feature), against what the unconditional PixelCNN++ makes of it.

A Gaussian decoder of a feature f, each grey level with the mass of its bin, falls short of the truth by

    (5)  E KL(q(x|f) || N(f)) = -E log N(x; f) - H(x|f)  >=  E log p(x) - E log N(x; f)

for any p, as H(x|f) <= H(x) <= -E log p(x). So the likelihood of a model without a code bounds the loss from below,
whatever f is. For f = t, the upper half of the image, and the lower half b it is -E log p(b|t) in place of -E log p(x),
which a model that goes row by row has too: the sum over the lower rows.
"""

from typing import Any

import torch
from torch import Tensor

from paperlib.data.device_images import Images
from paperlib.nn import likelihoods
from paperlib.pixelvae.markov_chain import Decoder
from paperlib.pixelvae.model import BATCH, PixelVAE
from paperlib.system.devices import stream

FEATURES = "class", "brightness", "upper half"
LEAST_STD = 12**-0.5  # of a uniform grey level within its bin: some corners of digits never vary
TENTHS = 10  # of the training images by mean grey level: the feature "brightness"


@torch.no_grad()
def glasses(settings: Any, images: Images, unconditional: PixelVAE, seed: int) -> dict[str, Any]:
    """`gaussian_nats` and `pixelcnn_nats` (FEATURES, n), -log p of held-out images or their lower halves.

    And of one held-out photograph of each class, (classes, S, S, C): `glasses_photograph`; `glasses_class_mean` and
    `..._draw` of the Gaussian of its class, the same for `brightness`, and for `half`, its lower half by regression on
    the upper; `glasses_half_pixelcnn` (2, classes, S, S, C), by the PixelCNN++.
    """
    n, generator = settings.measured_images, stream(seed, 8, images.device)
    pictures, labels = images.held_out[:n], images.held_out_labels[:n]
    chosen = torch.stack([(labels == k).nonzero()[0, 0] for k in range(images.classes)])
    whole, lower = _pixelcnn_nats(unconditional, images, pictures)
    nats, shown = [], {"glasses_photograph": pictures[chosen]}
    groups = {"class": (images.labels, labels), "brightness": _tenths(images, pictures)}
    for name, (known, asked) in groups.items():
        means, stds = _gaussians(images.train, known)
        nats.append(_gaussian_nats(pictures, means, stds, asked, images.dataset.levels))
        mean, std = means[asked[chosen]], stds[asked[chosen]]
        shown[f"glasses_{name}_mean"] = mean
        shown[f"glasses_{name}_draw"] = mean + std * _noise(mean, generator)
    half = pictures.shape[1] // 2
    top, bottom = pictures[:, :half], pictures[:, half:]
    predicted, std = _regression(images.train, top)
    rows = torch.arange(n, device=images.device)
    nats.append(_gaussian_nats(bottom, predicted, std.expand_as(predicted), rows, images.dataset.levels))
    drawn = predicted[chosen] + std * _noise(predicted[chosen], generator)
    for name, lower_half in (("mean", predicted[chosen]), ("draw", drawn)):
        shown[f"glasses_half_{name}"] = torch.cat([top[chosen].double(), lower_half], 1)
    decode, no_code = Decoder(unconditional, images, len(chosen)), top.new_empty(len(chosen), 0)
    given = images.to_float(top[chosen])
    shown["glasses_half_pixelcnn"] = torch.stack([decode(no_code, generator, given) for _ in range(2)])
    pictures_ = {name: x.round().clamp(0, images.dataset.levels - 1).byte() for name, x in shown.items()}
    return pictures_ | {"gaussian_nats": torch.stack(nats), "pixelcnn_nats": torch.stack([whole, whole, lower])}


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def _pixelcnn_nats(vae: PixelVAE, images: Images, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """-log p of `pictures` uint8 (N, S, S, C), and of their lower halves given the upper: two (N,)."""
    nats, half = [], pictures.shape[1] // 2
    for part in pictures.split(BATCH):
        x = images.to_float(part)
        parameters = vae.decoder(x)
        nats.append(
            [
                -likelihoods.discretized_mix_logistic_log_prob(
                    x[:, :, start:], parameters[:, :, start:], levels=images.dataset.levels
                )
                for start in (0, half)
            ]
        )
    whole, lower = (torch.cat(column).double() for column in zip(*nats, strict=True))
    return whole, lower


def _tenths(images: Images, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Which tenth of the training images' mean grey levels each training image, and each of `pictures`, belongs to."""
    known, asked = (x.flatten(1).double().mean(1) for x in (images.train, pictures))
    limits = torch.quantile(known, torch.linspace(0, 1, TENTHS + 1, device=known.device).to(known))[1:-1]
    return torch.bucketize(known, limits), torch.bucketize(asked, limits)


def _gaussians(pictures: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std of each pixel over each group of uint8 images (N, S, S, C), in grey levels: two (K, S, S, C)."""
    members = [pictures[groups == k].double() for k in range(int(groups.max()) + 1)]
    stds = torch.stack([x.std(0, correction=0) for x in members]).clamp(min=LEAST_STD)
    return torch.stack([x.mean(0) for x in members]), stds


def _gaussian_nats(pictures: Tensor, means: Tensor, stds: Tensor, groups: Tensor, levels: int) -> Tensor:
    """-log p of uint8 `pictures` (N, ...) under the Gaussians (K, ...) of their groups (N,), in float64."""
    parts = zip(pictures.split(512), groups.split(512), strict=True)
    return -torch.cat(
        [
            likelihoods.discretized_gaussian_log_prob(x.double(), means[k], stds[k].log(), levels=levels)
            for x, k in parts
        ]
    )


def _regression(train: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """The lower halves that a linear regression on `train`, uint8 (N, S, S, C), predicts for upper halves `top`
    (M, S / 2, S, C), and the std of what it leaves of each pixel, both in grey levels and float64.

    Least squares, as if each pixel of the upper half had noise with the variance of one grey level.
    """
    half, count = train.shape[1] // 2, len(train)

    def halves(part: Tensor) -> tuple[Tensor, Tensor]:
        part = part.double() - mean
        return part[:, :half].flatten(1), part[:, half:].flatten(1)

    mean = torch.stack([part.double().sum(0) for part in train.split(5000)]).sum(0) / count
    gram, cross = 0, 0
    for part in train.split(5000):
        t, b = halves(part)
        gram, cross = gram + t.mT @ t, cross + t.mT @ b
    gram.diagonal().add_(count)
    weights = torch.linalg.solve(gram, cross)
    squares = 0
    for part in train.split(5000):
        t, b = halves(part)
        squares = squares + (b - t @ weights).square().sum(0)
    shape = mean[half:].shape
    std = (squares / count).sqrt().clamp(min=LEAST_STD).view(shape)
    predicted = (top.double() - mean[:half]).flatten(1) @ weights
    return predicted.view(-1, *shape) + mean[half:], std
