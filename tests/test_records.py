"""What is recorded belongs to the code as it is: settings, criteria, and every number by the recorded arrays."""

import dataclasses
import math

import nbformat
import pytest

from paperlib.experiments import EXPERIMENTS
from paperlib.report import records
from paperlib.report.tables import FIGURE
from paperlib.runs.claims import judge
from paperlib.runs.estimate import Estimate
from paperlib.system import files

RECORDED = list(records.recorded())
TRAINED = [one for one in RECORDED if one.provenance["trainings"]]  # notebook 01 takes a minute, and is run by nbval


def name(one):
    return f"{one.preset}-{one.notebook}"


def measured(one):
    return {key: {n: Estimate(**q) for n, q in entry["measured"].items()} for key, entry in one.claims.items()}


def test_something_is_recorded_for_every_notebook():
    not_yet = {"05_mnist_collapse"}
    assert set(EXPERIMENTS) - not_yet <= {one.notebook for one in RECORDED} <= set(EXPERIMENTS)


@pytest.mark.parametrize("one", RECORDED, ids=name)
def test_a_record_is_of_committed_code_and_of_the_settings_and_criteria_that_the_library_has_now(one):
    run, settings = one.provenance, one.experiment.settings(one.preset)
    assert (run["notebook"], run["preset"], run["modified"]) == (one.notebook, one.preset, False)
    assert run["settings"] == files.plain(dataclasses.asdict(settings)), f"{one.command()} FLAGS=--record"
    assert one.command() == f"make reproduce PRESET={one.preset} ONLY={one.notebook[:2]}"
    assert one.minutes > 0 and run["revision"][:10] in one.origin()
    assert list(one.claims) == list(one.experiment.claims)
    for key, entry in one.claims.items():
        claim = one.experiment.claims[key]
        assert (entry["statement"], entry["expected"]) == (claim.statement, claim.expected)
        assert entry["holds"] == judge(one.preset, claim, measured(one)[key]), key


def test_figures_are_those_that_the_notebooks_draw():
    for preset in {one.preset for one in RECORDED}:
        notebooks = [files.NOTEBOOKS / f"{one.notebook}.ipynb" for one in RECORDED if one.preset == preset]
        cells = [cell.source for path in notebooks for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
        drawn = {name for cell in cells for name in FIGURE.findall(cell)}
        assert {png.stem for png in (files.figures_root() / preset).iterdir()} == drawn


@pytest.mark.parametrize("one", TRAINED, ids=name)
def test_recorded_numbers_follow_from_the_recorded_arrays(one):
    assert not records.differences(one)


def test_another_number_or_verdict_is_noticed(monkeypatch):
    one = TRAINED[0]
    key, entry = next(iter(one.claims.items()))
    name, quantity = next(iter(entry["measured"].items()))
    monkeypatch.setattr(records.Recorded, "recomputed", lambda self: measured(one))
    assert not records.differences(one)
    for changed in (
        entry | {"measured": entry["measured"] | {name: quantity | {"value": quantity["value"] * 1.01}}},
        entry | {"holds": not entry["holds"]},
        entry | {"measured": {}},
    ):
        (said,) = records.differences(dataclasses.replace(one, claims=one.claims | {key: changed}))
        assert said.startswith(key)


def test_numbers_that_could_not_be_measured_agree_with_themselves():
    assert records.agree(Estimate(None), Estimate(math.nan))
    assert not records.agree(Estimate(1.0), Estimate(math.nan))
    assert not records.agree(Estimate(1.0, 0.5, 2.0), Estimate(1.0, 0.5, 2.1))


@pytest.mark.parametrize(("differing", "code"), [([], 0), (["F1: another verdict"], 1)])
def test_claims_are_listed_failed_ones_first_and_a_difference_is_the_exit_code(differing, code, monkeypatch, capsys):
    monkeypatch.setattr(records, "differences", lambda one: differing)
    assert records.show() == code
    said = capsys.readouterr().out
    assert all(f"{claim} " in said for one in RECORDED for claim in one.claims)
    assert 0 < said.rindex(" fails (") < said.index(" holds (")
    assert all(said.count(f"{line}\n") == len(RECORDED) for line in differing)
    assert said.endswith("records: none differ\n") == (code == 0)
