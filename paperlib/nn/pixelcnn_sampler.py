"""Exact sampling from a PixelCNN++, computing for each pixel only what is new.

One full pass of the network per pixel repeats almost everything. Here every activation is computed once: an image costs
about one full pass, in small pieces (the idea of Ramachandran et al. 2017, arXiv 1704.06001). The order of work:

    for each row i:
        the vertical stream u of this row            it sees rows above only
        what the row above gives to this row of ul   the upper taps of each kernel, and u
        for each pixel j:
            ul at (i, j), the parameters, the draw   one product per kernel: the lower taps

A row of the half-size features is new on every second row, at every second pixel; of the quarter-size ones on every
fourth. Between, their last values are read. Sums are taken in another order than in the network, so results agree to
rounding.

    sampler = Sampler(network, batch=16, height=32, width=32)
    images = sampler.draw(h, generator=generator)

On CUDA the work of a row is recorded as a CUDA graph, once for each of its three kinds, and replayed.
"""

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from paperlib.nn.likelihoods import mix_logistic_noise, mix_logistic_size, sample_discretized_mix_logistic
from paperlib.nn.pixelcnn import GatedBlock, PixelCNN, ShiftedConv, ShiftedUpsample, conditioning_maps

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

    Weights and buffers are in the dtype and on the device of `network`, which must be the plain one (not compiled).
    Dropout never acts. While a row is drawn on the CPU torch's thread count may be set to 1; it is restored after the
    row. Raises `ValueError` for sides that are no multiples of 4, and for dtypes other than float32 and float64: half
    precision would round the noise and leave the grey levels.
    """

    @torch.inference_mode()
    def __init__(self, network: PixelCNN, batch: int, height: int, width: int) -> None:
        if height % 4 or width % 4 or min(batch, height, width) < 1:
            raise ValueError(f"cannot draw {batch} images of {height} x {width}: sides must be multiples of 4")
        if (dtype := network.last.bias.dtype) not in (torch.float32, torch.float64):
            raise ValueError(f"cannot draw in {dtype}: call .float() on the network first")
        network = copy.deepcopy(network)  # so that later training moves no bias that is read here
        self.settings, self.shape = network.settings, (batch, network.settings.channels, height, width)
        like = network.last.bias.detach()
        self.buffers = _Buffers(batch, like)
        self.streams = _Streams(network, self.buffers, width)
        size = network.settings.mixtures + network.settings.channels
        parameters = mix_logistic_size(network.settings.mixtures, network.settings.channels)
        self.noise = like.new_zeros(width, batch, size)  # of one row
        self.params = like.new_zeros(width, batch, parameters)
        self.graphs: dict[tuple[int, bool, tuple[int, ...]], torch.cuda.CUDAGraph] = {}

    def draw(
        self,
        h: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        progress: bool = True,
    ) -> Tensor:
        """Images (B, C, H, W) in [-1, 1], on grey levels, with h as in `PixelCNN.forward`.

        `noise` is what `mix_logistic_noise((B, H, W), mixtures, channels)` gives, drawn from `generator` (on the device
        of the network) unless it is given. The bar appears after two seconds; Ctrl-C ends within a row, and the sampler
        can be used again. Raises `ValueError` for shapes that do not fit, and when both generator and noise are given.
        """
        batch, channels, height, width = self.shape
        mixtures, like = self.settings.mixtures, self.noise
        if noise is None:
            shape = (batch, height, width)
            noise = mix_logistic_noise(
                shape, mixtures, channels, generator=generator, dtype=like.dtype, device=like.device
            )
        elif generator is not None:
            raise ValueError("give either noise or a generator, not both")
        if noise.shape != (expected := (batch, mixtures + channels, height, width)):
            raise ValueError(f"noise of shape {tuple(noise.shape)}, but it takes {expected}")
        images = torch.empty(self.shape, dtype=like.dtype, device=like.device)
        with torch.inference_mode():
            rows = noise.permute(2, 3, 0, 1).to(like)
            for i in self._rows(h, progress):
                self.noise.copy_(rows[i])
                self._compute(i, draw=True)
                images[:, :, i] = self.streams.pixels.permute(0, 2, 1)
        return images

    def teacher_forced(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        """What the network says, `network(x, h)`, (B, P, H, W), computed as `draw` does but with the pixels of x."""
        if x.shape != self.shape:
            raise ValueError(f"images of shape {tuple(x.shape)}, but this sampler was made for {self.shape}")
        like, (batch, _, height, width) = self.params, self.shape
        result = torch.empty(batch, like.shape[2], height, width, dtype=like.dtype, device=like.device)
        with torch.inference_mode():
            for i in self._rows(h, progress=False):
                self.streams.given_pixels.copy_(x[:, :, i].permute(0, 2, 1))
                self._compute(i, draw=False)
                result[:, :, i] = self.params.permute(1, 2, 0)
        return result

    def _rows(self, h: Tensor | None, progress: bool) -> Iterator[int]:
        maps = conditioning_maps(self.settings, torch.Size(self.shape), h)
        self.buffers.clear()
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
        self.streams.begin_row(kind, keep_pixels=not draw)
        threads = torch.get_num_threads()
        if self.shape[0] <= SINGLE_THREAD_BATCH:
            torch.set_num_threads(1)
        try:
            self._pixels(kind, draw)
        finally:
            torch.set_num_threads(threads)

    def _pixels(self, kind: int, draw: bool) -> None:
        channels, levels, streams = self.settings.channels, self.settings.levels, self.streams
        columns = zip(streams.pixel_columns, self.noise.unbind(0), self.params.unbind(0), strict=True)
        for j, (pixel, noise, params) in enumerate(columns):
            parameters = streams.parameters(j, kind)
            if draw:
                pixel.copy_(sample_discretized_mix_logistic(parameters, noise, channels=channels, levels=levels))
            else:
                params.copy_(parameters)

    def _graph(self, kind: int, draw: bool) -> torch.cuda.CUDAGraph:
        """Recorded on first use; what the recording does to the buffers is undone."""
        key = (kind, draw, self.streams.conditioning_shape)
        if key not in self.graphs:
            saved, graph = self.buffers.copy(), torch.cuda.CUDAGraph()
            with torch.cuda.device(self.noise.device):
                main, side = torch.cuda.current_stream(), torch.cuda.Stream()
                side.wait_stream(main)
                with torch.cuda.stream(side):
                    self._row(kind, draw)  # warms up: libraries allocate on their first call
                main.wait_stream(side)
                with torch.cuda.graph(graph):
                    self._row(kind, draw)
            self.graphs[key] = graph
            self.buffers.restore(saved)
        return self.graphs[key]


class _Buffers:
    """All that is remembered from pixel to pixel: rows (B, width + 2, features) between two columns of zeros."""

    def __init__(self, batch: int, like: Tensor) -> None:
        self.batch, self.like, self.all = batch, like, []

    def row(self, width: int, features: int) -> Tensor:
        self.all.append(self.like.new_zeros(self.batch, width + 2, features))
        return self.all[-1]

    def clear(self) -> None:
        for buffer in self.all:
            buffer.zero_()

    def copy(self) -> list[Tensor]:
        return [buffer.clone() for buffer in self.all]

    def restore(self, saved: list[Tensor]) -> None:
        for buffer, was in zip(self.all, saved, strict=True):
            buffer.copy_(was)


class _Resolution:
    """One resolution of one stream in one pass: the residual x (B, w + 2, F), and `elus`, (B, w + 2, 2 F) each.

    These are concat-ELU of x before, between and after the blocks.
    """

    def __init__(self, buffers: _Buffers, width: int, filters: int, blocks: int, below: "_Resolution | None" = None):
        # The lowest resolution turns round: its down pass goes on where its up pass ends.
        self.x = below.x if below else buffers.row(width, filters)
        first = below.elus[-1] if below else buffers.row(width, 2 * filters)
        self.elus = [first, *(buffers.row(width, 2 * filters) for _ in range(blocks))]
        self.blocks: list[_RowBlock] | list[_PixelBlock] = []


class _Streams:
    """The network with folded weights, over the buffers."""

    def __init__(self, network: PixelCNN, buffers: _Buffers, width: int) -> None:
        settings = network.settings
        n, f, channels = settings.blocks, settings.filters, settings.channels
        widths = [width, width // 2, width // 4]

        def resolutions(blocks: list[int], below: list[_Resolution | None]) -> list[_Resolution]:
            return [_Resolution(buffers, *each) for each in zip(widths, [f] * 3, blocks, below, strict=True)]

        self.up_u, self.up_ul = (resolutions([n] * 3, [None] * 3) for _ in range(2))
        self.down_u, self.down_ul = (
            resolutions([n + 1, n + 1, n], [None, None, up[2]]) for up in (self.up_u, self.up_ul)
        )
        self.conditions: list[Tensor | None] = [None] * 3
        self.condition_rows: dict[tuple[int, int], Tensor] = {}
        for level in range(3):
            up_u, up_ul, down_u, down_ul = (s[level] for s in (self.up_u, self.up_ul, self.down_u, self.down_ul))
            short_u, short_ul = up_u.elus, up_ul.elus
            if level == 2:
                short_u, short_ul = short_u[:-1], short_ul[:-1]
            scratch = buffers.row(widths[level], f), buffers.row(widths[level], 2 * f)
            for k in range(n):
                up_u.blocks.append(_RowBlock(network.up_u[level][k], buffers, up_u, k, scratch, None))
                cuts = up_u.elus[k + 1], None
                up_ul.blocks.append(_PixelBlock(network.up_ul[level][k], buffers, up_ul, k, *cuts))
            for k in range(len(down_u.elus) - 1):
                cut = short_u[-1 - k]
                down_u.blocks.append(_RowBlock(network.down_u[level][k], buffers, down_u, k, scratch, cut))
                cuts = down_u.elus[k + 1], short_ul[-1 - k]
                down_ul.blocks.append(_PixelBlock(network.down_ul[level][k], buffers, down_ul, k, *cuts))

        # Images carry a channel of ones. It is there wherever a layer reads the pixel just above or to the left, so
        # the first layers' biases ride on it; what lies outside the image then gives exact zeros, as after a shift.
        self.image, self.above, self.above2 = (buffers.row(width, channels + 1) for _ in range(3))
        self.given_pixels = self.image.new_zeros(*self.image[:, 1:-1, :channels].shape)
        self.pixels = self.image[:, 1:-1, :channels]
        self.pixel_columns = self.pixels.unbind(1)
        self.first_u = _taps(network.first_u)
        self.first_u[1][1][-1] += network.first_u.bias
        (self.first_above,) = _taps(network.first_above)
        self.first_above[1][-1] += network.first_above.bias
        (self.first_corner,), (self.first_left,) = _taps(network.first_left)
        self.first_left[-1] += network.first_left.bias

        self.halve_u = [_Halving(layer) for layer in network.halve_u]
        self.halve_ul = [_Halving(layer) for layer in network.halve_ul]
        self.double_u = [_Doubling(layer) for layer in network.double_u]
        self.double_ul = [_Doubling(layer) for layer in network.double_ul]
        ((self.last,),) = _taps(network.last)
        self.last_bias = network.last.bias.detach()
        self._make_columns(f)

    def _make_columns(self, f: int) -> None:
        """Views of the buffers, made once: making one takes as long as a small product."""
        self.left_pixels = self.image.unbind(1)  # that of column j is at j, its left neighbour's place
        self.up_x = [s.x[:, 1:-1].unbind(1) for s in self.up_ul]
        self.down_x = [s.x[:, 1:-1].unbind(1) for s in self.down_ul]
        pairs = [s.x.view(len(s.x), -1, 2 * f) for s in self.up_ul[:2]]  # columns 2j - 1 and 2j
        self.pairs_below = [p.unbind(1) for p in pairs]
        doubled = [s.x[:, 1:-1].unflatten(1, (-1, 2)).flatten(2) for s in self.down_ul[:2]]  # columns 2j and 2j + 1
        self.doubled = [d.unbind(1) for d in doubled]
        self.sign = torch.tensor([1.0, -1.0]).to(self.image).view(1, 2, 1)

    @property
    def conditioning_shape(self) -> tuple[int, ...]:
        return tuple(0 if c is None else c.shape[1] for c in self.conditions)

    def set_conditioning(self, rows: list[Tensor]) -> None:
        """Of each resolution (B, conditioning, w) or (B, conditioning, 1); kept in one place for each width."""
        for level, row in enumerate(rows):
            row, key = row.transpose(1, 2), (level, row.shape[2])
            if key not in self.condition_rows:
                self.condition_rows[key] = self.image.new_empty(row.shape)
            self.conditions[level] = self.condition_rows[key].copy_(row)

    def begin_row(self, kind: int, keep_pixels: bool) -> None:
        """The vertical stream of the next row, and all that is known of the horizontal one before its first pixel.

        `kind`: how many resolutions, from full, have a new row.
        """
        self.above2.copy_(self.above)
        self.above.copy_(self.image)
        self.image[:, 1:-1, -1] = 1
        if keep_pixels:
            self.pixels.copy_(self.given_pixels)
        # First what rests on the row before, and is about to be overwritten.
        for level in reversed(range(1, kind)):
            for up, halves in [(self.up_u, self.halve_u), (self.up_ul, self.halve_ul)]:
                up[level].x[:, 1:-1] = halves[level - 1].bias
                halves[level - 1].add_row(up[level - 1].x, up[level].x, 0)
        self._vertical_row(kind)
        self._begin_horizontal_row(kind)

    def _vertical_row(self, kind: int) -> None:
        x = self.up_u[0].x
        total = torch.zeros_like(x)
        _add_taps(total, self.above2, self.first_u[0])
        _add_taps(total, self.above, self.first_u[1])
        x[:, 1:-1] = total[:, 1:-1]
        for level in range(kind):
            up = self.up_u[level]
            if level:
                self.halve_u[level - 1].add_row(self.up_u[level - 1].x, up.x, 1)
            for block in up.blocks:
                block.row(self.conditions[level])
            if level < 2:  # else the first block of the down pass does it
                _concat_elu(up.x, up.elus[-1])
        for level in reversed(range(kind)):
            down = self.down_u[level]
            if level < 2:
                self.double_u[level].row(self.down_u[level + 1].x, down.x, odd=level == kind - 1)
            for block in down.blocks:
                block.row(self.conditions[level])
            _concat_elu(down.x, down.elus[-1])

    def _begin_horizontal_row(self, kind: int) -> None:
        x = self.up_ul[0].x
        total = torch.zeros_like(x)
        _add_taps(total, self.above, self.first_above)
        _add_taps(total, self.above, [self.first_corner, None])
        x[:, 1:-1] = total[:, 1:-1]
        for level in range(kind):
            for block in (*self.up_ul[level].blocks, *self.down_ul[level].blocks):
                block.begin_row(self.conditions[level])
        if kind < 3:  # an odd row of the finest resolution whose coarser neighbour has no new row
            self.double_ul[kind - 1].row(self.down_ul[kind].x, self.down_ul[kind - 1].x, odd=True)

    def parameters(self, j: int, kind: int) -> Tensor:
        """Those of column j, (B, P), once the pixels to its left are in `pixels`; columns come in order."""
        sign = self.sign
        self.up_x[0][j].addmm_(self.left_pixels[j], self.first_left)
        levels = 1
        while levels < kind and j % (1 << levels) == 0:
            levels += 1
        for level in range(levels):
            up, column = self.up_ul[level], j >> level
            if level:
                self.halve_ul[level - 1].add_pixel(self.pairs_below[level - 1][column], self.up_x[level][column])
            up.blocks[0].start(column, sign)
            for block in up.blocks:
                block.pixel(column, sign)
        for level in reversed(range(levels)):
            down, column = self.down_ul[level], j >> level
            if level < 2:
                if level + 1 < levels:
                    self.double_ul[level].pixel(self.down_x[level + 1][column >> 1], self.doubled[level][column >> 1])
                down.blocks[0].start(column, sign)
            for block in down.blocks:
                block.pixel(column, sign)
        return torch.addmm(self.last_bias, F.elu(self.down_x[0][j]), self.last)


class _Folded(NamedTuple):
    """The weights of a gated block."""

    inner: list[list[Tensor]]  # taps, and so are the gates
    inner_bias: Tensor
    gates: list[list[Tensor]]
    gates_bias: Tensor
    row_cut: Tensor | None  # (2 F, F), of the short-cut whose row is known before the first pixel
    pixel_cut: Tensor | None  # (2 F, F), of the other
    condition: Tensor | None  # (conditioning, 2 F)

    @classmethod
    def of(cls, block: GatedBlock) -> "_Folded":
        bias, row_cut, pixel_cut, condition = block.inner.bias.detach(), None, None, None
        if block.short_cut is not None:
            bias = bias + block.short_cut.bias.detach()
            ((weight,),) = _taps(block.short_cut)
            # Of concat-ELU of [row, pixel] the order is [row, pixel, -row, -pixel].
            parts = weight.unflatten(0, (2, -1, len(bias)))
            row_cut, *rest = (part.flatten(0, 1) for part in parts.unbind(1))
            pixel_cut = rest[0] if rest else None
        if block.condition is not None:
            condition = block.condition.weight.detach()[:, :, 0, 0].T.contiguous()
        gates, gates_bias = _taps(block.gated), block.gated.bias.detach()
        return cls(_taps(block.inner), bias, gates, gates_bias, row_cut, pixel_cut, condition)


class _RowBlock:
    """A gated block of the vertical stream, the k-th at `place`. `scratch` is for every such block of that width."""

    def __init__(
        self,
        block: GatedBlock,
        buffers: _Buffers,
        place: _Resolution,
        k: int,
        scratch: tuple[Tensor, Tensor],
        row_cut: Tensor | None,
    ) -> None:
        self.weights, self.row_cut = _Folded.of(block), row_cut
        self.x, self.before, (self.inner, self.gates) = place.x, place.elus[k], scratch
        self.middle = buffers.row(self.x.shape[1] - 2, 2 * self.x.shape[2])

    def row(self, condition: Tensor | None) -> None:
        """`before` and `middle` hold the row above, then this one."""
        weights = self.weights
        _add_taps(self.inner, self.before, weights.inner[0], weights.inner_bias)
        _concat_elu(self.x, self.before)
        _add_taps(self.inner, self.before, weights.inner[1])
        if self.row_cut is not None:
            _add_taps(self.inner, self.row_cut, [None, weights.row_cut, None])
        _add_taps(self.gates, self.middle, weights.gates[0], weights.gates_bias)
        _concat_elu(self.inner, self.middle)
        _add_taps(self.gates, self.middle, weights.gates[1])
        inside = self.gates[:, 1:-1]
        if condition is not None:
            inside += condition @ weights.condition
        values, gate = inside.chunk(2, 2)
        self.x[:, 1:-1].addcmul_(values, gate.sigmoid())


class _PixelBlock:
    """A gated block of the horizontal stream, the k-th at `place`: upper taps by rows, lower ones by pixels.

    Its short-cut reads concat-ELUs of a row that is whole before the first pixel, and of one that grows with it.
    """

    def __init__(
        self,
        block: GatedBlock,
        buffers: _Buffers,
        place: _Resolution,
        k: int,
        row_cut: Tensor,
        pixel_cut: Tensor | None,
    ) -> None:
        self.weights, self.row_cut = _Folded.of(block), row_cut
        self.x, self.before, self.after = place.x, place.elus[k], place.elus[k + 1]
        f, width = self.x.shape[2], self.x.shape[1] - 2
        self.middle = buffers.row(width, 2 * f)
        self.inner, self.gates = buffers.row(width, f), buffers.row(width, 2 * f)
        self.inner_now, self.gates_now = (torch.cat(taps[1]) for taps in (self.weights.inner, self.weights.gates))
        self.columns = self._columns(pixel_cut)

    def _columns(self, pixel_cut: Tensor | None) -> list["_Column"]:
        def columns(row: Tensor) -> tuple[Tensor, ...]:
            return row[:, 1:-1].unbind(1)

        def pairs(row: Tensor) -> tuple[Tensor, ...]:
            """Each column with its left neighbour, (B, 2 * features), side by side as the memory has them."""
            return row.flatten(1).unfold(1, 2 * row.shape[2], row.shape[2]).unbind(1)[:-1]

        def signed(row: Tensor) -> list[Tensor]:
            return [column.unflatten(1, (2, -1)) for column in columns(row)]

        inner, gates, x = columns(self.inner), columns(self.gates), columns(self.x)
        values, gate = zip(*(column.chunk(2, 1) for column in gates), strict=True)
        views = zip(
            signed(self.before),
            pairs(self.before),
            [None] * len(x) if pixel_cut is None else columns(pixel_cut),
            inner,
            [column.unsqueeze(1) for column in inner],
            signed(self.middle),
            pairs(self.middle),
            gates,
            values,
            gate,
            x,
            [column.unsqueeze(1) for column in x],
            signed(self.after),
            strict=True,
        )
        return [_Column(*each) for each in views]

    def begin_row(self, condition: Tensor | None) -> None:
        """What the row above gives, the vertical stream and h."""
        weights = self.weights
        _add_taps(self.inner, self.before, weights.inner[0], weights.inner_bias)
        _add_taps(self.inner, self.row_cut, [None, weights.row_cut])
        _add_taps(self.gates, self.middle, weights.gates[0], weights.gates_bias)
        if condition is not None:
            self.gates[:, 1:-1] += condition @ weights.condition

    def start(self, j: int, sign: Tensor) -> None:
        """concat-ELU of what enters the first block."""
        column = self.columns[j]
        torch.mul(column.x_once, sign, out=column.before)
        F.elu(column.before, inplace=True)

    def pixel(self, j: int, sign: Tensor) -> None:
        _, previous, cut, inner, inner_once, middle, gate_inputs, gates, values, gate, x, x_once, after = self.columns[
            j
        ]
        inner.addmm_(previous, self.inner_now)
        if cut is not None:
            inner.addmm_(cut, self.weights.pixel_cut)
        torch.mul(inner_once, sign, out=middle)
        F.elu(middle, inplace=True)
        gates.addmm_(gate_inputs, self.gates_now)
        x.addcmul_(values, torch.sigmoid(gate))
        torch.mul(x_once, sign, out=after)
        F.elu(after, inplace=True)


class _Column(NamedTuple):
    """Views of one column in the buffers of a block of the horizontal stream."""

    before: Tensor  # (B, 2, F), concat-ELU with its halves apart; so too `middle` and `after`
    previous: Tensor  # (B, 4 F), with its left neighbour
    cut: Tensor | None  # (B, 2 F), of the short-cut
    inner: Tensor  # (B, F)
    inner_once: Tensor  # (B, 1, F)
    middle: Tensor
    gate_inputs: Tensor  # (B, 4 F), with its left neighbour
    gates: Tensor  # (B, 2 F), of which the halves are
    values: Tensor
    gate: Tensor
    x: Tensor  # (B, F)
    x_once: Tensor  # (B, 1, F)
    after: Tensor


class _Halving:
    """Convolution of stride 2. A row laid flat falls into pairs of columns 2j - 1 and 2j, for it begins with a zero."""

    def __init__(self, layer: ShiftedConv) -> None:
        taps = _taps(layer)
        self.pairs = [torch.cat(row[:2]) for row in taps]  # of the row above, of the row itself
        self.rights = [row[2] if len(row) == 3 else None for row in taps]
        self.bias = layer.bias.detach()

    def add_row(self, source: Tensor, target: Tensor, k: int) -> None:
        """What the kernel's row k makes of the source, added to all of the target."""
        total = source.view(len(source), -1, 2 * source.shape[2])[:, :-1] @ self.pairs[k]
        if self.rights[k] is not None:
            total += source[:, 2::2] @ self.rights[k]
        target[:, 1:-1] += total

    def add_pixel(self, pair: Tensor, target: Tensor) -> None:
        """The lower row's part of one pixel: (B, 2 F) to (B, F)."""
        target.addmm_(pair, self.pairs[1])


