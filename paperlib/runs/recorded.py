"""What is kept of a run in the repository: `results/<preset>/<notebook>/` and `figures/<preset>/`."""

import dataclasses
import json
import shutil
import zipfile
from collections.abc import Iterable, Mapping
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
    """`run.finish` with what is known of the trainings, after writing the weights of `kept`, the models to be recorded.

    Of a recorded run only `metrics.json` and `run.json` are written.
    """
    if run.recorded:
        return finish(run, claims, measured, numbers, provenance(run)["data"])
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
    """The arrays recorded for the notebook and preset of `run`. Raises `UserError` as `provenance` does."""
    provenance(run)
    path = _recorded(run, "arrays.npz")
    try:
        return load_arrays(path.parent)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it with git checkout") from error


def load_recorded_metrics(run: Run) -> dict[str, Any]:
    """The `metrics.json` recorded for the notebook and preset of `run`. Raises `UserError` as `provenance` does."""
    provenance(run)
    return files.load_json(_recorded(run, "metrics.json"))


def load_recorded_weights(run: Run) -> dict[str, torch.Tensor]:
    """The weights recorded for the notebook and preset of `run`. Raises `UserError` as `provenance` does."""
    provenance(run)
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
    """`model` with the weights recorded for the notebook and preset of `run`. Raises as `provenance` does."""
    model.load_state_dict(load_recorded_weights(run))
    return Trained(model.eval(), [], 0, 0.0, "recorded", {}, [])


def best(notebook: str, presets: Iterable[str]) -> str:
    """Of `presets`, in rising order, the last for which `notebook` is recorded. Raises `UserError` where none is."""
    recorded = [preset for preset in presets if (files.results_root() / preset / notebook / "run.json").exists()]
    if not recorded:
        raise UserError(
            f"nothing is recorded of {notebook} in {files.results_root()}: run in a clone of the repository, or choose "
            "a preset that trains"
        )
    return recorded[-1]


def provenance(run: Run) -> dict[str, Any]:
    """The `run.json` recorded for the notebook and preset of `run`.

    Raises `UserError` where there is none, or one of other settings.
    """
    path = _recorded(run, "run.json")
    recorded = files.load_json(path)
    if recorded["settings"] != files.plain(dataclasses.asdict(run.settings)):
        raise UserError(
            f"{path.parent} was recorded with other settings than preset {run.preset} has now: restore the preset, or "
            f"record again (make reproduce PRESET={run.preset} ONLY={run.notebook[:2]} FLAGS=--record)"
        )
    return recorded


def _recorded(run: Run, name: str) -> Path:
    path = files.results_root() / run.preset / run.notebook / name
    if not path.exists():
        raise UserError(f"nothing is recorded at {path}: restore it with git checkout, or choose a preset that trains")
    return path


def record(directory: Path, settings: Any) -> list[Path]:
    """Promote the finished run in `directory` to `results/<preset>/<notebook>/` and `figures/<preset>/`.

    Raises `UserError` for a run that is unfinished, has other settings than `settings` (the preset's), was not
    trained, or where the run, a training, or a resumed part of one was made by code that is not committed.
    """
    try:
        made = files.load_json(directory / "run.json")
    except FileNotFoundError:
        raise UserError(f"{directory} is not finished: run it again without --record first") from None
    if made["settings"] != files.plain(dataclasses.asdict(settings)) or made.get("recorded"):
        raise UserError(f"{directory} is not a training with the preset's own settings, so it is not recorded")
    parts = [made]
    for training in made["trainings"].values():
        parts += [training, *training.get("resumed", [])]
    for part, again in [(made, "run again"), *((part, "run with --fresh") for part in parts[1:])]:
        if part["revision"] is None or part["modified"]:
            what = "measured" if part is made else "trained"
            raise UserError(f"{directory} was {what} by code that is not committed: commit it, {again}, then record")
    results = files.results_root() / made["preset"] / made["notebook"]
    figures = files.figures_root() / made["preset"]
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
