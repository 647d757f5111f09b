"""The training loop against a loop written out by hand, and against itself cut in pieces."""

import dataclasses
import math
import multiprocessing
import os
import signal
import time
import types
from functools import partial

import pytest
import torch
import toy_training
from torch import nn
from toy_training import BASE, DATA, OFTEN, Killed, assert_same, batch, evaluate, killed_at, leaves, load, network, run

from paperlib.runs import checkpoints, train
from paperlib.runs.train import Progress, batch_indices
from paperlib.system import devices, files
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


def by_hand(recipe, seed):
    """Last weights, moving average and history of `run` from the formulas of Adam and the rest."""
    model, average, history, since = network(), None, [], []
    parameters = list(model.parameters())
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    beta1, beta2 = recipe.betas
    for step in range(recipe.steps):
        fraction, t = step / recipe.steps, step + 1
        torch.manual_seed(train._mixed(seed, 1, step, 0))
        x = DATA[batch_indices(seed, len(DATA), recipe.batch_size, step)]
        value, terms = toy_training.loss(model, x, Progress(step, fraction))
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
    ("changes", "seed"),
    [
        ({}, 3),
        ({"schedule": "cosine", "clip_norm": 1.0, "warmup": 5, "ema": 0.0}, 3),
        ({"schedule": "exponential", "decay": 0.9, "betas": (0.8, 0.95), "ema": 0.2}, 4),
    ],
)
def test_fit_is_the_loop_by_hand(tmp_path, changes, seed):
    recipe = dataclasses.replace(BASE, **changes)
    trained = run(tmp_path, recipe, seed=seed)
    weights, average, history = by_hand(recipe, seed)
    for made, expected in ((load(tmp_path)["model"], weights), (trained.model.state_dict(), average)):
        for key, tensor in made.items():
            torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-8)
    rows = [[row[name] for name in ("step", "loss", "error", "twice")] for row in trained.history]
    torch.testing.assert_close(torch.tensor(rows), torch.tensor(history), rtol=1e-9, atol=0)
    assert not trained.model.training and trained.stopped == "finished" and trained.steps == 20


def test_held_out_numbers_are_those_of_the_average_with_the_same_noise(whole):
    _, trained = whole
    torch.manual_seed(train._mixed(3, 2))
    assert trained.history[-1]["held_out_error"] == evaluate(trained.model)["error"].item()
    assert list(trained.history[-1]) == ["step", "loss", "error", "twice", "held_out_error", "held_out_other"]


def test_neither_evaluation_nor_the_caller_s_state_changes_training(tmp_path):
    recipe = dataclasses.replace(BASE, ema=0.0)  # so that the trained model itself is evaluated
    run(tmp_path / "a", recipe)
    torch.manual_seed(1234)
    before = torch.get_rng_state()
    run(tmp_path / "b", recipe, network().eval(), evaluate=None)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(load(tmp_path / "a")["model"], load(tmp_path / "b")["model"])


def test_bfloat16_is_for_the_loss_alone(tmp_path):
    seen = set()

    def error(model, x, where):
        y = model(x)
        seen.add((where, y.dtype))
        return (y.float() - x).square().mean()

    recipe = dataclasses.replace(BASE, precision="bfloat16")
    changes = {
        "loss": lambda model, x, progress: (error(model, x, "loss"), {}),
        "batch": lambda indices: DATA[indices].float(),
        "evaluate": lambda model: {"error": error(model, DATA.float(), "evaluate")},
    }
    trained = run(tmp_path, recipe, nn.Linear(6, 6), **changes)
    assert seen == {("loss", torch.bfloat16), ("evaluate", torch.float32)}
    assert trained.model.weight.dtype == torch.float32


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


@pytest.mark.parametrize("number", devices.STOPS)
def test_ctrl_c_and_its_like_end_the_step_and_save_it(tmp_path, whole, capsys, number):
    handler = signal.getsignal(number)
    calls = []

    def interrupting(indices):
        calls.append(os.kill(os.getpid(), number) if len(calls) == 6 else None)
        return batch(indices)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, batch=interrupting)
    assert signal.getsignal(number) is handler
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


