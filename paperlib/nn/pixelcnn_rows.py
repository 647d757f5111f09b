"""The layers of a PixelCNN++ on rows of memory, each value computed once: what `pixelcnn_sampler` is made of.

Every row is (B, width + 2, features), between two columns of zeros. All is made and run in inference mode.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from paperlib.nn.pixelcnn import GatedBlock, ShiftedConv, ShiftedUpsample


class Buffers:
    """All that is remembered from pixel to pixel."""

    def __init__(self, batch: int, like: Tensor) -> None:
        self.batch, self.like, self.all = batch, like, []
        self.sign = torch.tensor([1.0, -1.0]).to(like).view(1, 2, 1)

    def row(self, width: int, features: int) -> Tensor:
        self.all.append(self.like.new_zeros(self.batch, width + 2, features))
        return self.all[-1]


class Resolution:
    """One resolution of one stream in one pass: the residual x (B, w + 2, F), and `elus`, (B, w + 2, 2 F) each.

    These are concat-ELU of x before, between and after the blocks.
    """

    def __init__(self, buffers: Buffers, width: int, filters: int, blocks: int, below: "Resolution | None" = None):
        # The lowest resolution turns round: its down pass goes on where its up pass ends.
        self.x = below.x if below else buffers.row(width, filters)
        first = below.elus[-1] if below else buffers.row(width, 2 * filters)
        self.elus = [first, *(buffers.row(width, 2 * filters) for _ in range(blocks))]
        self.blocks: list[RowBlock] | list[PixelBlock] = []


class _Block:
    """A gated block with folded weights, the k-th at `place`; its short-cut reads the row `row_cut`."""

    def __init__(
        self, block: GatedBlock, buffers: Buffers, place: Resolution, k: int, row_cut: Tensor | None = None
    ) -> None:
        self.x, self.before, self.row_cut = place.x, place.elus[k], row_cut
        width, f = self.x.shape[1] - 2, self.x.shape[2]
        self.inner, self.middle, self.gates = (buffers.row(width, size) for size in (f, 2 * f, 2 * f))
        self.inner_taps, self.gates_taps = taps(block.inner), taps(block.gated)
        self.inner_bias, self.gates_bias = block.inner.bias, block.gated.bias
        self.cut_weights: list[Tensor] = []  # (2 F, F), of `row_cut` and perhaps of a row that grows with this one
        if block.short_cut is not None:
            self.inner_bias = self.inner_bias + block.short_cut.bias
            ((weight,),) = taps(block.short_cut)
            # Of concat-ELU of [row, pixel] the order is [row, pixel, -row, -pixel].
            self.cut_weights = [part.flatten(0, 1) for part in weight.unflatten(0, (2, -1, f)).unbind(1)]
        self.condition = block.condition and block.condition.weight[:, :, 0, 0].T.contiguous()  # (conditioning, 2 F)


class RowBlock(_Block):
    """A gated block of the vertical stream."""

    def row(self, condition: Tensor | None) -> None:
        """`before` and `middle` hold the row above, then this one."""
        add_taps(self.inner, self.before, self.inner_taps[0], self.inner_bias)
        concat_elu(self.x, self.before)
        add_taps(self.inner, self.before, self.inner_taps[1])
        if self.row_cut is not None:
            add_taps(self.inner, self.row_cut, [None, self.cut_weights[0]])
        add_taps(self.gates, self.middle, self.gates_taps[0], self.gates_bias)
        concat_elu(self.inner, self.middle)
        add_taps(self.gates, self.middle, self.gates_taps[1])
        inside = self.gates[:, 1:-1]
        if condition is not None:
            inside += condition @ self.condition
        values, gate = inside.chunk(2, 2)
        self.x[:, 1:-1].addcmul_(values, gate.sigmoid())


class PixelBlock(_Block):
    """A gated block of the horizontal stream: upper taps by rows, lower ones by pixels.

    Its short-cut reads concat-ELUs of a row that is whole before the first pixel, and of one that grows with it.
    """

    def __init__(
        self,
        block: GatedBlock,
        buffers: Buffers,
        place: Resolution,
        k: int,
        row_cut: Tensor,
        pixel_cut: Tensor | None = None,
    ) -> None:
        super().__init__(block, buffers, place, k, row_cut)
        self.after, self.pixel_cut, self.sign = place.elus[k + 1], pixel_cut, buffers.sign
        self.inner_now, self.gates_now = torch.cat(self.inner_taps[1]), torch.cat(self.gates_taps[1])
        self.columns = [_Column(self, j) for j in range(self.x.shape[1] - 2)]

    def begin_row(self, condition: Tensor | None) -> None:
        """What the row above gives, the vertical stream and h."""
        add_taps(self.inner, self.before, self.inner_taps[0], self.inner_bias)
        add_taps(self.inner, self.row_cut, [None, self.cut_weights[0]])
        add_taps(self.gates, self.middle, self.gates_taps[0], self.gates_bias)
        if condition is not None:
            self.gates[:, 1:-1] += condition @ self.condition


class _Column:
    """Views of one column of a block of the horizontal stream: making one takes as long as a small product."""

    def __init__(self, block: PixelBlock, j: int) -> None:
        here = slice(j + 1, j + 2)
        # inner (B, F); gates and cut (B, 2 F)
        self.inner, self.gates = block.inner[:, j + 1], block.gates[:, j + 1]
        self.cut = None if block.pixel_cut is None else block.pixel_cut[:, j + 1]
        # With the left neighbour, side by side as the memory has them: (B, 4 F)
        self.previous, self.gate_inputs = (row[:, j : j + 2].flatten(1) for row in (block.before, block.middle))
        # (B, 1, F), and their concat-ELUs with the halves apart, (B, 2, F)
        self.x, self.inner_once = block.x[:, here], block.inner[:, here]
        self.values, self.gate = block.gates[:, here].chunk(2, 2)
        rows = block.before, block.middle, block.after
        self.before, self.middle, self.after = (row[:, j + 1].unflatten(1, (2, -1)) for row in rows)
        self.block = block

    def start(self) -> None:
        """concat-ELU of what enters the first block."""
        F.elu(torch.mul(self.x, self.block.sign, out=self.before), inplace=True)

    def step(self) -> None:
        block = self.block
        self.inner.addmm_(self.previous, block.inner_now)
        if self.cut is not None:
            self.inner.addmm_(self.cut, block.cut_weights[1])
        F.elu(torch.mul(self.inner_once, block.sign, out=self.middle), inplace=True)
        self.gates.addmm_(self.gate_inputs, block.gates_now)
        self.x.addcmul_(self.values, torch.sigmoid(self.gate))
        F.elu(torch.mul(self.x, block.sign, out=self.after), inplace=True)


class Halving:
    """Convolution of stride 2. A row laid flat falls into pairs of columns 2j - 1 and 2j, for it begins with a zero."""

    def __init__(self, layer: ShiftedConv) -> None:
        rows = taps(layer)
        self.pairs = [torch.cat(row[:2]) for row in rows]  # of the row above, of the row itself
        self.rights = [row[2] if len(row) == 3 else None for row in rows]
        self.bias = layer.bias

    def add_row(self, source: Tensor, target: Tensor, k: int) -> None:
        """What the kernel's row k makes of the source, added to all of the target."""
        total = source.view(len(source), -1, 2 * source.shape[2])[:, :-1] @ self.pairs[k]
        if self.rights[k] is not None:
            total += source[:, 2::2] @ self.rights[k]
        target[:, 1:-1] += total


