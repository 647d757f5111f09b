"""The runner on small notebooks made here: each way in which a notebook can end has a status of its own."""

import contextlib
import io
import json
import re
import signal
import subprocess
import sys
import threading
import time

import nbformat
import pytest

from paperlib import reproduce
from paperlib.experiments import EXPERIMENTS
from paperlib.system import files
from paperlib.system.errors import UserError

PARAMETERS = 'preset = "smoke"\nseed = 0\ndevice = "auto"\nweights = "train"\noverrides = {}'
USER_ERROR = "from paperlib.system.errors import UserError\nraise UserError('put the data there')"


@contextlib.contextmanager
def workplace(folder):
    """A folder that stands for `notebooks/` and one for `runs/`; yields what writes a notebook into the first."""

    def write(stem, *cells, parameters=PARAMETERS):
        first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
        cells = [first, *(nbformat.v4.new_code_cell(cell) for cell in cells)]
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), files.NOTEBOOKS / f"{stem}.ipynb")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "NOTEBOOKS", folder / "notebooks")
        patch.setenv("PAPERLIB_RUNS", str(folder / "runs"))
        files.NOTEBOOKS.mkdir()
        yield write


@pytest.fixture
def notebooks(tmp_path):
    with workplace(tmp_path) as write:
        yield write


def folder_of(stem, preset="smoke"):
    return files.runs_root() / stem / preset


def outputs(file):
    notebook = nbformat.read(file, as_version=4)
    return "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))


# How notebooks end


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """One run over notebooks that end in different ways: (exit code, what was said, the folder of runs)."""
    folder, said = tmp_path_factory.mktemp("ended"), io.StringIO()
    with workplace(folder) as write, contextlib.redirect_stdout(said):
        write("10_bad", "print('before')", "raise ValueError('what went wrong')", "print('after')")
        write("11_mistake", USER_ERROR)
        write("12_dead", "print('before', flush=True)", "import os; os.kill(os.getpid(), 9)", "print('after')")
        write("13_other", "1", parameters='presett = "smoke"\nseed = 0')
        write("14_good", "import os; print(preset, seed, os.path.basename(os.getcwd()))")
        code = reproduce.main(["--preset", "cpu", "--seed", "3"])
    return code, said.getvalue(), folder / "runs"


@pytest.mark.parametrize(
    "line",
    [
        # As numbered in the executed copy, where papermill adds a cell.
        r"10_bad: failed in cell 4 after \d+ s: ValueError: what went wrong",
        r"11_mistake: failed in cell 3 after \d+ s: put the data there",
        r"12_dead: kernel died after \d+ s: its process ended .*",
        r"13_other: unknown parameter after 0 s: .* has no device, overrides, preset, weights",
        r"14_good: ok after \d+ s",
    ],
)
def test_each_end_has_a_status_and_a_line(ended, line):
    assert re.search(f"^{line}$", ended[1], re.MULTILINE)


def test_one_failure_is_enough_for_the_exit_code(ended):
    assert ended[0] == 1


def test_the_table_comes_last_with_notebooks_in_order(ended):
    table = ended[1].split("\n\n")[-1]
    assert re.findall(r"^(\d\d)_\w+ ", table, re.MULTILINE) == ["10", "11", "12", "13", "14"]
    assert re.search(r"^14_good +ok +\d+ +- +\S*14_good", table, re.MULTILINE)


def test_the_parameters_reach_the_notebook_which_runs_in_its_own_folder(ended):
    assert outputs(ended[2] / "14_good" / "cpu" / "notebook.ipynb") == "cpu 3 notebooks\n"


@pytest.mark.parametrize("stem", ["10_bad", "12_dead"])
def test_the_copy_of_a_failure_stays_up_to_the_failed_cell(ended, stem):
    (copy,) = (ended[2] / stem / "cpu").glob("*.ipynb")
    assert copy.name == "notebook.failed.ipynb"
    assert outputs(copy) == "before\n"


def test_fail_fast_stops(notebooks, capsys):
    notebooks("10_bad", "raise ValueError")
    notebooks("11_good", "1")
    assert reproduce.main(["--fail-fast"]) == 1
    assert "11_good" not in capsys.readouterr().out


