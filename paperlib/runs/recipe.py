"""How to train, and what a training returns."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from paperlib.system.errors import UserError


class Progress(NamedTuple):
    """How far training is, for a loss that changes with it, as under KL annealing.

    `step`: steps taken before this one, from 0. `fraction`: step / steps, in [0, 1). `update`: which of the updates of
    the step's batch, from 0.
    """

    step: int
    fraction: float
    update: int = 0


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
    - `schedule`: a key of `SCHEDULES`, "constant", "cosine" (to zero) or "exponential" (by `decay` per step); over the
      first `warmup` steps the rate also rises linearly.
    - `ema`: decay of the moving average of parameters and buffers, 0 for none; the t-th averaging uses
      min(ema, (1 + t) / (10 + t)), so that the start is soon forgotten.
    - `precision`: "float32", or "bfloat16" to run the loss under autocast; all else stays float32.
    - `clip_norm`: the greatest norm of the gradient, 0 for no limit.
    - `evaluate_every`: steps between rows of the history, 0 for one row at the end.
    - `updates`: of the weights, from each batch.
    - `patience`: evaluations without improvement after which to stop, 0 for never.
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
    updates: int = 1
    evaluate_every: int = 0
    patience: int = 0
    checkpoint_minutes: float = 3.0
    compile: bool = False

    def __post_init__(self) -> None:
        choices = {"schedule": list(SCHEDULES), "precision": ["float32", "bfloat16"]}
        for name, valid in choices.items():
            if (value := getattr(self, name)) not in valid:
                raise UserError(f"unknown {name} {value!r}: choose from {', '.join(valid)}")
        positive = {"steps", "updates", "batch_size", "learning_rate", "decay"}
        for name, value in vars(self).items():
            if name in positive and not 0 < value < math.inf:
                raise UserError(f"{name} is {value}, but must be above 0")
            if isinstance(value, (int, float)) and not 0 <= value < math.inf:
                raise UserError(f"{name} is {value}, but must be 0 or more")
        if not self.ema < 1:
            raise UserError(f"ema is {self.ema}, but must be below 1")
        if self.patience and not self.evaluate_every:
            raise UserError("patience counts evaluations: set evaluate_every too, or patience to 0")

    def progress(self, step: int) -> Progress:
        return Progress(step, step / self.steps)

    def rate(self, progress: Progress) -> float:
        """The learning rate of the step that `progress` stands before."""
        rise = min(1.0, (progress.step + 1) / self.warmup) if self.warmup else 1.0
        return self.learning_rate * rise * SCHEDULES[self.schedule](progress.fraction, self.steps, self.decay)


@dataclass(frozen=True)
class Trained:
    """What `train.fit` returns.

    - `model`: the model given, in evaluation mode, with the best weights where there is patience, otherwise the moving
      average where there is one, otherwise the last weights.
    - `history`: one dict per row: `step`, then `loss` and the loss's terms, each the mean over the steps since the row
      before, then `held_out_<name>` for each number of `evaluate`.
    - `steps`, and `seconds` over all parts of a resumed training.
    - `stopped`: why: "finished" or "patience".
    - `provenance` as given when training started, and `resumed`: as given at each resumption.
    """

    model: nn.Module
    history: list[dict[str, float]]
    steps: int
    seconds: float
    stopped: str
    provenance: dict[str, Any]
    resumed: list[dict[str, Any]]
