"""The networks of notebook 03's chain of images: the encoder and the generator of one step.

Both read images at the same scales, side / 2, side / 4, ..., one for each entry of `Size.widths`. A code is a ladder of
vectors, one for each scale: coarse ones decide what the image is of, fine ones what its surfaces are like.

    image -> [32 x 32] -> [16 x 16] -> [8 x 8] -> [4 x 4, dense]      convolutions of stride 2, then one of stride 1
                |            |            |             |
               z^1          z^2          z^3           z^4            encoder: mean and std of each
                |            |            |             |
    image <- [32 x 32] <- [16 x 16] <- [8 x 8] <- [dense, 4 x 4]      generator: transposed convolutions of stride 2

A generator that sees the previous image reads it by the same scales on the way down and adds them on the way up (the
U-shaped path), and blends its output with it by a gate for each pixel, which the network gives too:

    (5)  G(x', z) = g x' + (1 - g) m,   0 < g < 1

All convolutions of stride 2 have kernels of 4 x 4: each output pixel of a transposed one is then reached by as many
inputs, four, which leaves no checkerboard of the kind that uneven overlap makes.

Layers are normalised image by image (GroupNorm), so that training and sampling, one image or many, are the same.
Where several steps share a network, each has a bias of its own in every normalised layer, a learned embedding of the
step, and its own dense layers between codes and maps: through shared ones the code of every step could only move the
image in the same few directions, and the first of them would leave the others idle. They are addressed by `index`, a
whole number in a tensor without dimensions, so that compiled code serves all steps.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paperlib.nn import likelihoods
from paperlib.system import distributed

SLOPE = 0.1  # of the leaky ReLU below 0
GROUPS = 4  # of channels that are normalised together
GREATEST_MEAN = 8.0  # of a code, in absolute value
LEAST_LOG_STD = -6.0  # of q(z|x); the greatest is 0, where it meets the prior


@dataclass(frozen=True)
class Size:
    """Of a step's networks. `widths` are the channels at side / 2, side / 4, ...; `units` those of the dense layer.

    `maps`: channels of the map that the code of each scale is spread to, and read from, but for the coarsest, whose
    code stands at the dense layer. `kernel`: side of the convolutions of stride 1, one at each scale but the coarsest.
    Raises `ValueError` for a side that cannot be halved so often, and for widths that are no multiples of `GROUPS`.
    """

    channels: int
    side: int
    widths: tuple[int, ...]
    units: int
    maps: tuple[int, ...]
    kernel: int = 3

    def __post_init__(self) -> None:
        if self.side % 2 ** len(self.widths):
            raise ValueError(f"{self.side} pixels cannot be halved {len(self.widths)} times")
        if wrong := [width for width in (*self.widths, self.units) if width % GROUPS]:
            raise ValueError(f"widths {wrong} are no multiples of {GROUPS}")
        if len(self.maps) != len(self.widths) - 1:
            raise ValueError(f"{len(self.maps)} code maps for {len(self.widths)} scales: there is one less")

    def at(self, scale: int) -> int:
        """Side of the images at a scale, from 0."""
        return self.side // 2 ** (scale + 1)


class Block(nn.Module):
    """A layer without bias, GroupNorm, the step's own bias, a skip connection if given, and a leaky ReLU."""

    def __init__(self, layer: nn.Module, width: int, steps: int) -> None:
        super().__init__()
        self.layer, self.norm = layer, nn.GroupNorm(GROUPS, width)
        self.embedding = nn.Parameter(torch.zeros(steps, width)) if steps > 1 else None
        nn.init.kaiming_normal_(layer.weight, SLOPE)

    def forward(self, x: Tensor, index: Tensor, skip: Tensor | None = None) -> Tensor:
        x = self.norm(self.layer(x))
        if self.embedding is not None:
            x = x + self.embedding.index_select(0, index.view(1)).view(1, -1, *[1] * (x.ndim - 2))
        return F.leaky_relu(x if skip is None else x + skip, SLOPE)


def _convolution(inputs: int, outputs: int, kernel: int) -> nn.Conv2d:
    """Of stride 1, the size kept."""
    return nn.Conv2d(inputs, outputs, kernel, padding="same", bias=False)


