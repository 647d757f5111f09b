"""What is recorded belongs to the code as it is, and every text that quotes it says the same."""

import dataclasses
import json
import re

import pytest

from paperlib import reproduce
from paperlib.report import tables
from paperlib.runs.claims import judge, verdict_text
from paperlib.runs.estimate import Estimate
from paperlib.runs.run import Run
from paperlib.system import files

RECORDED = sorted(files.results_root().glob("*/[0-9][0-9]_*/run.json"))
NAMES = [f"{file.parts[-3]}-{file.parts[-2]}" for file in RECORDED]


def test_something_is_recorded_for_every_notebook():
    assert {file.parts[-2] for file in RECORDED} == set(reproduce.EXPERIMENTS)


@pytest.mark.parametrize("file", RECORDED, ids=NAMES)
def test_records_are_of_the_settings_that_the_library_has_now(file):
    preset, notebook = file.parts[-3:-1]
    experiment = reproduce._experiment(files.NOTEBOOKS / f"{notebook}.ipynb")
    run = json.loads(file.read_text())
    assert (run["notebook"], run["preset"], run["modified"]) == (notebook, preset, False)
    settings = json.loads(json.dumps(dataclasses.asdict(experiment.PRESETS[preset])))
    assert run["settings"] == settings, f"run make reproduce PRESET={preset} ONLY={notebook[:2]} FLAGS=--record again"
    assert (files.figures_root() / preset / f"{experiment.HEADLINE[0]}.png").exists()


@pytest.mark.parametrize("file", RECORDED, ids=NAMES)
def test_verdicts_follow_from_the_recorded_numbers_by_the_criteria_in_the_code(file):
    preset, notebook = file.parts[-3:-1]
    claims = reproduce._experiment(files.NOTEBOOKS / f"{notebook}.ipynb").CLAIMS
    recorded = json.loads((file.parent / "metrics.json").read_text())["claims"]
    assert list(recorded) == list(claims)
    for key, entry in recorded.items():
        assert (entry["statement"], entry["expected"]) == (claims[key].statement, claims[key].expected)
        measured = {name: Estimate(**quantity) for name, quantity in entry["measured"].items()}
        run = Run(notebook, preset, None, 0, "cpu")
        assert entry["holds"] == judge(run, claims[key], measured), key


def test_readme_and_notebooks_quote_what_is_recorded():
    stale = [path.name for path, old, new in tables.texts() if old != new]
    assert not stale, "run python -m paperlib.report tables"


def test_the_blocks_hold_the_recorded_numbers():
    """The check above compares the texts with themselves; this one looks for the numbers."""
    readme = (files.ROOT / "README.md").read_text()
    for notebook in reproduce.EXPERIMENTS:
        recorded = tables.best(notebook)
        opening = json.loads((files.NOTEBOOKS / f"{notebook}.ipynb").read_text())["cells"][0]["source"]
        for key, entry in recorded.claims.items():
            few = recorded.experiment.CLAIMS[key].shows
            assert 1 <= len(few) <= 3
            for text, start, names in (
                (readme, f"| **{key}**", few),
                ("".join(opening), f"| {key} |", entry["measured"]),
            ):
                row = next(line for line in text.split("\n") if line.startswith(start))
                assert verdict_text(entry) in row
                shown = re.findall(r"-?\d+\.?\d*(?:e[+-]\d+)?", re.sub(r"(?<=\d),(?=\d{3})", "", row))
                for name in names:
                    number = float(f"{entry['measured'][name]['value']:.3g}")
                    assert number in map(float, shown), f"{key}: {number} is not there"


def test_every_recorded_figure_stands_below_that_of_the_committed_outputs():
    for notebook in reproduce.EXPERIMENTS:
        text = "".join("".join(cell["source"]) for cell in _cells(notebook) if cell["cell_type"] == "markdown")
        names = [name for cell in _cells(notebook) for name in tables.FIGURE.findall("".join(cell["source"]))]
        assert len(names) >= 3
        for name in names:
            assert text.count(f"/{tables.best(notebook).preset}/{name}.png)") == 1, name


def _cells(notebook):
    return json.loads((files.NOTEBOOKS / f"{notebook}.ipynb").read_text())["cells"]


def test_a_text_without_its_marks_is_an_error(tmp_path):
    from paperlib.system.errors import UserError

    with pytest.raises(UserError, match="needs one line"):
        tables._filled("no marks", "block", tmp_path)
    filled = tables._filled(f"a {tables.BEGIN}old{tables.END} b", "new", tmp_path)
    assert filled == f"a {tables.BEGIN}\n\nnew\n\n{tables.END} b"
