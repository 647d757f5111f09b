"""The table of claims: every recorded number follows from the recorded arrays, and a changed one is noticed."""

import dataclasses

import pytest

from paperlib.report import records
from paperlib.runs.estimate import Estimate

RECORDED = list(records.recorded())
TRAINED = [one for one in RECORDED if one.provenance["trainings"]]  # notebook 01 takes a minute, and is run by nbval


@pytest.mark.parametrize("one", TRAINED, ids=lambda one: f"{one.preset}-{one.notebook}")
def test_recorded_numbers_follow_from_the_recorded_arrays(one):
    assert not records.differences(one)


def test_another_number_or_verdict_is_noticed():
    one = TRAINED[0]
    key, entry = next(iter(one.claims.items()))
    name, quantity = next(iter(entry["measured"].items()))
    for changed in (
        entry | {"measured": entry["measured"] | {name: quantity | {"value": quantity["value"] * 1.01}}},
        entry | {"holds": not entry["holds"]},
        entry | {"measured": {}},
    ):
        (said,) = records.differences(dataclasses.replace(one, claims=one.claims | {key: changed}))
        assert said.startswith(key)


def test_numbers_that_could_not_be_measured_agree_with_themselves():
    assert records._same(Estimate(None), Estimate(float("nan")))
    assert not records._same(Estimate(1.0), Estimate(float("nan")))
    assert not records._same(Estimate(1.0, 0.5, 2.0), Estimate(1.0, 0.5, 2.1))


def test_failed_claims_come_first():
    holds = [entry["holds"] for *_, entry in records.rows(RECORDED)]
    assert holds == sorted(holds, key=lambda held: held is not False) and False in holds


def test_every_record_says_how_to_make_it_again():
    for one in RECORDED:
        assert one.command() == f"make reproduce PRESET={one.preset} ONLY={one.notebook[:2]}"
        assert one.minutes > 0 and one.provenance["revision"][:10] in one.origin()
