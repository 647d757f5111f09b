"""The ELBO seen from the encoder's side, on models where every statement can be computed without sampling.

Notebook 01 in code: one function per claim, E1 to E6, in the order of the story. Each computes both sides of its
equations in two independent ways, in float64 on the CPU, and returns a `Part`: what was measured, its verdict, and the
arrays that `elbo_figures` draws. The mathematics is in `finite`, `gaussian` and `chain`, the examples in
`elbo_examples`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paperlib.elbo import examples, finite, gaussian
from paperlib.elbo import figures as elbo_figures
from paperlib.elbo.finite import Finite
from paperlib.nn import likelihoods
from paperlib.runs.claims import Claim, Verdicts, judge
from paperlib.runs.estimate import Estimate
from paperlib.runs.experiment import Experiment
from paperlib.runs.presets import option
from paperlib.runs.run import Run, finish, save_arrays

NOTEBOOK = "01_elbo_derivation"
HEADLINE = ("rate_distortion_flows", elbo_figures.FLOWS_CAPTION)
F64 = {"dtype": torch.float64}


@dataclass(frozen=True)
class Settings:
    """What notebook 01 can be told. Raises `ValueError` for a count below 1."""

    models: int = option(1000, "random finite models (E1, E3, E5)")
    gaussian_models: int = option(100, "random linear-Gaussian models (E2)")
    estimated_models: int = option(8, "of these, how many are estimated by Monte Carlo too (E2)")
    samples: int = option(20_000, "draws of each Monte Carlo estimate (E2)")
    ascent_steps: int = option(3000, "gradient steps of the decoder (E3)")
    starts: int = option(48, "starts of the flows of free tables (E5)")
    flow_steps: int = option(4000, "gradient steps of each flow (E5)")
    chains: int = option(40, "random codes whose Markov chains are enumerated (E6)")
    wrong_decoders: int = option(12, "wrong decoders per code (E6)")

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} is {value}, but must be at least 1")


_cpu = replace(
    Settings(),
    models=20_000,
    gaussian_models=1000,
    estimated_models=40,
    samples=200_000,
    starts=256,
    flow_steps=20_000,
    chains=400,
    wrong_decoders=100,
)
PRESETS = {"smoke": Settings(), "cpu": _cpu, "gpu": _cpu, "paper": _cpu}


def _within(tolerance: float, *found: Estimate) -> bool:
    return all(quantity.value <= tolerance for quantity in found)  # also false for what is no number


def _indifferent(
    elbo_attained_below: Estimate,
    without_kl_attained_below: Estimate,
    gradient_below: Estimate,
    most_I_of_elbo: Estimate,
    I_without_kl: Estimate,
    flows_arrived: Estimate,
    rates_differ_by: Estimate,
    ends_with_more_I: Estimate,
    stop_short_without_kl: Estimate,
) -> bool:
    return (
        _within(1e-12, elbo_attained_below, without_kl_attained_below, gradient_below)
        and 0 < most_I_of_elbo.value < I_without_kl.value
        and flows_arrived.value >= 90
        and rates_differ_by.value >= 0.5
        and ends_with_more_I.value >= 90
        and stop_short_without_kl.value < 100
    )


def _mixes_as_stated(
    residual_below: Estimate,
    gaussian_gap_below: Estimate,
    degraded_slower_by: Estimate,
    parts_agree: Estimate,
    bound_broken_by: Estimate,
    more_I: Estimate,
    less_I: Estimate,
    gap_of_more_I: Estimate,
    gap_of_less_I: Estimate,
) -> bool:
    return (
        _within(1e-9, residual_below, gaussian_gap_below)
        and _within(0, degraded_slower_by, bound_broken_by)
        and parts_agree.value == 100
        and more_I.value > less_I.value
        and gap_of_more_I.value > gap_of_less_I.value
    )


CLAIMS = {
    "E1": Claim(
        "L = -KL(p(x) ‖ p_θ(x)) - E KL(q(z|x) ‖ p_θ(z|x)) - H(p), so L ≤ -H(p); without H(p) it is off by H(p).",
        "residuals at most 1e-12; the best L of 8 equal points is -log 8, of one point 0",
        lambda residual_below, without_entropy_below, best_elbo, best_elbo_of_a_point: (
            _within(1e-12, residual_below, without_entropy_below)
            and abs(best_elbo.value + math.log(8)) <= 1e-12
            and best_elbo_of_a_point.value == 0
        ),
        exact=True,
        shows=("residual_below",),
    ),
    "E2": Claim(
        "For linear-Gaussian models the same holds with h(p): L + h(p) ≤ 0, while L itself may be positive.",
        "residual at most 1e-10; L + h(p) ≤ 0, and 0 at best; an L > 0; Monte Carlo within 4 standard errors",
        lambda residual_below, best_L_plus_h_below, greatest_L_plus_h, example_L, worst_standard_errors: (
            _within(1e-10, residual_below, best_L_plus_h_below)
            and greatest_L_plus_h.value <= 0 < example_L.value
            and _within(4, worst_standard_errors)
        ),
        exact=True,
        shows=("residual_below", "example_L"),
    ),
    "E3": Claim(
        "E_q log p(x|z) is greatest at p(x|z) = q(x|z), where it is I_q(x;z) - H(p); the gap is E KL(q(x|z) ‖ p(x|z)).",
        "identity within 1e-12; gradient ascent on free tables within 1e-9 of the closed form, at q(x|z) within 1e-4",
        lambda residual_below, ascent_short_by_below, table_apart_below: (
            _within(1e-12, residual_below) and _within(1e-9, ascent_short_by_below) and _within(1e-4, table_apart_below)
        ),
        exact=True,
        shows=("residual_below",),
    ),
    "E4": Claim(
        "The best factored Gaussian has the mean and variances of q(x|z); it costs negentropy + ½ log(∏v / |Σ|).",
        "optimisation within 1e-6 of both; for Gaussians in bins it is false by more than 0.001 nat",
        lambda moments_apart_below, price_apart_below, false_in_bins_by: (
            _within(1e-6, moments_apart_below, price_apart_below) and false_in_bins_by.value > 1e-3
        ),
        exact=True,
        shows=("price_apart_below",),
    ),
    "E5": Claim(
        "The ELBO has the same maximum at every I that q(z) = p(z) allows; without its KL the maximum is at I = H(p); "
        "the collapsed point is stationary for both.",
        "maxima attained and gradients 0 within 1e-12; the ELBO's end below H(p); 90 % of the flows under the ELBO "
        "come within 1e-3 of -H(p), at rates 0.5 nat apart; 90 % end with more I without the KL, not all of them "
        "short of distortion 0.01",
        _indifferent,
        exact=True,
        shows=("elbo_attained_below", "ends_with_more_I"),
    ),
    "E6": Claim(
        "With p(x|z) = q(x|z) the chain is reversible at p(x); its eigenvalues are ≥ 0, the second is the squared "
        "maximal correlation; degrading a code slows nothing; a support in parts never mixes; more I can be faster; "
        "a wrong decoder moves the rest by at most √(½ E KL) / (1 - τ).",
        "residuals at most 1e-9, gap = exp(-2I) for the scalar Gaussian too; degrading raises no eigenvalue by more "
        "than 1e-12; one eigenvalue 1 per part; the bound never broken; a code with more I and a greater gap",
        _mixes_as_stated,
        exact=True,
        shows=("residual_below",),
    ),
}


@dataclass(frozen=True)
class Part:
    """What one section found: quantities by name, the claim's verdict, a small table to show, arrays to draw."""

    claim: str
    measured: dict[str, Estimate]
    verdict: Verdicts
    table: "Table"
    arrays: dict[str, np.ndarray]


