"""Every text that quotes what is recorded says the same."""

import re
from string import Formatter

import pytest

from paperlib.experiments import EXPERIMENTS
from paperlib.report import tables
from paperlib.runs.claims import verdict_text
from paperlib.system import files
from paperlib.system.errors import UserError


def test_readme_and_notebooks_quote_what_is_recorded():
    stale = [path.name for path, old, new in tables.texts() if old != new]
    assert not stale, "run python -m paperlib.report tables"


@pytest.mark.parametrize("notebook", EXPERIMENTS)
def test_the_blocks_hold_the_recorded_numbers(notebook):
    """The check above compares the texts with what the same code makes; this one looks for the numbers."""
    readme, recorded = tables.readme_block(), tables.best(notebook)
    assert recorded.claims.summary() in tables.notebook_block(notebook)
    for key, entry in recorded.claims.items():
        (row,) = (line for line in readme.split("\n") if line.startswith(f"| **{key}**"))
        assert verdict_text(entry) in row
        shown = set(map(float, re.findall(r"-?\d+\.?\d*(?:e[+-]\d+)?", re.sub(r"(?<=\d),(?=\d{3})", "", row))))
        parts = list(Formatter().parse(recorded.experiment.claims[key].reading))
        named = [(name, 100 if spec == "%" else 1) for _, name, spec, _ in parts if name]
        assert named and {float(f"{times * entry['measured'][name]['value']:.3g}") for name, times in named} <= shown


def test_a_block_is_put_between_its_marks_and_a_text_without_them_is_an_error(tmp_path):
    filled = tables.filled(f"a {tables.BEGIN}old{tables.END} b", "new", tmp_path)
    assert filled == f"a {tables.BEGIN}\n\nnew\n\n{tables.END} b"
    with pytest.raises(UserError, match="needs one line"):
        tables.filled("no marks", "block", tmp_path)


@pytest.mark.parametrize("check", [True, False])
def test_a_check_changes_nothing_and_an_update_what_is_out_of_date(check, tmp_path, monkeypatch, capsys):
    old, same = tmp_path / "old.md", tmp_path / "same.md"
    old.write_text("old")
    monkeypatch.setattr(files, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "texts", lambda: [(old, "old", "new"), (same, "same", "same")])
    assert tables.update(check) == int(check)
    assert old.read_text() == ("old" if check else "new") and not same.exists()
    assert capsys.readouterr().out.startswith(f"old.md: {'out of date' if check else 'written'}")
