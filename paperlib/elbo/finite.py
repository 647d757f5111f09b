"""Models small enough to write down: every distribution is a table, every expectation a finite sum.

Values are in nats, tables float64, and every function accepts leading batch dimensions `...`. As in notebook 01:

    (1)  L = E_q(x,z) log p(x|z) - E_p(x) KL(q(z|x) || p(z))
    (2)  L = -KL(p(x) || p_theta(x)) - E_p(x) KL(q(z|x) || p_theta(z|x)) - H(p)
    (3)  L = -KL(q(z) || p(z))       - E_q(z) KL(q(x|z) || p(x|z))       - H(p)
    (4)  E_q(x,z) log p(x|z) = I_q(x;z) - H(p) - E_q(z) KL(q(x|z) || p(x|z))
"""

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor
from torch.special import xlogy

Step = Tensor | float


@dataclass(frozen=True)
class Finite:
    """Data, encoder, prior and decoder as tables; what is written after `|` comes first.

    Raises `ValueError` if a table has a negative entry or a row that does not sum to one within 1e-9.
    """

    p_x: Tensor  # (..., X), data
    q_z_given_x: Tensor  # (..., X, Z), encoder
    p_z: Tensor  # (..., Z), prior
    p_x_given_z: Tensor  # (..., Z, X), decoder

    def __post_init__(self):
        for name, table in vars(self).items():
            if bool((table < 0).any()) or bool(((table.sum(-1) - 1).abs() > 1e-9).any()):
                raise ValueError(f"{name} is not a table of probabilities: its rows must be >= 0 and sum to one")

    def __getitem__(self, part: int | slice) -> "Finite":
        """One model of a batch, or some."""
        return Finite(*(table[part] for table in vars(self).values()))

    @property
    def q_xz(self) -> Tensor:
        """q(x,z) = p(x) q(z|x), (..., X, Z)."""
        return self.p_x[..., None] * self.q_z_given_x

    @property
    def q_z(self) -> Tensor:
        """q(z), (..., Z)."""
        return self.q_xz.sum(-2)

    @property
    def q_x_given_z(self) -> Tensor:
        """q(x|z), (..., Z, X). A code that is never used has no q(x|z): p(x) stands there, with weight q(z) = 0."""
        q_zx = self.q_xz.mT
        q_z = q_zx.sum(-1, keepdim=True)
        used = q_z > 0
        return torch.where(used, q_zx / torch.where(used, q_z, 1.0), self.p_x[..., None, :])


def from_lists(p_x: list, q_z_given_x: list, p_z: list, p_x_given_z: list) -> Finite:
    """One model written out by hand, shapes as in `Finite`. Raises `ValueError` for what is no table."""
    return Finite(*(torch.tensor(t, dtype=torch.float64) for t in (p_x, q_z_given_x, p_z, p_x_given_z)))


def entropy(p: Tensor) -> Tensor:
    """H(p) over the last dimension, (...)."""
    return -xlogy(p, p).sum(-1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) over the last dimension, (...): infinite where q = 0 < p."""
    return (xlogy(p, p) - xlogy(p, q)).sum(-1)


def mean(weights: Tensor, values: Tensor) -> Tensor:
    """The weighted sum over the last dimension, (...): what has weight 0 counts 0, even where it is infinite."""
    return torch.where(weights > 0, weights * values, 0.0).sum(-1)


def rate(model: Finite) -> Tensor:
    """E_p(x) KL(q(z|x) || p(z)), (...)."""
    return mean(model.p_x, kl(model.q_z_given_x, model.p_z[..., None, :]))


def distortion(model: Finite) -> Tensor:
    """-E_q(x,z) log p(x|z), (...); its negative is "the ELBO without its KL"."""
    return -xlogy(model.q_xz, model.p_x_given_z.mT).sum((-2, -1))


def elbo(model: Finite) -> Tensor:
    """L by its definition (1), (...)."""
    return -distortion(model) - rate(model)


def elbo_from_evidence(model: Finite) -> Tensor:
    """L by (2), (...)."""
    return elbo_without_entropy(model) - entropy(model.p_x)


def elbo_without_entropy(model: Finite) -> Tensor:
    """(2) without H(p), as the post has it, from p_theta(x) = sum_z p(z) p(x|z) and Bayes' p_theta(z|x), (...)."""
    p_zx = model.p_z[..., None] * model.p_x_given_z
    evidence = p_zx.sum(-2)
    posterior = (p_zx / evidence[..., None, :]).mT  # not a number where the model says x is impossible
    posterior = torch.where(evidence[..., None] > 0, posterior, model.p_z[..., None, :])
    return -kl(model.p_x, evidence) - mean(model.p_x, kl(model.q_z_given_x, posterior))


def elbo_from_codes(model: Finite) -> Tensor:
    """L by (3), from q(z) and q(x|z), (...)."""
    return -kl(model.q_z, model.p_z) - decoder_kl(model) - entropy(model.p_x)


def decoder_kl(model: Finite) -> Tensor:
    """E_q(z) KL(q(x|z) || p(x|z)), (...): what a wrong decoder costs in (3) and (4)."""
    return mean(model.q_z, kl(model.q_x_given_z, model.p_x_given_z))


def mutual_information(model: Finite) -> Tensor:
    """I_q(x;z) = KL(q(x,z) || p(x) q(z)), (...)."""
    return kl(model.q_xz.flatten(-2), (model.p_x[..., None] * model.q_z[..., None, :]).flatten(-2))