@dataclass(frozen=True)
class Table:
    """Rows of text under a heading; shows itself as Markdown."""

    heading: tuple[str, ...]
    rows: list[tuple[Any, ...]]

    def _repr_markdown_(self) -> str:
        lines = [self.heading, ("---",) + ("---:",) * (len(self.heading) - 1), *self.rows]
        return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)

    __repr__ = _repr_markdown_


def terms(model: Finite) -> Table:
    """L of one model by (1), (2) and (3), and the terms that these are made of, in nats."""
    rows = [
        ("L by (1): -distortion - rate", finite.elbo(model)),
        ("L by (2), from the evidence", finite.elbo_from_evidence(model)),
        ("L by (3), from q(x|z)", finite.elbo_from_codes(model)),
        ("the post's formula: (2) without H(p)", finite.elbo_from_evidence(model, entropy_term=False)),
        ("H(p)", finite.entropy(model.p_x)),
        ("rate", finite.rate(model)),
        ("distortion", finite.distortion(model)),
        ("I(x;z)", finite.mutual_information(model)),
    ]
    return Table(("one model", "nats"), rows)


def two_views(run: Run) -> Part:
    """E1: the definition (1) against the two views (2) and (3), on random finite models with zeros in the encoder."""
    models = finite.random_model(_generator(run, 1), run.settings.models, x=6, z=4, zeros=0.2)
    value, entropy = finite.elbo(models), finite.entropy(models.p_x)
    views = (finite.elbo_from_evidence(models), finite.elbo_from_codes(models))
    post = finite.elbo_from_evidence(models, entropy_term=False)

    uniform, point = torch.full((1, 8), 1 / 8, **F64), torch.eye(8, **F64)[:1]
    prior = torch.full((1, 3), 1 / 3, **F64)
    best = finite.matched(uniform, finite.random_coupling(uniform, prior, _generator(run, 2)), prior)
    of_point = finite.matched(point, prior[:, None].expand(1, 8, 3), prior)
    rows = []
    first = Finite(*(table[:1] for table in vars(models).values()))
    for name, model in (("a random model", first), ("best, 8 equal points", best), ("best, one point", of_point)):
        post_value = finite.elbo_from_evidence(model, entropy_term=False)
        sides = (finite.elbo(model), finite.elbo_from_evidence(model), finite.elbo_from_codes(model), post_value)
        rows.append((name, *sides, finite.entropy(model.p_x)))
    measured = {
        "residual_below": _below(1e-12, *(value - view for view in views)),
        "without_entropy_below": _below(1e-12, value - post + entropy),
        "best_elbo": _nats(finite.elbo(best)),
        "best_elbo_of_a_point": _nats(finite.elbo(of_point)),
    }
    heading = ("model", "L by (1)", "L by (2)", "L by (3)", "the post's formula", "H(p)")
    return _part(run, "E1", measured, Table(heading, rows))