class _Doubling:
    """Upsampling of one row to one of the two rows below it."""

    def __init__(self, layer: ShiftedUpsample) -> None:
        weight = layer.weight().detach().permute(2, 3, 0, 1)  # rows, columns, in, out
        self.right = None
        if weight.shape[1] == 3:  # column 2j reads j; column 2j + 1 reads j and j + 1
            self.right = [torch.cat([torch.zeros_like(w[0]), w[0]], 1) for w in weight]
            weight = weight[:, 1:]
        self.both = [torch.cat([w[0], w[1]], 1) for w in weight]
        self.bias = layer.bias.detach().repeat(2)

    def row(self, source: Tensor, target: Tensor, odd: bool) -> None:
        batch, width, f = source.shape
        total = self.bias.expand(batch, width, -1).contiguous()
        right = None if self.right is None else self.right[odd]
        _add_taps(total, source, [None, self.both[odd], right])
        target[:, 1:-1].unflatten(1, (-1, 2)).copy_(total[:, 1:-1].unflatten(2, (2, f)))

    def pixel(self, source: Tensor, target: Tensor) -> None:
        """To columns 2j and 2j + 1 of an even row: source (B, F), target (B, 2 F)."""
        torch.addmm(self.bias, source, self.both[0], out=target)


def _taps(layer: ShiftedConv) -> list[list[Tensor]]:
    """Folded weights of a kernel, by row and column: each (in, out)."""
    weight = layer.weight().detach().permute(2, 3, 1, 0)
    return [[tap.contiguous() for tap in row] for row in weight]


def _add_taps(total: Tensor, source: Tensor, taps: list[Tensor | None], bias: Tensor | None = None) -> None:
    """total[:, j] += sum_k source[:, j - 1 + k] taps[k], over all columns at once; with a bias it replaces the total.

    Both are (B, w + 2, ...). Laid flat, a column's neighbours are the rows before and after it; only the two outer
    columns then receive what is not theirs, and no one reads these of a total.
    """
    total, source = total.flatten(0, 1), source.flatten(0, 1)
    left, middle, right = (*taps, None, None)[:3]
    if bias is not None:
        torch.addmm(bias, source, middle, out=total)
    elif middle is not None:
        total.addmm_(source, middle)
    if left is not None:
        total[1:].addmm_(source[:-1], left)
    if right is not None:
        total[:-1].addmm_(source[1:], right)


def _concat_elu(x: Tensor, target: Tensor) -> None:
    """Inner columns of x (B, w + 2, F) to those of the target (B, w + 2, 2 F)."""
    f = x.shape[2]
    positive, negative = target[:, 1:-1, :f], target[:, 1:-1, f:]
    positive.copy_(x[:, 1:-1])
    torch.neg(x[:, 1:-1], out=negative)
    F.elu(target, inplace=True)
