"""PixelCNN++: p(x) of an image as a product over its pixels in reading order (Salimans et al. 2017, arXiv 1701.05517).

    log p(x | h) = sum_ij log p(x_ij | everything above row i, row i left of column j, h)

Two streams of features walk over the image, and both are causal through the shape of their kernels alone (section 2.2
and figure 2). A kernel's output lands at the place marked @; o are the other pixels it sees.

    vertical stream u           horizontal stream ul
    down-shifted, 2 x 3         down-right-shifted, 2 x 2
        o o o                       o o .
        o @ o                       o @ .
        . . .                       . . .

@ itself is read, which is right between layers but not at the image. So the first layer shifts its input: u at row i
sees rows above i, ul at (i, j) sees what comes before (i, j). Where u is known ul may read it, never the reverse.

Nothing later is seen, but not all that is earlier: a row 2k + 1 gets from the smaller resolutions only what row 2k knew
and so sees its own row 4n + 2 pixels to the left at most, and row 2k as many to the right (n blocks, as below).

    image --first--> [n blocks] --/2--> [n blocks] --/2--> [n blocks]      up pass, both streams
                      |   |              |   |              |  |
                     short-cuts         short-cuts         short-cuts      each block here reads one output from there
                      |   |              |   |              |  |
    params <--last-- [n + 1 blocks] <-x2-- [n + 1 blocks] <-x2-- [n blocks]    down pass, both streams

A block is a gated residual, with concat-ELU(x) = ELU([x, -x]) and a the short-cut or, for ul, what u says:

    c = dropout(concat-ELU(conv(concat-ELU(x)) + 1x1(concat-ELU(a))));   [v, g] = conv(c) + 1x1(h);   x + v sigmoid(g)

Convolutions are weight-normalised, and `initialise` sets scale and bias from a first batch (Salimans and Kingma 2016).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paperlib.nn.likelihoods import discretized_mix_logistic_log_prob, mix_logistic_size
from paperlib.system import distributed


@dataclass(frozen=True)
class PixelCNNSettings:
    """All that a network is built from; the defaults are the paper's for CIFAR-10. Raises `ValueError`."""

    channels: int = 3  # 1 or 3
    levels: int = 256  # of grey, 2 or more
    blocks: int = 5  # per resolution and pass, n above
    filters: int = 160  # features of each stream
    mixtures: int = 10  # logistics per pixel
    dropout: float = 0.5  # probability, within each block
    conditioning: int = 0  # channels of h, 0 for none

    def __post_init__(self) -> None:
        mix_logistic_size(self.mixtures, self.channels)
        least = {"levels": 2, "blocks": 1, "filters": 1, "mixtures": 1, "conditioning": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be {value} or more")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, but must be at least 0 and below 1")


class PixelCNN(nn.Module):
    """The network. Parameters are drawn from torch's generator; call `initialise` with a batch before training."""

    def __init__(self, settings: PixelCNNSettings) -> None:
        super().__init__()
        self.settings, n, f = settings, settings.blocks, settings.filters
        pixel = settings.channels + 1  # a channel of ones tells the image from the padding

        def blocks(kernel: tuple[int, int], short_cut: int, counts: list[int]) -> nn.ModuleList:
            return nn.ModuleList(
                nn.ModuleList(GatedBlock(settings, kernel, short_cut) for _ in range(count)) for count in counts
            )

        self.first_u = ShiftedConv(pixel, f, DOWN)
        self.first_above = ShiftedConv(pixel, f, (1, 3))
        self.first_left = ShiftedConv(pixel, f, (2, 1))
        self.up_u = blocks(DOWN, 0, [n, n, n])
        self.up_ul = blocks(DOWN_RIGHT, 1, [n, n, n])
        self.down_u = blocks(DOWN, 1, [n + 1, n + 1, n])
        self.down_ul = blocks(DOWN_RIGHT, 2, [n + 1, n + 1, n])
        self.halve_u = nn.ModuleList(ShiftedConv(f, f, DOWN, stride=2) for _ in range(2))
        self.halve_ul = nn.ModuleList(ShiftedConv(f, f, DOWN_RIGHT, stride=2) for _ in range(2))
        self.double_u = nn.ModuleList(ShiftedUpsample(f, DOWN) for _ in range(2))
        self.double_ul = nn.ModuleList(ShiftedUpsample(f, DOWN_RIGHT) for _ in range(2))
        self.last = ShiftedConv(f, mix_logistic_size(settings.mixtures, settings.channels), (1, 1))

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        """Parameters (B, P, H, W) of the mixture at every pixel, for images x (B, C, H, W) in [-1, 1].

        H and W are multiples of 4. h is (B, conditioning), or a map (B, conditioning, H', W') of which H' and W' divide
        or are multiples of the image's sides at each resolution (full, half, quarter). Raises `ValueError`.
        """
        maps = conditioning_maps(self.settings, x.shape, h)
        image = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        u = shift_down(self.first_u(image))
        ul = shift_down(self.first_above(image)) + shift_right(self.first_left(image))
        short_cuts = []  # taken from the end
        for level in range(3):
            if level:
                u, ul = self.halve_u[level - 1](u), self.halve_ul[level - 1](ul)
            short_cuts.append((u, ul))
            for block_u, block_ul in zip(self.up_u[level], self.up_ul[level], strict=True):
                u = block_u(u, None, maps[level])
                ul = block_ul(ul, u, maps[level])
                short_cuts.append((u, ul))
        short_cuts.pop()
        for level in (2, 1, 0):
            for block_u, block_ul in zip(self.down_u[level], self.down_ul[level], strict=True):
                from_u, from_ul = short_cuts.pop()
                u = block_u(u, from_u, maps[level])
                ul = block_ul(ul, torch.cat([u, from_ul], 1), maps[level])
            if level:
                u, ul = self.double_u[level - 1](u), self.double_ul[level - 1](ul)
        with torch.autocast(x.device.type, enabled=False):  # in bfloat16 these parameters cost 39 nats per image
            return self.last(F.elu(ul).to(self.last.bias.dtype))


