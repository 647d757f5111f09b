"""Every text that quotes what is recorded says the same."""

import re

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
    readme, opening = tables.readme_block(), tables.notebook_block(notebook)
    recorded = tables.best(notebook)
    for key, entry in recorded.claims.items():
        few = recorded.experiment.claims[key].shows
        assert 1 <= len(few) <= 3
        for text, start, names in ((readme, f"| **{key}**", few), (opening, f"| {key} |", entry["measured"])):
            (row,) = (line for line in text.split("\n") if line.startswith(start))
            assert verdict_text(entry) in row
            shown = set(map(float, re.findall(r"-?\d+\.?\d*(?:e[+-]\d+)?", re.sub(r"(?<=\d),(?=\d{3})", "", row))))
            assert {float(f"{entry['measured'][name]['value']:.3g}") for name in names} <= shown, key


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
