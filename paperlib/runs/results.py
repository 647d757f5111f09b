"""Runs and what they leave behind: arrays, figures, claims with verdicts, provenance.

A run writes to `runs/<notebook>/<preset>-<hash of settings and seed>/`:

| file | content |
| --- | --- |
| `<model>/last.pt`, ... | checkpoints, see `train` |
| `arrays.npz` | all that the figures draw, and nothing else is drawn |
| `<content-name>.png` | the figures |
| `metrics.json` | claims with verdicts, and further numbers |
| `run.json` | provenance; written last, so a run that has one is finished |
| `weights.safetensors` | the headline model in half precision |
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paperlib.system import files
from paperlib.system.errors import UserError

PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "scipy",
    "scikit-learn",
    "matplotlib",
    "seaborn",
    "papermill",
)


@dataclass(frozen=True)
class Quantity:
    """A measured number with, where it has one, its 95 % interval [low, high]; nan where it could not be measured."""

    value: float
    low: float | None = None
    high: float | None = None
    unit: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", math.nan if self.value is None else self.value)  # JSON has null for nan

    @classmethod
    def of(cls, estimate: Sequence[float], unit: str = "") -> "Quantity":
        """Of value, low and high."""
        return cls(*map(float, estimate), unit)

    def __str__(self) -> str:
        interval = "" if self.low is None else f" [{_short(self.low)}, {_short(self.high)}]"
        return f"{_short(self.value)}{interval}{' ' * bool(self.unit)}{self.unit}"


def _short(value: float) -> str:
    """Three digits, thousands written out."""
    text = f"{value:.3g}"
    return f"{float(text):,.0f}" if 1e3 <= abs(value) < 1e9 else text


@dataclass(frozen=True)
class Claim:
    """A statement with the criterion that decides it, written down before the run.

    `criterion` is called with the measured quantities by name and says whether the claim holds; `expected` says the
    same in words. `exact` claims are mathematics and judged under every preset, the others not under `smoke`.
    `shows` names the measured quantities that a short table gives.
    """

    statement: str
    expected: str
    criterion: Callable[..., bool]
    shows: tuple[str, ...]
    exact: bool = False


@dataclass(frozen=True)
class Run:
    """One run of one notebook: what was asked for, and the folder where its files go."""

    notebook: str
    preset: str
    settings: Any
    seed: int
    device: str
    weights: str = "train"
    started: float = field(default_factory=time.time)

    @property
    def name(self) -> str:
        return run_name(self.notebook, self.preset, self.settings, self.seed, self.weights)

    @property
    def directory(self) -> Path:
        return files.runs_root() / self.name

    def generator(self, stream: int, on_device: bool = False) -> torch.Generator:
        """A stream of random numbers of its own for each purpose, so that one measurement does not change another."""
        return torch.Generator(self.device if on_device else "cpu").manual_seed(1000 * self.seed + stream)

    @contextlib.contextmanager
    def seeded(self) -> Iterator[None]:
        """Within, torch's global generators start from the seed; their states from before come back."""
        with torch.random.fork_rng(devices=[self.device] if self.device.startswith("cuda") else []):
            torch.manual_seed(self.seed)
            yield