class StepLinear(nn.Module):
    """A dense layer for each of the steps, weights N(0, 1 / inputs), biases 0: (B, inputs) to (B, outputs)."""

    def __init__(self, inputs: int, outputs: int, steps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(steps, outputs, inputs) / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.zeros(steps, outputs))

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return F.linear(x, *(own.index_select(0, index.view(1)).squeeze(0) for own in (self.weight, self.bias)))


class Down(nn.Module):
    """An image (B, C, S, S) to what is seen at each scale, finest first: maps (B, width, s, s), then (B, units)."""

    def __init__(self, inputs: int, size: Size, steps: int) -> None:
        super().__init__()
        self.halve, self.look = nn.ModuleList(), nn.ModuleList()
        for width in size.widths:
            self.halve.append(Block(nn.Conv2d(inputs, width, 4, stride=2, padding=1, bias=False), width, steps))
            inputs = width
        for width in size.widths[:-1]:
            self.look.append(Block(_convolution(width, width, size.kernel), width, steps))
        flat = inputs * size.at(len(size.widths) - 1) ** 2
        self.dense = Block(nn.Linear(flat, size.units, bias=False), size.units, steps)

    def forward(self, x: Tensor, index: Tensor) -> list[Tensor]:
        seen = []
        for halve, look in zip(self.halve, self.look, strict=False):
            x = look(halve(x, index), index)
            seen.append(x)
        return [*seen, self.dense(self.halve[-1](x, index).flatten(1), index)]


class Encoder(nn.Module):
    """q(z_t | x, x(t-1)): the images stacked, (B, inputs, S, S), to mean and log std (B, D), D = sum(ladder)."""

    def __init__(self, inputs: int, size: Size, ladder: tuple[int, ...], steps: int) -> None:
        super().__init__()
        self.down = Down(inputs, size, steps)
        self.narrow, self.heads = nn.ModuleList(), nn.ModuleList()
        for scale, dims in enumerate(ladder[:-1]):
            width, maps = size.widths[scale], size.maps[scale]
            self.narrow.append(nn.Identity() if width == maps else nn.Conv2d(width, maps, 1))
            self.heads.append(_head(maps * size.at(scale) ** 2, dims, steps))
        self.heads.append(_head(size.units, ladder[-1], steps))

    def forward(self, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.down(x, index)
        maps = [narrow(one) for narrow, one in zip(self.narrow, seen[:-1], strict=True)] + seen[-1:]
        both = [_widened(head(one.flatten(1), index)).chunk(2, 1) for head, one in zip(self.heads, maps, strict=True)]
        mean, s = (torch.cat(part, 1) for part in zip(*both, strict=True))
        return GREATEST_MEAN * torch.tanh(mean / GREATEST_MEAN), LEAST_LOG_STD * torch.sigmoid(s)


def _head(inputs: int, dims: int, steps: int) -> StepLinear:
    """Means that at first vary by about 1 over images, and stds near exp(-1): codes that can be used."""
    head = StepLinear(inputs, 2 * dims, steps)
    with torch.no_grad():
        head.weight[:, dims:].mul_(0.1)
        head.bias[:, dims:].fill_(-1.6)
    return head


class Generator(nn.Module):
    """G_t of equation (5): the previous image, if it `sees` one, and a code, if there is a ladder, to an image."""

    def __init__(self, size: Size, ladder: tuple[int, ...], steps: int, sees: bool) -> None:
        super().__init__()
        if not sees and not ladder:
            raise ValueError("a generator needs a code or a previous image to make an image of")
        self.size, self.ladder, self.sees = size, ladder, sees
        coarsest = len(size.widths) - 1
        if sees:
            self.down = Down(size.channels, size, steps)
        self.spread = nn.ModuleList()
        if ladder:
            outputs = [maps * size.at(scale) ** 2 for scale, maps in enumerate(size.maps)] + [size.units]
            self.spread.extend(StepLinear(dims, wide, steps) for dims, wide in zip(ladder, outputs, strict=True))
        inputs = size.units * (bool(ladder) + sees)
        self.dense = Block(nn.Linear(inputs, size.units, bias=False), size.units, steps)
        flat = size.widths[-1] * size.at(coarsest) ** 2
        self.unfold = Block(nn.Linear(size.units, flat, bias=False), flat, steps)
        self.grow, self.look = nn.ModuleList(), nn.ModuleList()
        for scale in range(coarsest):
            width = size.widths[scale]
            inputs = width + (size.maps[scale] if ladder else 0)
            self.grow.append(Block(_doubling(size.widths[scale + 1], width, bias=False), width, steps))
            self.look.append(Block(_convolution(inputs, width, size.kernel), width, steps))
        self.last = _doubling(size.widths[0], size.channels + sees)
        nn.init.normal_(self.last.weight, std=0.3 / math.sqrt(4 * size.widths[0]))
        nn.init.zeros_(self.last.bias)

    def forward(self, previous: Tensor | None, seen: Tensor | None, z: Tensor | None, index: Tensor) -> Tensor:
        """`seen` is what the U-shaped path reads, `previous` what is blended: the same but for noise in training."""
        size, coarsest = self.size, len(self.size.widths) - 1
        skips = self.down(seen, index) if self.sees else [None] * (coarsest + 1)
        codes: list[Tensor | None] = [None] * (coarsest + 1)
        if self.ladder:
            parts = z.split(self.ladder, 1)
            codes = [F.leaky_relu(layer(part, index), SLOPE) for layer, part in zip(self.spread, parts, strict=True)]
        h = torch.cat([part for part in (skips[-1], codes[-1]) if part is not None], 1)
        h = self.unfold(self.dense(h, index), index)
        h = h.unflatten(1, (size.widths[-1], size.at(coarsest), size.at(coarsest)))
        for scale in reversed(range(coarsest)):
            h = self.grow[scale](h, index, skips[scale])
            if self.ladder:
                h = torch.cat([h, codes[scale].unflatten(1, (size.maps[scale], *h.shape[2:]))], 1)
            h = self.look[scale](h, index)
        out = _widened(self.last(h))
        if not self.sees:
            return out
        image, gate = out[:, :-1], torch.sigmoid(out[:, -1:])
        return gate * previous + (1 - gate) * image


def _doubling(inputs: int, outputs: int, bias: bool = True) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1, bias=bias)


