"""The state of a training: what a step changes, what a checkpoint holds, and how a training continues from it."""

import copy
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paperlib.runs import checkpoints
from paperlib.runs.recipe import Recipe, Trained
from paperlib.system import distributed
from paperlib.system.errors import UserError


@dataclass
class State:
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


class Training:
    """One call of `train.fit`: what does not change in it, and the state that does."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        recipe: Recipe,
        directory: Path,
        seed: int,
        count: int,
        device: torch.device,
        source: str,
    ) -> None:
        self.name, self.recipe, self.directory = name, recipe, directory
        self.seed, self.count, self.device, self.source = seed, count, device, source
        self.rank, self.world = distributed.rank_and_world()
        self.model = model.to(device)
        self.average = MovingAverage(model, recipe.ema) if recipe.ema else None
        learned = [p for p in model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.Adam(learned, lr=recipe.learning_rate, betas=recipe.betas, fused=True)
        self.state = State()
        self.values = torch.zeros(0)  # loss and terms of the last step

    @property
    def evaluated(self) -> nn.Module:
        """The model to evaluate: the moving average where there is one."""
        return self.average.module if self.average else self.model


class MovingAverage(nn.Module):
    """Of a model's parameters and buffers, see `Recipe.ema`. Torch's own has a GPU wait for its counter."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.module, self.decay = copy.deepcopy(model), decay
        self.register_buffer("n_averaged", torch.tensor(0))  # stays on the CPU

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the averages towards the weights that `model` has now; the first time, all the way."""
        t = int(self.n_averaged)
        averages, currents = ([*one.parameters(), *one.buffers()] for one in (self.module, model))
        by_type: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for average, current in zip(averages, currents, strict=True):
            into, of = by_type.setdefault(average.dtype, ([], []))
            into.append(average)
            of.append(current)
        for dtype, (into, of) in by_type.items():
            if t and dtype.is_floating_point:
                torch._foreach_lerp_(into, of, 1 - min(self.decay, (1 + t) / (10 + t)))
            else:  # counters too are copied
                torch._foreach_copy_(into, of)
        self.n_averaged += 1


def save(training: Training) -> None:
    """Write a checkpoint. Raises `UserError` as `checkpoints.write` does."""
    content = {
        "identity": _identity(training),
        "model": training.model.state_dict(),
        "average": training.average.state_dict() if training.average else {},
        "optimiser": training.optimiser.state_dict(),
        "state": dict(vars(training.state)),
    }
    checkpoints.write(training.directory, content)


def restore(training: Training) -> None:
    """Continue from the checkpoint, if any; `UserError` if it is of another training."""
    saved = checkpoints.read(training.directory)
    if saved is None:
        return
    differences = checkpoints.differences(saved["identity"], _identity(training))
    shapes = [checkpoints.shapes(weights) for weights in (saved["model"], training.model.state_dict())]
    differences += checkpoints.differences(*shapes)
    if differences:
        more = f" and {len(differences) - 4} more" if len(differences) > 4 else ""
        raise UserError(
            f"{training.directory} holds another training ({'; '.join(differences[:4])}{more}): use another folder, "
            f"or delete it or run with --fresh to start over"
        )
    training.model.load_state_dict(saved["model"])
    training.optimiser.load_state_dict(saved["optimiser"])
    if training.average:
        training.average.load_state_dict(saved["average"])
    training.state = State(**saved["state"])
    training.state.sums = training.state.sums.to(training.device)


def _identity(training: Training) -> dict[str, Any]:
    """What must be the same for a checkpoint to be continued."""
    settings = {**dataclasses.asdict(training.recipe), "betas": list(training.recipe.betas)}
    del settings["checkpoint_minutes"]
    return {**settings, "seed": training.seed, "count": training.count, "code": training.source}


def result(training: Training) -> Trained:
    """What a training that has stopped returns."""
    state = training.state
    if state.best:
        training.model.load_state_dict(state.best["weights"])
    elif training.average:
        training.model.load_state_dict(training.average.module.state_dict())
    first, *later = (json.loads(text) for text in state.provenance)
    return Trained(training.model.eval(), state.history, state.step, state.elapsed, state.stopped, first, later)


def load_weights(directory: Path) -> dict[str, Tensor]:
    """The weights that `train.fit` would return now for `directory`; `UserError` without a whole checkpoint there."""
    saved = checkpoints.read(directory)
    if saved is None:
        raise UserError(f"there is no checkpoint in {directory} to start from")
    if best := saved["state"]["best"]:
        return best["weights"]
    average = {k.removeprefix("module."): v for k, v in saved["average"].items() if k.startswith("module.")}
    return average or saved["model"]
