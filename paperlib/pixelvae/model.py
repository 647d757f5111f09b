"""The PixelVAE of notebooks 04 and 05: a PixelCNN++ as the decoder p(x|z), and a Gaussian encoder

    (5)  q(z|x) = N(mean(x), diag std(x)^2),   std(x) = min_std + (1 - min_std) sigmoid(s(x))

A network of transposed convolutions turns z into a map at the image's own resolution, whose projection is added inside
every gated block of the decoder: through it z says where things are, not just what they are.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from paperlib.data.device_images import Images
from paperlib.nn import likelihoods, pixelcnn
from paperlib.nn.pixelcnn import PixelCNN, PixelCNNSettings

BATCH = 128  # images at a time where nothing is trained


class Terms(NamedTuple):
    """What a PixelVAE says of a batch: log p(x|z) in nats (B,), and of `PixelVAE.code` mean, log std and z (B, D)."""

    log_p: Tensor
    mean: Tensor | None
    log_std: Tensor | None
    z: Tensor | None


class PixelVAE(nn.Module):
    """q(z|x) and p(x|z), see the module; images (B, C, S, S) in [-1, 1] with S a multiple of 8.

    Without a code (`coded` False) an unconditional PixelCNN++, in which z has no dimensions. The encoder may be
    `linear`; the decoder of a `factored` model sees no pixel, so that p(x|z) is a product over pixels.
    """

    def __init__(
        self,
        settings: Any,
        channels: int,
        side: int,
        levels: int,
        coded: bool = True,
        linear: bool = False,
        factored: bool = False,
    ) -> None:
        super().__init__()
        self.sees = 0.0 if factored else 1.0
        self.min_std, self.code_dim = settings.min_std, settings.code_dim if coded else 0
        if coded:
            widths, units = settings.encoder_channels, settings.encoder_units
            self.encoder = (
                nn.Sequential(nn.Flatten(), nn.Linear(channels * side * side, 2 * self.code_dim))
                if linear
                else _convolutions(channels, side, widths, units, 2 * self.code_dim)
            )
            self.expand = _expand(self.code_dim, side, settings.code_channels)
        sizes = {name: getattr(settings, name) for name in ("blocks", "filters", "mixtures", "dropout")}
        sizes["conditioning"] = settings.code_channels[-1] if coded else 0
        self.decoder = PixelCNN(PixelCNNSettings(channels, levels, **sizes))
        _keep_std(self)

    def q_z_given_x(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log std of q(z|x), equation (5): two (B, D), never in half precision."""
        encoded = self.encoder(x)
        mean, s = encoded.to(torch.promote_types(encoded.dtype, torch.float32)).chunk(2, 1)
        return mean, torch.log(self.min_std + (1 - self.min_std) * torch.sigmoid(s))

    def h(self, z: Tensor | None) -> Tensor | None:
        """What the decoder gets to see of z (B, D): a map (B, code_channels[-1], S, S). None for a model without z."""
        return self.expand(z) if self.code_dim else None

    def p_x_given_z(self, x: Tensor, z: Tensor | None, seen: Tensor | float = 1.0) -> Tensor:
        """log p(x|z) in nats, (B,); the decoder sees no pixel of images for which `seen` (B, 1, 1, 1) is 0, not 1."""
        return pixelcnn.log_prob(self.decoder, x, self.h(z), seen * self.sees)

    def code(self, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Mean and log std of q(z|x) and a sample z, (B, D); three times None for a model without z."""
        if not self.code_dim:
            return None, None, None
        mean, log_std = self.q_z_given_x(x)
        return mean, log_std, likelihoods.sample_gaussian(mean, log_std)

    def forward(self, x: Tensor, seen: Tensor | float = 1.0) -> Terms:
        mean, log_std, z = self.code(x)
        return Terms(self.p_x_given_z(x, z, seen), mean, log_std, z)


def build(settings: Any, images: Images, coded: bool = True, linear: bool = False, factored: bool = False) -> PixelVAE:
    """A new model for these images, on their device, with weights from torch's generator."""
    channels, side, _ = images.shape
    return PixelVAE(settings, channels, side, images.dataset.levels, coded, linear, factored).to(images.device)


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
    if not vae.code_dim:
        return
    for layer in [*vae.encoder, *vae.expand]:
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            inputs = layer.weight[0].numel()  # of one output
            if isinstance(layer, nn.ConvTranspose2d):
                inputs = layer.weight[:, 0].numel() // math.prod(layer.stride)
            nn.init.normal_(layer.weight, std=1.25 / math.sqrt(inputs))  # 1.25: what an ELU takes away
            nn.init.zeros_(layer.bias)
    vae.encoder[-1].weight[vae.code_dim :].mul_(0.1)  # std(x) alike for all images