def _widened(x: Tensor) -> Tensor:
    """Never in half precision, whatever autocast did."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Step(NamedTuple):
    """What a step makes of a batch: x(t) (B, C, S, S); mean, log std of q(z_t|.) and the sample z_t (B, D)."""

    image: Tensor
    mean: Tensor | None
    log_std: Tensor | None
    z: Tensor | None


class StepNetwork(nn.Module):
    """Encoder and generator of one step of the chain, or of `steps` that share them; without a ladder no encoder."""

    def __init__(self, size: Size, ladder: tuple[int, ...], steps: int, sees: bool) -> None:
        super().__init__()
        self.sees = sees
        if ladder:
            self.encoder = Encoder(size.channels * (1 + sees), size, ladder, steps)
        self.generator = Generator(size, ladder, steps, sees)

    def q_z_given_x(self, x: Tensor, seen: Tensor | None, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(torch.cat([x, seen], 1) if self.sees else x, index)

    def forward(self, x: Tensor, previous: Tensor | None, index: Tensor, noise: float = 0.0) -> Step:
        """The networks see the previous image with noise, for each image of a std drawn uniformly from 0 to
        `noise`: so training is never far from sampling and measuring, which add none.
        """
        seen = previous
        if self.sees and noise:
            options = {"dtype": seen.dtype, "device": seen.device}
            std = noise * distributed.rand((len(seen), 1, 1, 1), **options)
            seen = seen + std * distributed.randn(seen.shape, **options)
        mean = log_std = z = None
        if self.generator.ladder:
            mean, log_std = self.q_z_given_x(x, seen, index)
            z = likelihoods.sample_gaussian(mean, log_std)
        return Step(self.generator(previous, seen, z, index), mean, log_std, z)
