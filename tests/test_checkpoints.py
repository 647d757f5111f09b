"""Checkpoints that are damaged, foreign, hostile, or do not fit on the disk."""

import dataclasses
import importlib
import linecache
import os
import resource
import sys

import pytest
import torch
from torch import nn
from toy_training import BASE, OFTEN, Killed, assert_same, killed_at, leaves, load, run

from paperlib.runs import checkpoints
from paperlib.system.errors import UserError


@pytest.fixture
def cut(tmp_path):
    """The folder of a training that was killed at step 9."""
    with pytest.raises(Killed):
        run(tmp_path / "cut", OFTEN, batch=killed_at(9))
    return tmp_path / "cut"


@pytest.mark.parametrize("how", ["cut", "bit", "empty"])
def test_a_damaged_checkpoint_gives_way_to_the_previous(tmp_path, cut, how, capsys):
    last = cut / "last.pt"
    raw = bytearray(last.read_bytes())
    where = raw.index(load(cut)["model"]["4.weight"].numpy().tobytes())
    raw[where + 5] ^= 1
    last.write_bytes({"cut": raw[: len(raw) // 2], "bit": raw, "empty": b""}[how])
    run(cut)
    (said,) = (line for line in capsys.readouterr().err.splitlines() if "damaged" in line)
    assert said.endswith("last.pt is damaged: continuing from previous.pt")
    run(tmp_path / "whole")
    assert_same(load(cut), load(tmp_path / "whole"))


def test_the_previous_checkpoint_serves_where_the_last_is_missing(tmp_path, capsys):
    for k in range(3):
        checkpoints.write(tmp_path, {"k": k})
    assert checkpoints.read(tmp_path)["k"] == 2
    (tmp_path / "last.pt").unlink()
    assert checkpoints.read(tmp_path)["k"] == 1 and not capsys.readouterr().err
    assert checkpoints.read(tmp_path / "nowhere") is None


class Code:
    """A pickle that would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(("zipped", "message"), [(True, "more than tensors and plain"), (False, "damaged")])
def test_code_in_a_checkpoint_is_never_run(tmp_path, zipped, message):
    content = {"format": checkpoints.FORMAT, "model": Code(tmp_path / "ran")}
    torch.save(content, tmp_path / "last.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=message):
        run(tmp_path)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "last.pt", weights_only=False)
    assert (tmp_path / "ran").exists(), "the trap was not armed"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": dataclasses.replace(BASE, learning_rate=0.02)}, r"learning_rate 0\.01 -> 0\.02"),
        ({"seed": 4}, "seed 3 -> 4"),
        ({"count": 30}, "count 37 -> 30"),
        ({"model": nn.Linear(6, 6)}, r"0\.weight \(9, 6\) -> absent"),
    ],
)
def test_a_checkpoint_of_another_training_names_what_differs(cut, changes, message):
    with pytest.raises(UserError, match=f"holds another training .*{message}.*--fresh to start over"):
        run(cut, **changes)


LOSS = """
# {comment}
def loss(model, x, progress):
    \"\"\"{comment}\"\"\"
    return {weight} * model(x).square().mean(), {{}}

def make():
    weigh = lambda value: {weight} * value
    def captured(model, x, progress):
        return weigh(model(x).square().mean()), {{}}
    return captured
"""


@pytest.mark.parametrize("captured", [False, True])
def test_an_edited_objective_is_another_training(tmp_path, monkeypatch, captured):
    monkeypatch.syspath_prepend(tmp_path)

    def trained(**words):
        (tmp_path / "edited_loss.py").write_text(LOSS.format(**words), encoding="utf-8")
        sys.modules.pop("edited_loss", None)
        linecache.clearcache()
        importlib.invalidate_caches()
        module = importlib.import_module("edited_loss")
        return run(tmp_path / "run", loss=module.make() if captured else module.loss)

    trained(comment="squares", weight=1)
    trained(comment="the mean of squares", weight=1)
    with pytest.raises(UserError, match=r"holds another training \(code \w+ -> \w+\)"):
        trained(comment="squares", weight=2)


def test_checkpoints_hold_plain_values_whatever_the_provenance(tmp_path):
    trained = run(tmp_path, provenance={"path": tmp_path, "count": 3}, evaluate=lambda model: {"x": torch.ones(())})
    assert trained.provenance == {"path": str(tmp_path), "count": 3}
    kinds = {type(value) for value in leaves(load(tmp_path)).values()}
    assert kinds <= {torch.Tensor, int, float, str, bool, type(None)}


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path):
    checkpoints.write(tmp_path, {"x": torch.zeros(10)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match="no space left"):
            checkpoints.write(tmp_path, {"x": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    assert checkpoints.read(tmp_path)["x"].shape == (10,)
