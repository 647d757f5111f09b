"""The models of notebook 01's worked examples: pictures of two pixels, free tables, grey levels with codes."""

from dataclasses import replace

import torch
from torch import Generator, Tensor
from torch.distributions import MixtureSameFamily

from paperlib.elbo import finite, gaussian
from paperlib.elbo.finite import Finite

F64 = {"dtype": torch.float64}

# Two pixels, six kinds of picture; a code says to which group of kinds x belongs.
KIND_WEIGHTS = torch.tensor([0.22, 0.18, 0.15, 0.15, 0.18, 0.12], **F64)
KIND_MEANS = torch.tensor([[-3.0, -1.5], [-1.2, -2.4], [-2.6, 1.8], [0.4, 0.6], [1.6, 2.6], [2.8, -0.8]], **F64)
KIND_COVS = torch.tensor([
    [[0.35, 0.25], [0.25, 0.35]], [[0.30, -0.15], [-0.15, 0.20]], [[0.25, 0.0], [0.0, 0.45]],
    [[0.40, 0.30], [0.30, 0.40]], [[0.30, -0.22], [-0.22, 0.35]], [[0.25, 0.10], [0.10, 0.45]],
], **F64)  # fmt: skip
KINDS_BY_CODE = {"1 code": [[*range(6)]], "3 codes": [[0, 1], [2, 3], [4, 5]], "6 codes": [[k] for k in range(6)]}
BINNED = {
    "8 levels, in the middle": torch.tensor([0.0, 0.0, 0.1, 0.4, 0.4, 0.1, 0.0, 0.0], **F64),
    "8 levels, at the black end": torch.tensor([0.7, 0.2, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0], **F64),
}


def pictures(kinds: list[int]) -> MixtureSameFamily:
    """q(x|z) of the code that stands for these kinds."""
    return gaussian.mixture(KIND_WEIGHTS[kinds], KIND_MEANS[kinds], KIND_COVS[kinds])


FLOW_X_PERCENT, FLOW_Z_PERCENT = (36, 24, 18, 13, 9), (30, 25, 20, 15, 10)
FLOW_P_X, FLOW_P_Z = (torch.tensor(percent, **F64) / 100 for percent in (FLOW_X_PERCENT, FLOW_Z_PERCENT))


def best_elbos(count: int) -> Finite:
    """`count` models with L = -H(p), from I(x;z) = 0 to the greatest I that q(z) = p(z) allows."""
    most = finite.most_informative_coupling(FLOW_X_PERCENT, FLOW_Z_PERCENT)
    share = torch.linspace(0, 1, count, **F64)[:, None, None]
    joint = (1 - share) * FLOW_P_X[:, None] * FLOW_P_Z + share * most
    return finite.matched(FLOW_P_X.expand(count, -1), joint / FLOW_P_X[:, None], FLOW_P_Z.expand(count, -1))


def flow_starts(count: int, generator: Generator) -> Finite:
    """`count` random pairs of encoder and decoder, each from nearly flat to sharp, independently of the other."""
    scale = torch.linspace(0.1, 3, count, **F64)[:, None, None]
    shuffled = scale[torch.randperm(count, generator=generator)]
    encoder, decoder = (s * torch.randn(count, 5, 5, generator=generator, **F64) for s in (scale, shuffled))
    return Finite(FLOW_P_X.expand(count, -1), encoder.softmax(-1), FLOW_P_Z.expand(count, -1), decoder.softmax(-1))


def decoders_that_ignore_z(scales: Tensor, speeds: int, generator: Generator) -> Finite:
    """Models (scales, `speeds`, 12) of uniform p(x), p(z), p(x|z) = p(x), encoder logits of std `scales`, 12 each."""
    uniform, shape = torch.full((5,), 0.2, **F64), (len(scales), speeds, 12)
    noise = torch.randn(len(scales), 1, 12, 5, 5, generator=generator, **F64)
    encoder = (uniform.log() + scales[:, None, None, None, None] * noise).softmax(-1).expand(*shape, -1, -1)
    p, decoder = uniform.expand(*shape, -1), uniform.expand(*shape, 5, -1)
    return Finite(p, encoder, p, decoder)


def _levels() -> tuple[Tensor, dict[str, Tensor]]:
    """24 grey levels in two clumps, p(x) (24,), and codes (24, Z): x blurred by noise, or the side that it is on."""
    x = torch.arange(24, **F64)
    p_x = torch.exp(-0.5 * ((x - 6) / 2.2) ** 2) + 0.6 * torch.exp(-0.5 * ((x - 16.5) / 2.4) ** 2) + 0.004
    side = (x > 11.5).long()
    codes = {f"blur {width}": torch.softmax(-0.5 * ((x[:, None] - x) / width) ** 2, dim=-1) for width in (1, 2, 4)}
    codes["soft bit"] = torch.tensor([[0.99, 0.01], [0.01, 0.99]], **F64)[side]
    codes["hard bit"] = torch.eye(2, **F64)[side]
    codes["injective"] = torch.eye(24, **F64)
    return p_x / p_x.sum(), codes


LEVELS, LEVEL_CODES = _levels()


def with_best_decoder(p_x: Tensor, q: Tensor) -> Finite:
    """The code q(z|x) (X, Z) with p(x|z) = q(x|z) and a uniform prior, which no chain depends on."""
    return finite.matched(p_x, q, torch.full((q.shape[1],), 1 / q.shape[1], **F64))


def erased_bit(erased: float) -> Tensor:
    """A code (24, 3): the side of a grey level, wrong once in 1000, or with probability `erased` a third value for all,
    which shrinks every eigenvalue and tau by 1 - `erased`."""
    bit = torch.tensor([[1 - 1e-3, 1e-3], [1e-3, 1 - 1e-3]], **F64)[(torch.arange(24) > 11.5).long()]
    return torch.cat([(1 - erased) * bit, torch.full((24, 1), erased, **F64)], dim=1)


def tilted(model: Finite, tilt: Tensor, target: float) -> Finite:
    """`model` with a decoder proportional to q(x|z) exp(s tilt), s > 0 such that E KL(q(x|z) || p(x|z)) is
    `target` nats; `tilt` (Z, X)."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        wrong = replace(model, p_x_given_z=(model.q_x_given_z.log() + middle * tilt).softmax(-1))
        over = float(finite.decoder_kl(wrong)) > target
        low, high = (low, middle) if over else (middle, high)
    return wrong
