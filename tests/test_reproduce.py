"""The runner on small notebooks made here: each way in which a notebook can end has a status of its own."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import nbformat
import pytest

from paperlib import reproduce
from paperlib.experiments import EXPERIMENTS
from paperlib.system import files
from paperlib.system.errors import UserError

PARAMETERS = 'preset = "smoke"\nseed = 0\ndevice = "auto"\noverrides = {}'


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    """What writes a notebook into a folder that stands for `notebooks/`; another stands for `runs/`."""
    monkeypatch.setattr(files, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setenv("PAPERLIB_RUNS", str(tmp_path / "runs"))
    files.NOTEBOOKS.mkdir()

    def write(stem, *cells, parameters=PARAMETERS):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in (parameters, *cells)])
        notebook.cells[0].metadata["tags"] = ["parameters"]
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, files.NOTEBOOKS / f"{stem}.ipynb")

    return write


def folder_of(stem, preset="smoke"):
    return files.runs_root() / stem / preset


def outputs(file):
    notebook = nbformat.read(file, as_version=4)
    return "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))


# How notebooks end


def test_each_end_has_a_status_and_a_line_and_the_copy_of_a_failure_stays(notebooks, capsys):
    notebooks("10_bad", "print('before')", "raise ValueError('what went wrong')", "print('after')")
    notebooks("11_mistake", "from paperlib.system.errors import UserError\nraise UserError('put the data there')")
    notebooks("12_dead", "print('before', flush=True)", "import os; os.kill(os.getpid(), 9)", "print('after')")
    notebooks("13_other", "1", parameters='presett = "smoke"\nseed = 0')
    notebooks("14_good", "import os; print(preset, seed, os.path.basename(os.getcwd()))")
    assert reproduce.main(["--preset", "cpu", "--seed", "3"]) == 1
    said, table = capsys.readouterr().out.rsplit("\n\n", 1)
    for line in (  # cells as numbered in the executed copy, where papermill adds one
        r"10_bad: failed in cell 4 after \d+ s: ValueError: what went wrong",
        r"11_mistake: failed in cell 3 after \d+ s: put the data there",
        r"12_dead: kernel died after \d+ s: its process ended .*",
        r"13_other: unknown parameter after 0 s: .* has no device, overrides, preset",
        r"14_good: ok after \d+ s",
    ):
        assert re.search(f"^{line}$", said, re.MULTILINE), line
    assert re.findall(r"^(\d\d)_\w+ ", table, re.MULTILINE) == ["10", "11", "12", "13", "14"]
    assert re.search(r"^14_good +ok +\d+ +- +\S*14_good", table, re.MULTILINE)
    assert outputs(folder_of("14_good", "cpu") / "notebook.ipynb") == "cpu 3 notebooks\n"
    for stem in ("10_bad", "12_dead"):
        (copy,) = folder_of(stem, "cpu").glob("*.ipynb")
        assert copy.name == "notebook.failed.ipynb" and outputs(copy) == "before\n", "up to the failed cell"


def test_a_failure_leaves_an_earlier_success_alone_and_a_success_removes_it_and_fail_fast_stops(notebooks, capsys):
    notebooks("11_later", "1")
    for cell, code, kept in (("print('one')", 0, "one"), ("raise ValueError", 1, "one"), ("print('two')", 0, "two")):
        notebooks("10_some", cell)
        assert reproduce.main(["--fail-fast"]) == code
        assert outputs(folder_of("10_some") / "notebook.ipynb") == f"{kept}\n"
        assert (folder_of("10_some") / "notebook.failed.ipynb").exists() == bool(code)
        assert ("11_later" in capsys.readouterr().out) == (not code)


def test_a_full_disk_is_a_status_and_leaves_no_half_file(notebooks, monkeypatch, capsys):
    from papermill.iorw import LocalHandler

    def full(self, buf, path):
        Path(path).write_text(buf[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LocalHandler, "write", full)
    notebooks("10_big", "1")
    assert reproduce.main([]) == 1
    assert re.search("10_big: not written .*no space left", capsys.readouterr().out)
    assert not list(folder_of("10_big").iterdir())


INTERRUPTIBLE = """
import pathlib, time
try:
    pathlib.Path({ready!r}).touch()
    time.sleep(60)
except KeyboardInterrupt:
    print("checkpoint saved", flush=True)
    raise
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_reaches_the_kernel_and_ends_the_run(notebooks, tmp_path, capsys, number):
    ready, main = tmp_path / "ready", threading.main_thread().ident

    def interrupt():
        while not ready.exists():  # before, the runner may not listen, and the signal would end the tests
            time.sleep(0.02)
        signal.pthread_kill(main, number)

    notebooks("10_long", INTERRUPTIBLE.format(ready=str(ready)))
    notebooks("11_later", "1")
    threading.Thread(target=interrupt, daemon=True).start()
    assert reproduce.main([]) == 130
    said = capsys.readouterr().out
    assert "10_long: interrupted" in said and "11_later" not in said
    assert "checkpoint saved" in outputs(folder_of("10_long") / "notebook.failed.ipynb")


# What is asked for