def test_a_failure_leaves_the_copy_of_an_earlier_success_alone_and_a_success_removes_that_of_a_failure(notebooks):
    for cell, code, kept in (("print('one')", 0, "one"), ("raise ValueError", 1, "one"), ("print('two')", 0, "two")):
        notebooks("10_some", cell)
        assert reproduce.main([]) == code
        assert outputs(folder_of("10_some") / "notebook.ipynb") == f"{kept}\n"
        assert (folder_of("10_some") / "notebook.failed.ipynb").exists() == bool(code)


def test_a_full_disk_is_a_status_and_leaves_no_half_file(notebooks, monkeypatch, capsys):
    import papermill.iorw

    write = papermill.iorw.LocalHandler.write

    def full(self, buf, path):
        write(self, buf[:100], path)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(papermill.iorw.LocalHandler, "write", full)
    notebooks("10_big", "1")
    assert reproduce.main([]) == 1
    assert re.search("10_big: not written .*no space left", capsys.readouterr().out)
    assert not list(folder_of("10_big").iterdir())


def test_a_notebook_of_an_experiment_without_verdicts_is_incomplete(notebooks, monkeypatch, capsys):
    monkeypatch.setitem(EXPERIMENTS, "10_some", EXPERIMENTS["02_mnist_fuzziness"])
    notebooks("10_some", "1")
    assert reproduce.main([]) == 1
    assert "10_some: incomplete" in capsys.readouterr().out


INTERRUPTIBLE = """
import time
from pathlib import Path
try:
    Path({ready!r}).touch()
    time.sleep(60)
except KeyboardInterrupt:
    print("checkpoint saved", flush=True)
    raise
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_reaches_the_kernel_and_ends_the_run(notebooks, tmp_path, capsys, number):
    ready, main = tmp_path / "ready", threading.main_thread().ident

    def interrupt():
        deadline = time.monotonic() + 60
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        if ready.exists():  # else the runner may not listen yet, and the signal would end the tests
            signal.pthread_kill(main, number)

    notebooks("10_long", INTERRUPTIBLE.format(ready=str(ready)))
    notebooks("11_later", "1")
    threading.Thread(target=interrupt, daemon=True).start()
    assert reproduce.main([]) == 130
    said = capsys.readouterr().out
    assert "10_long: interrupted" in said and "11_later" not in said
    assert "checkpoint saved" in outputs(folder_of("10_long") / "notebook.failed.ipynb")


# What is asked for


def test_only_picks_by_number_or_name(notebooks):
    for stem in ("01_a", "02_b", "12_c"):
        notebooks(stem)
    assert [n.stem for n in reproduce.select(["12", "1"])] == ["01_a", "12_c"]
    assert [n.stem for n in reproduce.select(["02_b"])] == ["02_b"]
    with pytest.raises(UserError, match="no notebook '3': choose from 01_a, 02_b, 12_c"):
        reproduce.select(["3"])


def test_settings_of_every_type_reach_the_notebook(notebooks, monkeypatch):
    overrides = {"hidden": [8, 4], "sigma": None, "steps": 3, "dataset": "mnist", "min_samples": 2.5}
    arguments = [word for name, value in overrides.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    arguments[arguments.index('dataset="mnist"')] = "dataset=mnist"
    monkeypatch.setitem(EXPERIMENTS, "10_some", EXPERIMENTS["02_mnist_fuzziness"])
    notebooks("10_some", "import json; print(json.dumps(overrides))")
    reproduce.main(arguments)
    (copy,) = files.runs_root().glob("*/*/notebook*.ipynb")
    assert json.loads(outputs(copy)) == overrides


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


# What is shown meanwhile


class Looks:
    """Stands for a `threading.Event` that is set after so many looks, at once."""

    def __init__(self, count):
        self.left = count

    def wait(self, seconds):
        self.left -= 1
        return self.left < 0


def test_training_is_shown_in_a_log_by_one_line_a_minute(tmp_path, capsys, monkeypatch):
    file = tmp_path / "progress.json"
    file.write_text(json.dumps({"name": "vae", "step": 5, "steps": 10, "loss": 1.25, "elapsed": 1, "minutes": 0}))
    clock = iter(range(0, 1000, 25))  # seconds
    monkeypatch.setattr(reproduce.time, "monotonic", lambda: next(clock))
    reproduce.watch("02_mnist_fuzziness", file, Looks(3))
    assert capsys.readouterr().err == "02_mnist_fuzziness  vae  loss 1.25  step 5 of 10\n"
