"""Notebook 01: each claim's criterion holds for what is computed, fails for what is wrong, and the figures draw."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from paperlib.elbo import chain, finite, gaussian
from paperlib.elbo import examples as elbo_examples
from paperlib.elbo import experiment as elbo
from paperlib.elbo import figures as elbo_figures
from paperlib.runs.estimate import Estimate
from paperlib.runs.run import load_arrays, save_figure
from paperlib.system.errors import UserError

SMALL = {
    "models": 100,
    "gaussian_models": 20,
    "estimated_models": 2,
    "samples": 4000,
    "starts": 12,
    "flow_steps": 1500,
    "chains": 5,
    "wrong_decoders": 2,
}
SECTIONS = {
    "E1": elbo.two_views,
    "E2": elbo.gaussian_views,
    "E3": elbo.best_decoder,
    "E4": elbo.factored_gaussians,
    "E5": elbo.indifference,
    "E6": elbo.markov_chain,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPERLIB_RUNS", str(tmp_path_factory.mktemp("runs")))
        yield elbo.start("smoke", 0, "auto", "train", SMALL)


@pytest.fixture(scope="module")
def parts(run):
    return {claim: section(run) for claim, section in SECTIONS.items()}


@pytest.mark.parametrize("claim", SECTIONS)
def test_the_claim_holds(parts, claim):
    assert parts[claim].claim == claim
    assert parts[claim].verdict[claim]["holds"] is True, repr(parts[claim].verdict)


@pytest.mark.parametrize("claim", SECTIONS)
def test_every_quantity_of_a_criterion_can_fail_it(parts, claim):
    """Replace one measured value at a time by a far worse one: the verdict must notice."""
    criterion, measured = elbo.CLAIMS[claim].criterion, parts[claim].measured
    for name, quantity in measured.items():
        worse = [criterion(**measured | {name: dataclasses.replace(quantity, value=bad)}) for bad in (-1e3, 0.0, 1e3)]
        assert not all(worse), f"{claim} holds whatever {name} is"
        assert not criterion(**measured | {name: Estimate(float("nan"))}), f"{claim} holds where {name} is no number"


def test_conclude_writes_what_the_figures_draw(run, parts):
    verdicts = elbo.conclude(run, *parts.values())
    assert {key: entry["holds"] for key, entry in verdicts.items()} == dict.fromkeys(SECTIONS, True)
    assert json.loads((run.directory / "metrics.json").read_text())["claims"].keys() == SECTIONS.keys()
    arrays = load_arrays(run.directory)
    for draw in ("flows", "survival", "convergence", "price", "amplification"):
        figure = getattr(elbo_figures, draw)(arrays)
        for axis in figure.axes:
            assert axis.get_xlabel(), f"an axis of {draw} has no label"
        save_figure(run, figure, draw)
        assert (run.directory / f"{draw}.png").stat().st_size > 5000


def test_flows_end_where_the_theory_says(parts):
    arrays = parts["E5"].arrays
    entropy = float(arrays["flow_entropy"])
    end_rate, end_distortion = arrays["flow_elbo_rate"][-1], arrays["flow_elbo_distortion"][-1]
    np.testing.assert_allclose(end_rate + end_distortion, entropy, atol=2e-3)
    for name in ("elbo", "none"):
        assert (arrays[f"flow_{name}_rate"] + arrays[f"flow_{name}_distortion"] > entropy - 1e-12).all()
    most = float(arrays["flow_most"])
    assert 0 < end_rate.min() < end_rate.max() < most < entropy, "the line ends where q(z) = p(z) ends"
    measured = parts["E5"].measured
    stopped = arrays["flow_none_distortion"][-1] > 0.01
    assert 50 < measured["stop_short_without_kl"].value == pytest.approx(100 * stopped.mean())
    assert f"{most:.2f} nats" in elbo_figures.FLOWS_CAPTION and f"H(p) is {entropy:.2f}" in elbo_figures.FLOWS_CAPTION
    weak = np.median(arrays["survival_shares"][0], axis=1)
    speeds = arrays["survival_speeds"]
    np.testing.assert_allclose(weak, (speeds / (1 + speeds)) ** 2, atol=0.01)


def test_the_best_elbos_reach_every_information_up_to_the_most():
    models = elbo_examples.best_elbos(101)
    torch.testing.assert_close(models.q_z, elbo_examples.FLOW_P_Z.expand(101, -1), rtol=0, atol=1e-15)
    knows = finite.mutual_information(models)
    assert float(knows[0]) == pytest.approx(0, abs=1e-15)
    assert (knows.diff() > 0).all() and knows.diff().max() < 0.05
    torch.testing.assert_close(finite.rate(models), knows, rtol=0, atol=1e-12)


def test_flows_that_stop_short_let_several_x_share_a_code():
    """The ends of the flows without the KL: each is the entropy left by a hard code, one of 52 partitions of five x."""
    start = elbo_examples.flow_starts(12, torch.Generator().manual_seed(7))
    flow = finite.ascend(start, 3000, 0, encoder_step=4.0, decoder_step=4.0)
    assert (flow.distortion[-1] > 0.01).double().mean() > 0.5
    groups = torch.nn.functional.one_hot(flow.model.q_z_given_x.argmax(-1), 5).double()
    mass = (elbo_examples.FLOW_P_X[:, None] * groups).sum(-2)
    left = finite.entropy(elbo_examples.FLOW_P_X) - finite.entropy(mass)
    torch.testing.assert_close(flow.distortion[-1], left, rtol=0, atol=5e-3)
    short = flow.distortion[-1] > 0.01
    assert ((mass == 0).any(-1) == short).all(), "a code is idle exactly where a flow stops short"


def test_the_hard_bit_stays_where_the_parts_say(parts):
    arrays = parts["E6"].arrays
    side = float(elbo_examples.LEVELS[:12].sum())
    np.testing.assert_allclose(arrays["chain_hard bit"][1:], max(side, 1 - side), atol=1e-12)
    np.testing.assert_allclose(arrays["chain_injective"], 1 - float(elbo_examples.LEVELS.min()), atol=1e-12)
    for name in ("blur 1", "blur 2", "blur 4", "soft bit"):
        found, predicted = arrays[f"chain_{name}"], arrays[f"chain_{name}_predicted"]
        late = (found < 0.1) & (found > 1e-9)
        np.testing.assert_allclose(found[late], predicted[late], rtol=0.05)


def test_more_information_with_a_greater_gap(parts):
    rows = {row[0]: row for row in parts["E6"].table.rows}
    assert rows["blur 2"][1] > rows["soft bit"][1]
    assert rows["blur 2"][2] > rows["soft bit"][2]
    assert rows["blur 2"][1] > rows["hard bit"][1]
    assert rows["hard bit"][2] == 0
    assert rows["hard bit"][3] == "never"


def test_wrong_decoders_cost_the_same_and_slow_chains_amplify(parts):
    arrays = parts["E6"].arrays
    slowness, apart, along = (arrays[f"wrong_{name}"] for name in ("slowness", "apart", "along_slowest"))
    assert (apart <= arrays["wrong_bound"]).all()
    first_order = arrays["wrong_first_order"]
    assert (apart < first_order).all()
    assert (apart > 0.9 * first_order)[along == 1].all()
    order = np.argsort(slowness[along == 1])
    amplified = apart[along == 1][order]
    assert (np.diff(amplified) > 0).all()
    assert amplified[-1] > 5 * amplified[0]
    model = finite.matched(
        elbo_examples.LEVELS, elbo_examples.LEVEL_CODES["blur 2"], torch.full((24,), 1 / 24, dtype=torch.float64)
    )
    tilt = torch.randn(24, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wrong = dataclasses.replace(model, p_x_given_z=elbo_examples.tilted(model, tilt, 1e-3))
    assert float(finite.decoder_kl(wrong)) == pytest.approx(1e-3, rel=1e-6)


def test_a_leak_of_any_size_moves_the_stationary_law_equally_far():
    """Detailed balance between the sides: a leak of e to the right and 3 e back rests at 3 : 1."""
    left = float(elbo_examples.LEVELS[:12].sum())
    for _, _, apart in elbo.leaking_bit().rows:
        assert float(apart) == pytest.approx(abs(0.75 - left), abs=1e-6)


def test_the_estimator_is_within_its_standard_errors_and_sees_a_missing_term():
    generator = torch.Generator().manual_seed(3)
    model = gaussian.random_linear_gaussian(generator, x=4, z=2, factored=True)
    mean, error = elbo.estimate_elbo(model, 50_000, generator)
    exact = gaussian.linear_elbo(model)
    assert abs(mean - exact) < 4 * error
    assert error < 0.05, "an error of the size of a forgotten constant must show"


def test_the_scalar_gaussian_by_its_autoregression():
    """x' = rho^2 x + noise: the enumerated chain's autocorrelation is 1 - gap, without a spectrum."""
    for rho in (0.2, 0.7, 0.95):
        assert float(elbo_examples.scalar_gaussian(rho)) < 1e-9
    rho, x = 0.7, torch.linspace(-8.5, 8.5, 300, dtype=torch.float64)
    p = torch.softmax(-0.5 * x**2, dim=0)
    q = torch.softmax(-0.5 * (x - rho * x[:, None]) ** 2 / (1 - rho**2), dim=-1)
    kernel = chain.transition(q, finite.matched(p, q, p).p_x_given_z)
    assert float(p * x @ kernel @ x) == pytest.approx(rho**2, abs=1e-10)


def test_other_seed_other_numbers(run):
    again = elbo.start("smoke", 1, "auto", "train", SMALL)
    assert elbo.two_views(again).table.rows[0] != elbo.two_views(run).table.rows[0]
    assert elbo.two_views(run).table._repr_markdown_() == elbo.two_views(run).table._repr_markdown_()
    assert elbo.two_views(again).verdict["E1"]["holds"]


def test_mistakes_are_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERLIB_RUNS", str(tmp_path))
    with pytest.raises(UserError, match="smoke, cpu, gpu, paper"):
        elbo.start("big", 0, "auto", "train", {})
    with pytest.raises(UserError, match="starts is 0"):
        elbo.start("smoke", 0, "auto", "train", {"starts": 0})
    with pytest.raises(UserError, match="unknown setting 'start'"):
        elbo.start("smoke", 0, "auto", "train", {"start": 3})


def test_the_smallest_run_still_gives_verdicts(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERLIB_RUNS", str(tmp_path))
    least = elbo.start("smoke", 0, "auto", "train", dict.fromkeys(SMALL, 1) | {"samples": 50, "ascent_steps": 1})
    for section in (elbo.best_decoder, elbo.indifference, elbo.markov_chain):
        part = section(least)
        assert part.verdict[part.claim]["holds"] is (part.claim == "E6")


def test_presets_of_one_machine():
    assert elbo.PRESETS["gpu"] == elbo.PRESETS["paper"] == elbo.PRESETS["cpu"]
    assert elbo.PRESETS["cpu"].models > elbo.PRESETS["smoke"].models
