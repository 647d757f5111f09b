"""The training loop against a loop written out by hand, and against itself cut in pieces."""

import dataclasses
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import types
from functools import partial

import pytest
import torch
from torch import nn

from paperlib.runs import checkpoints, train
from paperlib.runs.train import Progress, Recipe, batch_indices, fit, pick_device
from paperlib.system import devices, distributed, files
from paperlib.system.errors import UserError

DATA = torch.randn(37, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
BASE = Recipe(steps=20, batch_size=8, learning_rate=0.01, ema=0.9, evaluate_every=4)
OFTEN = dataclasses.replace(BASE, checkpoint_minutes=0)


def network():
    """A float64 model with noise (dropout) and buffers (batch norm's, one of them an integer)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(0.3), nn.Tanh(), nn.Linear(9, 6)
        return nn.Sequential(*parts).double()


def loss(model, x, progress):
    error = (model(x + 0.1 * torch.randn_like(x)) - x).square().sum(1).mean()
    return (0.5 + progress.fraction) * error, {"error": error, "twice": 2.0 * progress.step}


def evaluate(model):
    x = DATA[:9]
    return {"error": (model(x + torch.randn_like(x)) - x).square().mean(), "other": 7}


def batch(indices):
    return DATA[indices]


def run(folder, recipe=BASE, model=None, **changes):
    settings = {"loss": loss, "batch": batch, "count": len(DATA), "seed": 3, "device": "cpu"}
    settings |= {"evaluate": evaluate} | changes
    return fit(model or network(), recipe=recipe, directory=folder, **settings)


def load(folder, name="last.pt"):
    return torch.load(folder / name, weights_only=True)


def leaves(value, path=""):
    """The values in nested dicts and lists, by path."""
    if not isinstance(value, (dict, list, tuple)):
        return {path: value}
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for key, item in pairs for k, v in leaves(item, f"{path}/{key}").items()}


def assert_same(a, b):
    """Equal bit for bit, but for the wall time and the provenance of resumed parts."""
    a, b = leaves(a), leaves(b)
    ignored = {k for k in a | b if k == "/state/elapsed" or k.startswith("/state/provenance")}
    assert a.keys() - ignored == b.keys() - ignored
    for key in a.keys() - ignored:
        if torch.is_tensor(a[key]):
            assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key
        else:
            assert a[key] == b[key], key


class Killed(Exception):
    pass


def killed_at(step, start=0):
    """A batch function that dies at the given step of a training that begins at `start`."""
    calls = []

    def dying(indices):
        calls.append(indices)
        if start + len(calls) > step:
            raise Killed
        return batch(indices)

    return dying


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run, and what it returned."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder)


# What a step computes


def test_epochs_are_permutations_laid_end_to_end():
    stream = torch.cat([batch_indices(1, 10, 4, step) for step in range(15)])
    epochs = stream.reshape(6, 10)
    assert (epochs.sort(1).values == torch.arange(10)).all()
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 6
    assert torch.equal(stream, torch.cat([batch_indices(1, 10, 30, step) for step in range(2)]))
    assert not torch.equal(stream[:10], torch.cat([batch_indices(2, 10, 5, s) for s in (0, 1)]))


def test_writing_into_indices_leaves_later_ones_alone():
    before = batch_indices(9, 10, 10, 0).clone()
    batch_indices(9, 10, 10, 0).zero_()
    assert torch.equal(batch_indices(9, 10, 10, 0), before)


def by_hand(recipe):
    """Last weights, moving average and history of `run` from the formulas of Adam and the rest."""
    model, average, history, since = network(), None, [], []
    parameters = list(model.parameters())
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    beta1, beta2 = recipe.betas
    for step in range(recipe.steps):
        fraction, t = step / recipe.steps, step + 1
        torch.manual_seed(train._mixed(3, 1, step, 0))
        x = DATA[batch_indices(3, len(DATA), recipe.batch_size, step)]
        value, terms = loss(model, x, Progress(step, fraction))
        gradients = torch.autograd.grad(value, parameters)
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        shrink = min(1.0, recipe.clip_norm / norm.item()) if recipe.clip_norm else 1.0
        rate = {
            "constant": 0.01,
            "cosine": 0.01 * math.cos(math.pi * fraction / 2) ** 2,
            "exponential": 0.01 * recipe.decay**step,
        }[recipe.schedule]
        if t < recipe.warmup:
            rate *= t / recipe.warmup
        with torch.no_grad():
            for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
                m.copy_(beta1 * m + (1 - beta1) * shrink * g)
                v.copy_(beta2 * v + (1 - beta2) * (shrink * g) ** 2)
                p -= rate * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + 1e-8)
        now = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        decay = min(recipe.ema, (1 + step) / (10 + step)) if average else 0.0
        average = {
            key: decay * average[key] + (1 - decay) * w if average and w.is_floating_point() else w
            for key, w in now.items()
        }
        since.append((value.item(), terms["error"].item(), terms["twice"]))
        if t % recipe.evaluate_every == 0:
            history.append([t, *(sum(column) / len(since) for column in zip(*since, strict=True))])
            since = []
    return now, average, history


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"schedule": "cosine", "clip_norm": 1.0, "warmup": 5},
        {"schedule": "exponential", "decay": 0.9, "betas": (0.8, 0.95), "ema": 0.2},
    ],
)
def test_fit_is_the_loop_by_hand(tmp_path, changes):
    recipe = dataclasses.replace(BASE, **changes)
    trained = run(tmp_path, recipe)
    weights, average, history = by_hand(recipe)
    for key, tensor in load(tmp_path)["model"].items():
        torch.testing.assert_close(tensor, weights[key], rtol=0, atol=1e-8)
    for key, tensor in trained.model.state_dict().items():
        torch.testing.assert_close(tensor, average[key], rtol=0, atol=1e-8)
    rows = [[row[name] for name in ("step", "loss", "error", "twice")] for row in trained.history]
    torch.testing.assert_close(torch.tensor(rows), torch.tensor(history), rtol=1e-9, atol=0)
    assert not trained.model.training and trained.stopped == "finished" and trained.steps == 20


def test_held_out_numbers_are_those_of_the_average_with_the_same_noise(whole):
    _, trained = whole
    torch.manual_seed(train._mixed(3, 2))
    with torch.no_grad():
        expected = evaluate(trained.model)["error"].item()
    assert trained.history[-1]["held_out_error"] == expected
    assert list(trained.history[-1]) == [*("step", "loss", "error", "twice", "held_out_error", "held_out_other")]


def test_without_average_the_last_weights_are_returned(tmp_path):
    trained = run(tmp_path, dataclasses.replace(BASE, ema=0.0))
    assert_same(dict(trained.model.state_dict()), load(tmp_path)["model"])


def test_neither_evaluation_nor_the_caller_s_randomness_changes_training(tmp_path, whole):
    torch.manual_seed(1234)
    before = torch.get_rng_state()
    run(tmp_path, evaluate=None)
    assert torch.equal(torch.get_rng_state(), before)
    a, b = load(tmp_path), load(whole[0])
    assert_same([a["model"], a["average"]["module.0.weight"]], [b["model"], b["average"]["module.0.weight"]])


def test_steps_run_in_training_mode_whatever_came_before(tmp_path):
    recipe = dataclasses.replace(BASE, ema=0.0)  # so that the trained model itself is evaluated
    run(tmp_path / "a", recipe)
    run(tmp_path / "b", recipe, network().eval(), evaluate=None)
    assert_same(load(tmp_path / "a")["model"], load(tmp_path / "b")["model"])


def test_another_seed_trains_otherwise(tmp_path, whole):
    other = run(tmp_path, seed=4)
    assert not torch.equal(other.model[0].weight, whole[1].model[0].weight)


def test_bfloat16_is_for_the_loss_alone(tmp_path):
    seen = set()

    def watched(model, x, progress):
        y = model(x)
        seen.add(("loss", y.dtype))
        return (y.float() - x).square().mean(), {}

    def held_out(model):
        y = model(DATA.float())
        seen.add(("evaluate", y.dtype))
        return {"error": y.square().mean()}

    recipe = dataclasses.replace(BASE, precision="bfloat16")
    trained = run(
        tmp_path,
        recipe,
        nn.Linear(6, 6),
        loss=watched,
        batch=lambda i: DATA[i].float(),
        evaluate=held_out,
    )
    assert seen == {("loss", torch.bfloat16), ("evaluate", torch.float32)}
    assert trained.model.weight.dtype == torch.float32
    assert trained.history[-1]["loss"] < trained.history[0]["loss"]


# Stopping and continuing


@pytest.mark.parametrize("step", [1, 4, 11, 19])
def test_a_killed_training_resumes_bit_for_bit(tmp_path, whole, step):
    folder, trained = whole
    with pytest.raises(Killed):
        run(tmp_path, OFTEN, batch=killed_at(step), provenance={"revision": "a"})
    assert load(tmp_path)["state"]["step"] == step
    again = run(tmp_path, BASE, model=network(), provenance={"revision": "b"})
    assert_same(load(tmp_path), load(folder))
    assert_same(dict(again.model.state_dict()), dict(trained.model.state_dict()))
    assert again.history == trained.history
    assert again.provenance == {"revision": "a"} and again.resumed == [{"revision": "b"}]


def test_ctrl_c_ends_the_step_and_saves_it(tmp_path, whole, capsys):
    handler = signal.getsignal(signal.SIGINT)
    calls = []

    def interrupting(indices):
        calls.append(os.kill(os.getpid(), signal.SIGINT) if len(calls) == 6 else None)
        return batch(indices)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, batch=interrupting)
    assert signal.getsignal(signal.SIGINT) is handler
    assert "stopping after this step" in capsys.readouterr().err
    assert load(tmp_path)["state"]["step"] == 7
    run(tmp_path)
    assert_same(load(tmp_path), load(whole[0]))


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    def insisting(indices):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        raise AssertionError("still running")

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, batch=insisting)
    assert [path.name for path in tmp_path.iterdir()] == [files.LOCK]


def test_a_process_killed_outright_resumes_bit_for_bit(tmp_path):
    recipe = dataclasses.replace(OFTEN, steps=600, evaluate_every=50)
    code = """
        import pathlib, sys
        sys.path[:0] = sys.argv[2:]
        import dataclasses, test_train
        recipe = dataclasses.replace(test_train.OFTEN, steps=600, evaluate_every=50)
        test_train.run(pathlib.Path(sys.argv[1]), recipe)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "a")]
    command += [str(files.ROOT), str(files.ROOT / "tests")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not (tmp_path / "a" / "previous.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.3)
    process.kill()
    process.wait()
    step = checkpoints.read(tmp_path / "a")["state"]["step"]
    assert 1 <= step < 600
    short = dataclasses.replace(recipe, checkpoint_minutes=3)
    run(tmp_path / "a", short)
    run(tmp_path / "b", short)
    assert_same(load(tmp_path / "a"), load(tmp_path / "b"))


def test_a_finished_training_is_returned_without_a_step(whole):
    folder, trained = whole

    def never(*_):
        raise AssertionError("trained again")

    before = (folder / "last.pt").read_bytes()
    again = run(folder, batch=never, evaluate=never)
    assert_same(dict(again.model.state_dict()), dict(trained.model.state_dict()))
    assert (again.history, again.seconds, again.stopped, again.resumed) == (
        *(trained.history, trained.seconds, "finished", []),
    )
    assert (folder / "last.pt").read_bytes() == before and not again.model.training


def scripted(values):
    """An evaluation that returns the values given, one after the other."""
    left = iter(values)
    return lambda model: {"error": next(left)}


@pytest.mark.parametrize("kill", [None, 14])
def test_patience_returns_the_best_weights(tmp_path, kill):
    recipe = dataclasses.replace(OFTEN, evaluate_every=2, patience=3, steps=40)
    values = [9.0, 5.0, 6.0, 4.0, 4.0, 7.0, 4.5, 0.0]
    taken = []

    def kept(model):
        taken.append({k: v.clone() for k, v in model.state_dict().items()})
        return {"error": values[len(taken) - 1]}

    if kill:  # between the best evaluation and the stop
        with pytest.raises(Killed):
            run(tmp_path, recipe, evaluate=kept, batch=killed_at(kill - 2))
    trained = run(tmp_path, recipe, evaluate=kept)
    assert trained.stopped == "patience" and trained.steps == 14 and len(taken) == 7
    assert_same(dict(trained.model.state_dict()), taken[3])
    best = load(tmp_path, "best.pt")
    assert best["value"] == 4.0 and best["step"] == 8
    assert_same(best["weights"], taken[3])


def test_with_patience_a_finished_training_returns_the_best_weights_too(tmp_path):
    recipe = dataclasses.replace(BASE, patience=9)
    trained = run(tmp_path, recipe, evaluate=scripted([5.0, 3.0, 4.0, 4.0, 4.0]))
    assert trained.stopped == "finished" and trained.steps == 20
    assert_same(dict(trained.model.state_dict()), load(tmp_path, "best.pt")["weights"])


class Clock:
    """Time that passes only in making batches: `seconds` each."""

    def __init__(self, monkeypatch, seconds):
        self.now, self.seconds = 1000.0, seconds
        monkeypatch.setattr(train, "time", types.SimpleNamespace(monotonic=lambda: self.now))

    def batch(self, indices):
        self.now += self.seconds
        return batch(indices)


def test_a_time_budget_stops_and_drives_the_schedule_over_resumed_parts(tmp_path, monkeypatch):
    fractions, rates = [], []

    def watched(model, x, progress):
        fractions.append(progress.fraction)
        rates.append(recipe.rate(progress))
        return loss(model, x, progress)

    recipe = Recipe(
        steps=1000,
        batch_size=8,
        learning_rate=1.0,
        schedule="cosine",
        minutes=2,
        checkpoint_minutes=0,
    )
    clock, deaths = Clock(monkeypatch, 10), killed_at(5)
    with pytest.raises(Killed):
        run(tmp_path, recipe, loss=watched, batch=lambda i: (deaths(i), clock.batch(i))[1])
    clock.now += 1e6  # the time between two parts does not count
    trained = run(tmp_path, recipe, loss=watched, batch=clock.batch)
    assert (trained.stopped, trained.steps, trained.seconds) == ("minutes", 12, 120)
    assert fractions == pytest.approx([k / 12 for k in range(12)])
    assert rates == pytest.approx([(1 + math.cos(math.pi * k / 12)) / 2 for k in range(12)])
    assert len(trained.history) == 1 and trained.history[0]["step"] == 12


def test_checkpoints_come_by_the_clock_and_at_the_end(tmp_path, monkeypatch):
    clock, written = Clock(monkeypatch, 60), []
    monkeypatch.setattr(checkpoints, "write", lambda folder, content: written.append(content["state"]["step"]))
    run(tmp_path, batch=clock.batch)
    assert written == [3, 6, 9, 12, 15, 18, 20]


# Checkpoints that are damaged, foreign or hostile


def damage(path, how):
    raw = bytearray(path.read_bytes())
    if how == "cut":
        raw = raw[: len(raw) // 2]
    elif how == "bit":
        where = raw.find(load(path.parent, path.name)["model"]["4.weight"].numpy().tobytes())
        assert where > 0
        raw[where + 5] ^= 1
    else:
        raw = bytearray()
    path.write_bytes(raw)


@pytest.mark.parametrize("how", ["cut", "bit", "empty"])
def test_a_damaged_checkpoint_gives_way_to_the_previous(tmp_path, whole, how, capsys):
    with pytest.raises(Killed):
        run(tmp_path, OFTEN, batch=killed_at(9))
    damage(tmp_path / "last.pt", how)
    run(tmp_path)
    said = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert len(said) == 1 and said[0].endswith("last.pt is damaged: continuing from previous.pt")
    assert_same(load(tmp_path), load(whole[0]))


def test_two_damaged_checkpoints_are_an_error(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, OFTEN, batch=killed_at(9))
    for name in ("last.pt", "previous.pt"):
        damage(tmp_path / name, "cut")
    with pytest.raises(UserError, match=r"last\.pt and previous\.pt damaged.*--fresh"):
        run(tmp_path)


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_never_run(tmp_path, zipped):
    content = {"format": checkpoints.FORMAT, "model": Code(tmp_path / "ran")}
    torch.save(content, tmp_path / "last.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="not loaded" if zipped else "damaged"):
        run(tmp_path)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "last.pt", weights_only=False)
    assert (tmp_path / "ran").exists(), "the trap was not armed"


def test_a_checkpoint_of_another_training_names_what_differs(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, OFTEN, batch=killed_at(3))
    for changes, message in (
        (
            {"recipe": dataclasses.replace(BASE, learning_rate=0.02)},
            r"learning_rate 0\.01 -> 0\.02",
        ),
        ({"recipe": dataclasses.replace(BASE, ema=0.0)}, r"ema 0\.9 -> 0\.0"),
        ({"seed": 4}, "seed 3 -> 4"),
        ({"count": 30}, "count 37 -> 30"),
        ({"model": nn.Linear(6, 6)}, r"0\.weight \(9, 6\) -> absent"),
    ):
        with pytest.raises(UserError, match=message):
            run(tmp_path, **changes)
    torch.save({"weights": 1}, tmp_path / "last.pt")
    with pytest.raises(UserError, match="not a checkpoint of this version"):
        run(tmp_path)


def test_checkpoints_hold_plain_values_whatever_the_provenance(tmp_path):
    trained = run(
        tmp_path,
        provenance={"path": tmp_path, "count": 3},
        evaluate=lambda m: {"x": torch.ones(())},
    )
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


def test_the_previous_checkpoint_serves_where_the_last_is_missing(tmp_path, capsys):
    for k in range(3):
        checkpoints.write(tmp_path, {"k": k})
    assert checkpoints.read(tmp_path)["k"] == 2
    (tmp_path / "last.pt").unlink()
    assert checkpoints.read(tmp_path)["k"] == 1 and not capsys.readouterr().err
    assert checkpoints.read(tmp_path / "nowhere") is None


# What goes wrong in training


def test_a_loss_that_is_not_finite_stops_before_it_does_harm(tmp_path):
    def exploding(model, x, progress):
        value, terms = loss(model, x, progress)
        return (value * math.inf if progress.step == 6 else value), terms

    with pytest.raises(UserError, match=r"not finite at step 6 \(loss inf, error [\d.]+, twice 12\)"):
        run(tmp_path, OFTEN, loss=exploding)
    saved = load(tmp_path)
    assert saved["state"]["step"] == 6
    assert all(v.isfinite().all() for v in leaves(saved).values() if torch.is_tensor(v))


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    def steep(model, x, progress):  # finite itself, but with an infinite slope at 0
        y = (model[4].weight * 0).square().sum().sqrt() if progress.step == 6 else 0.0
        return (model(x) - x).square().mean() + y, {}

    with pytest.raises(UserError, match="weights are not finite at step 7"):
        run(tmp_path, OFTEN, loss=steep)
    saved = load(tmp_path)
    assert saved["state"]["step"] == 6
    assert all(v.isfinite().all() for v in saved["model"].values())


def test_a_watched_number_that_is_not_finite_stops(tmp_path):
    with pytest.raises(UserError, match="held-out error is nan at step 8"):
        run(tmp_path, evaluate=scripted([1.0, math.nan]))


def test_terms_must_stay_the_same(tmp_path):
    def changing(model, x, progress):
        return model(x).square().mean(), {"a" if progress.step < 2 else "b": 1.0}

    with pytest.raises(ValueError, match="terms"):
        run(tmp_path, loss=changing)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_too_little_memory_is_explained(tmp_path, error):
    def hungry(indices):
        raise error

    with pytest.raises(UserError, match=r"out of memory: lower batch_size \(now 8\)"):
        run(tmp_path, batch=hungry)


def test_memory_really_exhausted_on_the_cpu_is_recognised():
    with pytest.raises(UserError, match="out of memory"), devices.memory_explained("buy more"):
        torch.empty(1 << 50)
    with pytest.raises(RuntimeError, match="other"), devices.memory_explained("buy more"):
        raise RuntimeError("other")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"minutes": -1.0}, "minutes is -1.0"),
        (
            {"schedule": "cosin"},
            "unknown schedule 'cosin': choose from constant, cosine, exponential",
        ),
        ({"precision": "float16"}, "unknown precision"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"evaluate_every": 0, "patience": 2}, "patience counts evaluations"),
    ],
)
def test_a_recipe_refuses_nonsense(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(BASE, **changes)


def test_patience_without_held_out_data_is_refused(tmp_path):
    with pytest.raises(UserError, match="no held-out data"):
        run(tmp_path, dataclasses.replace(BASE, patience=2), evaluate=None)
    with pytest.raises(UserError, match="no training examples"):
        run(tmp_path, count=0)


# The machine


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


def test_without_a_compiler_training_runs_uncompiled(tmp_path, monkeypatch, capsys, whole):
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    run(tmp_path, dataclasses.replace(BASE, compile=True))
    assert capsys.readouterr().err.count("no C++ compiler") == 1
    assert_same(load(tmp_path)["model"], load(whole[0])["model"])


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
    trained = run(tmp_path / "b", dataclasses.replace(BASE, minutes=5), name="demo")
    assert not capsys.readouterr().err
    told = json.loads((tmp_path / "progress.json").read_text())
    assert (told["name"], told["step"], told["steps"], told["minutes"]) == ("demo", 20, 20, 5)
    assert 0 < told["elapsed"] <= trained.seconds and math.isfinite(told["loss"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "progress.json"]


def test_a_progress_file_that_cannot_be_written_does_not_stop_training(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERLIB_PROGRESS", str(tmp_path / "nowhere" / "progress.json"))
    assert run(tmp_path / "a").stopped == "finished"


# Several processes

WORKER = """
    import pathlib, sys, torch
    folder, doing = pathlib.Path(sys.argv[1]), sys.argv[2]
    sys.path[:0] = sys.argv[3:]
    import test_train
    torch.distributed.init_process_group("gloo")
    if doing == "go on":
        assert test_train.run_noisily(folder).steps == 20
    else:
        try:
            test_train.run_noisily(folder, batch=test_train.killed_at(9))
            raise SystemExit("was not killed")
        except test_train.Killed:
            torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


def run_noisily(folder, **changes):
    """A training with noise and dropout that belong to samples, and a term over the whole batch."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), distributed.Dropout(0.2), nn.Linear(9, 6)).double()

    def loss(model, x, progress):
        noise = distributed.randn(x.shape, dtype=x.dtype)
        moved = distributed.randint(3, (len(x), 1)) + distributed.rand((len(x), 1), dtype=x.dtype)
        y = model(x + 0.1 * noise * moved)
        every = distributed.gathered(y)
        return (y - x).square().sum(1).mean() + (every.T @ every / len(every)).square().mean(), {
            "pixel": x.mean(),
            "all": distributed.mean(y.mean()),
        }

    return run(folder, OFTEN, model, loss=loss, **changes)


def by_two(folder, tmp_path, doing):
    (tmp_path / "worker.py").write_text(textwrap.dedent(WORKER))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(tmp_path / "worker.py"), str(folder), doing, str(files.ROOT), str(files.ROOT / "tests")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, said = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said[-2000:]


def test_two_processes_train_as_one_and_another_number_of_them_goes_on(tmp_path):
    by_two(tmp_path / "two", tmp_path, "stop at 9")
    assert load(tmp_path / "two")["state"]["step"] == 9
    shutil.copytree(tmp_path / "two", tmp_path / "two then one")
    by_two(tmp_path / "two", tmp_path, "go on")
    run_noisily(tmp_path / "two then one")
    run_noisily(tmp_path / "one")
    one = load(tmp_path / "one")
    for other in ("two", "two then one"):
        two = load(tmp_path / other)
        for key, tensor in leaves(one["average"]).items():
            torch.testing.assert_close(tensor, leaves(two["average"])[key], rtol=0, atol=1e-9)
        for a, b in zip(one["state"]["history"], two["state"]["history"], strict=True):
            assert a == pytest.approx(b, rel=1e-9)
    quiet = run_noisily(tmp_path / "another", batch=lambda rows: DATA[rows] + distributed.randn((len(rows), 6)))
    assert quiet.history != one["state"]["history"], "noise has an effect"


def test_a_second_process_in_the_same_folder_is_refused(tmp_path):
    holder = (
        "from paperlib.paths import *; import sys, time\nwith locked(Path(sys.argv[1]), 'training'): time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", holder, str(tmp_path)])
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / files.LOCK).exists() or not (tmp_path / files.LOCK).read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(UserError, match=f"process {other.pid} is training in {tmp_path}: wait until it is done"):
            run(tmp_path)
    finally:
        other.kill()
        other.wait()
    assert run(tmp_path).steps == 20, "the lock ends with its process"
