"""A training loop that any model of this repository can use, and that can be stopped anywhere.

    recipe = Recipe(steps=5_000, batch_size=64, learning_rate=1e-3, schedule="cosine", ema=0.99)
    device = pick_device("auto")
    pixels = torch.rand(1_000, 784, device=device)
    model = nn.Sequential(nn.Linear(784, 32), nn.Linear(32, 784))

    def loss(model, x, progress):
        error = (model(x) - x).square().sum(1).mean()
        return error, {"nats": error / 2}

    trained = fit(model, loss, lambda i: pixels[i], 1_000, recipe, folder, seed=0, device=device)

Run again, the same lines continue an unfinished training or return the finished one at once.

**What decides the result.** The examples of a step and the noise drawn in it are functions of
(seed, step) alone: the epochs are permutations, each from (seed, epoch), laid end to end and cut
into batches, and before each step torch's generators are seeded from (seed, step). So the seed and
the step in a checkpoint are the data order and the random state, and a resumed training equals an
uninterrupted one bit for bit, on the same machine with the same number of threads. Noise must come
from torch: NumPy's generators are not touched. A time budget (`minutes`) gives repetition up, as do
the CUDA operators that `torch.use_deterministic_algorithms` lists. The caller's random state is
restored at the end.

**Checkpoints.** `last.pt` and `previous.pt` in the folder hold the model, its moving average, the
optimiser, step, seed, recipe, history, provenance, best weights and seconds; `best.pt` holds the
best weights alone, where there is patience. See `checkpoints` for how they are kept whole.

**Several processes.** Where `torch.distributed` is initialised each process takes its slice of the
same batch (`batch_size` counts them all), gradients are averaged, and the first process evaluates
and writes. Noise drawn by the functions of `processes` is then the same for any number of them, and
the result equal but for rounding; a resumed training may have another number.
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from paperlib.runs import checkpoints
from paperlib.system import distributed
from paperlib.system.devices import (
    autocast,
    compiled,
    interrupt_deferred,
    memory_explained,
    pick_device,
    progress_bar,
)
from paperlib.system.errors import UserError
from paperlib.system.files import locked, make_folder, replacing

__all__ = ["SCHEDULES", "Progress", "Recipe", "Trained", "batch_indices", "fit", "load_weights", "pick_device"]


class Progress(NamedTuple):
    """How far training is, for a loss that changes with it, such as one with a ramp of the KL.

    `step`: steps taken before this one, from 0. `fraction`: of the whole training, 0 to 1, which is
    step / steps or, where further on, the part of the time budget that is spent.
    """

    step: int
    fraction: float


# What multiplies the learning rate, given the fraction of training done, steps and decay.
SCHEDULES: dict[str, Callable[[float, int, float], float]] = {
    "constant": lambda fraction, steps, decay: 1.0,
    "cosine": lambda fraction, steps, decay: 0.5 * (1 + math.cos(math.pi * fraction)),
    "exponential": lambda fraction, steps, decay: decay ** (fraction * steps),
}


@dataclass(frozen=True)
class Recipe:
    """How to train. Raises `UserError` for a value that makes no sense.

    - `steps`, `batch_size`, `learning_rate`: of Adam, whose momenta are `betas`.
    - `schedule`: a key of `SCHEDULES`, "constant", "cosine" (to zero) or "exponential" (by `decay`
      a step); over the first `warmup` steps the rate also rises linearly.
    - `ema`: decay of the moving average of parameters and buffers, 0 for none; the t-th averaging
      uses min(ema, (1 + t) / (10 + t)), so that the start is soon forgotten.
    - `precision`: "float32", or "bfloat16" to run the loss under autocast; parameters, Adam and
      evaluation stay float32.
    - `clip_norm`: the greatest norm of the gradient, 0 for no limit.
    - `evaluate_every`: steps between rows of the history, 0 for one row at the end.
    - `patience`: evaluations without improvement after which to stop, 0 for never.
    - `minutes`: time budget, 0 for none.
    - `checkpoint_minutes`: time between checkpoints; it alone may change on resuming.
    - `compile`: run the model through `torch.compile`, where there is a C++ compiler.
    """

    steps: int
    batch_size: int
    learning_rate: float
    schedule: str = "constant"
    decay: float = 1.0
    warmup: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    ema: float = 0.0
    precision: str = "float32"
    clip_norm: float = 0.0
    evaluate_every: int = 0
    patience: int = 0
    minutes: float = 0.0
    checkpoint_minutes: float = 3.0
    compile: bool = False

    def __post_init__(self) -> None:
        choices = {"schedule": list(SCHEDULES), "precision": ["float32", "bfloat16"]}
        for name, valid in choices.items():
            if (value := getattr(self, name)) not in valid:
                raise UserError(f"unknown {name} {value!r}: choose from {', '.join(valid)}")
        positive = {"steps", "batch_size", "learning_rate", "decay"}
        for name, value in vars(self).items():
            if name in positive and not 0 < value < math.inf:
                raise UserError(f"{name} is {value}, but must be above 0")
            if isinstance(value, (int, float)) and not 0 <= value < math.inf:
                raise UserError(f"{name} is {value}, but must be 0 or more")
        if not self.ema < 1:
            raise UserError(f"ema is {self.ema}, but must be below 1")
        if self.patience and not self.evaluate_every:
            raise UserError("patience counts evaluations: set evaluate_every too, or patience to 0")

    def rate(self, progress: Progress) -> float:
        """The learning rate of the step that `progress` stands before."""
        risen = min(1.0, (progress.step + 1) / self.warmup) if self.warmup else 1.0
        factor = SCHEDULES[self.schedule](progress.fraction, self.steps, self.decay)
        return self.learning_rate * risen * factor


@dataclass(frozen=True)
class Trained:
    """What `fit` returns.

    - `model`: the model given, in evaluation mode, with the best weights where there is patience,
      else the moving average where there is one, else the last weights.
    - `history`: one dict a row: `step`, then `loss` and the loss's terms, each the mean over the
      steps since the row before, then `held_out_<name>` for each number of `evaluate`.
    - `steps`, and `seconds` over all parts of a resumed training.
    - `stopped`: why: "finished", "patience" or "minutes".
    - `provenance` as given when training started, and `resumed`: as given at each resumption.
    """

    model: nn.Module
    history: list[dict[str, float]]
    steps: int
    seconds: float
    stopped: str
    provenance: dict[str, Any]
    resumed: list[dict[str, Any]]


Loss = Callable[[nn.Module, Any, Progress], tuple[Tensor, Mapping[str, Tensor | float]]]
Evaluate = Callable[[nn.Module], Mapping[str, float]]


def fit(
    model: nn.Module,
    loss: Loss,
    batch: Callable[[Tensor], Any],
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

    - `loss(model, inputs, progress)` returns a scalar to minimise, a mean over the batch, and a
      dict of scalars to log; `progress` is a `Progress`. Only what runs through `model(...)` is
      compiled.
    - `batch(indices)` makes the inputs, on `device`, from indices (B,), int64 on the CPU, each
      below `count`. It may augment with noise from torch.
    - `evaluate(model)` returns named numbers of held-out data, the first of which is watched: lower
      is better. The model is the moving average where there is one, in evaluation mode, without
      gradients or autocast. The noise is alike at each evaluation: only the weights differ.
    - `provenance`: JSON values that say which revision trains; others are stored as their `str`.
    - `partial`: there are steps in which some parameters have no part.

    A training that is finished there is returned at once, and stderr says so; a loss that has changed since is not
    noticed. The first Ctrl-C ends the step, writes a checkpoint and raises `KeyboardInterrupt`; a second one
    raises it at once.

    Raises `UserError` when a loss, a weight or the watched number is not finite (the checkpoint
    from before it stays), when memory is short, when another process trains in `directory`, and
    when the checkpoint there is damaged in both generations, holds code, or is of another training.
    """
    device = torch.device(device)
    run = _Run(name, model, recipe, make_folder(Path(directory)), seed, count, device)
    if count < 1:
        raise UserError(f"{name}: there are no training examples")
    if recipe.batch_size % run.world:
        raise UserError(f"batch_size {recipe.batch_size} is no multiple of {run.world} processes")
    if recipe.patience and evaluate is None:
        raise UserError(f"{name}: there is no held-out data for patience; set patience to 0")
    with locked(run.directory, "training") if run.rank == 0 else nullcontext():
        _restore(run)
        if run.state.stopped and run.rank == 0:
            print(f"{name}: trained before, taken from {run.directory}", file=sys.stderr)
        if not run.state.stopped:
            run.state.provenance.append(json.dumps(dict(provenance or {}), default=str))
            _go_on(run, loss, batch, evaluate, partial)
    return _trained(run)


