"""Recorded models draw without a data set, and without the packages that only notebooks and preparation need."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import paperlib
from paperlib import pretrained, sample
from paperlib.system import files
from paperlib.system.errors import UserError

WITHOUT = """
import sys
for name in {blocked}:
    sys.modules[name] = None
import paperlib
print(*(tuple(paperlib.load_pretrained(name, "cpu").sample(1).shape) for name in {models}))
"""
EXTRAS = ["torchvision", "sklearn", "seaborn", "pandas", "psutil", "lmdb", "papermill", "ipykernel", "jupyterlab"]
EXTRAS += ["ipywidgets", "nbconvert", "nbformat", "jinja2", "latex2mathml"]


@pytest.fixture(scope="module", params=pretrained.MODELS)
def model(request):
    return paperlib.load_pretrained(request.param, "cpu")


def test_models_draw_where_only_the_library_is_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERLIB_DATA", str(tmp_path))
    code = WITHOUT.format(blocked=EXTRAS, models=list(pretrained.MODELS))
    ran = subprocess.run([sys.executable, "-c", code], cwd=files.ROOT, capture_output=True, text=True, timeout=280)
    assert ran.stdout == "(1, 28, 28, 1) (1, 64, 64, 3) (1, 32, 32, 3)\n", ran.stderr
    assert not list(tmp_path.iterdir())


def test_samples_are_a_function_of_the_seed(model):
    one, again, other = (model.sample(2, seed) for seed in (0, 0, 1))
    assert one.dtype == torch.uint8 and one.shape == other.shape and len(one) == 2
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_a_chain_ends_in_the_sample():
    rooms = paperlib.load_pretrained("sequential", "cpu")
    states = rooms.chain(2, seed=3)
    assert len(states) == rooms.model.steps + 1 and torch.equal(states[-1], rooms.sample(2, seed=3))
    pictures = paperlib.load_pretrained("pixelvae", "cpu")
    states = pictures.chain(2, count=1, seed=3)
    assert len(states) == 3 and torch.equal(states[-1], pictures.sample(1, seed=3, steps=2))
    assert torch.equal(pictures.chain(1, start=states[1])[0], states[1])


def test_codes_are_decoded():
    digits = paperlib.load_pretrained("fuzziness", "cpu")
    z = torch.randn(3, digits.code_dim)
    means = digits.model.p_x_given_z(z).unflatten(1, digits.images.shape).permute(0, 2, 3, 1)
    assert (digits.decode(z) - 255 * means).abs().max() <= 0.5 + 1e-3
    rooms = paperlib.load_pretrained("sequential", "cpu")
    codes = [torch.zeros(2, sum(rooms.model.ladder))] * rooms.model.steps
    states = rooms.decode(codes)
    assert len(states) == rooms.model.steps and torch.equal(states[:, 0], states[:, 1])
    pictures = paperlib.load_pretrained("pixelvae", "cpu")
    assert pictures.decode(torch.zeros(2, pictures.model.code_dim)).shape == (2, 32, 32, 3)


def test_the_command_writes_a_sheet(tmp_path, capsys):
    out = tmp_path / "digits.png"
    assert sample.main(["fuzziness", "--out", str(out), "--count", "3", "--columns", "2", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    drawn, digits = np.asarray(Image.open(out)), paperlib.load_pretrained("fuzziness", "cpu").sample(3)
    assert drawn.shape == (57, 57)
    np.testing.assert_array_equal(drawn[29:, :28], digits[2, ..., 0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["digits", "--out", "a.png"], "unknown model 'digits': choose from fuzziness, sequential, pixelvae"),
        (["fuzziness", "--out", "a.jpg"], "takes a file that ends in .png"),
        (["fuzziness", "--out", "a.png", "--count", "0"], "take whole numbers from 1"),
    ],
)
def test_mistakes_get_one_line(words, message):
    with pytest.raises(UserError, match=message):
        sample.main(words)
