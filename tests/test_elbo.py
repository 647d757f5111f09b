"""Notebook 01: each claim's criterion holds for what is computed, fails for what is wrong, and the figures draw."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from paperlib import elbo
from paperlib.elbo import examples, finite
from paperlib.elbo.experiment import CLAIMS
from paperlib.runs.estimate import Estimate
from paperlib.runs.run import load_arrays
from paperlib.system import files
from paperlib.system.errors import UserError

SMALL = {"models": 100, "gaussian_models": 20, "estimated_models": 2, "samples": 4000}
SMALL |= {"starts": 12, "flow_steps": 1500, "chains": 20, "wrong_decoders": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPERLIB_RUNS", str(tmp_path_factory.mktemp("runs")))
        yield elbo.start("smoke", 0, "auto", SMALL)


@pytest.fixture(scope="module")
def sections(run):
    return {claim: elbo.measure(run, claim) for claim in CLAIMS}


@pytest.mark.parametrize("claim", CLAIMS)
def test_every_quantity_of_a_criterion_can_fail_it(sections, claim):
    """Replace one measured value at a time by a far worse one: the verdict must notice."""
    criterion, measured = CLAIMS[claim].criterion, sections[claim].measured
    for name, quantity in measured.items():
        worse = [criterion(**measured | {name: dataclasses.replace(quantity, value=bad)}) for bad in (-1e3, 0.0, 1e3)]
        assert not all(worse), f"{claim} holds whatever {name} is"
        assert not criterion(**measured | {name: Estimate(float("nan"))}), f"{claim} holds where {name} is nan"


def test_all_claims_hold_and_the_figures_draw_what_conclude_writes(run, sections):
    verdicts = elbo.conclude(run, *sections.values())
    assert verdicts.decided() == dict.fromkeys(CLAIMS, "holds")
    assert verdicts == {key: entry for part in sections.values() for key, entry in elbo.verdict(run, part).items()}
    assert json.loads((run.directory / "metrics.json").read_text())["claims"].keys() == CLAIMS.keys()
    arrays = load_arrays(run.directory)
    for draw in ("flows", "survival", "convergence", "price", "amplification"):
        figure = getattr(elbo.figures, draw)(arrays)
        for axis in figure.axes:
            assert axis.get_xlabel(), f"an axis of {draw} has no label"
        elbo.save_figure(run, figure, draw)
        assert (run.directory / f"{draw}.png").stat().st_size > 5000


def test_flows_end_where_the_theory_says(sections):
    arrays = sections["E5"].arrays
    entropy, most = float(arrays["flow_entropy"]), float(arrays["flow_most"])
    told = (files.NOTEBOOKS / "01_elbo_derivation.ipynb").read_text(encoding="utf-8")
    assert f"stops at {most:.2f} nats" in told and f"$H(p)$ is {entropy:.2f}" in told
    on_the_line = finite.mutual_information(examples.best_elbos(101))
    assert float(on_the_line[0]) == pytest.approx(0, abs=1e-15)
    assert 0 < on_the_line.diff().min() < on_the_line.diff().max() < 0.05
    rate = arrays["flow_elbo_rate"][-1]
    np.testing.assert_allclose(rate + arrays["flow_elbo_distortion"][-1], entropy, atol=2e-3)
    assert 0 < rate.min() < rate.max() < most < entropy, "the line ends where q(z) = p(z) ends"
    for name in ("elbo", "none"):
        assert (arrays[f"flow_{name}_rate"] + arrays[f"flow_{name}_distortion"] > entropy - 1e-12).all()
    weak, speeds = np.median(arrays["survival_shares"][0], axis=1), arrays["survival_speeds"]
    np.testing.assert_allclose(weak, (speeds / (1 + speeds)) ** 2, atol=0.01)


def test_flows_that_stop_short_let_several_x_share_a_code(sections):
    """The ends of the flows without the KL: each is the entropy left by a hard code, one of 52 partitions of five x."""
    start = examples.flow_starts(12, torch.Generator().manual_seed(7))
    flow = finite.ascend(start, 3000, 0, encoder_step=4.0, decoder_step=4.0)
    groups = torch.nn.functional.one_hot(flow.model.q_z_given_x.argmax(-1), 5).double()
    mass = (examples.FLOW_P_X[:, None] * groups).sum(-2)
    left = finite.entropy(examples.FLOW_P_X) - finite.entropy(mass)
    torch.testing.assert_close(flow.distortion[-1], left, rtol=0, atol=5e-3)
    short = flow.distortion[-1] > 0.01
    assert ((mass == 0).any(-1) == short).all(), "a code is idle exactly where a flow stops short"
    assert short.double().mean() > 0.5 < sections["E5"].measured["stop_short_without_kl"].value / 100


def test_chains_of_the_grey_levels_approach_p_as_predicted(sections):
    arrays, left = sections["E6"].arrays, float(examples.LEVELS[:12].sum())
    for name, stays in (("hard bit", max(left, 1 - left)), ("injective", 1 - float(examples.LEVELS.min()))):
        for suffix in ("", "_predicted"):
            np.testing.assert_allclose(arrays[f"chain_{name}{suffix}"][1:], stays, atol=1e-12)
    for name in ("blur 1", "blur 2", "blur 4", "soft bit"):
        distance, predicted = arrays[f"chain_{name}"], arrays[f"chain_{name}_predicted"]
        late = (distance < 0.1) & (distance > 1e-9)
        np.testing.assert_allclose(distance[late], predicted[late], rtol=0.05)
    for _, _, apart in elbo.leaking_bit().rows:  # detailed balance: e to the right and 3 e back rests at 3 : 1
        assert float(apart) == pytest.approx(abs(0.75 - left), abs=1e-6)


def test_wrong_decoders_cost_the_same_and_slow_chains_amplify(sections):
    names = ("slowness", "apart", "bound", "first_order", "along_slowest")
    slowness, apart, bound, first_order, along = (sections["E6"].arrays[f"wrong_{name}"] for name in names)
    np.testing.assert_allclose(2 * (bound / slowness) ** 2, 1e-5, rtol=1e-6)  # E KL, by (10)
    assert (apart < first_order).all() and (first_order < bound).all()
    assert (apart > 0.9 * first_order)[along == 1].all()
    amplified = apart[along == 1][np.argsort(slowness[along == 1])]
    assert (np.diff(amplified) > 0).all() and amplified[-1] > 5 * amplified[0]


def test_the_seed_decides_the_random_models(run):
    other = elbo.measure(elbo.start("smoke", 1, "auto", SMALL), "E1")
    assert repr(other.table) != repr(elbo.measure(run, "E1").table) == repr(elbo.measure(run, "E1").table)


def test_the_smallest_run_still_gives_verdicts_and_a_smaller_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERLIB_RUNS", str(tmp_path))
    with pytest.raises(UserError, match="starts is 0"):
        elbo.start("smoke", 0, "auto", {"starts": 0})
    least = elbo.start("smoke", 0, "auto", dict.fromkeys(SMALL, 1) | {"samples": 50, "ascent_steps": 1})
    for claim in ("E3", "E5", "E6"):
        assert elbo.verdict(least, elbo.measure(least, claim))[claim]["holds"] is (claim == "E6")
