"""A PixelCNN++ of the same size and arithmetic as `paperlib.nn.pixelcnn` written in the usual way, for `training.py`.

Padding layers before convolutions, torch's own weight normalisation, a likelihood in a few separate steps; no attention
to what is computed twice or copied.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm


def concat_elu(x):
    return F.elu(torch.cat([x, -x], dim=1))


class DownConv(nn.Module):
    """Sees the rows above and its own."""

    def __init__(self, inputs, outputs, kernel=(2, 3), stride=1):
        super().__init__()
        self.pad = nn.ZeroPad2d(((kernel[1] - 1) // 2, (kernel[1] - 1) // 2, kernel[0] - 1, 0))
        self.conv = weight_norm(nn.Conv2d(inputs, outputs, kernel, stride))

    def forward(self, x):
        return self.conv(self.pad(x))


class DownRightConv(nn.Module):
    """Sees the rows above and its own up to itself."""

    def __init__(self, inputs, outputs, kernel=(2, 2), stride=1):
        super().__init__()
        self.pad = nn.ZeroPad2d((kernel[1] - 1, 0, kernel[0] - 1, 0))
        self.conv = weight_norm(nn.Conv2d(inputs, outputs, kernel, stride))

    def forward(self, x):
        return self.conv(self.pad(x))


class DownDeconv(nn.Module):
    def __init__(self, filters):
        super().__init__()
        self.conv = weight_norm(nn.ConvTranspose2d(filters, filters, (2, 3), 2, output_padding=1))

    def forward(self, x):
        rows, columns = 2 * x.shape[2], 2 * x.shape[3]
        return self.conv(x)[:, :, :rows, 1 : 1 + columns]


class DownRightDeconv(nn.Module):
    def __init__(self, filters):
        super().__init__()
        self.conv = weight_norm(nn.ConvTranspose2d(filters, filters, (2, 2), 2, output_padding=1))

    def forward(self, x):
        rows, columns = 2 * x.shape[2], 2 * x.shape[3]
        return self.conv(x)[:, :, :rows, :columns]


class GatedResidual(nn.Module):
    def __init__(self, filters, conv, dropout, short_cut=0):
        super().__init__()
        self.conv_in = conv(2 * filters, filters)
        self.nin = weight_norm(nn.Conv2d(2 * short_cut * filters, filters, 1)) if short_cut else None
        self.dropout = nn.Dropout(dropout)
        self.conv_out = conv(2 * filters, 2 * filters)

    def forward(self, x, a=None):
        c = self.conv_in(concat_elu(x))
        if a is not None:
            c = c + self.nin(concat_elu(a))
        c1, c2 = self.conv_out(self.dropout(concat_elu(c))).chunk(2, dim=1)
        return x + c1 * torch.sigmoid(c2)


class PlainPixelCNN(nn.Module):
    def __init__(self, blocks, filters, mixtures=10, dropout=0.0):
        super().__init__()
        f = filters
        self.first_u = DownConv(4, f)
        self.first_above = DownConv(4, f, (1, 3))
        self.first_left = DownRightConv(4, f, (2, 1))

        def layers(counts, conv, short_cut):
            return nn.ModuleList(
                nn.ModuleList(GatedResidual(f, conv, dropout, short_cut) for _ in range(count)) for count in counts
            )

        self.up_u, self.up_ul = layers([blocks] * 3, DownConv, 0), layers([blocks] * 3, DownRightConv, 1)
        counts = [blocks, blocks + 1, blocks + 1]
        self.down_u, self.down_ul = layers(counts, DownConv, 1), layers(counts, DownRightConv, 2)
        self.halve_u = nn.ModuleList(DownConv(f, f, stride=2) for _ in range(2))
        self.halve_ul = nn.ModuleList(DownRightConv(f, f, stride=2) for _ in range(2))
        self.double_u = nn.ModuleList(DownDeconv(f) for _ in range(2))
        self.double_ul = nn.ModuleList(DownRightDeconv(f) for _ in range(2))
        self.out = weight_norm(nn.Conv2d(f, 10 * mixtures, 1))

    def forward(self, x):
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        u = F.pad(self.first_u(x), (0, 0, 1, 0))[:, :, :-1]
        above = F.pad(self.first_above(x), (0, 0, 1, 0))[:, :, :-1]
        ul = above + F.pad(self.first_left(x), (1, 0))[:, :, :, :-1]
        us, uls = [u], [ul]
        for level in range(3):
            for block_u, block_ul in zip(self.up_u[level], self.up_ul[level], strict=True):
                us.append(block_u(us[-1]))
                uls.append(block_ul(uls[-1], us[-1]))
            if level < 2:
                us.append(self.halve_u[level](us[-1]))
                uls.append(self.halve_ul[level](uls[-1]))
        u, ul = us.pop(), uls.pop()
        for level in range(3):
            for block_u, block_ul in zip(self.down_u[level], self.down_ul[level], strict=True):
                u = block_u(u, us.pop())
                ul = block_ul(ul, torch.cat([u, uls.pop()], dim=1))
            if level < 2:
                u, ul = self.double_u[level](u), self.double_ul[level](ul)
        return self.out(F.elu(ul))


def nats(x, parameters):
    """-log p(x) of a batch, summed, of a mixture of logistics in 256 bins."""
    batch, _, height, width = x.shape
    logits, means, log_scales, mix = parameters.split([parameters.shape[1] // 10 * k for k in (1, 3, 3, 3)], dim=1)
    shape = (batch, 3, -1, height, width)
    means, mix = means.reshape(shape), torch.tanh(mix.reshape(shape))
    log_scales = log_scales.reshape(shape).clamp(min=-7)
    x = x.unsqueeze(2).expand_as(means)
    green = means[:, 1] + mix[:, 0] * x[:, 0]
    blue = means[:, 2] + mix[:, 1] * x[:, 0] + mix[:, 2] * x[:, 1]
    centred = x - torch.stack([means[:, 0], green, blue], dim=1)
    scale = torch.exp(-log_scales)
    plus, minus = scale * (centred + 1 / 255), scale * (centred - 1 / 255)
    inside = torch.sigmoid(plus) - torch.sigmoid(minus)
    middle = scale * centred
    tiny = middle - log_scales - 2 * F.softplus(middle) - torch.log(torch.tensor(127.5))
    bins = torch.where(inside > 1e-5, torch.log(inside.clamp(min=1e-12)), tiny)
    bins = torch.where(x > 0.999, -F.softplus(minus), bins)
    bins = torch.where(x < -0.999, plus - F.softplus(plus), bins)
    return -torch.logsumexp(bins.sum(dim=1) + F.log_softmax(logits, dim=1), dim=1).sum()
