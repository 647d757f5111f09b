"""Run the notebooks in order with papermill, and say what came of each.

    python -m paperlib.reproduce                         # every notebook, on the small embedded data
    python -m paperlib.reproduce --preset cpu --only 02  # one notebook on real data
    python -m paperlib.reproduce --list                  # notebooks, presets, settings with their help

papermill's own word is not enough: a misspelt parameter is only a line in its log, and a notebook whose kernel was
killed looks complete. So each notebook gets a status here, and anything but `ok` makes the exit code 1.
"""

import argparse
import dataclasses
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from paperlib.experiments import EXPERIMENTS
from paperlib.runs import presets
from paperlib.runs.claims import Verdicts
from paperlib.runs.experiment import RECORDED
from paperlib.runs.provenance import describe_code
from paperlib.runs.recorded import record
from paperlib.system import files, kernels
from paperlib.system.devices import STOPS
from paperlib.system.errors import UserError, run_command


@dataclass(frozen=True)
class Job:
    """One notebook and what to run it with."""

    notebook: Path
    parameters: dict[str, Any]
    directory: Path  # where its outputs go


@dataclass(frozen=True)
class Outcome:
    """What became of a notebook: `status` is "ok" or says in a few words what went wrong."""

    job: Job
    status: str
    seconds: float
    message: str = ""
    claims: Verdicts | None = None


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    notebooks = select(options.only)
    if options.list:
        print(_listing(notebooks))
        return 0
    jobs = [_plan(notebook, options) for notebook in notebooks]
    if options.record:
        _check_recordable(options)
    outcomes = []
    for job in jobs:
        if options.fresh:
            files.discard(job.directory)
        outcomes.append(outcome := run_notebook(job))
        said = f"{job.notebook.stem}: {outcome.status} after {outcome.seconds:.0f} s"
        print(said + (f": {outcome.message}" if outcome.message else ""), flush=True)
        if outcome.status == "interrupted" or (options.fail_fast and outcome.status != "ok"):
            break
    print("\n" + _table(outcomes))
    failed = len(outcomes) < len(jobs) or any(outcome.status != "ok" for outcome in outcomes)
    for outcome in outcomes if options.record else ():
        experiment = EXPERIMENTS.get(outcome.job.notebook.stem)
        if outcome.status != "ok":
            print(f"not recorded: {outcome.job.notebook.stem}, {outcome.status}")
        elif experiment:
            for path in record(outcome.job.directory, experiment.presets[options.preset]):
                print(f"recorded {_short(path)}")
    return 130 if any(outcome.status == "interrupted" for outcome in outcomes) else int(failed)


def run_notebook(job: Job) -> Outcome:
    """Execute one notebook in a kernel of its own; the executed copy stays beside the run's other files.

    That of a failure is called `notebook.failed.ipynb`, so that it never takes the place of a finished one.
    """
    import papermill

    started, claims = time.monotonic(), None
    if unknown := sorted(set(job.parameters) - set(papermill.inspect_notebook(job.notebook))):  # papermill only logs it
        return Outcome(job, "unknown parameter", 0.0, f"its parameters cell has no {', '.join(unknown)}")
    _clear(job.directory)
    executed = job.directory / f".notebook.{os.getpid()}.partial.ipynb"
    before = _written(job.directory / "run.json")
    status, message = _execute(job, executed)
    if status == "ok":
        if _written(job.directory / "run.json") not in (None, before):
            claims = Verdicts(files.load_json(job.directory / "metrics.json")["claims"])
        message = _what_is_missing(job, executed, claims)
        status = "incomplete" if message else "ok"
    _keep(executed, job.directory / ("notebook.ipynb" if status == "ok" else "notebook.failed.ipynb"))
    return Outcome(job, status, time.monotonic() - started, message, claims if status == "ok" else None)


def _written(file: Path) -> tuple[int, int] | None:
    """What tells one writing of a file from the next, whatever the clocks say; None where there is none."""
    return (file.stat().st_ino, file.stat().st_mtime_ns) if file.exists() else None


def _clear(directory: Path) -> None:
    """Remove the half-executed notebooks of runners that were killed."""
    for partial in directory.glob(".notebook.*.partial.ipynb"):
        if not psutil.pid_exists(int(partial.name.split(".")[2])):
            partial.unlink(missing_ok=True)


