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


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), MemoryError(), None])
def test_too_little_memory_is_explained(error):
    def hungry():
        with devices.oom_as_user_error("buy more"):
            if error:
                raise error
            torch.empty(1 << 50)

    with pytest.raises(UserError, match="out of memory: buy more"):
        hungry()
    with pytest.raises(RuntimeError, match="other"), devices.oom_as_user_error("buy more"):
        raise RuntimeError("other")


def test_pick_device(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu")
    for name in ("gpu", "cpu:1", "cuda:", "cuda:x", "cuda0", ""):
        with pytest.raises(UserError, match="choose auto, cpu"):
            pick_device(name)
    count = 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match="sees 0 CUDA devices"):
        pick_device("cuda")
    count = 2
    assert pick_device("auto") == torch.device("cuda", 0)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match="sees 2 CUDA devices"):
        pick_device("cuda:2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("cuda") == torch.device("cuda", 1)


def test_on_cuda_float32_is_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    pick_device("auto")
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_autocast_keeps_no_weights():
    """Those that were cast without a gradient have none later, in torch 2.8 and 2.9."""
    layer = nn.Linear(3, 3)
    with devices.autocast(torch.device("cpu"), "bfloat16"):
        assert not torch.is_autocast_cache_enabled()
        with torch.no_grad():
            layer(torch.ones(2, 3))
        y = layer(torch.ones(2, 3))
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and layer.weight.grad.abs().sum() > 0


def test_without_a_compiler_training_runs_uncompiled(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    run(tmp_path / "a", dataclasses.replace(BASE, compile=True))
    assert capsys.readouterr().err.count("no C++ compiler") == 1
    run(tmp_path / "b")
    assert_same(load(tmp_path / "a")["model"], load(tmp_path / "b")["model"])


@pytest.mark.slow
def test_compiled_training_agrees_with_uncompiled(tmp_path):
    trained = []
    for flag in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6)).double()
        recipe = dataclasses.replace(BASE, compile=flag)
        trained.append(run(tmp_path / str(flag), recipe, model, loss=lambda m, x, _: ((m(x) - x).square().mean(), {})))
    for key, tensor in trained[0].model.state_dict().items():
        torch.testing.assert_close(trained[1].model.state_dict()[key], tensor, rtol=0, atol=1e-8)


class Toy(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, 2)

    def forward(self, x):
        return self.layer(x)


@pytest.mark.slow
def test_the_ninth_model_of_a_process_is_compiled_too(monkeypatch):
    """torch keeps eight compilations of one forward, and then runs it as it is."""
    counted, true = [], torch.compile
    monkeypatch.setattr(devices, "_compiles", lambda device: True)

    def backend(module, _):
        counted.append(module)
        return module.forward

    monkeypatch.setattr(torch, "compile", lambda model: true(model, backend=backend))
    for width in range(1, 13):
        devices.compiled(Toy(width))(torch.ones(3, width))
    assert len(counted) == 12


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
    monkeypatch.setenv("PAPERLIB_PROGRESS", str(tmp_path / "nowhere" / "progress.json"))
    assert run(tmp_path / "c").stopped == "finished", "a lost bar does not stop training"


def test_where_torch_cannot_compile_training_runs_uncompiled(tmp_path, monkeypatch, capsys):
    def broken(function):
        def call(*_):
            raise RuntimeError("fatal error: Python.h:\n no such file")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    devices._compiles.cache_clear()
    run(tmp_path / "a", dataclasses.replace(BASE, compile=True))
    run(tmp_path / "b", dataclasses.replace(BASE, compile=True))
    devices._compiles.cache_clear()
    said = [line for line in capsys.readouterr().err.split("\n") if "cannot compile" in line]
    assert said == [
        "torch cannot compile here (RuntimeError: fatal error: Python.h: no such file): running uncompiled, slower"
    ]


def test_a_device_is_text():
    with pytest.raises(UserError, match="device is 0, but takes text: auto, cpu"):
        pick_device(0)