def _go_on(run: "_Run", loss: Loss, batch: Callable[[Tensor], Any], evaluate: Evaluate | None, partial: bool) -> None:
    """Train from where `run` is until it stops."""
    recipe, state, model, device = run.recipe, run.state, run.model, run.device
    objective: nn.Module = _Objective(compiled(model) if recipe.compile else model, loss)
    if run.world > 1:
        where = None if device.type == "cpu" else [device]
        objective = nn.parallel.DistributedDataParallel(objective, device_ids=where, find_unused_parameters=partial)
    saved_at = time.monotonic()
    began = saved_at - state.elapsed
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        memory_explained(f"lower batch_size (now {recipe.batch_size})"),
        interrupt_deferred() as interrupted,
        progress_bar(run.name, state.step, recipe.steps, recipe.minutes, hidden=run.rank > 0) as show,
    ):
        while not state.stopped:
            _step(run, objective, batch)
            state.elapsed = time.monotonic() - began
            if recipe.minutes:
                state.elapsed = _from_first(run, state.elapsed)
            if state.step >= recipe.steps:
                state.stopped = "finished"
            elif recipe.minutes and state.elapsed >= 60 * recipe.minutes:
                state.stopped = "minutes"
            every = recipe.evaluate_every
            if state.stopped or (every and state.step % every == 0):
                _add_row(run, evaluate)
            show(state.step, state.elapsed, lambda: _shown(run), force=bool(state.stopped))
            late = time.monotonic() - saved_at >= 60 * recipe.checkpoint_minutes
            asked = _any_process(run, bool(interrupted))
            if late or state.stopped or asked:
                state.elapsed = time.monotonic() - began
                _save(run)
                saved_at = time.monotonic()
            if asked and not state.stopped:
                raise KeyboardInterrupt