def random_model(
    generator: Generator, batch: int, x: int, z: int, sharpness: float = 1.5, zeros: float = 0.0
) -> Finite:
    """`batch` models of `x` data points and `z` codes: softmax tables of normal logits times `sharpness`. With
    probability `zeros` an entry of the encoder is exactly zero (never the greatest of its row)."""

    def logits(*shape: int) -> Tensor:
        return sharpness * torch.randn(batch, *shape, generator=generator, dtype=torch.float64)

    encoder = logits(x, z)
    dropped = torch.rand(batch, x, z, generator=generator, dtype=torch.float64) < zeros
    encoder[dropped & (encoder < encoder.amax(-1, keepdim=True))] = -torch.inf
    return Finite(*(table.softmax(-1) for table in (logits(x), encoder, logits(z), logits(z, x))))


def random_coupling(p_x: Tensor, p_z: Tensor, generator: Generator, sharpness: Tensor | float) -> Tensor:
    """A random encoder (..., X, Z) with q(z) = p(z) within 1e-14: a random table scaled to both marginals (Sinkhorn),
    which are positive."""
    shape = (*p_x.shape, p_z.shape[-1])
    joint = (sharpness * torch.randn(shape, generator=generator, dtype=torch.float64)).exp()
    for _ in range(10_000):
        joint = joint * (p_z / joint.sum(-2))[..., None, :]
        joint = joint * (p_x / joint.sum(-1))[..., None]
        if float((joint.sum(-2) - p_z).abs().max()) < 1e-15:
            break
    return joint / joint.sum(-1, keepdim=True)


def most_informative_coupling(x_parts: tuple[int, ...], z_parts: tuple[int, ...]) -> Tensor:
    """The joint table (X, Z) with the greatest I(x;z) of all with marginals `x_parts` and `z_parts`, over their sum.

    I is convex in the table, so a corner of the set of such tables is best. The support of a corner has no cycle, so
    corners are what comes from filling cells one by one, each as far as its row and column allow. All orders are tried,
    each remainder once; whole numbers make this exact. Raises `ValueError` if the sums differ.
    """
    total = sum(x_parts)
    if total != sum(z_parts):
        raise ValueError(f"the marginals sum to {total} and {sum(z_parts)}, but must have one sum")

    def take(parts: tuple[int, ...], index: int, amount: int) -> tuple[int, ...]:
        return (*parts[:index], parts[index] - amount, *parts[index + 1 :])

    @functools.cache
    def best(rows: tuple[int, ...], columns: tuple[int, ...]) -> tuple[float, tuple[tuple[int, int, int], ...]]:
        """The greatest sum of n log n over cells (i, j, n) that use up `rows` and `columns`, and these cells."""
        choice = (-math.inf if any(rows) else 0.0, ())
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                if amount := min(row, column):
                    rest, cells = best(take(rows, i, amount), take(columns, j, amount))
                    choice = max(choice, (amount * math.log(amount) + rest, ((i, j, amount), *cells)))
        return choice

    table = torch.zeros(len(x_parts), len(z_parts), dtype=torch.float64)
    for i, j, amount in best(x_parts, z_parts)[1]:
        table[i, j] = amount
    return table / total


def gradients(model: Finite, kl_weight: float) -> tuple[Tensor, Tensor]:
    """Gradients of E_q log p(x|z) - kl_weight * rate, by positive tables, in the logits of encoder and decoder."""
    q = model.q_z_given_x
    gain = model.p_x_given_z.log().mT - kl_weight * (q.log() - model.p_z.log()[..., None, :])
    gain = model.p_x[..., None] * q * (gain - (q * gain).sum(-1, keepdim=True))
    return gain, model.q_xz.mT - model.q_z[..., None] * model.p_x_given_z


@dataclass(frozen=True)
class Flow:
    """The path of gradient ascent: `rate` and `distortion` (steps + 1, ...) in nats, and the last `model`."""

    rate: Tensor
    distortion: Tensor
    model: Finite


def ascend(model: Finite, steps: int, kl_weight: float, decoder_step: Step, encoder_step: Step | None = None) -> Flow:
    """Gradient ascent on E_q log p(x|z) - kl_weight * rate in the logits of decoder and encoder, from those of `model`.

    A step is one number, or (..., 1, 1) to give each model its own; an encoder without one stays, and may have zeros.
    """
    encoder, decoder = model.q_z_given_x.log(), model.p_x_given_z.log()
    path = [(rate(model), distortion(model))]
    for _ in range(steps):
        up_encoder, up_decoder = gradients(model, kl_weight)
        decoder = (decoder + decoder_step * up_decoder).log_softmax(-1)
        model = replace(model, p_x_given_z=decoder.exp())
        if encoder_step is not None:
            encoder = (encoder + encoder_step * up_encoder).log_softmax(-1)
            model = replace(model, q_z_given_x=encoder.exp())
        path.append((rate(model), distortion(model)))
    rates, distortions = zip(*path, strict=True)
    return Flow(torch.stack(rates), torch.stack(distortions), model)


def matched(p_x: Tensor, encoder: Tensor, p_z: Tensor) -> Finite:
    """The model whose decoder is q(x|z): the best for this encoder, see (3)."""
    blank = Finite(p_x, encoder, p_z, p_x[..., None, :].expand(*p_z.shape, p_x.shape[-1]))
    return replace(blank, p_x_given_z=blank.q_x_given_z)
