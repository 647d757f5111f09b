"""The report: it needs no network, has every recorded figure, and formulas that are no text."""

import re

import pytest

from paperlib.report import page, records
from paperlib.system import files


@pytest.fixture(scope="module")
def index():
    return page.index(list(records.recorded()))


def test_nothing_on_it_comes_from_elsewhere(index):
    sources = re.findall(r'(?:src|href)="([^"]*)"', index)
    assert sources and all(one.startswith("data:image/png;base64,") or one.endswith(".html") for one in sources)


def test_every_recorded_figure_and_claim_is_there(index):
    for one in records.recorded():
        names = [name for name in page.captions(one.notebook)]
        drawn = [name for name in names if (files.figures_root() / one.preset / f"{name}.png").exists()]
        assert drawn == names, "every figure of the notebook is recorded"
        for claim in one.claims:
            assert f"<b>{claim}</b>" in index
    assert index.count("<figure>") == sum(len(page.captions(one.notebook)) for one in records.recorded())


def test_formulas_become_mathml_but_not_in_code():
    text = page.markdown(r"Let $x^2$ and `$HOME` be. $$\sum_t x_t \tag{1}$$")
    assert text.count("<math") == 2 and "<code>$HOME</code>" in text and r"\sum" not in text
    assert "<mi>x</mi>" in text and "FORMULA" not in text


def test_a_notebook_page_loads_nothing(tmp_path):
    text = page.notebook_page(files.NOTEBOOKS / "02_mnist_fuzziness.ipynb")
    assert "<mi>x</mi>" in text and "FORMULA" not in re.sub(r"<[^>]*>", "", text)
    assert not re.search(r'(?:src|href)="https?://[^"]*\.(?:js|css|png)', text)
    assert not re.search(r'src="(?!data:)[^"]*\.png"', text)