def load_weights(directory: Path) -> dict[str, Tensor]:
    """The weights that the training in `directory` has now, as `fit` would return them, for another one to start from.

    Raises `UserError` where there is no whole checkpoint.
    """
    saved = checkpoints.read(directory)
    if saved is None:
        raise UserError(f"there is no checkpoint in {directory} to start from")
    if best := saved["state"]["best"]:
        return best["weights"]
    average = {k.removeprefix("module."): v for k, v in saved["average"].items() if k.startswith("module.")}
    return average or saved["model"]


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


@dataclass
class _State:
    """All that a checkpoint holds besides the state dicts of model, average and optimiser."""

    step: int = 0
    elapsed: float = 0.0  # seconds
    history: list[dict[str, float]] = field(default_factory=list)
    terms: list[str] = field(default_factory=list)  # what `sums` are sums of
    sums: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    summed: int = 0  # steps in `sums`: those since the last row
    best: dict[str, Any] = field(default_factory=dict)  # value, step and weights
    waited: int = 0  # evaluations since the best
    stopped: str = ""
    provenance: list[str] = field(default_factory=list)  # JSON, the first from the start


class _Run:
    """One call of `fit`: what does not change in it, and the state that does."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        recipe: Recipe,
        directory: Path,
        seed: int,
        count: int,
        device: torch.device,
    ) -> None:
        self.name, self.recipe, self.directory = name, recipe, directory
        self.seed, self.count, self.device = seed, count, device
        self.rank, self.world = distributed.rank_and_world()
        self.model = model.to(device)
        self.average = _averaged(model, recipe.ema) if recipe.ema else None
        learned = [p for p in model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.Adam(learned, lr=recipe.learning_rate, betas=recipe.betas, fused=True)
        self.state = _State()
        self.values = torch.zeros(0)  # loss and terms of the last step

    @property
    def shown(self) -> nn.Module:
        """The model to evaluate."""
        return self.average.module if self.average else self.model


class _Objective(nn.Module):
    """The loss as a module: gradients are then averaged whatever part of the model it calls."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, inputs: Any, progress: Progress) -> tuple[Tensor, Mapping[str, Any]]:
        return self.loss(self.model, inputs, progress)


