"""Runs and what they leave behind: arrays, figures, claims with verdicts, provenance.

A run writes to `runs/<notebook>/<preset>-<hash of settings and seed>/`:

| file | content |
| --- | --- |
| `<model>/last.pt`, ... | checkpoints, see `checkpoints` |
| `arrays.npz` | all that the figures draw, and nothing else is drawn |
| `<content-name>.png` | the figures |
| `metrics.json` | claims with verdicts, and further numbers |
| `run.json` | provenance; written last, so a run that has one is finished |
| `weights.safetensors` | the models to be recorded, in half precision |
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paperlib.runs.claims import Claim, Verdicts, decide
from paperlib.runs.estimate import Estimate
from paperlib.runs.provenance import describe_code, describe_device, versions
from paperlib.system import devices, files
from paperlib.system.errors import UserError


@dataclass(frozen=True)
class Run:
    """One run of one notebook: what was asked for, and the folder where its files go."""

    notebook: str
    preset: str
    settings: Any
    seed: int
    device: str
    recorded: bool = False  # shows what is recorded for `preset`, and trains nothing
    started: float = field(default_factory=time.time)

    @property
    def name(self) -> str:
        return run_name(self.notebook, self.preset, self.settings, self.seed, self.recorded)

    @property
    def directory(self) -> Path:
        return files.runs_root() / self.name

    def generator(self, stream: int, on_device: bool = False) -> torch.Generator:
        """`devices.stream` of the run's seed, on the CPU or on its device."""
        return devices.stream(self.seed, stream, self.device if on_device else "cpu")

    def seeded(self) -> AbstractContextManager[None]:
        """Within, torch's global generators start from the run's seed, see `devices.seeded`."""
        return devices.seeded(self.seed, self.device)


def run_name(notebook: str, preset: str, settings: Any, seed: int, recorded: bool = False) -> str:
    """`<notebook>/<preset>-<hash of settings and seed>`, or `<notebook>/recorded`.

    Raises `UserError` for a seed that means nothing.
    """
    if type(seed) is not int or not 0 <= seed < 2**32:  # scikit-learn's limit
        raise UserError(f"seed is {seed!r}, but takes a whole number from 0 to {2**32 - 1}")
    if recorded:
        return f"{notebook}/recorded"
    identity = json.dumps([dataclasses.asdict(settings), seed], sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    return f"{notebook}/{preset}-{digest}"


def start(notebook: str, preset: str, settings: Any, seed: int, device: str, recorded: bool = False) -> Run:
    """Open a run and make its folder. Raises `UserError` as `run_name` does."""
    run = Run(notebook, preset, settings, seed, device, recorded)
    files.make_folder(run.directory)
    return run


def save_arrays(run: Run, **arrays: Any) -> dict[str, np.ndarray]:
    """Write `arrays.npz` and return its content, as a later reader will find it."""
    arrays = {name: a.numpy(force=True) if torch.is_tensor(a) else np.asarray(a) for name, a in arrays.items()}
    with files.atomic_write(run.directory / "arrays.npz") as file:
        np.savez_compressed(file, **arrays)
    return load_arrays(run.directory)


def load_arrays(directory: Path) -> dict[str, np.ndarray]:
    with np.load(directory / "arrays.npz") as archive:
        return dict(archive)


def save_figure(run: Run, figure: Any, name: str) -> Any:
    """Write `<name>.png` into the run's folder and return the figure, closed, so that a cell shows it once."""
    from matplotlib import pyplot

    with files.atomic_write(run.directory / f"{name}.png") as file:
        figure.savefig(file, metadata={"Software": None})
    pyplot.close(figure)
    return figure


def save_animation(run: Run, frames: Sequence[Any], name: str) -> Any:
    """Write Pillow images as an animated `<name>.png`, five a second without end, and return it for a cell to show."""
    from IPython.display import Image

    path = run.directory / f"{name}.png"
    with files.atomic_write(path) as file:
        frames[0].save(file, format="png", save_all=True, append_images=frames[1:], duration=200, loop=0)
    return Image(path.read_bytes(), format="png")


def finish(
    run: Run,
    claims: Mapping[str, Claim],
    measured: Mapping[str, Mapping[str, Estimate]],
    numbers: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    trainings: Mapping[str, Any] | None = None,
) -> Verdicts:
    """Judge the claims by the quantities `measured`, write `metrics.json` and then `run.json`; the verdicts.

    `numbers` holds whatever else is worth keeping, `data` describes the data set, `trainings` each training by name.
    """
    verdicts = decide(run.preset, claims, measured)
    files.write_json(run.directory / "metrics.json", {"claims": verdicts, "numbers": dict(numbers or {})})
    provenance = {
        "notebook": run.notebook,
        "preset": run.preset,
        "settings": dataclasses.asdict(run.settings),
        "seed": run.seed,
        "recorded": run.recorded,
        "device": describe_device(run.device),
        "data": dict(data or {}),
        "trainings": dict(trainings or {}),
        **describe_code(),
        "versions": versions(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(run.started)),
        "seconds": round(time.time() - run.started, 1),
    }
    files.write_json(run.directory / "run.json", provenance)
    return verdicts