class Doubling:
    """Upsampling of one row to one of the two rows below it: (B, F) of a column to (B, 2 F) of two."""

    def __init__(self, layer: ShiftedUpsample) -> None:
        weight = layer.weight().permute(2, 3, 0, 1)  # rows, columns, in, out
        self.rights = [None, None]
        if weight.shape[1] == 3:  # column 2j reads j; column 2j + 1 reads j and j + 1
            self.rights = [torch.cat([torch.zeros_like(w[0]), w[0]], 1) for w in weight]
            weight = weight[:, 1:]
        self.both = [torch.cat([w[0], w[1]], 1) for w in weight]
        self.bias = layer.bias.repeat(2)

    def row(self, source: Tensor, target: Tensor, odd: bool) -> None:
        batch, width, f = source.shape
        total = self.bias.expand(batch, width, -1).contiguous()
        add_taps(total, source, [None, self.both[odd], self.rights[odd]])
        target[:, 1:-1].unflatten(1, (-1, 2)).copy_(total[:, 1:-1].unflatten(2, (2, f)))


def taps(layer: ShiftedConv) -> list[list[Tensor]]:
    """Folded weights of a kernel, by row and column: each (in, out)."""
    return [[tap.contiguous() for tap in row] for row in layer.weight().permute(2, 3, 1, 0)]


def add_taps(total: Tensor, source: Tensor, row: list[Tensor | None], bias: Tensor | None = None) -> None:
    """total[:, j] += sum_k source[:, j - 1 + k] row[k], over all columns at once; with a bias it replaces the total.

    Both are (B, w + 2, ...). Laid flat, a column's neighbours are the rows before and after it; only the two outer
    columns then receive what is not theirs, and no one reads these of a total.
    """
    total, source = total.flatten(0, 1), source.flatten(0, 1)
    left, middle, right = (*row, None, None)[:3]
    if bias is not None:
        torch.addmm(bias, source, middle, out=total)
    elif middle is not None:
        total.addmm_(source, middle)
    if left is not None:
        total[1:].addmm_(source[:-1], left)
    if right is not None:
        total[:-1].addmm_(source[1:], right)


def concat_elu(x: Tensor, target: Tensor) -> None:
    """Inner columns of x (B, w + 2, F) to those of the target (B, w + 2, 2 F)."""
    positive, negative = target[:, 1:-1].chunk(2, 2)
    positive.copy_(x[:, 1:-1])
    torch.neg(x[:, 1:-1], out=negative)
    F.elu(target, inplace=True)