def _averaged(model: nn.Module, decay: float) -> AveragedModel:
    def move(averages: list[Tensor], currents: list[Tensor], _: Tensor) -> None:
        t = int(average.n_averaged)
        if averages[0].is_floating_point():
            get_ema_multi_avg_fn(min(decay, (1 + t) / (10 + t)))(averages, currents, t)
        else:  # counters
            torch._foreach_copy_(averages, currents)

    average = AveragedModel(model, multi_avg_fn=move, use_buffers=True)
    return average


def _step(run: _Run, objective: nn.Module, batch: Callable[[Tensor], Any]) -> None:
    recipe, state, optimiser = run.recipe, run.state, run.optimiser
    spent = state.elapsed / (60 * recipe.minutes) if recipe.minutes else 0.0
    progress = Progress(state.step, min(1.0, max(state.step / recipe.steps, spent)))
    for group in optimiser.param_groups:
        group["lr"] = recipe.rate(progress)
    indices = batch_indices(run.seed, run.count, recipe.batch_size, state.step)
    indices = indices.chunk(run.world)[run.rank]

    run.model.train()
    _set_seed(run, _NOISE, state.step, 0)
    with distributed.share(run.rank, run.world):
        inputs = batch(indices)
        with autocast(run.device, recipe.precision):
            value, terms = objective(inputs, progress)
    optimiser.zero_grad(set_to_none=True)
    value.backward()
    _add_to_sums(run, value, terms)
    if _may_wait(run):
        _refuse_non_finite(run)
    if recipe.clip_norm:
        nn.utils.clip_grad_norm_(run.model.parameters(), recipe.clip_norm)
    optimiser.step()
    if run.average:
        run.average.update_parameters(run.model)
    state.step += 1


def _set_seed(run: _Run, *key: int) -> None:
    mixed = _mixed(run.seed, *key)
    torch.default_generator.manual_seed(mixed)
    if run.device.type == "cuda":
        with torch.cuda.device(run.device):
            torch.cuda.manual_seed(mixed)


def _add_to_sums(run: _Run, value: Tensor, terms: Mapping[str, Tensor | float]) -> None:
    state, names = run.state, ["loss", *(term for term in terms if term != "loss")]
    scalars = [value, *(terms[term] for term in names[1:])]
    scalars = [torch.as_tensor(scalar, device=run.device).detach() for scalar in scalars]
    run.values = torch.stack([scalar.double().reshape(()) for scalar in scalars])
    if run.world > 1:
        dist.all_reduce(run.values)
        run.values /= run.world
    if not state.summed:
        state.terms, state.sums = names, torch.zeros_like(run.values)
    if state.terms != names:
        raise ValueError(f"the loss returned the terms {names}, at the step before {state.terms}")
    state.sums, state.summed = state.sums + run.values, state.summed + 1


def _refuse_non_finite(run: _Run, weights: bool = False) -> None:
    """Raise `UserError` if a loss since the last row, or with `weights` a weight, is not finite."""
    state, what = run.state, ""
    if state.summed and not math.isfinite(state.sums[0].item()):
        what = "the loss is"
    elif weights and not all(bool(p.isfinite().all()) for p in run.model.parameters()):
        what = "the weights are"
    if what:
        pairs = zip(state.terms, run.values.tolist(), strict=True)
        numbers = ", ".join(f"{term} {number:.6g}" for term, number in pairs)
        last = run.directory / "last.pt"
        kept = f"{last} is from before it" if last.exists() else "there is no checkpoint yet"
        raise UserError(
            f"{run.name}: {what} not finite at step {state.step} ({numbers}): lower learning_rate "
            f"or set clip_norm; {kept}"
        )


