from dataclasses import dataclass, replace

import pytest

from paperlib.runs import presets
from paperlib.runs.presets import option
from paperlib.system.errors import UserError


@dataclass(frozen=True)
class Settings:
    steps: int = option(10, "steps")
    rate: float = option(1e-3, "rate")
    name: str = option("digits", "data")
    wide: bool = option(False, "wide")
    hidden: tuple[int, ...] = option((4, 4), "units")
    limit: float | None = option(None, "limit")

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, but must be above 0")


PRESETS = {"smoke": (smoke := Settings()), "cpu": replace(smoke, steps=100)}


def test_choose_returns_the_preset_with_overrides_in_it():
    assert presets.choose(PRESETS, "cpu") == PRESETS["cpu"]
    chosen = presets.choose(PRESETS, "cpu", {"rate": 1, "hidden": [8], "limit": 2.0})
    assert chosen == Settings(steps=100, rate=1.0, hidden=(8,), limit=2.0)
    assert type(chosen.rate) is float
    assert type(chosen.hidden) is tuple


def test_an_unknown_preset_or_setting_names_the_valid_ones():
    with pytest.raises(UserError, match="unknown preset 'smokee': choose from smoke, cpu"):
        presets.choose(PRESETS, "smokee")
    with pytest.raises(UserError, match="unknown setting 'step': choose from steps, rate, name"):
        presets.choose(PRESETS, "smoke", {"step": 1})
    with pytest.raises(UserError, match="unknown setting 'step'"):
        presets.parse(PRESETS["smoke"], ["step=1"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 1.5),
        ("steps", True),
        ("steps", "10"),
        ("rate", "fast"),
        ("rate", None),
        ("name", 3),
        ("wide", "false"),
        ("wide", 0),
        ("hidden", 8),
        ("hidden", [8, "8"]),
        ("limit", "none"),
    ],
)
def test_a_value_of_another_type_is_refused(field, value):
    with pytest.raises(UserError, match=f"setting '{field}' is"):
        presets.choose(PRESETS, "smoke", {field: value})


def test_a_value_out_of_range_is_a_user_error():
    with pytest.raises(UserError, match="steps is 0, but must be above 0"):
        presets.choose(PRESETS, "smoke", {"steps": 0})


def test_parse_reads_each_type_from_words():
    words = ["steps=5", "rate=2e-3", "name=mnist", "wide=true", "hidden=[8, 8]", "limit=null"]
    assert presets.parse(PRESETS["smoke"], words) == {
        "steps": 5,
        "rate": 0.002,
        "name": "mnist",
        "wide": True,
        "hidden": (8, 8),
        "limit": None,
    }
    assert presets.parse(PRESETS["smoke"], ["name=7"]) == {"name": "7"}, "text stays text"


@pytest.mark.parametrize("word", ["steps", "steps=", "steps=ten", "wide=False", "hidden=8"])
def test_words_that_cannot_be_read_are_refused(word):
    with pytest.raises(UserError, match=r"steps|wide|hidden"):
        presets.parse(PRESETS["smoke"], [word])