def test_a_process_killed_outright_had_the_folder_to_itself_and_resumes_bit_for_bit(tmp_path, monkeypatch):
    recipe = dataclasses.replace(BASE, steps=1000, evaluate_every=50)
    often = dataclasses.replace(recipe, checkpoint_minutes=0)
    process = multiprocessing.get_context("spawn").Process(target=run, args=(tmp_path / "a", often))
    process.start()
    while not (tmp_path / "a" / "previous.pt").exists() and process.is_alive():
        time.sleep(0.01)
    monkeypatch.setattr(train, "locked", partial(files.locked, patience=0.1))
    with pytest.raises(UserError, match=f"process {process.pid} is training in {tmp_path}/a: wait until it is done"):
        run(tmp_path / "a", recipe)
    process.kill()
    process.join()
    assert 1 <= checkpoints.read(tmp_path / "a")["state"]["step"] < 1000
    for folder in ("a", "b"):
        run(tmp_path / folder, recipe)
    assert_same(load(tmp_path / "a"), load(tmp_path / "b"))


def test_a_finished_training_is_returned_without_a_step(whole):
    folder, trained = whole

    def never(*_):
        raise AssertionError("trained again")

    before = (folder / "last.pt").read_bytes()
    again = run(folder, batch=never, evaluate=never)
    assert_same(dict(again.model.state_dict()), dict(trained.model.state_dict()))
    assert dataclasses.replace(again, model=None) == dataclasses.replace(trained, model=None)
    assert (folder / "last.pt").read_bytes() == before and not again.model.training


@pytest.mark.parametrize(
    ("steps", "kill", "end"),  # the second is killed between the best evaluation and the stop
    [(40, None, ("patience", 14, 7)), (40, 12, ("patience", 14, 7)), (12, None, ("finished", 12, 6))],
)
def test_patience_returns_the_best_weights(tmp_path, steps, kill, end):
    recipe = dataclasses.replace(OFTEN, evaluate_every=2, patience=3, steps=steps)
    values = [9.0, 5.0, 6.0, 4.0, 4.0, 7.0, 4.5, 0.0]
    taken = []

    def kept(model):
        taken.append({k: v.clone() for k, v in model.state_dict().items()})
        return {"error": values[len(taken) - 1]}

    if kill:
        with pytest.raises(Killed):
            run(tmp_path, recipe, evaluate=kept, batch=killed_at(kill))
    trained = run(tmp_path, recipe, evaluate=kept)
    assert (trained.stopped, trained.steps, len(taken)) == end
    best = load(tmp_path)["state"]["best"]
    assert best["value"] == 4.0 and best["step"] == 8
    for weights in (dict(trained.model.state_dict()), best["weights"]):
        assert_same(weights, taken[3])


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


# What goes wrong


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (lambda w: math.inf, r"loss is not finite at step 6 \(loss inf, error [\d.]+, twice 12\)"),
        (lambda w: (w * 0).square().sum().sqrt(), "weights are not finite at step 7"),  # finite, of infinite slope
    ],
)
def test_what_is_not_finite_stops_before_it_is_saved(tmp_path, term, message):
    def loss(model, x, progress):
        value, terms = toy_training.loss(model, x, progress)
        return value + (term(model[4].weight) if progress.step == 6 else 0.0), terms

    with pytest.raises(UserError, match=message):
        run(tmp_path, OFTEN, loss=loss)
    saved = load(tmp_path)
    assert saved["state"]["step"] == 6
    assert all(v.isfinite().all() for v in leaves(saved).values() if torch.is_tensor(v))


@pytest.mark.parametrize(
    ("recipe", "others", "message"),
    [
        ({"steps": 0}, {}, "steps is 0"),
        ({"learning_rate": math.nan}, {}, "learning_rate is nan"),
        ({"schedule": "cosin"}, {}, "unknown schedule 'cosin': choose from constant, cosine, exponential"),
        ({"precision": "float16"}, {}, "unknown precision"),
        ({"ema": 1.0}, {}, "ema is 1.0"),
        ({"evaluate_every": 0, "patience": 2}, {}, "patience counts evaluations"),
        ({"patience": 2}, {"evaluate": None}, "no held-out data"),
        ({}, {"count": 0}, "no training examples"),
        ({}, {"evaluate": lambda model: {"error": math.nan}}, "held-out error is nan at step 4"),
        ({}, {"loss": lambda model, x, progress: (model(x).sum(), {str(progress.step): 1.0})}, "returned the terms"),
    ],
)
def test_nonsense_is_refused(tmp_path, recipe, others, message):
    with pytest.raises((UserError, ValueError), match=message):
        run(tmp_path, dataclasses.replace(BASE, **recipe), **others)