def log_prob(network: nn.Module, x: Tensor, h: Tensor | None = None, seen: Tensor | float = 1.0) -> Tensor:
    """log p(x | h) in nats, (B,), for images (B, C, H, W) in [-1, 1]; `network`, perhaps compiled, reads seen * x."""
    return discretized_mix_logistic_log_prob(x, network(seen * x, h), levels=network.settings.levels)


@torch.no_grad()
def initialise(network: PixelCNN, x: Tensor, h: Tensor | None = None) -> None:
    """Set every scale and bias so that, on this batch, each layer's output has mean 0 and std 1, 0.1 before the gates.

    Layers are set in turn in one forward pass of the network, in the mode that it is in, before it is compiled.
    Channels that do not vary keep their scale. Raises `ValueError` for no images and where an output is not finite;
    the network is then as it was.
    """
    if not len(x):
        raise ValueError("initialisation on no images")

    def normalise(layer: _WeightNorm, _: tuple[Tensor], output: Tensor) -> Tensor:
        mean, std = output.mean((0, 2, 3)), output.std((0, 2, 3), correction=0)
        if not (mean.isfinite().all() and std.isfinite().all()):
            raise ValueError("initialisation met an output that is not finite: check x, h and the weights")
        varies = std > 1e-4 * (mean.abs() + std + 1e-4)
        factor = torch.where(varies, layer.gain / std, 1.0)
        layer.scale.mul_(factor)
        layer.bias.sub_(mean).mul_(factor)
        return (output - mean[:, None, None]) * factor[:, None, None]

    layers = [layer for layer in network.modules() if isinstance(layer, _WeightNorm)]
    hooks = [layer.register_forward_hook(normalise) for layer in layers]
    before = [(p, p.clone()) for layer in layers for p in (layer.scale, layer.bias)]
    try:
        network(x, h)
    except BaseException:
        for parameter, value in before:
            parameter.copy_(value)
        raise
    finally:
        for hook in hooks:
            hook.remove()


DOWN, DOWN_RIGHT = (2, 3), (2, 2)  # kernels, rows x columns


class GatedBlock(nn.Module):
    """The gated residual of the module's text, whose short-cut has `short_cut` times the filters."""

    def __init__(self, settings: PixelCNNSettings, kernel: tuple[int, int], short_cut: int) -> None:
        super().__init__()
        f = settings.filters
        self.inner = ShiftedConv(2 * f, f, kernel)
        self.short_cut = ShiftedConv(2 * short_cut * f, f, (1, 1)) if short_cut else None
        self.dropout = distributed.Dropout(settings.dropout)
        self.gated = ShiftedConv(2 * f, 2 * f, kernel, gain=0.1)
        self.condition = nn.Conv2d(settings.conditioning, 2 * f, 1, bias=False) if settings.conditioning else None
        if self.condition is not None:
            nn.init.normal_(self.condition.weight, std=0.05)

    def forward(self, x: Tensor, a: Tensor | None = None, h: Tensor | None = None) -> Tensor:
        """x (B, F, H, W), a (B, short_cut F, H, W), h (B, conditioning, H, W or 1, 1)."""
        c = self.inner(concat_elu(x))
        if self.short_cut is not None:
            c = c + self.short_cut(concat_elu(a))
        gates = self.gated(self.dropout(concat_elu(c)))
        if self.condition is not None:
            gates = gates + self.condition(h)
        return x + F.glu(gates, 1)