def gaussian_views(run: Run) -> Part:
    """E2: (1) against (2') in closed form, the same data in other units, and the estimators that training uses."""
    generator, settings = _generator(run, 3), run.settings
    residuals, slack = [], []
    for _ in range(settings.gaussian_models):
        model = gaussian.random_linear_gaussian(generator, x=4, z=2)
        value = gaussian.linear_elbo(model)
        residuals.append(value - gaussian.linear_elbo_from_evidence(model))
        slack.append(value + gaussian.gaussian_entropy(model.cov))
    scores = []
    for _ in range(settings.estimated_models):
        model = gaussian.random_linear_gaussian(generator, x=4, z=2, factored=True)
        mean, error = estimate_elbo(model, settings.samples, generator)
        scores.append((mean - gaussian.linear_elbo(model)).abs() / error)

    cov = gaussian.random_linear_gaussian(generator, x=4, z=2).cov
    rows, best = [], []
    for unit, scale in (("metres", 1.0), ("decimetres", 10.0), ("kilometres", 1e-3)):
        model = gaussian.matched(cov * scale**2, correlation=0.8)
        value, entropy = gaussian.linear_elbo(model), gaussian.gaussian_entropy(model.cov)
        rows.append((f"x in {unit}", value, entropy, value + entropy))
        best.append(value + entropy)
    measured = {
        "residual_below": _below(1e-10, torch.stack(residuals)),
        "best_L_plus_h_below": _below(1e-10, *best),
        "greatest_L_plus_h": _nats(torch.stack(slack).max()),
        "example_L": _nats(rows[-1][1]),
        "worst_standard_errors": Estimate(float(torch.stack(scores).max())),
    }
    return _part(run, "E2", measured, Table(("best model", "L", "h(p)", "L + h(p)"), rows))


