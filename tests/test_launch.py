"""Training without a notebook: one process, several, and a change of their number come to the same."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import environment

from paperlib.system import files

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
FEW = {  # steps of every training; a row of the history for each, to compare
    "pixelvae": {"pretrain_steps": 20, "finetune_steps": 4, "ablation_steps": 2, "evaluations": 20, "batch_size": 16}
    | {"dropout": 0.1, "evaluation_images": 20, "learning_rate": 1e-5},
    "sequential": {"train_steps": 20, "one_step_train_steps": 8, "infusion_train_steps": 6, "ablation_train_steps": 4}
    | {"evaluations": 20, "batch_size": 16, "evaluation_images": 20, "measured_images": 40, "learning_rate": 1e-5},
}


def launch(name, runs, count, settings, progress=""):
    """`python -m paperlib.<name>`, by torchrun where there are several processes."""
    command = [*TORCHRUN, f"--nproc-per-node={count}"] if count > 1 else [sys.executable]
    command += ["-m", f"paperlib.{name}", "--device", "cpu"]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    variables = environment(runs, {"PAPERLIB_RUNS": str(runs), "PAPERLIB_PROGRESS": str(progress)})
    return subprocess.Popen(
        command, cwd=files.ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process, seconds=200):
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def histories(runs):
    """Of each training in the one run below `runs`, its rows as an array of numbers."""
    rows_of = {}
    for file in sorted(runs.glob("*/*/*/last.pt")):
        rows = torch.load(file, weights_only=True)["state"]["history"]
        rows_of[file.parent.name] = np.array([list(row.values()) for row in rows])
    return rows_of


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pixelvae", "sequential"])
def test_two_processes_train_as_one(name, tmp_path):
    """All objectives, with dropout, moved images, an MMD over the whole batch, a controlled KL and random steps.

    Small steps, as Adam's first ones turn rounding into differences.
    """
    for count in (1, 2):
        code, out, err = finish(launch(name, tmp_path / str(count), count, FEW[name]))
        assert code == 0, err[-2000:]
        assert "goes on from there" in out
    one, two = histories(tmp_path / "1"), histories(tmp_path / "2")
    assert set(one) == set(two) and len(one) >= 4
    assert max(len(rows) for rows in one.values()) == 20
    for training, rows in one.items():
        np.testing.assert_allclose(two[training][:, :2], rows[:, :2], rtol=1e-5, err_msg=training)  # the loss
        np.testing.assert_allclose(two[training], rows, rtol=1e-4, atol=1e-4, err_msg=training)  # its terms, held out


def until(process, there, seconds=120):
    """Wait, while `process` runs, for what is to be there."""
    deadline = time.monotonic() + seconds
    while not there() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.05)


def workers(process):
    """Processes that torchrun started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


@pytest.mark.slow
def test_one_of_two_killed_ends_the_job_and_what_was_finished_stays(tmp_path):
    settings = FEW["pixelvae"] | {"finetune_steps": 400}
    process = launch("pixelvae", tmp_path / "killed", 2, settings)
    until(process, lambda: list(tmp_path.glob("killed/*/*/pretraining/last.pt")))
    time.sleep(1)
    os.kill(workers(process)[1], signal.SIGKILL)
    code, _, err = finish(process)
    assert code != 0
    assert "SIGKILL" in err
    (last,) = tmp_path.rglob("pretraining/last.pt")
    assert torch.load(last, weights_only=True)["state"]["stopped"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_stopped_training_goes_on_with_another_number_of_processes(before, after, tmp_path):
    """The rows are those of a training that one process did without a stop: before the stop, around it, and after."""
    settings = FEW["pixelvae"] | {"pretrain_steps": 60, "evaluations": 60, "learning_rate": 1e-6}
    assert finish(launch("pixelvae", tmp_path / "whole", 1, settings))[0] == 0
    process = launch("pixelvae", tmp_path / "stopped", before, settings, progress=tmp_path / "progress.json")
    until(process, (tmp_path / "progress.json").exists)  # after the first step
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code != 0 and "stopping after this step" in err
    (last,) = tmp_path.glob("stopped/*/*/pretraining/last.pt")
    state = torch.load(last, weights_only=True)["state"]
    assert not state["stopped"] and 0 < state["step"] < 50
    code, _, err = finish(launch("pixelvae", tmp_path / "stopped", after, settings))
    assert code == 0, err[-2000:]
    whole, resumed = histories(tmp_path / "whole"), histories(tmp_path / "stopped")
    assert set(whole) == set(resumed) and len(whole["pretraining"]) == 60
    for training, rows in whole.items():
        np.testing.assert_allclose(resumed[training][:, :2], rows[:, :2], rtol=1e-5, err_msg=training)
        np.testing.assert_allclose(resumed[training], rows, rtol=1e-4, atol=1e-4, err_msg=training)
