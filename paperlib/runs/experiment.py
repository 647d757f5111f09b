"""The interface between the experiment of a notebook and all that runs or reports it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from paperlib.runs import presets, recorded, run
from paperlib.runs.claims import Claim
from paperlib.runs.estimate import Estimate
from paperlib.runs.run import Run
from paperlib.system.devices import pick_device
from paperlib.system.errors import UserError

RECORDED = "recorded"  # the preset that shows the best recorded run and trains nothing


@dataclass(frozen=True)
class Experiment:
    """The experiment behind one notebook.

    - `notebook`: its file's name without the ending.
    - `presets`: settings by name, of one frozen dataclass, the best last.
    - `datasets`: what the setting `dataset` may name.
    - `claims`: by key, see `Claim`.
    - `recompute(run)`: the numbers that decide each claim, by claim and name, from what is recorded for `run`.
    - `fit(run)`: train all models of a run without its notebook, by name; None where there is no such command (01, 02).
    """

    notebook: str
    presets: Mapping[str, Any]
    claims: Mapping[str, Claim]
    recompute: Callable[[Run], Mapping[str, Mapping[str, Estimate]]]
    fit: Callable[[Run], Mapping[str, Any]] | None = None
    datasets: tuple[str, ...] = ()

    def settings(self, preset: str, overrides: Mapping[str, Any] | None = None) -> Any:
        """The preset's settings with `overrides`; for `RECORDED` those of the best recorded run.

        Raises `UserError` for a preset, setting or data set not known.
        """
        if preset == RECORDED:
            if overrides:
                raise UserError(f"{RECORDED} trains nothing: drop overrides, or choose a preset that trains")
            return self.presets[recorded.best(self.notebook, self.presets)]
        if preset not in self.presets:
            raise UserError(f"unknown preset {preset!r}: choose from {', '.join([RECORDED, *self.presets])}")
        settings = presets.choose(self.presets, preset, overrides)
        if self.datasets and settings.dataset not in self.datasets:
            raise UserError(f"unknown data set {settings.dataset!r}: choose from {', '.join(self.datasets)}")
        return settings

    def run_name(self, preset: str, seed: int, overrides: Mapping[str, Any]) -> str:
        """Where `start` puts the run, below the folder of runs."""
        settings = self.settings(preset, overrides)
        return run.run_name(self.notebook, preset, settings, seed, preset == RECORDED)

    def device(self, preset: str, name: str) -> torch.device:
        """What `pick_device` makes of `name`. Raises `UserError` where the CPU, not asked for, would train a preset
        that is made for CUDA.
        """
        device = pick_device(name)
        made_for_cuda = preset in ("gpu", "paper") and self.presets[preset] != self.presets["cpu"]
        if made_for_cuda and device.type == "cpu" and name != "cpu":
            raise UserError(
                f"preset {preset!r} is made for CUDA, which torch cannot use here: choose preset cpu, or ask for the "
                f"CPU with device cpu"
            )
        return device

    def start(
        self, preset: str = RECORDED, seed: int = 0, device: str = "auto", overrides: Mapping[str, Any] | None = None
    ) -> Run:
        """Open the run that the notebook's parameters ask for. Raises `UserError` for any that are not known."""
        overrides = {} if overrides is None else overrides
        if not isinstance(overrides, Mapping):
            raise UserError(
                f"overrides is {overrides!r}, but takes settings by name, such as {{'steps': 500}} "
                f"(papermill: -y 'overrides: {{steps: 500}}')"
            )
        settings, place = self.settings(preset, overrides), str(self.device(preset, device))
        if preset == RECORDED:
            best = recorded.best(self.notebook, self.presets)
            return run.start(self.notebook, best, settings, seed, place, recorded=True)
        return run.start(self.notebook, preset, settings, seed, place)

    def recorded_run(self, device: str = "auto") -> Run:
        """The best recorded run, without a folder. Raises `UserError` where nothing is recorded."""
        best = recorded.best(self.notebook, self.presets)
        return Run(self.notebook, best, self.presets[best], 0, str(pick_device(device)), recorded=True)