def estimate_elbo(model: gaussian.LinearGaussian, samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The ELBO of a factored model as training estimates it, from one z per x: mean and standard error, in nats."""
    m = model
    noise = torch.randn(samples, len(m.mean), generator=generator, **F64)
    x = m.mean + noise @ torch.linalg.cholesky(m.cov).T
    code_mean, code_log_std = x @ m.enc.T + m.enc_bias, 0.5 * m.enc_cov.diagonal().log()
    z = likelihoods.sample_gaussian(code_mean, code_log_std, generator=generator)
    log_p = likelihoods.gaussian_log_prob(x, z @ m.dec.T + m.dec_bias, 0.5 * m.dec_cov.diagonal().log())
    terms = log_p - likelihoods.gaussian_kl(code_mean, code_log_std)
    return terms.mean(), terms.std() / math.sqrt(samples)


def best_decoder(run: Run) -> Part:
    """E3: identity (4) on random models, and gradient ascent on the decoder's table with one code never used."""
    models = finite.random_model(_generator(run, 4), run.settings.models, x=6, z=4, zeros=0.2)
    closed = finite.mutual_information(models) - finite.entropy(models.p_x)
    residual = -finite.distortion(models) - (closed - finite.decoder_kl(models))

    start = finite.random_model(_generator(run, 5), 16, x=5, z=3, sharpness=0.7)
    unused = torch.cat([start.q_z_given_x, torch.zeros(16, 5, 1, **F64)], dim=-1)
    decoder = finite.random_model(_generator(run, 6), 16, x=5, z=4, sharpness=0.7).p_x_given_z
    start = Finite(start.p_x, unused, torch.full((16, 4), 0.25, **F64), decoder)
    flow = finite.ascend(start, run.settings.ascent_steps, kl_weight=0, decoder_step=4.0)
    best = finite.mutual_information(start) - finite.entropy(start.p_x)
    apart = (flow.model.p_x_given_z - flow.model.q_x_given_z).abs().amax(-1)
    used = flow.model.q_z > 0
    rows = [
        (step, -flow.distortion[step, 0], best[0], best[0] + flow.distortion[step, 0])
        for step in (0, 10, 100, run.settings.ascent_steps)
        if step <= run.settings.ascent_steps
    ]
    measured = {
        "residual_below": _below(1e-12, residual),
        "ascent_short_by_below": _below(1e-9, best + flow.distortion[-1]),
        "table_apart_below": _below(1e-4, apart[used]),
    }
    heading = ("gradient steps", "E_q log p(x|z)", "I - H(p)", "gap")
    return _part(run, "E3", measured, Table(heading, rows))


def factored_gaussians(run: Run) -> Part:
    """E4: the best factored Gaussian for codes that are ever finer on one density of two pixels, and for bins."""
    codes, arrays = examples.priced_codes()
    rows = [(name, *found.parts, found.parts.sum()) for name, found in codes.items()]
    binned = {name: gaussian.fit_binned(torch.tensor(q, **F64)) for name, q in examples.BINNED.items()}
    for name, fit in binned.items():
        rows.append((f"{name}: binned Gaussian with q's moments", "", "", fit.moments[2]))
        rows.append((f"{name}: best, deviation {fit.best[1]:.2f} not {fit.moments[1]:.2f}", "", "", fit.best[2]))
    measured = {
        "moments_apart_below": _below(1e-6, *(found.moments_apart for found in codes.values())),
        "price_apart_below": _below(1e-6, *(found.price_apart for found in codes.values())),
        "false_in_bins_by": _nats(min(fit.moments[2] - fit.best[2] for fit in binned.values())),
    }
    heading = ("q(x|z)", "negentropy", "½ log(∏v / det Σ)", "price")
    return _part(run, "E4", measured, Table(heading, rows), arrays)


def indifference(run: Run) -> Part:
    """E5: both maxima attained, the collapsed point stationary, and flows of free tables from many starts."""
    settings, generator = run.settings, _generator(run, 7)
    p_x, p_z = examples.FLOW_P_X, examples.FLOW_P_Z
    size = len(p_x)
    count = min(settings.models, 1000)
    sharpness = torch.linspace(0, 4, count, **F64)[:, None, None]
    couplings = finite.random_coupling(p_x.expand(count, -1), p_z.expand(count, -1), generator, sharpness)
    best = finite.matched(p_x.expand(count, -1), couplings, p_z.expand(count, -1))
    line = examples.best_elbos(101)
    injective = finite.matched(p_x, torch.eye(size, **F64), p_z)
    collapsed = Finite(p_x, p_z.expand(size, -1), p_z, p_x.expand(len(p_z), -1))
    slopes = [slope for weight in (0, 1) for slope in finite.gradients(collapsed, weight)]

    start = examples.flow_starts(settings.starts, generator)
    flows = [finite.ascend(start, settings.flow_steps, weight, encoder_step=4.0, decoder_step=4.0) for weight in (1, 0)]
    entropy = finite.entropy(p_x)
    knows = [finite.mutual_information(flow.model) for flow in flows]
    arrived = flows[0].rate[-1] + flows[0].distortion[-1] - entropy < 1e-3
    shown = np.unique(np.geomspace(1, settings.flow_steps + 1, 80).astype(int)) - 1
    most = finite.mutual_information(line)[-1]
    arrays = {"flow_entropy": entropy, "flow_most": most, **examples.survival(settings.flow_steps, generator)}
    for name, flow in zip(("elbo", "none"), flows, strict=True):
        arrays |= {f"flow_{name}_rate": flow.rate[shown], f"flow_{name}_distortion": flow.distortion[shown]}
    measured = {
        "elbo_attained_below": _below(1e-12, finite.elbo(best) + entropy, finite.elbo(line) + entropy),
        "without_kl_attained_below": _below(1e-12, finite.distortion(injective)),
        "gradient_below": _below(1e-12, *slopes),
        "most_I_of_elbo": _nats(most),
        "I_without_kl": _nats(finite.mutual_information(injective)),
        "flows_arrived": _share(arrived),
        "rates_differ_by": _nats(_width(flows[0].rate[-1][arrived])),
        "ends_with_more_I": _share(knows[1] > knows[0]),
        "stop_short_without_kl": _share(flows[1].distortion[-1] > 0.01),
    }
    rows = [
        ("I at the start", *_spread(finite.mutual_information(start))),
        ("I at the end, ELBO", *_spread(knows[0])),
        ("I at the end, without its KL", *_spread(knows[1])),
        ("distortion at the end, without its KL", *_spread(flows[1].distortion[-1])),
    ]
    heading = ("nats", "least", "median", "greatest")
    return _part(run, "E5", measured, Table(heading, rows), arrays)


def markov_chain(run: Run) -> Part:
    """E6: enumerated kernels of random codes, the codes of the figure, and wrong decoders."""
    generator = _generator(run, 8)
    exact = [examples.residuals(generator) for _ in range(run.settings.chains)]
    residuals, degraded = zip(*exact, strict=True)
    scalar = torch.stack([examples.scalar_gaussian(correlation) for correlation in (0.0, 0.3, 0.6, 0.9)])
    parts = [examples.parts_agree(generator) for _ in range(run.settings.chains)]
    codes, arrays = examples.codes()
    rows = [(name, found.information, found.gap, _half_life(found.gap), found.parts) for name, found in codes.items()]
    broken, amplified = examples.wrong_decoders(run.settings.wrong_decoders, generator)
    measured = {
        "residual_below": _below(1e-9, *residuals),
        "gaussian_gap_below": _below(1e-9, scalar),
        "degraded_slower_by": _over(torch.stack(degraded) - 1e-12),
        "parts_agree": _share(torch.tensor(parts)),
        "bound_broken_by": _over(broken),
        "more_I": _nats(codes["blur 2"].information),
        "less_I": _nats(codes["soft bit"].information),
        "gap_of_more_I": Estimate(codes["blur 2"].gap),
        "gap_of_less_I": Estimate(codes["soft bit"].gap),
    }
    heading = ("code", "I(x;z), nats", "gap", "steps to halve", "parts")
    return _part(run, "E6", measured, Table(heading, rows), arrays | amplified)


def leaking_bit() -> Table:
    """However small the leak of a hard bit's decoder, its ratio alone decides where the chain rests."""
    rows = [(f"{leak:.0e}", f"{price:.1e}", apart) for leak, price, apart in examples.leaking_bit()]
    return Table(("leak to the right", "E KL(q(x|z) ‖ p(x|z)), nats", "TV(π, p)"), rows)


def conclude(run: Run, *parts: Part) -> Verdicts:
    """Write the arrays, judge all claims and write what the run found. Returns the table of verdicts."""
    arrays = {}
    for part in parts:
        arrays |= part.arrays
    save_arrays(run, **arrays)
    return finish(run, CLAIMS, {part.claim: part.measured for part in parts})


def recomputed(run: Run) -> dict[str, dict[str, Estimate]]:
    """What each claim is judged by, all of it computed again, which takes a minute."""
    parts = (part(run) for part in (two_views, gaussian_views, best_decoder, factored_gaussians, indifference))
    return {part.claim: part.measured for part in (*parts, markov_chain(run))}


def _generator(run: Run, stream: int) -> torch.Generator:
    """A stream of random numbers of its own for each experiment, so that one does not move another."""
    return torch.Generator().manual_seed(1000 * run.seed + stream)


def _below(tolerance: float, *residuals: Tensor) -> Estimate:
    """`tolerance` where no residual exceeds it, else the greatest: smaller ones are rounding, and differ by machine."""
    greatest = torch.stack([residual.abs().max() for residual in residuals]).max()  # keeps what is no number
    return Estimate(tolerance if greatest <= tolerance else float(greatest))


def _over(values: Tensor) -> Estimate:
    """By how much the greatest of `values` is above 0; 0 where none is."""
    return Estimate(float(values.max().clamp(min=0)))


def _share(holds: Tensor) -> Estimate:
    return Estimate(100 * float(holds.double().mean()), unit="%")


def _half_life(gap: float) -> str:
    return "never" if gap == 0 else f"{math.log(2) / -math.log1p(-gap):.1f}"


def _nats(value: Tensor | float) -> Estimate:
    return Estimate(float(value), unit="nats")


def _width(values: Tensor) -> Tensor:
    return values.max() - values.min() if len(values) else torch.tensor(0.0)


def _spread(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return values.min(), values.median(), values.max()


def _cell(value: Any) -> str:
    if torch.is_tensor(value) or isinstance(value, float):
        return f"{round(float(value), 3) + 0.0:.3f}"
    return str(value).replace("|", "\\|")


def _part(
    run: Run,
    claim: str,
    measured: dict[str, Estimate],
    table: Table,
    arrays: Mapping[str, Tensor] | None = None,
) -> Part:
    entry = {
        "statement": CLAIMS[claim].statement,
        "expected": CLAIMS[claim].expected,
        "measured": {name: vars(quantity) for name, quantity in measured.items()},
        "holds": judge(run, CLAIMS[claim], measured),
    }
    drawn = {name: array.numpy() for name, array in (arrays or {}).items()}
    return Part(claim, measured, Verdicts({claim: entry}), table, drawn)


EXPERIMENT = Experiment(
    notebook=NOTEBOOK,
    headline=HEADLINE,
    presets=PRESETS,
    claims=CLAIMS,
    recompute=recomputed,
)


def start(preset: str, seed: int, device: str, weights: str, overrides: Mapping[str, Any]) -> Run:
    """Open the run that the notebook's parameters ask for; it computes on the CPU whatever `device` says."""
    return EXPERIMENT.start(preset, seed, "cpu", weights, overrides)
