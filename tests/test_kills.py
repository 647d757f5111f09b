"""SIGKILL at random moments: every file is whole at every moment, and the end is that of an undisturbed run."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from paperlib.runs import checkpoints
from paperlib.system import files


def start(home, arguments):
    environment = os.environ | {"PAPERLIB_RUNS": str(home / "runs"), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, "-m", "paperlib.reproduce", "--preset", "smoke", *arguments]
    return subprocess.Popen(
        command, cwd=files.ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finished(home, arguments):
    """Run to the end; seconds that it took."""
    began = time.monotonic()
    process = start(home, arguments)
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said[-3000:]
    return time.monotonic() - began


def opened(home):
    """Open every file below the roots as its reader would; how many there are."""
    count = 0
    for path in home.rglob("*"):
        if ".partial" in path.name or not path.is_file():
            continue  # beside its place, not in it
        if path.suffix in (".json", ".ipynb"):
            json.loads(path.read_text())
        elif path.suffix == ".npz":
            with np.load(path) as archive:
                assert all(archive[name] is not None for name in archive.files)
        elif path.suffix == ".npy":
            np.load(path, mmap_mode="r")
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                assert all(file.get_tensor(name) is not None for name in file.keys())
        elif path.name in ("last.pt", "previous.pt"):
            assert checkpoints._load(path) is not None, path
        else:
            continue
        count += 1
    return count


def kept(home, ending):
    """Files by notebook and name. A run's folder is the same whenever its settings are."""
    return {path.relative_to(home): path.read_bytes() for path in sorted(home.rglob(f"*{ending}"))}


@pytest.mark.parametrize(
    ("arguments", "kills"),
    [
        pytest.param(["--only", "02"], 3, id="a notebook, 3 times"),
        pytest.param([], 20, id="all notebooks, 20 times", marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_moments_and_started_again_it_ends_as_if_undisturbed(arguments, kills, tmp_path):
    took = finished(tmp_path / "whole", arguments)
    home, moments, seen = tmp_path / "killed", random.Random(0), 0
    for _ in range(kills):
        process = start(home, arguments)
        time.sleep(moments.uniform(0.1, 0.6) * took)
        alive = process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
        seen += alive
        opened(home)
    assert seen >= 0.6 * kills, "most were killed before they were done"
    finished(home, arguments)
    assert opened(home) > 5
    for ending in ("metrics.json", ".png"):
        whole, killed = kept(tmp_path / "whole", ending), kept(home, ending)
        assert whole and set(whole) == set(killed)
        assert not [str(path) for path in whole if whole[path] != killed[path]], "other numbers or pictures"
