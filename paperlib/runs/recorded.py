"""What is kept of a run in the repository: `results/<preset>/<notebook>/` and `figures/<preset>/`."""

import dataclasses
import json
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paperlib.runs.claims import Claim, Verdicts
from paperlib.runs.estimate import Estimate
from paperlib.runs.recipe import Trained
from paperlib.runs.run import Run, finish, load_arrays
from paperlib.runs.training_state import load_weights
from paperlib.system import files
from paperlib.system.errors import UserError


def conclude(
    run: Run,
    claims: Mapping[str, Claim],
    measured: Mapping[str, Mapping[str, Estimate]],
    numbers: Mapping[str, Any],
    data: Mapping[str, Any],
    trained: Mapping[str, Trained],
    kept: torch.nn.Module,
) -> Verdicts:
    """`run.finish` for a run that trains, after writing the weights of `kept`, the model to be recorded."""
    if run.weights == "train":
        save_weights(run, kept.state_dict())
    trainings = {
        name: {"steps": one.steps, "seconds": round(one.seconds, 1), **one.provenance, "resumed": one.resumed}
        for name, one in trained.items()
    }
    return finish(run, claims, measured, numbers, data, trainings)


def save_weights(run: Run, state: Mapping[str, torch.Tensor]) -> None:
    """Write `weights.safetensors`: float32 in half precision, settings and seed in its header."""
    header = {"settings": json.dumps(dataclasses.asdict(run.settings), sort_keys=True), "seed": str(run.seed)}
    _write(run.directory / "weights.safetensors", state, header)


def save_unfinished(training: Path, target: Path) -> None:
    """Write the weights of the training in the folder `training`, finished or not, to `target`, as `save_weights` does.

    For a training that outlasts the machine: `start_from` begins with them, with fresh optimiser state. Raises
    `UserError` where there is no whole checkpoint.
    """
    _write(target, load_weights(training), {"training": training.name})


def _write(path: Path, state: Mapping[str, torch.Tensor], header: Mapping[str, str]) -> None:
    from safetensors.torch import save_file

    half = {k: (v.half() if v.dtype == torch.float32 else v).contiguous().cpu() for k, v in state.items()}
    with files.atomic_write(path) as file:
        save_file(half, file, metadata=dict(header))


def load_recorded_arrays(run: Run) -> dict[str, np.ndarray]:
    """The arrays recorded for this notebook and preset. Raises `UserError` as `load_recorded_weights` does."""
    path = _recorded(run, "arrays.npz")
    try:
        return load_arrays(path.parent)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it with git checkout") from error


def load_recorded_weights(run: Run) -> dict[str, torch.Tensor]:
    """The weights recorded for this notebook and preset.

    Raises `UserError` where none are recorded, or of other settings or another seed, or the file is damaged.
    """
    return read_weights(_recorded(run, "weights.safetensors"))


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights in a file that `save_weights` or `save_unfinished` wrote, half precision widened.

    Raises `UserError` where it is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, FileNotFoundError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it with git checkout") from error
    return {k: v.float() if v.dtype == torch.float16 else v for k, v in state.items()}


def load_model(run: Run, model: torch.nn.Module) -> Trained:
    """`model` with the weights recorded for this notebook and preset. Raises as `load_recorded_weights` does."""
    model.load_state_dict(load_recorded_weights(run))
    return Trained(model.eval(), [], 0, 0.0, "recorded", {}, [])


def _recorded(run: Run, name: str) -> Path:
    """The path of a recorded file, which must be there and of this run's settings and seed."""
    folder = files.results_root() / run.preset / run.notebook
    for path in (folder / "run.json", folder / name):
        if not path.exists():
            raise UserError(f'nothing is recorded at {path}: choose another preset, or weights = "train"')
    recorded = files.load_json(folder / "run.json")
    if (recorded["settings"], recorded["seed"]) != (files.plain(dataclasses.asdict(run.settings)), run.seed):
        raise UserError(
            f"{folder} was recorded with other settings or seed {recorded['seed']}: drop overrides and seed, "
            f'or use weights = "train"'
        )
    return folder / name


def record(directory: Path, settings: Any) -> list[Path]:
    """Promote the finished run in `directory` to `results/<preset>/<notebook>/` and `figures/<preset>/`.

    Raises `UserError` for a run that is unfinished, has other settings than `settings` (the preset's), was not
    trained, or where the run, a training, or a resumed part of one was made by code that is not committed.
    """
    try:
        provenance = files.load_json(directory / "run.json")
    except FileNotFoundError:
        raise UserError(f"{directory} is not finished: run it again without --record first") from None
    if provenance["settings"] != files.plain(dataclasses.asdict(settings)) or provenance["weights"] != "train":
        raise UserError(f"{directory} is not a training with the preset's own settings, so it is not recorded")
    parts = [provenance]
    for training in provenance["trainings"].values():
        parts += [training, *training.get("resumed", [])]
    if any(part["revision"] is None or part["modified"] for part in parts):
        raise UserError(f"{directory} was made by code that is not committed: commit it, run with --fresh, then record")
    results = files.results_root() / provenance["preset"] / provenance["notebook"]
    figures = files.figures_root() / provenance["preset"]
    targets = {directory / name: results / name for name in ("arrays.npz", "weights.safetensors", "metrics.json")}
    targets |= {png: figures / png.name for png in sorted(directory.glob("*.png"))}
    targets |= {directory / "run.json": results / "run.json"}
    written = []
    for source, target in targets.items():
        if source.exists():
            with files.atomic_write(target) as file:
                shutil.copyfile(source, file)
            written.append(target)
    return written
