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


def given(*words):
    """The settings that words of a command line come to."""
    return presets.choose(PRESETS, "smoke", presets.parse(smoke, words))


def test_choose_returns_the_preset_with_overrides_in_it():
    assert presets.choose(PRESETS, "cpu") == PRESETS["cpu"]
    chosen = presets.choose(PRESETS, "cpu", {"rate": 1, "hidden": [8], "limit": 2.0})
    assert chosen == Settings(steps=100, rate=1.0, hidden=(8,), limit=2.0)
    assert type(chosen.rate) is float and type(chosen.hidden) is tuple


def test_an_unknown_preset_or_setting_names_the_valid_ones():
    with pytest.raises(UserError, match="unknown preset 'smokee': choose from smoke, cpu"):
        presets.choose(PRESETS, "smokee")
    with pytest.raises(UserError, match="unknown setting 'step': choose from steps, rate, name"):
        given("step=1")


WRONG = {"steps": [1.5, True, "10", 0], "rate": ["fast", None], "name": [3], "wide": ["false", 0]}
WRONG |= {"hidden": [8, [8, "8"]], "limit": ["none"]}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in WRONG for value in WRONG[field]])
def test_a_value_of_another_type_or_out_of_range_is_refused(field, value):
    with pytest.raises(UserError, match=f"{field}'? is .*, but "):
        presets.choose(PRESETS, "smoke", {field: value})


def test_words_are_read_as_each_type():
    values = {"steps": 5, "rate": 0.002, "name": "mnist", "wide": True, "hidden": (8, 8), "limit": None}
    words = ["steps=5", "rate=2e-3", "name=mnist", "wide=true", "hidden=[8, 8]", "limit=null"]
    assert given(*words) == Settings(**values)
    assert given("name=7").name == "7", "text stays text"


@pytest.mark.parametrize("word", ["steps", "steps=", "steps=ten", "wide=False", "hidden=8"])
def test_words_that_cannot_be_read_are_refused(word):
    with pytest.raises(UserError, match=r"cannot read 'steps': write name=value|setting '(steps|wide|hidden)' is"):
        given(word)
