"""The six sections of notebook 01, one per claim: each computes its equations in two independent ways."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from paperlib.elbo import chain, examples, finite, gaussian
from paperlib.elbo.examples import F64
from paperlib.elbo.finite import Finite, Flow
from paperlib.elbo.section import Section, Table, below, nats, numpy, over, percent
from paperlib.runs.estimate import Estimate


def terms(model: Finite) -> Table:
    """L of one model by (1), (2) and (3), and the terms that these are made of, in nats."""
    rows = {
        "L by (1): -distortion - rate": finite.elbo(model),
        "L by (2), from the evidence": finite.elbo_from_evidence(model),
        "L by (3), from q(x|z)": finite.elbo_from_codes(model),
        "the post's formula: (2) without H(p)": finite.elbo_without_entropy(model),
        "H(p)": finite.entropy(model.p_x),
        "rate": finite.rate(model),
        "distortion": finite.distortion(model),
        "I(x;z)": finite.mutual_information(model),
    }
    return Table(("one model", "nats"), list(rows.items()))


def two_views(count: int, generator: Generator, of_best: Generator) -> Section:
    """E1: the definition (1) against the two views (2) and (3), on random finite models with zeros in the encoder."""
    models = finite.random_model(generator, count, x=6, z=4, zeros=0.2)
    value, entropy = finite.elbo(models), finite.entropy(models.p_x)
    residuals = (value - finite.elbo_from_evidence(models), value - finite.elbo_from_codes(models))

    uniform, prior, point = torch.full((1, 8), 1 / 8, **F64), torch.full((1, 3), 1 / 3, **F64), torch.eye(8, **F64)[:1]
    best = finite.matched(uniform, finite.random_coupling(uniform, prior, of_best, 1.0), prior)
    of_point = finite.matched(point, prior[:, None].expand(1, 8, 3), prior)
    views = (finite.elbo, finite.elbo_from_evidence, finite.elbo_from_codes, finite.elbo_without_entropy)
    shown = {"a random model": models[:1], "best, 8 equal points": best, "best, one point": of_point}
    rows = [(name, *(view(model) for view in views), finite.entropy(model.p_x)) for name, model in shown.items()]
    measured = {
        "residual_below": below(1e-12, *residuals),
        "without_entropy_below": below(1e-12, value - finite.elbo_without_entropy(models) + entropy),
        "best_elbo": nats(finite.elbo(best)),
        "best_elbo_of_a_point": nats(finite.elbo(of_point)),
    }
    heading = ("model", "L by (1)", "L by (2)", "L by (3)", "the post's formula", "H(p)")
    return Section("E1", measured, Table(heading, rows))


def gaussian_views(count: int, estimated: int, samples: int, generator: Generator) -> Section:
    """E2: (1) against (2') for `count` random models, `estimated` ones by `samples` draws too, and other units."""
    residuals, slack, scores, rows = [], [], [], []
    for _ in range(count):
        model = gaussian.random_linear_gaussian(generator, x=4, z=2)
        value = gaussian.linear_elbo(model)
        residuals.append(value - gaussian.linear_elbo_from_evidence(model))
        slack.append(value + gaussian.centred(model.cov).entropy())
    for _ in range(estimated):
        model = gaussian.random_linear_gaussian(generator, x=4, z=2, factored=True)
        mean, error = gaussian.estimate_elbo(model, samples, generator)
        scores.append((mean - gaussian.linear_elbo(model)).abs() / error)

    cov = gaussian.random_linear_gaussian(generator, x=4, z=2).cov
    for unit, scale in (("metres", 1.0), ("decimetres", 10.0), ("kilometres", 1e-3)):
        model = gaussian.matched(cov * scale**2, correlation=0.8)
        value, entropy = gaussian.linear_elbo(model), gaussian.centred(model.cov).entropy()
        rows.append((f"x in {unit}", value, entropy, value + entropy))
    measured = {
        "residual_below": below(1e-10, torch.stack(residuals)),
        "best_L_plus_h_below": below(1e-10, *(row[-1] for row in rows)),
        "greatest_L_plus_h": nats(torch.stack(slack).max()),
        "example_L": nats(rows[-1][1]),
        "worst_standard_errors": Estimate(float(torch.stack(scores).max())),
    }
    return Section("E2", measured, Table(("best model", "L", "h(p)", "L + h(p)"), rows))


def best_decoder(count: int, steps: int, generator: Generator, of_start: Generator, of_decoder: Generator) -> Section:
    """E3: identity (4) on random models, and gradient ascent on the decoder's table with one code never used."""
    models = finite.random_model(generator, count, x=6, z=4, zeros=0.2)
    closed = finite.mutual_information(models) - finite.entropy(models.p_x)
    residual = -finite.distortion(models) - (closed - finite.decoder_kl(models))

    start = finite.random_model(of_start, 16, x=5, z=3, sharpness=0.7)
    unused = torch.cat([start.q_z_given_x, torch.zeros(16, 5, 1, **F64)], dim=-1)
    decoder = finite.random_model(of_decoder, 16, x=5, z=4, sharpness=0.7).p_x_given_z
    start = Finite(start.p_x, unused, torch.full((16, 4), 0.25, **F64), decoder)
    flow = finite.ascend(start, steps, kl_weight=0, decoder_step=4.0)
    best = finite.mutual_information(start) - finite.entropy(start.p_x)
    apart = (flow.model.p_x_given_z - flow.model.q_x_given_z).abs().amax(-1)
    shown = [step for step in sorted({0, 10, 100, steps}) if step <= steps]
    rows = [(step, -flow.distortion[step, 0], best[0], best[0] + flow.distortion[step, 0]) for step in shown]
    measured = {
        "residual_below": below(1e-12, residual),
        "ascent_short_by_below": below(1e-9, best + flow.distortion[-1]),
        "table_apart_below": below(1e-4, apart[flow.model.q_z > 0]),
    }
    return Section("E3", measured, Table(("gradient steps", "E_q log p(x|z)", "I - H(p)", "gap"), rows))


def factored_gaussians() -> Section:
    """E4: the best factored Gaussian for ever finer codes on one density of two pixels, and for bins. Arrays: the kinds
    on a grid, `price_axis` (161,), `price_density` (6, 161, 161); for N codes `price_N_parts` (2,), the average
    negentropy and correlation of (5), and `price_N_fits` (N, 2, 2), mean and std of each fit."""
    axis = torch.linspace(-5, 5, 161, **F64)
    kinds = examples.pictures([0, 1, 2, 3, 4, 5])
    density = kinds.component_distribution.log_prob(torch.cartesian_prod(axis, axis)[:, None]).exp()
    arrays = {"price_axis": axis, "price_density": (examples.KIND_WEIGHTS * density).T.reshape(-1, 161, 161)}
    rows, moments_apart, price_apart = [], [], []
    for name, groups in examples.KINDS_BY_CODE.items():
        parts, fits = [], []
        for group in groups:
            q = examples.pictures(group)
            mean, std, price = gaussian.fit_factored(q)
            parts.append(torch.stack(gaussian.factored_price(q)))
            fits.append(torch.stack([mean, std]))
            moments_apart += [mean - q.mean, std**2 - gaussian.covariance(q).diagonal()]
            price_apart.append(price - parts[-1].sum())
        q_z = torch.stack([examples.KIND_WEIGHTS[group].sum() for group in groups])
        average = q_z @ torch.stack(parts)
        rows.append((name, *average, average.sum()))
        arrays |= {f"price_{len(groups)}_parts": average, f"price_{len(groups)}_fits": torch.stack(fits)}

    lost = []
    for name, q in examples.BINNED.items():
        of_moments, best = gaussian.fit_binned(q)
        rows.append((f"{name}: binned Gaussian with q's moments", "", "", of_moments.kl))
        rows.append((f"{name}: best, std {best.std:.2f} not {of_moments.std:.2f}", "", "", best.kl))
        lost.append(of_moments.kl - best.kl)
    measured = {
        "moments_apart_below": below(1e-6, *moments_apart),
        "price_apart_below": below(1e-6, *price_apart),
        "false_in_bins_by": nats(min(lost)),
    }
    return Section("E4", measured, Table(("q(x|z)", "negentropy", "½ log(∏v / det Σ)", "price"), rows), numpy(arrays))


def indifference(count: int, starts: int, steps: int, generator: Generator) -> Section:
    """E5: both maxima attained by `count` models, the collapsed point stationary, and `starts` flows of free tables.
    Arrays, in nats: `flow_entropy` (), `flow_most` () the greatest rate of the ELBO's maximum; of the flows at shown
    steps `flow_<elbo or none>_<rate or distortion>` (shown, starts); and those of `survival`."""
    p_x, p_z = examples.FLOW_P_X, examples.FLOW_P_Z
    entropy, line = finite.entropy(p_x), examples.best_elbos(101)
    sharpness, many = torch.linspace(0, 4, count, **F64)[:, None, None], (p_x.expand(count, -1), p_z.expand(count, -1))
    best = finite.matched(many[0], finite.random_coupling(*many, generator, sharpness), many[1])
    injective = finite.matched(p_x, torch.eye(len(p_x), **F64), p_z)
    collapsed = Finite(p_x, p_z.expand(len(p_x), -1), p_z, p_x.expand(len(p_z), -1))
    most = finite.mutual_information(line)[-1]
    measured = {
        "elbo_attained_below": below(1e-12, finite.elbo(best) + entropy, finite.elbo(line) + entropy),
        "without_kl_attained_below": below(1e-12, finite.distortion(injective)),
        "gradient_below": below(1e-12, *(g for weight in (0, 1) for g in finite.gradients(collapsed, weight))),
        "most_I_of_elbo": nats(most),
        "I_without_kl": nats(finite.mutual_information(injective)),
    }
    start = examples.flow_starts(starts, generator)
    flows = {weight: finite.ascend(start, steps, weight, encoder_step=4.0, decoder_step=4.0) for weight in (1, 0)}
    of_flows, table = _ends(start, flows[1], flows[0], entropy)
    arrays = {"flow_entropy": entropy, "flow_most": most, **survival(steps, generator)}
    shown = np.unique(np.geomspace(1, steps + 1, 80).astype(int)) - 1
    for name, flow in (("elbo", flows[1]), ("none", flows[0])):
        arrays |= {f"flow_{name}_rate": flow.rate[shown], f"flow_{name}_distortion": flow.distortion[shown]}
    return Section("E5", measured | of_flows, table, numpy(arrays))


def _ends(start: Finite, under_elbo: Flow, without_kl: Flow, entropy: Tensor) -> tuple[dict[str, Estimate], Table]:
    """Of the ends of the flows: the quantities that E5 is decided by, and their table."""
    knew, knows, knows_more = map(finite.mutual_information, (start, under_elbo.model, without_kl.model))
    distortion = without_kl.distortion[-1]
    arrived = under_elbo.rate[-1] + under_elbo.distortion[-1] - entropy < 1e-3
    rates = under_elbo.rate[-1][arrived]
    measured = {
        "flows_arrived": percent(arrived),
        "rates_differ_by": nats(rates.max() - rates.min() if len(rates) else 0),
        "ends_with_more_I": percent(knows_more > knows),
        "stop_short_without_kl": percent(distortion > 0.01),
    }
    compared = {"I at the start": knew, "I at the end, ELBO": knows, "I at the end, without its KL": knows_more}
    compared["distortion at the end, without its KL"] = distortion
    rows = [(name, values.min(), values.median(), values.max()) for name, values in compared.items()]
    return measured, Table(("nats", "least", "median", "greatest"), rows)


def survival(steps: int, generator: Generator) -> dict[str, Tensor]:
    """`survival_shares` (2, 7, 12) of I left when the ELBO is climbed from a decoder that ignores z, s times as fast as
    the encoder: the s, `survival_speeds` (7,), and the scales of the encoder's logits, `survival_scales` (2,). Near the
    collapsed point it is (s / (1 + s))^2."""
    speeds, scales = torch.logspace(-1.5, 1.5, 7, **F64), torch.tensor([0.1, 2.0], **F64)
    start, speed = examples.decoders_that_ignore_z(scales, len(speeds), generator), speeds[:, None, None, None]
    step = 4.0 / speed.clamp(min=1)
    flow = finite.ascend(start, steps, 1, encoder_step=step, decoder_step=step * speed)
    left = finite.mutual_information(flow.model) / finite.mutual_information(start)
    return {"survival_speeds": speeds, "survival_scales": scales, "survival_shares": left}


def markov_chain(count: int, decoders: int, generator: Generator) -> Section:
    """E6: enumerated kernels of `count` random codes; `mixing`; and `wrong_decoders`, `decoders` of them per code."""
    residuals, raised = zip(*(chain_residuals(generator) for _ in range(count)), strict=True)
    agree = torch.tensor([parts_agree(generator) for _ in range(count)])
    (rows, arrays), wrong = mixing(), wrong_decoders(decoders, generator)
    information, gap = ({row[0]: row[k] for row in rows} for k in (1, 2))
    measured = {
        "residual_below": below(1e-9, *residuals),
        "gaussian_gap_below": below(1e-9, *map(scalar_gaussian, (0.0, 0.3, 0.6, 0.9))),
        "degraded_slower_by": over(torch.stack(raised) - 1e-12),
        "parts_agree": percent(agree),
        "bound_broken_by": over(wrong["wrong_apart"] - wrong["wrong_bound"]),
        "more_I": nats(information["blur 2"]),
        "less_I": nats(information["soft bit"]),
        "gap_of_more_I": Estimate(gap["blur 2"]),
        "gap_of_less_I": Estimate(gap["soft bit"]),
    }
    table = Table(("code", "I(x;z), nats", "gap", "steps to halve", "parts"), rows)
    return Section("E6", measured, table, numpy(arrays | wrong))


def chain_residuals(generator: Generator) -> tuple[Tensor, Tensor]:
    """One random code, connected: residuals of the exact statements, and how much degrading it raised an eigenvalue."""
    model = finite.random_model(generator, 1, x=6, z=4, sharpness=1.0)[0]
    p_x, q = model.p_x, model.q_z_given_x
    kernel = chain.transition(q, model.q_x_given_z)
    eigenvalues, by_kernel = chain.spectrum(p_x, q).eigenvalues, torch.linalg.eigvals(kernel)
    flow = p_x[:, None] * kernel
    residuals = [p_x @ kernel - p_x, flow - flow.T, by_kernel.imag, by_kernel.real.clamp(max=0)]
    residuals.append(by_kernel.real.sort(descending=True).values - eigenvalues)
    residuals.append(eigenvalues[1] - chain.maximal_correlation(model.q_xz) ** 2)
    channel = torch.randn(4, 4, generator=generator, **F64).softmax(-1)
    degraded = chain.spectrum(p_x, q @ channel).eigenvalues
    return torch.cat([part.flatten() for part in residuals]), (degraded - eigenvalues).max()


def scalar_gaussian(correlation: float) -> Tensor:
    """How far, on a grid, the gap of a scalar Gaussian of this corr(x, z) is from exp(-2 I) and 1 - corr^2, summed."""
    x = torch.linspace(-8.5, 8.5, 300, **F64)
    p_x = torch.softmax(-0.5 * x**2, dim=0)
    q = torch.softmax(-0.5 * (x - correlation * x[:, None]) ** 2 / (1 - correlation**2), dim=-1)
    gap, information = chain.spectrum(p_x, q).gap, finite.mutual_information(finite.matched(p_x, q, p_x))
    return (gap - torch.exp(-2 * information)).abs() + (gap - (1 - correlation**2)).abs()


def parts_agree(generator: Generator) -> bool:
    """Whether a random sparse code has one eigenvalue 1 per connected component of its support."""
    model = finite.random_model(generator, 1, x=7, z=6, sharpness=0.5, zeros=0.75)[0]
    eigenvalues = chain.spectrum(model.p_x, model.q_z_given_x).eigenvalues
    return int((eigenvalues > 1 - 1e-9).sum()) == 1 + int(chain.components(model.q_xz).max())


def mixing() -> tuple[list[tuple[Any, ...]], dict[str, Tensor]]:
    """The chains of `LEVEL_CODES`: rows of name, I(x;z) in nats, gap, steps to halve, parts of the support; arrays
    `chain_<name>` (201,), distances to p(x) after 0, ..., 200 steps, and `chain_<name>_predicted`, those by (9) or,
    where the support falls apart, 1 - p(the least part): a start there never leaves it."""
    p_x, steps, rows, arrays = examples.LEVELS, 200, [], {}
    for name, q in examples.LEVEL_CODES.items():
        model, spectrum = examples.with_best_decoder(p_x, q), chain.spectrum(p_x, q)
        parts = torch.bincount(chain.components(model.q_xz), weights=p_x)
        if len(parts) == 1:
            gap, predicted = float(spectrum.gap), chain.predicted_distances(p_x, spectrum, steps)
        else:
            gap, predicted = 0.0, (1 - parts.min()).expand(steps + 1)
        half_life = f"{math.log(2) / -math.log1p(-gap):.1f}" if gap else "never"
        rows.append((name, float(finite.mutual_information(model)), gap, half_life, len(parts)))
        kernel = chain.transition(q, model.q_x_given_z)
        arrays |= {f"chain_{name}": chain.distances(kernel, p_x, steps), f"chain_{name}_predicted": predicted}
    return rows, arrays


def wrong_decoders(count: int, generator: Generator) -> dict[str, Tensor]:
    """Bits ever more often erased, each with decoders of one E KL, 1e-5 nats: `count` random, one along the slowest f.
    Arrays (7 (1 + count),): `wrong_slowness` 1 / (1 - tau), `wrong_apart` TV(pi, p), `wrong_bound` (10),
    `wrong_first_order` (11), `wrong_along_slowest` 1 where the error is along the slowest eigenfunction."""
    p_x, rows = examples.LEVELS, []
    for erased in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.9):
        q = examples.erased_bit(erased)
        model, spectrum = examples.with_best_decoder(p_x, q), chain.spectrum(p_x, q)
        tilts = [spectrum.slowest.expand(3, -1), *torch.randn(count, 3, len(p_x), generator=generator, **F64)]
        for index, tilt in enumerate(tilts):
            wrong = examples.tilted(model, tilt, 1e-5)
            kernel, kl = chain.transition(q, wrong.p_x_given_z), finite.decoder_kl(wrong)
            apart, tau = chain.total_variation(chain.stationary(kernel), p_x), chain.dobrushin(kernel)
            bounds = (chain.stationary_bound(kl, tau), chain.first_order_bound(kl, spectrum.gap))
            rows.append(torch.stack([1 / (1 - tau), apart, *bounds, torch.tensor(float(index == 0), **F64)]))
    names = ("slowness", "apart", "bound", "first_order", "along_slowest")
    return {f"wrong_{name}": column for name, column in zip(names, torch.stack(rows).T, strict=True)}


def leaking_bit() -> Table:
    """A hard bit whose decoder leaks to the right, and three times as much back: the ratio alone decides about pi."""
    model, rows = examples.with_best_decoder(examples.LEVELS, examples.LEVEL_CODES["hard bit"]), []
    for leak in (1e-2, 1e-4, 1e-6):
        mix = torch.tensor([[1 - leak, leak], [3 * leak, 1 - 3 * leak]], **F64)
        wrong = replace(model, p_x_given_z=mix @ model.p_x_given_z)
        pi = chain.stationary(chain.transition(model.q_z_given_x, wrong.p_x_given_z))
        rows.append((f"{leak:.0e}", f"{finite.decoder_kl(wrong):.1e}", chain.total_variation(pi, examples.LEVELS)))
    return Table(("leak to the right", "E KL(q(x|z) ‖ p(x|z)), nats", "TV(π, p)"), rows)