def _add_row(run: _Run, evaluate: Evaluate | None) -> None:
    """Evaluate, add a row to the history, keep the best weights, and stop where patience ends."""
    _refuse_non_finite(run)
    state, measured = run.state, {}
    if evaluate and run.rank == 0:
        _set_seed(run, _EVALUATION)
        run.shown.eval()
        with torch.no_grad():
            measured = {key: float(number) for key, number in evaluate(run.shown).items()}
    measured = _from_first(run, measured)
    for watched, value in list(measured.items())[:1]:
        if not math.isfinite(value):
            raise UserError(f"{run.name}: held-out {watched} is {value} at step {state.step}")
        if not run.recipe.patience:
            continue
        if not state.best or value < state.best["value"]:
            weights = {k: v.detach().cpu().clone() for k, v in run.shown.state_dict().items()}
            state.best, state.waited = {"value": value, "step": state.step, "weights": weights}, 0
        else:
            state.waited += 1
        if state.waited >= run.recipe.patience:
            state.stopped = state.stopped or "patience"
    row = {"step": state.step, **_means(state)}
    state.history.append(row | {f"held_out_{key}": value for key, value in measured.items()})
    state.summed = 0


def _means(state: _State) -> dict[str, float]:
    return dict(zip(state.terms, (state.sums / state.summed).tolist(), strict=True))


def _shown(run: _Run) -> dict[str, float]:
    row = run.state.history[-1] if run.state.history else {}
    held_out = {key: value for key, value in row.items() if key.startswith("held_out_")}
    return {"loss": run.values[0].item()} | dict(list(held_out.items())[:1])


def _may_wait(run: _Run) -> bool:
    """On a GPU, reading a number waits for all work queued before it: there, every tenth step."""
    return run.device.type == "cpu" or run.state.step % 10 == 9


def _any_process(run: _Run, asked: bool) -> bool:
    """Whether a process is asked to stop; several then do so after the same step, else one would wait for the rest."""
    if run.world == 1:
        return asked
    if not _may_wait(run):
        return False
    flag = torch.tensor(float(asked), device=run.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def _from_first(run: _Run, value: Any) -> Any:
    """`value` as the first process has it."""
    values = [value]
    if run.world > 1:
        dist.broadcast_object_list(values, device=run.device)
    return values[0]


def _trained(run: _Run) -> Trained:
    state = run.state
    if state.best:
        run.model.load_state_dict(state.best["weights"])
    elif run.average:
        run.model.load_state_dict(run.average.module.state_dict())
    first, *later = (json.loads(text) for text in state.provenance)
    return Trained(run.model.eval(), state.history, state.step, state.elapsed, state.stopped, first, later)


def _identity(run: _Run) -> dict[str, Any]:
    """What must be the same for a checkpoint to be continued."""
    settings = {**dataclasses.asdict(run.recipe), "betas": list(run.recipe.betas)}
    del settings["checkpoint_minutes"]
    return {**settings, "seed": run.seed, "count": run.count}


def _save(run: _Run) -> None:
    _refuse_non_finite(run, weights=True)
    if run.rank > 0:
        return
    state, best = run.state, run.directory / "best.pt"
    if state.best:
        with replacing(best) as partial:
            checkpoints.save(partial, state.best)
    content = {
        "identity": _identity(run),
        "model": run.model.state_dict(),
        "average": run.average.state_dict() if run.average else {},
        "optimiser": run.optimiser.state_dict(),
        "state": dict(vars(state)),
    }
    checkpoints.write(run.directory, content)


def _restore(run: _Run) -> None:
    """Continue from the checkpoint, if any; `UserError` if it is of another training."""
    saved = checkpoints.read(run.directory)
    if saved is None:
        return
    differ = checkpoints.differences(saved["identity"], _identity(run))
    shapes = [checkpoints.shapes(weights) for weights in (saved["model"], run.model.state_dict())]
    differ += checkpoints.differences(*shapes)
    if differ:
        more = f" and {len(differ) - 4} more" if len(differ) > 4 else ""
        raise UserError(
            f"{run.directory} holds another training ({'; '.join(differ[:4])}{more}): use another "
            f"folder, or delete it or run with --fresh to start over"
        )
    run.model.load_state_dict(saved["model"])
    run.optimiser.load_state_dict(saved["optimiser"])
    if run.average:
        run.average.load_state_dict(saved["average"])
    run.state = _State(**saved["state"])
    run.state.sums = run.state.sums.to(run.device)
