"""The worked examples of notebook 01: codes of a density of two pixels, flows of free tables, Markov chains."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from paperlib.elbo import chain, finite, gaussian
from paperlib.elbo.finite import Finite

F64 = {"dtype": torch.float64}

# Two pixels, six kinds of picture; a code says to which group of kinds x belongs.
MIXTURE = gaussian.Mixture(
    torch.tensor([0.22, 0.18, 0.15, 0.15, 0.18, 0.12], **F64),
    torch.tensor([[-3.0, -1.5], [-1.2, -2.4], [-2.6, 1.8], [0.4, 0.6], [1.6, 2.6], [2.8, -0.8]], **F64),
    torch.tensor(
        [
            [[0.35, 0.25], [0.25, 0.35]],
            [[0.30, -0.15], [-0.15, 0.20]],
            [[0.25, 0.0], [0.0, 0.45]],
            [[0.40, 0.30], [0.30, 0.40]],
            [[0.30, -0.22], [-0.22, 0.35]],
            [[0.25, 0.10], [0.10, 0.45]],
        ],
        **F64,
    ),
)
CODES_OF_MIXTURE = {
    "1 code": [[0, 1, 2, 3, 4, 5]],
    "3 codes": [[0, 1], [2, 3], [4, 5]],
    "6 codes": [[0], [1], [2], [3], [4], [5]],
}
BINNED = {
    "8 levels, in the middle": (0.0, 0.0, 0.1, 0.4, 0.4, 0.1, 0.0, 0.0),
    "8 levels, at the black end": (0.7, 0.2, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0),
}


@dataclass(frozen=True)
class Priced:
    """A code's price (5) in nats: `parts` (2,), negentropy and correlation averaged over q(z); and how far the
    optimiser's moments and price lie from those of the closed form, for each z."""

    parts: Tensor
    moments_apart: Tensor
    price_apart: Tensor


def priced_codes() -> tuple[dict[str, Priced], dict[str, Tensor]]:
    """Codes of `MIXTURE`, from coarse to fine: their prices, and what the figure draws."""
    codes, arrays = {}, density_on_grid()
    for name, groups in CODES_OF_MIXTURE.items():
        q_z = torch.stack([MIXTURE.weights[group].sum() for group in groups])
        parts, fits, moments, prices = [], [], [], []
        for group, weight in zip(groups, q_z, strict=True):
            q = gaussian.Mixture(MIXTURE.weights[group] / weight, MIXTURE.means[group], MIXTURE.covs[group])
            mean, variances, price = gaussian.fit_factored(q, points=250)
            true_mean, cov = q.moments()
            closed = gaussian.factored_price(q)
            parts.append(torch.stack([closed.negentropy, closed.correlation]))
            fits.append(torch.stack([mean, variances.sqrt()]))
            moments.append(torch.cat([mean - true_mean, variances - cov.diagonal()]))
            prices.append(price - closed.total)
        codes[name] = Priced(q_z @ torch.stack(parts), torch.stack(moments), torch.stack(prices))
        found = {"parts": codes[name].parts, "fits": torch.stack(fits)}
        arrays |= {f"price_{len(groups)}_{key}": value for key, value in found.items()}
    return codes, arrays


def density_on_grid() -> dict[str, Tensor]:
    """The six kinds of `MIXTURE` on a grid, for the figure: axis (161,), density (6, 161, 161)."""
    axis = torch.linspace(-5, 5, 161, **F64)
    plane = torch.cartesian_prod(axis, axis)
    parts = [
        gaussian.Mixture(torch.ones(1, **F64), mean[None], cov[None]).log_prob(plane).exp()
        for mean, cov in zip(MIXTURE.means, MIXTURE.covs, strict=True)
    ]
    density = MIXTURE.weights[:, None] * torch.stack(parts)
    return {"price_axis": axis, "price_density": density.reshape(-1, 161, 161)}


FLOW_X_PERCENT, FLOW_Z_PERCENT = (36, 24, 18, 13, 9), (30, 25, 20, 15, 10)
FLOW_P_X, FLOW_P_Z = (torch.tensor(percent, **F64) / 100 for percent in (FLOW_X_PERCENT, FLOW_Z_PERCENT))


def best_elbos(count: int) -> Finite:
    """`count` models with L = -H(p), from the code that knows nothing to the one that knows most with q(z) = p(z)."""
    most = finite.most_informative_coupling(FLOW_X_PERCENT, FLOW_Z_PERCENT)
    share = torch.linspace(0, 1, count, **F64)[:, None, None]
    joint = (1 - share) * FLOW_P_X[:, None] * FLOW_P_Z + share * most
    p_x, p_z = FLOW_P_X.expand(count, -1), FLOW_P_Z.expand(count, -1)
    return finite.matched(p_x, joint / FLOW_P_X[:, None], p_z)


