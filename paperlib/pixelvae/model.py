"""The PixelVAE of notebook 04: a PixelCNN++ as the decoder p(x|z), and a Gaussian encoder

    (5)  q(z|x) = N(mean(x), diag std(x)^2),   std(x) = min_std + (1 - min_std) sigmoid(s(x))

A network of transposed convolutions turns z into a map at the image's own resolution, whose projection is added inside
every gated block of the decoder: through it z says where things are, not just what they are.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paperlib.data.device_images import Images
from paperlib.nn import likelihoods, pixelcnn
from paperlib.nn.pixelcnn import PixelCNN, PixelCNNSettings

BATCH = 128  # images at a time where nothing is trained


class Terms(NamedTuple):
    """What a PixelVAE says of a batch: log p(x|z) in nats (B,), and what `PixelVAE.code` returns."""

    log_p: Tensor
    mean: Tensor | None
    log_std: Tensor | None
    z: Tensor | None


class PixelVAE(nn.Module):
    """q(z|x) and p(x|z), see the module; images (B, C, S, S) in [-1, 1] with S a multiple of 8.

    Encoders: "conv", "linear", "label" (z is the class, one-hot, not learned), "nothing" (an unconditional PixelCNN++).
    """

    def __init__(self, settings: Any, channels: int, side: int, levels: int, classes: int, encoder: str) -> None:
        super().__init__()
        self.kind, self.min_std, self.classes = encoder, settings.min_std, classes
        self.code_dim = {"label": classes, "nothing": 0}.get(encoder, settings.code_dim)
        outputs = 2 * self.code_dim
        if encoder == "linear":
            self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(channels * side * side, outputs))
        elif encoder == "conv":
            self.encoder = _convolutions(channels, side, settings.encoder_channels, settings.encoder_units, outputs)
        if self.code_dim:
            self.expand = _expand(self.code_dim, side, settings.code_channels)
        sizes = {name: getattr(settings, name) for name in ("blocks", "filters", "mixtures", "dropout")}
        sizes["conditioning"] = settings.code_channels[-1] if self.code_dim else 0
        self.decoder = PixelCNN(PixelCNNSettings(channels, levels, **sizes))
        _keep_std(self)

    @property
    def learns_code(self) -> bool:
        return self.kind in ("conv", "linear")

    def q_z_given_x(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log std of q(z|x), equation (5): two (B, D), never in half precision."""
        encoded = self.encoder(x)
        mean, s = encoded.to(torch.promote_types(encoded.dtype, torch.float32)).chunk(2, 1)
        return mean, torch.log(self.min_std + (1 - self.min_std) * torch.sigmoid(s))

    def h(self, z: Tensor | None) -> Tensor | None:
        """What the decoder gets to see of z (B, D): a map (B, code_channels[-1], S, S). None for a model without z."""
        return None if z is None else self.expand(z)

    def p_x_given_z(self, x: Tensor, z: Tensor | None, seen: Tensor | float = 1.0) -> Tensor:
        """log p(x|z) in nats, (B,); the decoder sees no pixel of images for which `seen` (B, 1, 1, 1) is 0, not 1."""
        return pixelcnn.log_prob(self.decoder, x, self.h(z), seen)

    def code(self, x: Tensor, labels: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Mean and log std of q(z|x) and a sample z, (B, D); None, None and z = the class, or None, if not learned."""
        if self.learns_code:
            mean, log_std = self.q_z_given_x(x)
            return mean, log_std, likelihoods.sample_gaussian(mean, log_std)
        return None, None, F.one_hot(labels, self.classes).to(x.dtype) if self.kind == "label" else None

    def forward(self, x: Tensor, labels: Tensor, seen: Tensor | float = 1.0) -> Terms:
        mean, log_std, z = self.code(x, labels)
        return Terms(self.p_x_given_z(x, z, seen), mean, log_std, z)


def build(settings: Any, images: Images, encoder: str = "conv") -> PixelVAE:
    """A new model for these images, on their device, with weights from torch's generator."""
    channels, side, _ = images.shape
    vae = PixelVAE(settings, channels, side, images.dataset.levels, images.classes, encoder)
    return vae.to(images.device)


def _convolutions(channels: int, side: int, widths: tuple[int, ...], units: int, outputs: int) -> nn.Sequential:
    """4 x 4 convolutions, each halving the image, and a dense layer: the authors' encoder, with normalised layers.

    Without the normalisation Adam's first steps saturate every unit, and the means are the same for all images.
    """
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.GroupNorm(4, width), nn.ELU()]
        channels, side = width, side // 2
    layers += [nn.Flatten(), nn.Linear(channels * side * side, units), nn.LayerNorm(units), nn.ELU()]
    return nn.Sequential(*layers, nn.Linear(units, outputs))


def _expand(code_dim: int, side: int, channels: tuple[int, ...]) -> nn.Sequential:
    """z (B, D) to a map (B, channels[-1], side, side): a dense layer, then two convolutions for each doubling."""
    width, base = channels[0], side // 2 ** len(channels)
    layers = [nn.Linear(code_dim, width * base * base), nn.Unflatten(1, (width, base, base))]
    for wider in channels:
        layers += [nn.ELU(), nn.ConvTranspose2d(width, wider, 4, stride=2, padding=1)]
        layers += [nn.ELU(), nn.Conv2d(wider, wider, 3, padding=1)]
        width = wider
    return nn.Sequential(*layers)


@torch.no_grad()
def _keep_std(vae: PixelVAE) -> None:
    """Initial weights that keep the std from layer to layer: about 1 for the means over images and for the map.

    torch's own shrink it at every layer, that of the means to a tenth of the noise.
    """
    layers = [*vae.expand] if vae.code_dim else []
    layers += [*vae.encoder] if vae.learns_code else []
    for layer in layers:
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            inputs = layer.weight[0].numel()  # of one output
            if isinstance(layer, nn.ConvTranspose2d):
                inputs = layer.weight[:, 0].numel() // math.prod(layer.stride)
            nn.init.normal_(layer.weight, std=1.25 / math.sqrt(inputs))  # 1.25: what an ELU takes away
            nn.init.zeros_(layer.bias)
    if vae.learns_code:
        vae.encoder[-1].weight[vae.code_dim :].mul_(0.1)  # std(x) alike for all images
