"""The training loop against a loop written out by hand, and against itself cut in pieces."""

import dataclasses
import math
import os
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
from toy_training import (
    BASE,
    DATA,
    OFTEN,
    Killed,
    assert_same,
    batch,
    evaluate,
    killed_at,
    leaves,
    load,
    loss,
    network,
    run,
)

from paperlib.runs import checkpoints, train
from paperlib.runs.train import Progress, batch_indices
from paperlib.system import files
from paperlib.system.errors import UserError


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
    kept = batch_indices(1, 10, 10, 0).clone()
    batch_indices(1, 10, 10, 0).zero_()
    assert torch.equal(batch_indices(1, 10, 10, 0), kept), "writing into indices leaves later ones alone"


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
    recipe = dataclasses.replace(OFTEN, steps=300, evaluate_every=50)
    code = """
        import pathlib, sys
        sys.path[:0] = sys.argv[2:]
        import dataclasses, toy_training
        recipe = dataclasses.replace(toy_training.OFTEN, steps=300, evaluate_every=50)
        toy_training.run(pathlib.Path(sys.argv[1]), recipe)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "a")]
    command += [str(files.ROOT), str(files.ROOT / "tests")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not (tmp_path / "a" / "previous.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.1)
    process.kill()
    process.wait()
    step = checkpoints.read(tmp_path / "a")["state"]["step"]
    assert 1 <= step < 300
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
    best = load(tmp_path)["state"]["best"]
    assert best["value"] == 4.0 and best["step"] == 8
    assert_same(best["weights"], taken[3])


def test_with_patience_a_finished_training_returns_the_best_weights_too(tmp_path):
    recipe = dataclasses.replace(BASE, patience=9)
    trained = run(tmp_path, recipe, evaluate=scripted([5.0, 3.0, 4.0, 4.0, 4.0]))
    assert trained.stopped == "finished" and trained.steps == 20
    assert_same(dict(trained.model.state_dict()), load(tmp_path)["state"]["best"]["weights"])


def test_checkpoints_come_by_the_clock_and_at_the_end(tmp_path, monkeypatch):
    """Time passes only in making batches, a minute each."""
    now, written = [1000.0], []

    def slow(indices):
        now[0] += 60
        return batch(indices)

    monkeypatch.setattr(train, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(checkpoints, "write", lambda folder, content: written.append(content["state"]["step"]))
    run(tmp_path, batch=slow)
    assert written == [3, 6, 9, 12, 15, 18, 20]


def test_a_second_process_in_the_same_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "locked", partial(files.locked, patience=0.2))
    holder = "from paperlib.system.files import *; import sys, time\n"
    holder += "with locked(Path(sys.argv[1]), 'training'): print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", holder, str(tmp_path)]
    with subprocess.Popen(command, cwd=files.ROOT, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"process {other.pid} is training in {tmp_path}: wait until it is done"):
            run(tmp_path)
        other.kill()
    assert run(tmp_path).steps == 20, "the lock ends with its process"
    assert run(tmp_path).steps == 20, "and with its block"


# What goes wrong


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
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
