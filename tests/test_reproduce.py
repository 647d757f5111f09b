"""The runner on small notebooks made here: each way in which a notebook can end has a status of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import nbformat
import pytest

from paperlib import reproduce
from paperlib.system import files
from paperlib.system.errors import UserError

PARAMETERS = 'preset = "smoke"\nseed = 0\ndevice = "auto"\nweights = "train"\noverrides = {}'


@pytest.fixture
def notebooks(monkeypatch, tmp_path):
    """A folder that stands for `notebooks/`; `notebooks(stem, *cells)` writes one into it."""
    monkeypatch.setattr(files, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setenv("PAPERLIB_RUNS", str(tmp_path / "runs"))
    files.NOTEBOOKS.mkdir()

    def write(stem, *cells, parameters=PARAMETERS):
        first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
        cells = [first, *(nbformat.v4.new_code_cell(cell) for cell in cells)]
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), files.NOTEBOOKS / f"{stem}.ipynb")

    return write


def executed(stem, preset="smoke", name="notebook.ipynb"):
    return nbformat.read(files.runs_root() / stem / preset / name, as_version=4)


def outputs(notebook):
    return "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))


def test_notebooks_run_in_order_with_their_parameters(notebooks, capsys):
    notebooks("11_second", "print('second', preset, seed)")
    notebooks("10_first", "import os; print(preset, seed, os.path.basename(os.getcwd()))")
    assert reproduce.main(["--preset", "cpu", "--seed", "3"]) == 0
    assert "cpu 3 notebooks" in outputs(executed("10_first", "cpu"))
    said = capsys.readouterr().out
    assert said.index("10_first: ok") < said.index("11_second: ok")
    assert re.search(r"10_first +ok +\d+ +- +\S*10_first", said), "the table"


def test_a_failing_cell_is_named_its_copy_stays_and_later_notebooks_run(notebooks, capsys):
    notebooks("10_bad", "print('before')", "raise ValueError('what went wrong')", "print('after')")
    notebooks("11_good", "1")
    assert reproduce.main([]) == 1
    said = capsys.readouterr().out
    assert "10_bad: failed in cell 4" in said, "as numbered in the executed copy, where papermill adds a cell"
    assert "ValueError: what went wrong" in said
    assert "11_good: ok" in said
    copy = executed("10_bad", name="notebook.failed.ipynb")
    assert any(o.output_type == "error" for cell in copy.cells for o in cell.get("outputs", []))
    assert "before" in outputs(copy)
    assert "after" not in outputs(copy)


def test_fail_fast_stops(notebooks, capsys):
    notebooks("10_bad", "raise ValueError")
    notebooks("11_good", "1")
    assert reproduce.main(["--fail-fast"]) == 1
    assert "11_good" not in capsys.readouterr().out


def test_a_users_mistake_is_one_line_without_a_traceback(notebooks, capsys):
    notebooks("10_bad", "from paperlib.errors import UserError\nraise UserError('put the data there')")
    assert reproduce.main([]) == 1
    assert "failed in cell 3 after" in (said := capsys.readouterr().out)
    assert ": put the data there\n" in said
    assert "Traceback" not in said


def test_a_failure_leaves_the_copy_of_an_earlier_success_alone(notebooks):
    notebooks("10_some", "print('fine')")
    assert reproduce.main([]) == 0
    notebooks("10_some", "raise ValueError")
    assert reproduce.main([]) == 1
    assert "fine" in outputs(executed("10_some"))
    notebooks("10_some", "print('again')")
    assert reproduce.main([]) == 0
    assert "again" in outputs(executed("10_some"))
    assert not (files.runs_root() / "10_some" / "smoke" / "notebook.failed.ipynb").exists()


def test_a_full_disk_is_a_status_and_later_notebooks_run(notebooks, monkeypatch, capsys):
    """The write of the executed copy fails as on a full disk; no half file stays."""
    import papermill.iorw

    write = papermill.iorw.LocalHandler.write

    def full(self, buf, path):
        if "10_big" in path:
            write(self, buf[:100], path)
            raise OSError(28, "No space left on device")
        write(self, buf, path)

    monkeypatch.setattr(papermill.iorw.LocalHandler, "write", full)
    notebooks("10_big", "1")
    notebooks("11_good", "1")
    assert reproduce.main([]) == 1
    said = capsys.readouterr().out
    assert "10_big: not written" in said
    assert "no space left" in said
    assert "11_good: ok" in said
    assert not list((files.runs_root() / "10_big" / "smoke").iterdir())


def test_a_dead_kernel_is_not_taken_for_success(notebooks, capsys):
    notebooks("10_dead", "print('here', flush=True)", "import os; os.kill(os.getpid(), 9)", "print('never')")
    notebooks("11_good", "1")
    assert reproduce.main([]) == 1
    said = capsys.readouterr().out
    assert "10_dead: kernel died" in said
    assert "11_good: ok" in said
    assert "here" in outputs(executed("10_dead", name="notebook.failed.ipynb"))


def test_a_parameter_that_a_notebook_does_not_have_is_an_error(notebooks, capsys):
    notebooks("10_other", "1", parameters='presett = "smoke"\nseed = 0')
    assert reproduce.main([]) == 1
    assert "10_other: unknown parameter" in (said := capsys.readouterr().out)
    assert "device, overrides, preset, weights" in said


INTERRUPTIBLE = """
import sys, time
from pathlib import Path
try:
    print("ready", flush=True)
    Path({ready!r}).write_text("")
    time.sleep(60)