def flow_starts(count: int, generator: torch.Generator) -> Finite:
    """`count` random pairs of encoder and decoder, each from nearly flat to sharp, independently of the other."""
    p_x, p_z = FLOW_P_X.expand(count, -1), FLOW_P_Z.expand(count, -1)
    scale = torch.linspace(0.1, 3, count, **F64)
    shuffled = scale[torch.randperm(count, generator=generator)]
    encoder, decoder = (
        (sharpness[:, None, None] * torch.randn(count, rows, columns, generator=generator, **F64)).softmax(-1)
        for sharpness, rows, columns in (
            (scale, len(FLOW_P_X), len(FLOW_P_Z)),
            (shuffled, len(FLOW_P_Z), len(FLOW_P_X)),
        )
    )
    return Finite(p_x, encoder, p_z, decoder)


def survival(steps: int, generator: torch.Generator) -> dict[str, Tensor]:
    """What is left of I when the ELBO is climbed from a decoder that ignores z, by the decoder's relative speed.

    Near the collapsed point the share is (s / (1 + s))^2 for a decoder s times as fast as the encoder, exactly so for
    the uniform p(x) and p(z) that are used here, where ascent in the logits weighs all changes alike.
    """
    p_x = p_z = torch.full((5,), 0.2, **F64)
    speeds, scales = torch.logspace(-1.5, 1.5, 7, **F64), torch.tensor([0.1, 2.0], **F64)
    shape = (len(scales), len(speeds), 12)
    noise = torch.randn(len(scales), 1, 12, len(p_x), len(p_z), generator=generator, **F64)
    encoder = (p_z.log() + scales[:, None, None, None, None] * noise).softmax(-1).expand(*shape, -1, -1)
    decoder = p_x.expand(*shape, len(p_z), -1)
    model = Finite(p_x.expand(*shape, -1), encoder, p_z.expand(*shape, -1), decoder)
    speed = speeds[:, None, None, None]
    step = 4.0 / speed.clamp(min=1)
    flow = finite.ascend(model, steps, 1, encoder_step=step, decoder_step=step * speed)
    left = finite.mutual_information(flow.model) / finite.mutual_information(model)
    return {"survival_speeds": speeds, "survival_scales": scales, "survival_shares": left}


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
DECODER_KL = 1e-5  # nats, of every wrong decoder