def _execute(job: Job, copy: Path) -> tuple[str, str]:
    """Run all cells into `copy`: status and message."""
    import papermill
    from nbclient.exceptions import DeadKernelError

    with _kernel() as kernel, _progress(job.notebook.stem):
        try:
            files.make_folder(job.directory)
            options = {"progress_bar": False, "km": kernel, "extra_arguments": ["--IPKernelApp.log_level=50"]}
            with files.os_errors_as_user_error(copy):
                papermill.execute_notebook(job.notebook, copy, job.parameters, cwd=job.notebook.parent, **options)
        except UserError as error:
            return "not written", str(error)
        except papermill.PapermillExecutionError as error:
            interrupted = error.ename == "KeyboardInterrupt"
            status = "interrupted" if interrupted else f"failed in cell {error.exec_count}"
            return status, error.evalue if error.ename == "UserError" else f"{error.ename}: {error.evalue}"
        except DeadKernelError:
            return "kernel died", "its process ended in the middle of a cell; most often the memory did not suffice"
        except RuntimeError as error:  # of the client, such as of a kernel that does not start
            return "kernel failed", str(error)
        except KeyboardInterrupt:
            return "interrupted", ""
    return "ok", ""


def _what_is_missing(job: Job, executed: Path, claims: Verdicts | None) -> str:
    """What a run lacks that papermill took for finished, in words; nothing where it is complete."""
    import nbformat

    cells = nbformat.read(executed, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    if any(cell.execution_count is None for cell in code):
        return "some cells of the executed copy never ran"
    drawing = [cell for cell in code if "save_figure(" in cell.source or "save_animation(" in cell.source]
    if blank := [cell for cell in drawing if not any("image/png" in one.get("data", {}) for one in cell.outputs)]:
        return f"{len(blank)} of {len(drawing)} figures are not in the executed copy"
    if claims is None and job.notebook.stem in EXPERIMENTS:
        return "no verdicts were written: does its last cell still conclude the run?"
    return ""


def _keep(executed: Path, target: Path) -> None:
    """Move an executed copy into place; half of one, as a full disk leaves it, is dropped."""
    try:
        json.loads(executed.read_text(encoding="utf-8"))
        os.replace(executed, target)
        if target.name == "notebook.ipynb":
            target.with_name("notebook.failed.ipynb").unlink(missing_ok=True)
    except (OSError, ValueError):
        executed.unlink(missing_ok=True)


@contextmanager
def _kernel():
    """A kernel manager whose kernel gets our Ctrl-C, so that a training can save a checkpoint; a second one ends us."""
    from jupyter_client.manager import AsyncKernelManager
    from jupyter_client.utils import run_sync

    asked = threading.Event()

    def interrupt(number: int, frame: Any) -> None:
        if asked.is_set() or not kernel.has_kernel:
            raise KeyboardInterrupt
        asked.set()
        print("interrupting the notebook (again to stop at once) ...", file=sys.stderr)
        os.kill(kernel.provisioner.pid, signal.SIGINT)

    before = {
        number: signal.signal(number, interrupt) for number in STOPS if signal.getsignal(number) != signal.SIG_IGN
    }
    with tempfile.TemporaryDirectory() as folder, environ(kernels.install(Path(folder))):
        kernel = AsyncKernelManager(kernel_name="python3")
        try:
            yield kernel
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if kernel.has_kernel:
                run_sync(kernel.shutdown_kernel)(now=True)


@contextmanager
def environ(variables: Mapping[str, str | None]):
    """Within, these variables of the environment are set, or where None is given are not there."""

    def put(given: Mapping[str, str | None]) -> None:
        for name, value in given.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})

    before = {name: os.environ.get(name) for name in variables}
    put(variables)
    try:
        yield
    finally:
        put(before)


@contextmanager
def _progress(label: str):
    """Show the training that runs in the kernel: a live bar on a terminal, a line a minute in a log."""
    done = threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "progress.json"
        watcher = threading.Thread(target=watch, args=(label, file, done), daemon=True)
        watcher.start()
        try:
            with environ({"PAPERLIB_PROGRESS": str(file), "TQDM_DISABLE": "1"}):
                yield
        finally:
            done.set()
            watcher.join()