def concat_elu(x: Tensor) -> Tensor:
    return F.elu(torch.cat([x, -x], 1))


def shift_down(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 1, 0))[:, :, :-1]


def shift_right(x: Tensor) -> Tensor:
    return F.pad(x, (1, 0))[..., :-1]


class _WeightNorm(nn.Module):
    """weight = scale * direction / |direction|, a norm per output channel; `initialise` makes the std `gain`."""

    def __init__(self, shape: tuple[int, ...], out_dim: int, gain: float) -> None:
        super().__init__()
        self.out_dim, self.gain = out_dim, gain
        self.direction = nn.Parameter(0.05 * torch.randn(shape))
        self.scale = nn.Parameter(torch.full((shape[out_dim],), gain))
        self.bias = nn.Parameter(torch.zeros(shape[out_dim]))

    def weight(self) -> Tensor:
        others = [k for k in range(4) if k != self.out_dim]
        norm = self.direction.square().sum(others, keepdim=True).sqrt()
        return self.direction * (self.scale.view(norm.shape) / norm)


class ShiftedConv(_WeightNorm):
    """Convolution of which the output stands at the kernel's last row and, if its width is even or 1, last column."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int], stride: int = 1, gain: float = 1.0) -> None:
        super().__init__((outputs, inputs, *kernel), 0, gain)
        rows, columns = kernel
        right = (columns - 1) // 2
        self.stride, self.pad = stride, (columns - 1 - right, right, rows - 1, 0)  # left, right, top, bottom

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, self.pad), self.weight(), self.bias, self.stride)


class ShiftedUpsample(_WeightNorm):
    """Transposed convolution to twice the size, cropped: rows 2i and 2i + 1 read row i, and so on as for the kernel."""

    def __init__(self, filters: int, kernel: tuple[int, int]) -> None:
        super().__init__((filters, filters, *kernel), 1, 1.0)
        self.left = (kernel[1] - 1) // 2

    def forward(self, x: Tensor) -> Tensor:
        whole = F.conv_transpose2d(x, self.weight(), self.bias, stride=2, output_padding=1)
        return whole[:, :, : 2 * x.shape[2], self.left : self.left + 2 * x.shape[3]]


def conditioning_maps(settings: PixelCNNSettings, shape: torch.Size, h: Tensor | None) -> list[Tensor | None]:
    """h at full, half and quarter resolution, (B, conditioning, H, W) or of one pixel; checks the shapes of x and h."""
    if len(shape) != 4 or shape[1] != settings.channels or shape[2] % 4 or shape[3] % 4:
        raise ValueError(
            f"images of shape {tuple(shape)}, but this network takes (B, {settings.channels}, H, W) with sides "
            f"that are multiples of 4"
        )
    if (h is not None) != bool(settings.conditioning):
        raise ValueError(f"h is {'missing' if h is None else 'given'}, but conditioning is {settings.conditioning}")
    if h is None:
        return [None, None, None]
    if h.ndim not in (2, 4) or tuple(h.shape[:2]) != (shape[0], settings.conditioning):
        raise ValueError(f"h of shape {tuple(h.shape)}, but it takes ({shape[0]}, {settings.conditioning}) or a map")
    h = h[:, :, None, None] if h.ndim == 2 else h
    if h.shape[2:] == (1, 1):
        return [h, h, h]
    return [_resized(h, (shape[2] >> level, shape[3] >> level)) for level in range(3)]


def _resized(h: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixels repeated, or averaged, so that each output is a whole number of inputs or the reverse."""
    for axis, target in zip((2, 3), size, strict=True):
        side = h.shape[axis]
        if target % side and side % target:
            raise ValueError(f"h has a side of {side}, which neither divides nor is a multiple of {target}")
        if target > side:
            h = h.repeat_interleave(target // side, axis)
        elif side > target:
            h = h.unflatten(axis, (target, side // target)).mean(axis + 1)
    return h
