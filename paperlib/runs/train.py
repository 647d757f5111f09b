"""A training loop that any model of this repository can use, and that can be stopped anywhere.

    recipe = Recipe(steps=5_000, batch_size=64, learning_rate=1e-3, schedule="cosine", ema=0.99)
    pixels = torch.rand(1_000, 784)
    model = nn.Sequential(nn.Linear(784, 32), nn.Linear(32, 784))

    def loss(model, x, progress):
        error = (model(x) - x).square().sum(1).mean()
        return error, {"nats": error / 2}

    trained = fit(model, loss, lambda i: pixels[i], 1_000, recipe, folder, seed=0, device="cpu")

Run again, the same lines continue an unfinished training or return the finished one at once.

**What decides the result.** The examples of a step and the noise drawn in it are functions of (seed, step) alone: the
epochs are permutations, each from (seed, epoch), laid end to end and cut into batches, and before each step torch's
generators are seeded from (seed, step). So the seed and the step in a checkpoint are the data order and the random
state, and a resumed training equals an uninterrupted one bit for bit, on the same machine with the same number of
threads. Noise must come from torch: NumPy's generators are not touched. The CUDA operators that
`torch.use_deterministic_algorithms` lists give repetition up. The caller's random state is restored at the end.

**Checkpoints.** `last.pt` and `previous.pt` in the folder hold the model, its moving average, the optimiser, step,
seed, recipe, history, provenance, best weights and seconds; see `checkpoints`.

**Several processes.** Where `torch.distributed` is initialised each process takes its slice of the same batch
(`batch_size` counts them all), gradients are averaged, and the first process evaluates and writes. Noise drawn by the
functions of `distributed` is then the same for any number of them, and the result equal but for rounding; a resumed
training may have another number.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from paperlib.runs.provenance import source_hash
from paperlib.runs.recipe import SCHEDULES, Progress, Recipe, Trained
from paperlib.runs.training_state import State, Training, load_weights, restore, result, save
from paperlib.system import distributed
from paperlib.system.devices import autocast, compiled, interrupt_deferred, oom_as_user_error, progress_bar
from paperlib.system.errors import UserError
from paperlib.system.files import locked, make_folder

__all__ = ["SCHEDULES", "Progress", "Recipe", "Trained", "batch_indices", "fit", "load_weights"]

Loss = Callable[[nn.Module, Any, Progress], tuple[Any, ...]]
Evaluate = Callable[[nn.Module], Mapping[str, float]]
Batch = Callable[[Tensor], Any]


def fit(
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    count: int,
    recipe: Recipe,
    directory: Path | str,
    *,
    seed: int,
    device: torch.device | str,
    evaluate: Evaluate | None = None,
    provenance: Mapping[str, Any] | None = None,
    name: str = "training",
    partial: bool = False,
) -> Trained:
    """Train `model` in place, continuing from the checkpoint in `directory` where there is one.

    - `loss(model, inputs, progress)` returns a scalar to minimise, a mean over the batch, and a dict of scalars to log.
      Only what runs through `model(...)` is compiled. With several `recipe.updates` it is called for each update of
      the batch, and the third value that it returns are the inputs of the next.
    - `batch(indices)` makes the inputs, on `device`, from int64 indices (B,) on the CPU, each below `count`. It may
      augment with noise from torch.
    - `evaluate(model)` returns named numbers of held-out data, the first of which is watched: lower is better. The
      model is `Training.evaluated`, in evaluation mode, without gradients or autocast; the noise is always the same.
    - `provenance`: JSON values that say which revision trains; others are stored as their `str`.
    - `partial`: there are updates in which some parameters have no part.

    A training that is finished there is returned at once, and stderr says so. One of other settings, or of other code
    in the modules of the loss and of the model's layers, is refused. The first Ctrl-C ends the step, writes a
    checkpoint and raises `KeyboardInterrupt`, a second one at once.

    Raises `UserError` when a loss, a weight or the watched number is not finite (the checkpoint from before it stays),
    when memory is short, when another process trains in `directory`, and for a checkpoint that cannot be continued.
    """
    source = source_hash([loss, *map(type, model.modules())])
    training = Training(name, model, recipe, make_folder(Path(directory)), seed, count, torch.device(device), source)
    _refuse_impossible(training, evaluate)
    with locked(training.directory, "training") if training.rank == 0 else nullcontext():
        restore(training)
        if not training.state.stopped:
            training.state.provenance.append(json.dumps(dict(provenance or {}), default=str))
            _train(training, loss, batch, evaluate, partial)
        elif training.rank == 0:
            print(f"{name}: trained before, taken from {training.directory}", file=sys.stderr)
    return result(training)


def _refuse_impossible(training: Training, evaluate: Evaluate | None) -> None:
    if training.count < 1:
        raise UserError(f"{training.name}: there are no training examples")
    if training.recipe.batch_size % training.world:
        raise UserError(f"batch_size {training.recipe.batch_size} is no multiple of {training.world} processes")
    if training.recipe.patience and evaluate is None:
        raise UserError(f"{training.name}: there is no held-out data for patience; set patience to 0")


def _train(training: Training, loss: Loss, batch: Batch, evaluate: Evaluate | None, partial: bool) -> None:
    """Take steps until `training` is stopped."""
    recipe, state, device = training.recipe, training.state, training.device
    objective: nn.Module = _Objective(compiled(training.model) if recipe.compile else training.model, loss)
    if training.world > 1:
        where = None if device.type == "cpu" else [device]
        objective = nn.parallel.DistributedDataParallel(objective, device_ids=where, find_unused_parameters=partial)
    saved_at = time.monotonic()
    began = saved_at - state.elapsed
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        oom_as_user_error(f"lower batch_size (now {recipe.batch_size})"),
        interrupt_deferred() as interrupted,
        progress_bar(training.name, state.step, recipe.steps, hidden=training.rank > 0) as show,
    ):
        while not state.stopped:
            _step(training, objective, batch)
            state.elapsed = time.monotonic() - began
            if state.step >= recipe.steps:
                state.stopped = "finished"
            if state.stopped or (recipe.evaluate_every and state.step % recipe.evaluate_every == 0):
                _add_row(training, evaluate)
            show(state.step, state.elapsed, lambda: _shown(training), force=bool(state.stopped))
            late = time.monotonic() - saved_at >= 60 * recipe.checkpoint_minutes
            asked = _any_process(training, bool(interrupted))
            if late or state.stopped or asked:
                state.elapsed = time.monotonic() - began
                _refuse_non_finite(training, weights=True)
                if training.rank == 0:
                    save(training)
                saved_at = time.monotonic()
            if asked and not state.stopped:
                raise KeyboardInterrupt


def batch_indices(seed: int, count: int, batch_size: int, step: int) -> Tensor:
    """Which of `count` examples a step sees, (batch_size,) int64: epochs laid end to end, cut."""
    first, end = step * batch_size, (step + 1) * batch_size
    parts = []
    while first < end:
        epoch, start = divmod(first, count)
        parts.append(_permutation(seed, epoch, count)[start : start + end - first])
        first += len(parts[-1])
    return torch.cat(parts)


# Separate streams of random numbers.
_ORDER, _NOISE, _EVALUATION = 0, 1, 2


def _mixed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(_mixed(_ORDER, seed, epoch))
    return torch.randperm(count, generator=generator)


class _Objective(nn.Module):
    """The loss as a module: gradients are then averaged whatever part of the model it calls."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, inputs: Any, progress: Progress) -> tuple[Any, ...]:
        return self.loss(self.model, inputs, progress)


