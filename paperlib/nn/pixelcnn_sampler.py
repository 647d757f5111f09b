"""Exact sampling from a PixelCNN++, computing for each pixel only what is new.

One full pass of the network per pixel repeats almost everything. Here every activation is computed once: an image costs
about one full pass, in small pieces (the idea of Ramachandran et al. 2017, arXiv 1704.06001). The order of work:

    for each row i:
        the vertical stream u of this row            it sees rows above only
        what the row above gives to this row of ul   the upper taps of each kernel, and u
        for each pixel j:
            ul at (i, j), the parameters, the draw   one product per kernel: the lower taps

A row of the half-size features is new on every second row, at every second pixel; of the quarter-size ones on every
fourth. Sums are taken in another order than in the network, so results agree to rounding.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from paperlib.nn.likelihoods import mix_logistic_noise, sample_discretized_mix_logistic
from paperlib.nn.pixelcnn import PixelCNN, conditioning_maps
from paperlib.nn.pixelcnn_rows import (
    Buffers,
    Doubling,
    Halving,
    PixelBlock,
    Resolution,
    RowBlock,
    add_taps,
    concat_elu,
    taps,
)

# A pixel's products are small: up to this batch a second thread costs more in waiting than it saves.
SINGLE_THREAD_BATCH = 64


@torch.no_grad()
def draw_by_full_passes(network: PixelCNN, noise: Tensor, h: Tensor | None = None) -> Tensor:
    """The definition of sampling, as slow as it is plain: a full pass of the network for each pixel.

    Images (B, C, H, W) in [-1, 1] from `noise` as in `Sampler.draw`; in float64 the same images.
    """
    settings, (batch, _, height, width) = network.settings, noise.shape
    images = noise.new_zeros(batch, settings.channels, height, width)
    for i in range(height):
        for j in range(width):
            images[:, :, i, j] = sample_discretized_mix_logistic(
                network(images, h)[:, :, i, j], noise[:, :, i, j], channels=settings.channels, levels=settings.levels
            )
    return images


class Sampler:
    """Draws `batch` images of height x width at a time, with the weights that `network` has now.

    Works in the dtype and on the device of `network`, which must be the plain one (not compiled). Dropout never acts.
    While a row is drawn on the CPU torch's thread count may be set to 1; it is restored after the row. On CUDA the work
    of a row is recorded as a CUDA graph, once for each of its three kinds, and replayed. Raises `ValueError` for sides
    that are no multiples of 4, and for dtypes other than float32 and float64: half precision would round the noise and
    leave the grey levels.
    """

    @torch.inference_mode()
    def __init__(self, network: PixelCNN, batch: int, height: int, width: int) -> None:
        if height % 4 or width % 4 or min(batch, height, width) < 1:
            raise ValueError(f"cannot draw {batch} images of {height} x {width}: sides must be multiples of 4")
        if (dtype := network.last.bias.dtype) not in (torch.float32, torch.float64):
            raise ValueError(f"cannot draw in {dtype}: call .float() on the network first")
        network = copy.deepcopy(network)  # so that later training moves no bias that is read here
        self.settings, like = network.settings, network.last.bias.detach()
        channels, mixtures = self.settings.channels, self.settings.mixtures
        self.shape = (batch, channels, height, width)
        self.buffers = Buffers(batch, like)
        self.streams = _Streams(network, self.buffers, width)
        # Of one row: noise, pixels that are given instead, and parameters.
        sizes = mixtures + channels, channels, len(like)
        self.noise, self.given, self.params = (like.new_zeros(width, batch, size) for size in sizes)
        self.graphs: dict[tuple[int, ...], torch.cuda.CUDAGraph] = {}

    def draw(
        self,
        h: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        top: Tensor | None = None,
        progress: bool = True,
    ) -> Tensor:
        """Images (B, C, H, W) in [-1, 1], on grey levels, with h as in `PixelCNN.forward`.

        Where the first rows are given as `top` (B, C, R, W), the others are drawn from p(rest | top).

        `noise` is what `mix_logistic_noise((B, H, W), mixtures, channels)` gives, drawn from `generator` (on the device
        of the network) unless it is given. The bar appears after two seconds; Ctrl-C ends within a row, and the sampler
        can be used again. Raises `ValueError` for shapes that do not fit, and when both generator and noise are given.
        """
        batch, channels, height, width = self.shape
        mixtures, like = self.settings.mixtures, self.noise
        if noise is None:
            shape, place = (batch, height, width), {"dtype": like.dtype, "device": like.device}
            noise = mix_logistic_noise(shape, mixtures, channels, generator=generator, **place)
        elif generator is not None:
            raise ValueError("give either noise or a generator, not both")
        if noise.shape != (expected := (batch, mixtures + channels, height, width)):
            raise ValueError(f"noise of shape {tuple(noise.shape)}, but it takes {expected}")
        images = like.new_empty(self.shape)  # outside inference mode, so that images can train
        with torch.inference_mode():
            rows = noise.permute(2, 3, 0, 1).to(like)
            for i in self._rows(h, progress):
                if given := top is not None and i < top.shape[2]:
                    self.given.copy_(top[:, :, i].permute(2, 0, 1))
                self.noise.copy_(rows[i])
                self._compute(i, draw=not given)
                images[:, :, i] = self.streams.pixels.permute(0, 2, 1)
        return images

    def teacher_forced(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        """What the network says, `network(x, h)`, (B, P, H, W), computed as `draw` does but with the pixels of x."""
        if x.shape != self.shape:
            raise ValueError(f"images of shape {tuple(x.shape)}, but this sampler was made for {self.shape}")
        result = self.params.new_empty(len(x), self.params.shape[2], *x.shape[2:])
        with torch.inference_mode():
            for i in self._rows(h, progress=False):
                self.given.copy_(x[:, :, i].permute(2, 0, 1))
                self._compute(i, draw=False)
                result[:, :, i] = self.params.permute(1, 2, 0)
        return result

    def _rows(self, h: Tensor | None, progress: bool) -> Iterator[int]:
        maps = conditioning_maps(self.settings, torch.Size(self.shape), h)
        for buffer in self.buffers.all:
            buffer.zero_()
        hidden = {} if progress else {"disable": True}  # else for TQDM_DISABLE to say
        for i in tqdm(range(self.shape[2]), desc="sampling", unit="row", leave=False, delay=2, **hidden):
            if h is not None:
                self.streams.set_conditioning([m[:, :, (i >> level) % m.shape[2]] for level, m in enumerate(maps)])
            yield i

    def _compute(self, i: int, draw: bool) -> None:
        kind = 1 if i % 2 else 2 if i % 4 else 3  # how many resolutions have a new row
        if self.noise.is_cuda:
            self._graph(kind, draw).replay()
        else:
            self._row(kind, draw)

    def _row(self, kind: int, draw: bool) -> None:
        channels, levels, streams = self.settings.channels, self.settings.levels, self.streams
        streams.begin_row(kind)
        threads = torch.get_num_threads()
        if self.shape[0] <= SINGLE_THREAD_BATCH:
            torch.set_num_threads(1)
        try:
            columns = zip(streams.pixels.unbind(1), self.noise, self.given, self.params, strict=True)
            for j, (pixel, noise, given, params) in enumerate(columns):
                parameters = streams.parameters(j, kind)
                if draw:
                    pixel.copy_(sample_discretized_mix_logistic(parameters, noise, channels=channels, levels=levels))
                else:
                    pixel.copy_(given)
                    params.copy_(parameters)
        finally:
            torch.set_num_threads(threads)

    def _graph(self, kind: int, draw: bool) -> torch.cuda.CUDAGraph:
        """Recorded on first use; what the recording does to the buffers is undone."""
        key = (kind, draw, *(0 if c is None else c.shape[1] for c in self.streams.conditions))
        if key not in self.graphs:
            saved, graph = [buffer.clone() for buffer in self.buffers.all], torch.cuda.CUDAGraph()
            with torch.cuda.device(self.noise.device):
                main, side = torch.cuda.current_stream(), torch.cuda.Stream()
                side.wait_stream(main)
                with torch.cuda.stream(side):
                    self._row(kind, draw)  # warms up: libraries allocate on their first call
                main.wait_stream(side)
                with torch.cuda.graph(graph):
                    self._row(kind, draw)
            self.graphs[key] = graph
            for buffer, was in zip(self.buffers.all, saved, strict=True):
                buffer.copy_(was)
        return self.graphs[key]


class _Streams:
    """The network with folded weights, over the buffers."""

    def __init__(self, network: PixelCNN, buffers: Buffers, width: int) -> None:
        f, channels = network.settings.filters, network.settings.channels
        self._make_resolutions(network, buffers, width)
        self.conditions: list[Tensor | None] = [None] * 3
        self.condition_rows: dict[tuple[int, int], Tensor] = {}

        # Images carry a channel of ones. It is there wherever a layer reads the pixel just above or to the left, so
        # the first layers' biases ride on it; what lies outside the image then gives exact zeros, as after a shift.
        self.image, self.above, self.above2 = (buffers.row(width, channels + 1) for _ in range(3))
        self.pixels = self.image[:, 1:-1, :channels]
        self.first_u = taps(network.first_u)
        self.first_u[1][1][-1] += network.first_u.bias
        (self.first_above,) = taps(network.first_above)
        self.first_above[1][-1] += network.first_above.bias
        (self.first_corner,), (self.first_left,) = taps(network.first_left)
        self.first_left[-1] += network.first_left.bias

        self.halve_u, self.halve_ul = ([Halving(one) for one in each] for each in (network.halve_u, network.halve_ul))
        self.double_u, self.double_ul = (
            [Doubling(one) for one in each] for each in (network.double_u, network.double_ul)
        )
        ((self.last,),), self.last_bias = taps(network.last), network.last.bias

        # Views of the buffers, made once: making one takes as long as a small product.
        self.left_pixels = self.image.unbind(1)  # that of column j is at j, its left neighbour's place
        self.up_x, self.down_x = ([s.x[:, 1:-1].unbind(1) for s in pass_] for pass_ in (self.up_ul, self.down_ul))
        # Columns 2j - 1 and 2j; and 2j and 2j + 1.
        self.pairs_below = [s.x.view(len(s.x), -1, 2 * f).unbind(1) for s in self.up_ul[:2]]
        self.doubled = [s.x[:, 1:-1].unflatten(1, (-1, 2)).flatten(2).unbind(1) for s in self.down_ul[:2]]

    def _make_resolutions(self, network: PixelCNN, buffers: Buffers, width: int) -> None:
        n, f, widths = network.settings.blocks, network.settings.filters, [width, width // 2, width // 4]
        self.up_u, self.up_ul = ([Resolution(buffers, w, f, n) for w in widths] for _ in range(2))
        self.down_u, self.down_ul = (
            [*(Resolution(buffers, w, f, n + 1) for w in widths[:2]), Resolution(buffers, widths[2], f, n, up[2])]
            for up in (self.up_u, self.up_ul)
        )
        for level in range(3):
            up_u, up_ul, down_u, down_ul = (s[level] for s in (self.up_u, self.up_ul, self.down_u, self.down_ul))
            # Short-cuts are taken from the end. The lowest resolution's last is what its down pass begins with.
            short_u, short_ul = (up.elus[: n + (level < 2)] for up in (up_u, up_ul))
            up_u.blocks = [RowBlock(b, buffers, up_u, k) for k, b in enumerate(network.up_u[level])]
            up_ul.blocks = [
                PixelBlock(b, buffers, up_ul, k, up_u.elus[k + 1]) for k, b in enumerate(network.up_ul[level])
            ]
            down_u.blocks = [
                RowBlock(b, buffers, down_u, k, short_u[-1 - k]) for k, b in enumerate(network.down_u[level])
            ]
            down_ul.blocks = [
                PixelBlock(b, buffers, down_ul, k, down_u.elus[k + 1], short_ul[-1 - k])
                for k, b in enumerate(network.down_ul[level])
            ]

    def set_conditioning(self, rows: list[Tensor]) -> None:
        """Of each resolution (B, conditioning, w) or (B, conditioning, 1); kept in one place for each width."""
        for level, row in enumerate(rows):
            row, key = row.transpose(1, 2), (level, row.shape[2])
            if key not in self.condition_rows:
                self.condition_rows[key] = self.image.new_empty(row.shape)
            self.conditions[level] = self.condition_rows[key].copy_(row)

    def begin_row(self, kind: int) -> None:
        """The vertical stream of the next row, and all that is known of the horizontal one before its first pixel.

        `kind`: how many resolutions, from full, have a new row.
        """
        self.above2.copy_(self.above)
        self.above.copy_(self.image)
        self.image[:, 1:-1, -1] = 1
        # First what rests on the row before, and is about to be overwritten.
        for level in reversed(range(1, kind)):
            for up, halves in [(self.up_u, self.halve_u), (self.up_ul, self.halve_ul)]:
                up[level].x[:, 1:-1] = halves[level - 1].bias
                halves[level - 1].add_row(up[level - 1].x, up[level].x, 0)
        self._vertical_row(kind)
        self._begin_horizontal_row(kind)

    def _first(self, x: Tensor, *parts: tuple[Tensor, list[Tensor | None]]) -> None:
        total = torch.zeros_like(x)
        for source, row in parts:
            add_taps(total, source, row)
        x[:, 1:-1] = total[:, 1:-1]

    def _vertical_row(self, kind: int) -> None:
        self._first(self.up_u[0].x, (self.above2, self.first_u[0]), (self.above, self.first_u[1]))
        for level in range(kind):
            up = self.up_u[level]
            if level:
                self.halve_u[level - 1].add_row(self.up_u[level - 1].x, up.x, 1)
            for block in up.blocks:
                block.row(self.conditions[level])
            if level < 2:  # else the first block of the down pass does it
                concat_elu(up.x, up.elus[-1])
        for level in reversed(range(kind)):
            down = self.down_u[level]
            if level < 2:
                self.double_u[level].row(self.down_u[level + 1].x, down.x, odd=level == kind - 1)
            for block in down.blocks:
                block.row(self.conditions[level])
            concat_elu(down.x, down.elus[-1])

    def _begin_horizontal_row(self, kind: int) -> None:
        self._first(self.up_ul[0].x, (self.above, self.first_above), (self.above, [self.first_corner]))
        for level in range(kind):
            for block in (*self.up_ul[level].blocks, *self.down_ul[level].blocks):
                block.begin_row(self.conditions[level])
        if kind < 3:  # an odd row of the finest resolution whose coarser neighbour has no new row
            self.double_ul[kind - 1].row(self.down_ul[kind].x, self.down_ul[kind - 1].x, odd=True)

    def parameters(self, j: int, kind: int) -> Tensor:
        """Those of column j, (B, P), once the pixels to its left are in `pixels`; columns come in order."""
        self.up_x[0][j].addmm_(self.left_pixels[j], self.first_left)
        levels = 1
        while levels < kind and j % (1 << levels) == 0:
            levels += 1
        for level in range(levels):
            blocks, column = self.up_ul[level].blocks, j >> level
            if level:
                pair, halving = self.pairs_below[level - 1][column], self.halve_ul[level - 1]
                self.up_x[level][column].addmm_(pair, halving.pairs[1])
            blocks[0].columns[column].start()
            for block in blocks:
                block.columns[column].step()
        for level in reversed(range(levels)):
            blocks, column = self.down_ul[level].blocks, j >> level
            if level < 2:
                if level + 1 < levels:
                    below, double = self.down_x[level + 1][column >> 1], self.double_ul[level]
                    torch.addmm(double.bias, below, double.both[0], out=self.doubled[level][column >> 1])
                blocks[0].columns[column].start()
            for block in blocks:
                block.columns[column].step()
        return torch.addmm(self.last_bias, F.elu(self.down_x[0][j]), self.last)