def watch(label: str, file: Path, done: threading.Event) -> None:
    """Show what a kernel writes to its progress file, once a second, until `done`."""
    live = sys.stderr.isatty()
    bar = tqdm(desc=label, disable=not live, leave=False, file=sys.stderr, unit="step")
    said = time.monotonic()
    while not done.wait(1.0):
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            continue
        text = f"{label}  {state['name']}  loss {state['loss']:.4g}"
        if live:
            bar.total = state["steps"]
            bar.set_description(text, refresh=False)
            bar.update(state["step"] - bar.n)
        elif time.monotonic() - said > 60:
            said = time.monotonic()
            print(f"{text}  step {state['step']} of {state['steps']}", file=sys.stderr, flush=True)
    bar.close()


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m paperlib.reproduce", description=__doc__.split("\n")[0])
    add, several = parser.add_argument, {"action": "append", "default": []}
    add("--preset", default="smoke", help="smoke (default), cpu, gpu or paper; or recorded, which trains nothing")
    add("--only", metavar="NN", help="a notebook by number or name; may be repeated", **several)
    add("--seed", type=int, default=0, help="of every draw (default 0)")
    add("--device", default="auto", help="auto (default: cuda where there is one), cpu or cuda")
    add("--set", metavar="NAME=VALUE", help="change one setting; may be repeated", **several)
    add("--fresh", action="store_true", help="forget an earlier run of the same settings")
    add("--record", action="store_true", help="promote finished runs to results/ and figures/")
    add("--fail-fast", action="store_true", help="stop at the first notebook that fails")
    add("--list", action="store_true", help="list notebooks, presets and settings, and stop")
    return parser


def select(only: list[str]) -> list[Path]:
    """The numbered notebooks in order, all of them or those that `only` names by number or stem."""
    notebooks = sorted(files.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    if not notebooks:
        raise UserError(f"there are no notebooks in {files.NOTEBOOKS}: run in a clone of the repository")
    chosen = []
    for name in only:
        matches = [n for n in notebooks if n.stem == name.removesuffix(".ipynb") or n.stem[:2] == name.zfill(2)]
        if not matches:
            raise UserError(f"no notebook {name!r}: choose from {', '.join(n.stem for n in notebooks)}")
        chosen += matches
    return sorted(set(chosen)) if only else notebooks


def _plan(notebook: Path, options: argparse.Namespace) -> Job:
    parameters = {name: getattr(options, name) for name in ("preset", "seed", "device")}
    parameters["overrides"] = {}
    if (experiment := EXPERIMENTS.get(notebook.stem)) is None:
        return Job(notebook, parameters, files.runs_root() / notebook.stem / options.preset)
    try:
        parameters["overrides"] = presets.parse(experiment.settings(options.preset), options.set)
        experiment.device(options.preset, options.device)
        name = experiment.run_name(options.preset, options.seed, parameters["overrides"])
    except UserError as error:
        raise UserError(f"{notebook.stem}: {error}") from error
    return Job(notebook, parameters, files.runs_root() / name)


def _check_recordable(options: argparse.Namespace) -> None:
    if options.set:
        raise UserError("--record keeps runs of a preset as it stands: drop --set")
    if options.preset == RECORDED:
        raise UserError("--record keeps runs that were trained: choose a preset that trains")
    code = describe_code()
    if code["revision"] is None or code["modified"]:
        raise UserError("--record needs committed code: commit (or stash) the changes first")


def _table(outcomes: list[Outcome]) -> str:
    rows = [("notebook", "status", "seconds", "verdicts", "outputs")]
    for one in outcomes:
        verdicts = "-" if one.claims is None else one.claims.summary()
        rows.append((one.job.notebook.stem, one.status, f"{one.seconds:.0f}", verdicts, _short(one.job.directory)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _listing(notebooks: list[Path]) -> str:
    lines = []
    for notebook in notebooks:
        lines.append(notebook.stem)
        if (experiment := EXPERIMENTS.get(notebook.stem)) is None:
            continue
        lines.append(f"  presets: {', '.join(experiment.presets)}")
        every = list(experiment.presets.values())
        for field in dataclasses.fields(every[0]):
            values = [getattr(settings, field.name) for settings in every]
            same = all(value == values[0] for value in values)
            text = str(values[0]) if same else ", ".join(map(str, values))
            lines.append(f"  {field.name:<20} {text:<32} {field.metadata.get('help', '')}")
    return "\n".join(lines)


def _short(path: Path) -> str:
    """`path` as seen from the repository, where it lies inside."""
    return str(path.relative_to(files.ROOT) if path.is_relative_to(files.ROOT) else path)


if __name__ == "__main__":
    logging.getLogger("papermill").setLevel(logging.ERROR)
    run_command(main)