def _step(training: Training, objective: nn.Module, batch: Batch) -> None:
    recipe, state, optimiser = training.recipe, training.state, training.optimiser
    progress = recipe.progress(state.step)
    for group in optimiser.param_groups:
        group["lr"] = recipe.rate(progress)
    indices = batch_indices(training.seed, training.count, recipe.batch_size, state.step)
    indices = indices.chunk(training.world)[training.rank]

    training.model.train()
    _set_seed(training, _NOISE, state.step, 0)
    with distributed.share(training.rank, training.world):
        following = [batch(indices)]
        for update in range(recipe.updates):
            with autocast(training.device, recipe.precision):
                value, terms, *following = objective(*following, progress._replace(update=update))
            optimiser.zero_grad(set_to_none=True)
            value.backward()
            _add_to_sums(training, value, terms)
            if update == recipe.updates - 1 and _may_wait(training):
                _refuse_non_finite(training)
            if recipe.clip_norm:
                nn.utils.clip_grad_norm_(training.model.parameters(), recipe.clip_norm)
            optimiser.step()
    if training.average:
        training.average.update(training.model)
    state.step += 1
    state.summed += 1


def _set_seed(training: Training, *key: int) -> None:
    mixed = _mixed(training.seed, *key)
    torch.default_generator.manual_seed(mixed)
    if training.device.type == "cuda":
        with torch.cuda.device(training.device):
            torch.cuda.manual_seed(mixed)