def residuals(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One random code, connected: residuals of the exact statements, and how much degrading it raised an eigenvalue."""
    model = finite.random_model(generator, 1, x=6, z=4, sharpness=1.0)
    p_x, q = model.p_x[0], model.q_z_given_x[0]
    kernel = chain.transition(q, model.q_x_given_z[0])
    spectrum = chain.spectrum(p_x, q)
    by_kernel = torch.linalg.eigvals(kernel)
    flow = p_x[:, None] * kernel
    residuals = [
        p_x @ kernel - p_x,
        flow - flow.T,
        by_kernel.imag,
        by_kernel.real.sort(descending=True).values - spectrum.eigenvalues,
        by_kernel.real.clamp(max=0),
        (spectrum.eigenvalues[1] - chain.maximal_correlation(model.q_xz[0]) ** 2)[None],
    ]
    channel = torch.randn(4, 4, generator=generator, **F64).softmax(-1)
    degraded = chain.spectrum(p_x, q @ channel)
    worst = (degraded.eigenvalues - spectrum.eigenvalues).max()
    return torch.cat([part.flatten() for part in residuals]), worst


def scalar_gaussian(correlation: float, points: int = 300, reach: float = 8.5) -> Tensor:
    """Gap minus exp(-2 I) of the scalar Gaussian with corr(x, z) = `correlation`, both enumerated on a fine grid."""
    x = torch.linspace(-reach, reach, points, **F64)
    p_x = torch.softmax(-0.5 * x**2, dim=0)
    q = torch.softmax(-0.5 * (x - correlation * x[:, None]) ** 2 / (1 - correlation**2), dim=-1)
    model = finite.matched(p_x, q, p_x)
    gap = chain.spectrum(p_x, q).gap
    closed = 1 - correlation**2
    apart = (gap - torch.exp(-2 * finite.mutual_information(model))).abs()
    return apart + (gap - closed).abs()


def parts_agree(generator: torch.Generator) -> bool:
    """Whether a random sparse code has one eigenvalue 1 per part of the support that a search finds."""
    model = finite.random_model(generator, 1, x=7, z=6, sharpness=0.5, zeros=0.75)
    spectrum = chain.spectrum(model.p_x[0], model.q_z_given_x[0])
    return int((spectrum.eigenvalues > 1 - 1e-9).sum()) == len(chain.components(model.q_xz[0]))


@dataclass(frozen=True)
class Mixing:
    """A code's chain: I(x;z) in nats, gap (0 where the support falls apart), number of parts of the support."""

    information: float
    gap: float
    parts: int


def codes(steps: int = 200) -> tuple[dict[str, Mixing], dict[str, Tensor]]:
    """The chains of `LEVEL_CODES`, and their distances to p(x) after 0, ..., `steps` steps with the prediction.

    The prediction is (9), and where the support falls apart 1 - p(the least part): a start there never leaves it.
    """
    found, arrays = {}, {}
    for name, q in LEVEL_CODES.items():
        model = finite.matched(LEVELS, q, torch.full((q.shape[1],), 1 / q.shape[1], **F64))
        spectrum = chain.spectrum(LEVELS, q)
        parts = chain.components(model.q_xz)
        if len(parts) == 1:
            gap, predicted = float(spectrum.gap), chain.predicted_distances(LEVELS, spectrum, steps)
        else:
            gap, predicted = 0.0, (1 - min(LEVELS[part].sum() for part in parts)).expand(steps + 1)
        found[name] = Mixing(float(finite.mutual_information(model)), gap, len(parts))
        kernel = chain.transition(q, model.q_x_given_z)
        arrays |= {f"chain_{name}": chain.distances(kernel, LEVELS, steps), f"chain_{name}_predicted": predicted}
    return found, arrays


def wrong_decoders(count: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Codes ever more often erased, each with wrong decoders of one and the same E KL: TV minus the bound (10).

    An erased code says nothing, so erasing with probability e shrinks every eigenvalue and tau by 1 - e.
    """
    rows, base = [], torch.tensor([[1 - 1e-3, 1e-3], [1e-3, 1 - 1e-3]], **F64)[(torch.arange(24) > 11.5).long()]
    for erased in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.9):
        q = torch.cat([(1 - erased) * base, torch.full((len(base), 1), erased, **F64)], dim=1)
        model = finite.matched(LEVELS, q, torch.full((3,), 1 / 3, **F64))
        spectrum = chain.spectrum(LEVELS, q)
        tilts = [spectrum.slowest.expand(3, -1), *torch.randn(count, 3, len(LEVELS), generator=generator, **F64)]
        for index, tilt in enumerate(tilts):
            wrong = replace(model, p_x_given_z=tilted(model, tilt, DECODER_KL))
            kernel = chain.transition(q, wrong.p_x_given_z)
            apart = chain.total_variation(chain.stationary(kernel), LEVELS)
            tau = chain.dobrushin(kernel)
            bound = chain.stationary_bound(finite.decoder_kl(wrong), tau)
            first_order = chain.first_order_bound(finite.decoder_kl(wrong), spectrum.gap)
            along = torch.tensor(float(index == 0), **F64)
            rows.append(torch.stack([1 / (1 - tau), apart, bound, first_order, along]))
    found = torch.stack(rows)
    names = ("slowness", "apart", "bound", "first_order", "along_slowest")
    return found[:, 1] - found[:, 2], {f"wrong_{name}": found[:, k] for k, name in enumerate(names)}


def tilted(model: Finite, tilt: Tensor, target: float) -> Tensor:
    """A decoder (Z, X) proportional to q(x|z) exp(s tilt), s > 0 such that E KL(q(x|z) || p(x|z)) is `target` nats."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        decoder = (model.q_x_given_z.log() + middle * tilt).softmax(-1)
        over = float(finite.decoder_kl(replace(model, p_x_given_z=decoder))) > target
        low, high = (low, middle) if over else (middle, high)
    return decoder


def leaking_bit(leaks: tuple[float, ...] = (1e-2, 1e-4, 1e-6)) -> list[tuple[float, float, float]]:
    """A hard bit whose decoder leaks to the right, and thrice as much back: (leak, E KL in nats, TV(pi, p)) of each."""
    q = LEVEL_CODES["hard bit"]
    model = finite.matched(LEVELS, q, torch.full((2,), 0.5, **F64))
    rows = []
    for leak in leaks:
        mix = torch.tensor([[1 - leak, leak], [3 * leak, 1 - 3 * leak]], **F64)
        wrong = replace(model, p_x_given_z=mix @ model.p_x_given_z)
        rest = chain.stationary(chain.transition(q, wrong.p_x_given_z))
        rows.append((leak, float(finite.decoder_kl(wrong)), float(chain.total_variation(rest, LEVELS))))
    return rows