def run_name(notebook: str, preset: str, settings: Any, seed: int, weights: str = "train") -> str:
    """`<notebook>/<preset>-<hash>`: the same for the same settings and seed, another for any other.

    A run with recorded weights has a name of its own, so that it never takes the place of one that was trained.
    Raises `UserError` for a seed or `weights` that mean nothing.
    """
    if type(seed) is not int or seed < 0:
        raise UserError(f"seed is {seed!r}, but takes a whole number from 0")
    if weights not in ("train", "recorded"):
        raise UserError(f"unknown weights {weights!r}: choose from train, recorded")
    identity = json.dumps([dataclasses.asdict(settings), seed], sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    return f"{notebook}/{preset}-{digest}" + ("-recorded" if weights == "recorded" else "")


def start(notebook: str, preset: str, settings: Any, seed: int, device: str, weights: str = "train") -> Run:
    """Open a run and make its folder. Raises `UserError` as `run_name` does."""
    run = Run(notebook, preset, settings, seed, device, weights)
    files.make_folder(run.directory)
    return run


def judge(run: Run, claim: Claim, measured: Mapping[str, Quantity]) -> bool | None:
    """Whether `claim` holds for what was `measured`; None where the preset claims nothing."""
    if run.preset == "smoke" and not claim.exact:
        return None
    return bool(claim.criterion(**measured))


def save_arrays(run: Run, **arrays: Any) -> dict[str, np.ndarray]:
    """Write `arrays.npz` and return its content, as a later reader will find it."""
    arrays = {name: a.numpy(force=True) if torch.is_tensor(a) else np.asarray(a) for name, a in arrays.items()}
    with files.replacing(run.directory / "arrays.npz") as file:
        np.savez_compressed(file, **arrays)
    return load_arrays(run.directory)


def load_arrays(directory: Path) -> dict[str, np.ndarray]:
    with np.load(directory / "arrays.npz") as archive:
        return dict(archive)


def save_figure(run: Run, figure: Any, name: str) -> Any:
    """Write `<name>.png` into the run's folder and return the figure, closed, so that a cell shows it once."""
    from matplotlib import pyplot

    with files.replacing(run.directory / f"{name}.png") as file:
        figure.savefig(file, metadata={"Software": None})
    pyplot.close(figure)
    return figure


def load_recorded_arrays(run: Run) -> dict[str, np.ndarray]:
    """The arrays recorded for this notebook and preset. Raises `UserError` as `load_recorded_weights` does."""
    path = _recorded(run, "arrays.npz")
    try:
        return load_arrays(path.parent)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it with git checkout") from error


def _recorded(run: Run, name: str) -> Path:
    """The path of a recorded file, which must be there and of this run's settings and seed."""
    folder = files.results_root() / run.preset / run.notebook
    for path in (folder / "run.json", folder / name):
        if not path.exists():
            raise UserError(f'nothing is recorded at {path}: choose another preset, or weights = "train"')
    recorded = load_json(folder / "run.json")
    if (recorded["settings"], recorded["seed"]) != (_plain(dataclasses.asdict(run.settings)), run.seed):
        raise UserError(
            f"{folder} was recorded with other settings or seed {recorded['seed']}: drop overrides and seed, "
            f'or use weights = "train"'
        )
    return folder / name


def save_weights(run: Run, state: Mapping[str, torch.Tensor]) -> None:
    """Write `weights.safetensors`: floating-point tensors in half precision, settings and seed in its header."""
    from safetensors.torch import save_file

    half = {k: (v.half() if v.is_floating_point() else v).contiguous().cpu() for k, v in state.items()}
    header = {"settings": json.dumps(dataclasses.asdict(run.settings), sort_keys=True), "seed": str(run.seed)}
    with files.replacing(run.directory / "weights.safetensors") as file:
        save_file(half, file, metadata=header)


def load_recorded_weights(run: Run) -> dict[str, torch.Tensor]:
    """The weights recorded for this notebook and preset, in float32.

    Raises `UserError` where none are recorded, or of other settings or another seed, or the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = _recorded(run, "weights.safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read ({error}): restore it with git checkout") from error
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}


def finish(
    run: Run,
    claims: Mapping[str, Claim],
    measured: Mapping[str, Mapping[str, Quantity]],
    numbers: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    trainings: Mapping[str, Any] | None = None,
) -> "Verdicts":
    """Judge the claims, write `metrics.json` and then `run.json`, and return the verdicts as a table.

    `measured` holds the quantities of each claim by name, `numbers` whatever else is worth keeping, `data` the
    description of the data set, `trainings` that of each training (steps, seconds, revision).
    """
    verdicts = {
        key: {
            "statement": claim.statement,
            "expected": claim.expected,
            "measured": {name: dataclasses.asdict(q) for name, q in measured[key].items()},
            "holds": judge(run, claim, measured[key]),
        }
        for key, claim in claims.items()
    }
    _write_json(run.directory / "metrics.json", {"claims": verdicts, "numbers": dict(numbers or {})})
    provenance = {
        "notebook": run.notebook,
        "preset": run.preset,
        "settings": dataclasses.asdict(run.settings),
        "seed": run.seed,
        "weights": run.weights,
        "device": describe_device(run.device),
        "data": dict(data or {}),
        "trainings": dict(trainings or {}),
        **describe_code(),
        "versions": versions(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(run.started)),
        "seconds": round(time.time() - run.started, 1),
    }
    _write_json(run.directory / "run.json", provenance)
    return Verdicts(verdicts)


class Verdicts(dict):
    """The `claims` part of a `metrics.json`; shows itself as a table."""

    def _repr_markdown_(self) -> str:
        rows = [
            "| claim | statement | expected | measured | verdict |",
            "| --- | --- | --- | --- | --- |",
        ]
        for key, entry in self.items():
            cells = (
                key,
                entry["statement"],
                entry["expected"],
                measured_text(entry),
                verdict_text(entry),
            )
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        return "\n".join(rows)

    def __repr__(self) -> str:
        return "\n".join(f"{key}: {verdict_text(entry)} ({measured_text(entry)})" for key, entry in self.items())

    def decided(self) -> dict[str, str]:
        """The verdict of each claim alone, without the numbers that led to it."""
        return {key: verdict_text(entry) for key, entry in self.items()}


def verdict_text(entry: Mapping[str, Any]) -> str:
    return {True: "holds", False: "fails", None: "not claimed"}[entry["holds"]]


def measured_text(entry: Mapping[str, Any], names: Sequence[str] | None = None) -> str:
    """The measured quantities of a claim in words, all or those named."""
    chosen = entry["measured"] if names is None else {name: entry["measured"][name] for name in names}
    return "; ".join(f"{name.replace('_', ' ')} {Quantity(**q)}" for name, q in chosen.items())


def describe_training(trained: Any) -> dict[str, Any]:
    """What `run.json` says of a `train.Trained`: steps, seconds, and the code that started and resumed it."""
    return {
        "steps": trained.steps,
        "seconds": round(trained.seconds, 1),
        **trained.provenance,
        "resumed": trained.resumed,
    }


def describe_code() -> dict[str, Any]:
    """Git revision of the code, and whether code, notebooks or pins differ from it; None where git does not know."""
    watched = ["paperlib", "notebooks", "requirements.txt", "pyproject.toml"]
    try:
        revision = _git("rev-parse", "HEAD")
        modified = bool(_git("status", "--porcelain", "--", *watched))
    except (OSError, subprocess.CalledProcessError):
        return {"revision": None, "modified": None}
    return {"revision": revision, "modified": modified}


def describe_device(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} of {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a number may depend on, as really installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def record(directory: Path, settings: Any) -> list[Path]:
    """Promote the finished run in `directory` to `results/<preset>/<notebook>/` and `figures/<preset>/`.

    Raises `UserError` for a run that is unfinished, has other settings than `settings` (the preset's), was not
    trained, or in which anything was made by code that is not committed: the run itself, a training, or a part of a
    training that was resumed. A training may be of an earlier commit than the run; `run.json` says of which.
    """
    try:
        provenance = load_json(directory / "run.json")
    except FileNotFoundError:
        raise UserError(f"{directory} is not finished: run it again without --record first") from None
    if provenance["settings"] != _plain(dataclasses.asdict(settings)) or provenance["weights"] != "train":
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
            with files.replacing(target) as file:
                shutil.copyfile(source, file)
            written.append(target)
    return written


def load_json(path: Path) -> Any:
    """The content of a JSON file; a `UserError` names a file that is damaged."""
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and run again") from error


def _write_json(path: Path, content: Any) -> None:
    with files.replacing(path) as file:
        file.write_text(json.dumps(_plain(content), indent=1, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    """`value` in types that JSON has; a float that is no number becomes null."""
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=files.ROOT, check=True, capture_output=True, text=True).stdout.strip()
