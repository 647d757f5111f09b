import dataclasses
import json
import math
from functools import partial

import pytest
import torch
from torch import nn
from toy_training import BASE, assert_same, load, run

from paperlib.system import devices
from paperlib.system.devices import pick_device, seeded
from paperlib.system.errors import UserError


def test_seeded_draws_the_same_and_leaves_the_caller_s_randomness_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    drawn = []
    for _ in range(2):
        with seeded(7, "cpu"):
            drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
    assert torch.equal(drawn[0], torch.rand(3, generator=torch.Generator().manual_seed(7)))
    assert torch.equal(torch.get_rng_state(), before)


def test_memory_really_exhausted_on_the_cpu_is_recognised():
    with pytest.raises(UserError, match="out of memory"), devices.oom_as_user_error("buy more"):
        torch.empty(1 << 50)
    with pytest.raises(RuntimeError, match="other"), devices.oom_as_user_error("buy more"):
        raise RuntimeError("other")


def test_pick_device(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu")
    for name in ("gpu", "cpu:1", "cuda:", "cuda:x", "cuda0", ""):
        with pytest.raises(UserError, match="choose auto, cpu"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match="sees 0 CUDA devices"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto") == torch.device("cuda", 0)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match="sees 2 CUDA devices"):
        pick_device("cuda:2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("cuda") == torch.device("cuda", 1)


def test_without_a_compiler_training_runs_uncompiled(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    run(tmp_path / "a", dataclasses.replace(BASE, compile=True))
    assert capsys.readouterr().err.count("no C++ compiler") == 1
    run(tmp_path / "b")
    assert_same(load(tmp_path / "a")["model"], load(tmp_path / "b")["model"])


@pytest.mark.slow
def test_compiled_training_agrees_with_uncompiled(tmp_path):
    def quiet(model, x, progress):
        return (model(x) - x).square().mean(), {}

    trained = []
    for folder, flag in (("a", False), ("b", True)):
        recipe = dataclasses.replace(BASE, compile=flag)
        model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6)).double()
        model.load_state_dict(trained[0][0] if trained else model.state_dict())
        start = {k: v.clone() for k, v in model.state_dict().items()}
        trained.append((start, run(tmp_path / folder, recipe, model, loss=quiet)))
    a, b = (result.model.state_dict() for _, result in trained)
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-8)


def test_progress_goes_to_a_bar_or_to_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(devices, "tqdm", partial(devices.tqdm, disable=False))
    run(tmp_path / "a", name="demo")
    shown = capsys.readouterr()
    assert "demo: 100%" in shown.err and "held_out_error=" in shown.err and not shown.out
    monkeypatch.setenv("PAPERLIB_PROGRESS", str(tmp_path / "progress.json"))
    trained = run(tmp_path / "b", name="demo")
    assert not capsys.readouterr().err
    told = json.loads((tmp_path / "progress.json").read_text())
    assert (told["name"], told["step"], told["steps"]) == ("demo", 20, 20)
    assert 0 < told["elapsed"] <= trained.seconds and math.isfinite(told["loss"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "progress.json"]


def test_a_progress_file_that_cannot_be_written_does_not_stop_training(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERLIB_PROGRESS", str(tmp_path / "nowhere" / "progress.json"))
    assert run(tmp_path / "a").stopped == "finished"