except KeyboardInterrupt:
    print("checkpoint saved", flush=True)
    raise
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_reaches_the_kernel_and_ends_the_run(notebooks, tmp_path, number):
    notebooks("10_long", INTERRUPTIBLE.format(ready=str(tmp_path / "ready")))
    notebooks("11_later", "1")
    script = (
        "import sys; from pathlib import Path; from paperlib import errors, paths, reproduce\n"
        "paths.NOTEBOOKS = Path(sys.argv.pop(1)); errors.run_command(reproduce.main)"
    )
    command = [sys.executable, "-c", script, str(files.NOTEBOOKS)]
    runner = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline and runner.poll() is None:
        time.sleep(0.1)
    time.sleep(0.3)
    runner.send_signal(number)
    out, err = runner.communicate(timeout=30)
    assert runner.returncode == 130, err
    assert "10_long: interrupted" in out
    assert "11_later" not in out
    assert "checkpoint saved" in outputs(executed("10_long", name="notebook.failed.ipynb"))


def test_only_picks_by_number_or_name(notebooks):
    for stem in ("01_a", "02_b", "12_c"):
        notebooks(stem)
    assert [n.stem for n in reproduce._select(["12", "1"])] == ["01_a", "12_c"]
    assert [n.stem for n in reproduce._select(["02_b"])] == ["02_b"]
    with pytest.raises(UserError, match="no notebook '3': choose from 01_a, 02_b, 12_c"):
        reproduce._select(["3"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "smokee"], "unknown preset 'smokee': choose from smoke, cpu"),
        (["--set", "stepz=3"], "unknown setting 'stepz'"),
        (["--set", "steps=many"], "02_mnist_fuzziness: setting 'steps' is 'many', but takes int"),
        (["--set", "hidden=8"], "takes a list of int, such as [1, 2]"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--weights", "recordde"], "unknown weights 'recordde'"),
        (["--set", "steps=0"], "steps is 0"),
        (["--record", "--set", "steps=3"], "drop --set"),
        (["--only", "77"], "no notebook '77'"),
    ],
)
def test_mistakes_on_the_command_line_are_said_before_anything_runs(arguments, message, tmp_path):
    if "--only" not in arguments:
        arguments = [*arguments, "--only", "02"]
    command = [sys.executable, "-m", "paperlib.reproduce", *arguments]
    environment = os.environ | {"PAPERLIB_RUNS": str(tmp_path)}
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert run.returncode == 2
    assert message in run.stderr
    assert run.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_settings_of_every_type_reach_the_notebook(notebooks, monkeypatch):
    overrides = {"hidden": [8, 4], "sigma": None, "steps": 3, "dataset": "mnist", "min_samples": 2.5}
    arguments = [word for name, value in overrides.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    arguments[arguments.index('dataset="mnist"')] = "dataset=mnist"
    notebooks("10_some", "import json; print(json.dumps(overrides))")
    monkeypatch.setitem(reproduce.EXPERIMENTS, "10_some", "fuzziness")
    reproduce.main(arguments)
    (copy,) = files.runs_root().glob("*/*/notebook*.ipynb")
    assert json.loads(outputs(nbformat.read(copy, as_version=4))) == overrides


def test_the_list_shows_notebooks_presets_and_settings_with_help(capsys):
    assert reproduce.main(["--list"]) == 0
    said = capsys.readouterr().out
    assert "02_mnist_fuzziness\n  presets: smoke, cpu, gpu, paper" in said
    assert re.search(r"steps +\d+, \d+.* optimiser steps", said)


def test_plain_papermill_works_from_any_folder_and_names_the_presets(tmp_path):
    source = files.ROOT / "notebooks" / "02_mnist_fuzziness.ipynb"
    command = [sys.executable, "-m", "papermill", str(source), "out.ipynb", "-p", "preset", "smokee"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1
    assert "unknown preset 'smokee': choose from smoke, cpu, gpu, paper" in run.stderr.strip().split("\n")[-1]


def test_training_is_shown_from_the_kernels_progress_file(tmp_path, capsys, monkeypatch):
    """In a log, at most a line a minute: with the clock run forward, one line."""
    import threading

    file, done = tmp_path / "progress.json", threading.Event()
    file.write_text(json.dumps({"name": "vae", "step": 5, "steps": 10, "loss": 1.25, "elapsed": 1, "minutes": 0}))
    ticks = iter(range(0, 10_000, 61))
    monkeypatch.setattr(reproduce.time, "monotonic", lambda: next(ticks))
    threading.Timer(1.5, done.set).start()
    reproduce._watch("02_mnist_fuzziness", file, done)
    assert "02_mnist_fuzziness  vae  loss 1.25  step 5 of 10" in capsys.readouterr().err
