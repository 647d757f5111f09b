"""Training without a notebook: one process, several, and a change of their number come to the same."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import commands
import numpy as np
import pytest
import torch

from paperlib.system import files

FEW = {  # steps of every training; a row of the history for each, to compare
    "pixelvae": {"train_steps": 20, "elbo_steps": 4, "sweep_steps": 2, "evaluations": 20, "batch_size": 16}
    | {"dropout": 0.1, "evaluation_images": 20, "learning_rate": 1e-5},
    "sequential": {"train_steps": 20, "one_step_train_steps": 8, "infusion_train_steps": 6, "ablation_train_steps": 4}
    | {"evaluations": 20, "batch_size": 16, "evaluation_images": 20, "measured_images": 40, "learning_rate": 1e-5},
}
pytestmark = pytest.mark.slow


def launch(name, runs, count, settings):
    """`python -m paperlib.<name>`, by torchrun where there are several processes."""
    by = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
    command = [sys.executable, *by, "-m", f"paperlib.{name}", "--device", "cpu", *commands.settings(settings)]
    variables = commands.environment(runs, {"PAPERLIB_RUNS": str(runs), "PAPERLIB_PROGRESS": f"{runs}.json"})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=files.ROOT, env=variables, **pipes)


def finish(process, ok=True):
    """What an ended command said."""
    out, err = process.communicate(timeout=200)
    assert (process.returncode == 0) == ok, err[-2000:]
    return out + err


def until(process, there):
    """Wait, while `process` runs, for what is to be there."""
    deadline = time.monotonic() + 120
    while not there() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.05)


def state(runs, training):
    """What is in the one checkpoint of a training below `runs`."""
    (last,) = runs.glob(f"*/*/{training}/last.pt")
    return torch.load(last, weights_only=True)["state"]


def assert_same_rows(runs, expected, longest):
    """The same trainings in both folders, with the same rows of losses, terms and held-out numbers."""
    names = {last.parent.name for last in expected.glob("*/*/*/last.pt")}
    assert names == {last.parent.name for last in runs.glob("*/*/*/last.pt")} and len(names) >= 4
    lengths = []
    for name in names:
        one, other = (np.array([list(row.values()) for row in state(r, name)["history"]]) for r in (expected, runs))
        np.testing.assert_allclose(other[:, :2], one[:, :2], rtol=1e-5, err_msg=name)  # the loss
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-4, err_msg=name)
        lengths.append(len(one))
    assert max(lengths) == longest


@pytest.mark.parametrize("name", ["pixelvae", "sequential"])
def test_two_processes_train_as_one(name, tmp_path):
    """All objectives, with dropout, moved images, an MMD over the whole batch, a controlled KL and random steps.

    Small steps, as Adam's first ones turn rounding into differences.
    """
    for count in (1, 2):
        assert "goes on from there" in finish(launch(name, tmp_path / str(count), count, FEW[name]))
    assert_same_rows(tmp_path / "2", tmp_path / "1", 20)


def test_one_of_two_killed_ends_the_job_and_what_was_finished_stays(tmp_path):
    runs = tmp_path / "runs"
    process = launch("pixelvae", runs, 2, FEW["pixelvae"] | {"elbo_steps": 400})
    until(process, lambda: list(runs.glob("*/*/none/last.pt")))
    time.sleep(1)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[1]), signal.SIGKILL)
    assert "SIGKILL" in finish(process, ok=False)
    assert state(runs, "none")["stopped"] == "finished"


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_stopped_training_goes_on_with_another_number_of_processes(before, after, tmp_path):
    """The rows are those of a training that one process did without a stop: before the stop, around it, and after."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    settings = FEW["pixelvae"] | {"train_steps": 60, "evaluations": 60, "learning_rate": 1e-6}
    finish(launch("pixelvae", whole, 1, settings))
    process = launch("pixelvae", stopped, before, settings)
    until(process, (tmp_path / "stopped.json").exists)  # after the first step
    process.send_signal(signal.SIGINT)
    assert "stopping after this step" in finish(process, ok=False)
    kept = state(stopped, "none")
    assert not kept["stopped"] and 0 < kept["step"] < 50
    finish(launch("pixelvae", stopped, after, settings))
    assert_same_rows(stopped, whole, 60)