def test_the_kernel_is_ours_and_knows_nobody_s_configuration(notebooks, tmp_path, monkeypatch, capsys):
    """Another paperlib, backend, matplotlibrc, profile, kernel and a home that is none change nothing."""
    (tmp_path / "other" / "paperlib").mkdir(parents=True)
    (tmp_path / "other" / "paperlib" / "__init__.py").write_text("raise SystemExit('the other one')")
    (tmp_path / "home" / "profile_default").mkdir(parents=True)
    (tmp_path / "home" / "profile_default" / "ipython_config.py").write_text("c.InlineBackend.figure_formats = {'svg'}")
    (tmp_path / "home" / "matplotlibrc").write_text("figure.facecolor: red")
    (kernel := tmp_path / "home" / "kernels" / "python3").mkdir(parents=True)
    (kernel / "kernel.json").write_text(json.dumps({"argv": ["false"], "display_name": "x", "language": "python"}))
    variables = {"PYTHONPATH": "other", "MPLBACKEND": "Agg", "HOME": "/nowhere"}
    variables |= dict.fromkeys(("IPYTHONDIR", "MPLCONFIGDIR", "JUPYTER_DATA_DIR", "JUPYTER_PATH"), "home")
    for name, value in variables.items():
        monkeypatch.setenv(name, str(tmp_path / value) if value in ("other", "home") else value)
    drawn = "import sys, paperlib\nfrom matplotlib import pyplot\nprint(paperlib.__file__, sys.executable)"
    notebooks("30_clean", drawn + "\nfigure, axis = pyplot.subplots()  # save_figure(")
    assert reproduce.main([]) == 0, capsys.readouterr().out
    executed = folder_of("30_clean") / "notebook.ipynb"
    assert outputs(executed) == f"{files.ROOT / 'paperlib' / '__init__.py'} {sys.executable}\n"
    assert "svg" not in executed.read_text()


def test_a_notebook_without_its_figures_is_incomplete(notebooks, capsys):
    code = "import matplotlib\nmatplotlib.use('Agg')\nfrom matplotlib import pyplot\npyplot.plot([1])  # save_figure("
    notebooks("31_blank", code)
    assert reproduce.main([]) == 1
    assert "31_blank: incomplete" in (said := capsys.readouterr().out)
    assert "1 of 1 figures are not in the executed copy" in said


def test_fresh_forgets_a_run_but_not_one_that_is_training(notebooks, capsys):
    notebooks("32_old", "1")
    (old := folder_of("32_old") / "model").mkdir(parents=True)
    (old / "last.pt").write_text("old")
    (folder_of("32_old") / ".notebook.999999999.partial.ipynb").write_text("killed")
    code = "import sys, pathlib, time\nfrom paperlib.system import files\n"
    code += "with files.locked(pathlib.Path(sys.argv[1]), 'training'):\n    print('in', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(old)], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match=f"process {other.pid} is training in {old}"):
            reproduce.main(["--fresh"])
        assert (old / "last.pt").exists()
        other.kill()
    assert reproduce.main([]) == 0 and (old / "last.pt").exists()
    assert not list(folder_of("32_old").glob(".notebook*")), "what a killed runner left"
    assert reproduce.main(["--fresh"]) == 0
    assert not old.exists() and not list(files.runs_root().glob("*/.*")), capsys.readouterr().out


def test_nothing_to_run_is_an_error(notebooks):
    with pytest.raises(UserError, match=f"no notebooks in {files.NOTEBOOKS}"):
        reproduce.main([])


def test_only_picks_by_number_or_name(notebooks):
    for stem in ("01_a", "02_b", "12_c"):
        notebooks(stem)
    for names, stems in ((["12", "1"], ["01_a", "12_c"]), (["02_b"], ["02_b"]), ([], ["01_a", "02_b", "12_c"])):
        assert [path.stem for path in reproduce.select(names)] == stems


def test_settings_of_every_type_reach_the_notebook_which_is_incomplete_without_verdicts(notebooks, monkeypatch, capsys):
    overrides = {"hidden": [8, 4], "sigma": None, "steps": 3, "min_samples": 2.5}
    arguments = [word for name, value in overrides.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    monkeypatch.setitem(EXPERIMENTS, "10_some", EXPERIMENTS["02_mnist_fuzziness"])
    notebooks("10_some", "import json; print(json.dumps(overrides))")
    assert reproduce.main([*arguments, "--set", "dataset=mnist"]) == 1
    assert "10_some: incomplete" in capsys.readouterr().out
    (copy,) = files.runs_root().glob("*/*/notebook*.ipynb")
    assert json.loads(outputs(copy)) == overrides | {"dataset": "mnist"}


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
    assert "unknown preset 'smokee': choose from recorded, smoke, cpu, gpu, paper" in run.stderr.strip().split("\n")[-1]


# What is shown meanwhile


def test_training_is_shown_in_a_log_by_one_line_a_minute(tmp_path, capsys, monkeypatch):
    file = tmp_path / "progress.json"
    file.write_text(json.dumps({"name": "vae", "step": 5, "steps": 10, "loss": 1.25, "elapsed": 1}))
    clock, done = iter(range(0, 1000, 25)), iter([False, False, False, True])  # seconds, and whether it ended
    monkeypatch.setattr(reproduce.time, "monotonic", lambda: next(clock))
    reproduce.watch("02_mnist_fuzziness", file, types.SimpleNamespace(wait=lambda seconds: next(done)))
    assert capsys.readouterr().err == "02_mnist_fuzziness  vae  loss 1.25  step 5 of 10\n"