def _add_to_sums(training: Training, value: Tensor, terms: Mapping[str, Tensor | float]) -> None:
    state, names = training.state, ["loss", *(term for term in terms if term != "loss")]
    scalars = [value, *(terms[term] for term in names[1:])]
    training.values = torch.stack([_double(scalar, training.device) for scalar in scalars])
    if training.world > 1:
        dist.all_reduce(training.values)
        training.values /= training.world
    if not len(state.sums):
        state.terms, state.sums = names, torch.zeros_like(training.values)
    if state.terms != names:
        raise ValueError(f"the loss returned the terms {names}, at the step before {state.terms}")
    state.sums = state.sums + training.values


def _double(scalar: Tensor | float, device: torch.device) -> Tensor:
    """Without dimensions, on `device`; a number is filled in there, as copying it would have a GPU wait."""
    if torch.is_tensor(scalar):
        return scalar.detach().to(device, torch.float64).reshape(())
    return torch.full((), scalar, dtype=torch.float64, device=device)


def _refuse_non_finite(training: Training, weights: bool = False) -> None:
    """Raise `UserError` if a loss since the last row, or with `weights` a weight, is not finite."""
    state, what = training.state, ""
    if len(state.sums) and not math.isfinite(state.sums[0].item()):
        what = "the loss is"
    elif weights and not all(bool(p.isfinite().all()) for p in training.model.parameters()):
        what = "the weights are"
    if what:
        pairs = zip(state.terms, training.values.tolist(), strict=True)
        numbers = ", ".join(f"{term} {number:.6g}" for term, number in pairs)
        last = training.directory / "last.pt"
        kept = f"{last} is from before it" if last.exists() else "there is no checkpoint yet"
        raise UserError(
            f"{training.name}: {what} not finite at step {state.step} ({numbers}): lower learning_rate "
            f"or set clip_norm; {kept}"
        )


def _add_row(training: Training, evaluate: Evaluate | None) -> None:
    """Evaluate, and add a row to the history."""
    _refuse_non_finite(training)
    state, measured = training.state, {}
    if evaluate and training.rank == 0:
        _set_seed(training, _EVALUATION)
        training.evaluated.eval()
        with torch.no_grad():
            measured = {key: float(number) for key, number in evaluate(training.evaluated).items()}
    measured = _from_first(training, measured)
    if measured:
        _watch(training, *next(iter(measured.items())))
    row = {"step": state.step, **_means(state)}
    state.history.append(row | {f"held_out_{key}": value for key, value in measured.items()})
    state.sums, state.summed = state.sums[:0], 0


def _watch(training: Training, watched: str, value: float) -> None:
    """Refuse a held-out value that is not finite; with patience, keep the best weights and stop where it ends."""
    state = training.state
    if not math.isfinite(value):
        raise UserError(f"{training.name}: held-out {watched} is {value} at step {state.step}")
    if not training.recipe.patience:
        return
    if not state.best or value < state.best["value"]:
        weights = {k: v.detach().cpu().clone() for k, v in training.evaluated.state_dict().items()}
        state.best, state.waited = {"value": value, "step": state.step, "weights": weights}, 0
    else:
        state.waited += 1
    if state.waited >= training.recipe.patience:
        state.stopped = state.stopped or "patience"


def _means(state: State) -> dict[str, float]:
    return dict(zip(state.terms, (state.sums / state.summed).tolist(), strict=True))


def _shown(training: Training) -> dict[str, float]:
    row = training.state.history[-1] if training.state.history else {}
    held_out = {key: value for key, value in row.items() if key.startswith("held_out_")}
    return {"loss": training.values[0].item()} | dict(list(held_out.items())[:1])


def _may_wait(training: Training) -> bool:
    """On a GPU, reading a number waits for all work queued before it: there, every tenth step."""
    return training.device.type == "cpu" or training.state.step % 10 == 9


def _any_process(training: Training, asked: bool) -> bool:
    """Whether a process is asked to stop; several then do so after the same step, else one would wait for the rest."""
    if training.world == 1:
        return asked
    if not _may_wait(training):
        return False
    flag = torch.tensor(float(asked), device=training.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def _from_first(training: Training, value: Any) -> Any:
    """`value` as the first process has it."""
    values = [value]
    if training.world > 1:
        dist.broadcast_object_list(values, device=training.device)
    return values[0]
