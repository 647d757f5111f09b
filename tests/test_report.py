"""The report: it needs no network, has every recorded figure, and formulas that are no text."""

import dataclasses
import re
from pathlib import Path

import pytest

from paperlib.report import __main__ as report
from paperlib.report import page, records, tables
from paperlib.system import files

RECORDED = list(records.recorded())


@pytest.fixture(scope="module")
def index():
    return page.index(RECORDED)


def test_every_recorded_figure_and_claim_is_there_and_nothing_comes_from_elsewhere(index):
    sources = re.findall(r'(?:src|href)="([^"]*)"', index)
    assert sources and all(re.match(r"data:image/png;base64,|#|\w+\.html$", one) for one in sources)
    assert all(f'id="{one[1:]}"' in index for one in sources if one.startswith("#"))
    for one in RECORDED:
        for name in page.captions(one.notebook):
            assert (files.figures_root() / one.preset / f"{name}.png").exists(), "a figure is not recorded"
        assert all(f"<b>{claim}</b>" in index for claim in one.claims)
    assert index.count("<figure>") == sum(len(page.captions(one.notebook)) for one in RECORDED)


def test_text_is_escaped_and_code_within_it_marked(monkeypatch):
    monkeypatch.setattr(page, "captions", lambda notebook: {})
    one, texts = RECORDED[0], {"statement": "p < q & r", "expected": "`a < b` for all a"}
    claims = type(one.claims)({key: entry | texts for key, entry in one.claims.items()})
    text = page.index([dataclasses.replace(one, claims=claims)])
    assert "p &lt; q &amp; r</td>" in text
    assert "<code>a &lt; b</code> for all a" in text


def test_formulas_become_mathml_but_not_in_code():
    text = page.markdown(r"Let $x^2$ and `$HOME` be. $$\sum_t x_t \tag{1}$$")
    assert text.count("<math") == 2 and "<code>$HOME</code>" in text and r"\sum" not in text
    assert "<mi>x</mi>" in text and "FORMULA" not in text
    assert text.count('<span class="equation">') == 1 and "<span>(1)</span>" in text and "tag" not in text


def test_a_notebook_page_loads_nothing():
    text = page.notebook_page(files.NOTEBOOKS / "02_mnist_fuzziness.ipynb")
    assert "<mi>x</mi>" in text and "FORMULA" not in re.sub(r"<[^>]*>", "", text)
    assert not re.search(r'(?:src|href)="https?://[^"]*\.(?:js|css|png)', text)
    assert not re.search(r'src="(?!data:)[^"]*\.png"', text)


def test_the_index_and_all_notebooks_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "index", lambda every: "index")
    monkeypatch.setattr(page, "notebook_page", lambda path: path.stem)
    assert page.write(tmp_path / "new") == tmp_path / "new" / "index.html"
    names = {"index", *(path.stem for path in files.NOTEBOOKS.glob("[0-9]*.ipynb"))}
    assert {path.name: path.read_text() for path in (tmp_path / "new").iterdir()} == {f"{n}.html": n for n in names}


@pytest.mark.parametrize(
    ("words", "called"),
    [
        ("", ("page", files.ROOT / "report")),
        ("--to /there", ("page", Path("/there"))),
        ("page --to /there", ("page", Path("/there"))),
        ("tables", ("tables", False)),
        ("tables --check", ("tables", True)),
        ("claims --list", ("claims", True)),
    ],
)
def test_the_commands(words, called, monkeypatch):
    calls = []
    for name, module, function in (("page", page, "write"), ("tables", tables, "update"), ("claims", records, "show")):
        monkeypatch.setattr(module, function, lambda given, name=name: calls.append((name, given)) or 0)
    assert report.main(words.split()) == 0
    assert calls == [called]
