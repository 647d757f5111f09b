"""SIGKILL at random moments: every file is whole at every moment, and the end is that of an undisturbed run."""

import contextlib
import json
import random
import time

import commands
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from paperlib.runs import checkpoints
from paperlib.runs.run import load_arrays


def run(home, words, most=float("inf")):
    """Run the notebooks until about `most` files were written, then kill. How many were, and what it said."""
    streams = home / f"streams {time.monotonic_ns()}"
    streams.mkdir(parents=True)
    began, written = time.time(), set()
    process = commands.start(words, home, streams)
    while process.is_alive() and len(written) < most:
        time.sleep(0.01)
        for path in (home / "runs").rglob("*.*"):
            with contextlib.suppress(FileNotFoundError):  # it took its place meanwhile
                if (changed := path.stat().st_mtime) > began and path.is_file():
                    written.add((path, changed))
        assert time.time() - began < 1800
    time.sleep(random.uniform(0, 0.1))
    commands.stop(process, streams)
    return len(written), commands.finished(streams)


def read_weights(path):
    with safe_open(path, framework="pt") as file:
        return all(file.get_tensor(name) is not None for name in file.keys())


READERS = {
    ".json": lambda path: json.loads(path.read_text()),
    ".ipynb": lambda path: json.loads(path.read_text()),
    ".npz": lambda path: load_arrays(path.parent),
    ".npy": lambda path: np.load(path, mmap_mode="r") is not None,
    ".png": lambda path: Image.open(path).load(),
    ".safetensors": read_weights,
    ".pt": checkpoints._load,
}


def opened(home):
    """Open every file below the roots as its reader would; how many there are."""
    # A partial file is beside its place, not in it.
    paths = [path for path in home.rglob("*") if path.suffix in READERS and ".partial" not in path.name]
    assert all(READERS[path.suffix](path) for path in paths)
    return len(paths)


def kept(home, ending):
    """Files by notebook and name. A run's folder is the same whenever its settings are."""
    files = (path for path in home.rglob(f"*{ending}") if ".partial" not in path.name)
    return {path.relative_to(home): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("words", "kills"),
    [
        pytest.param(commands.NOTEBOOK, 3, id="a notebook, 3 times"),
        pytest.param(["paperlib.reproduce"], 20, id="all notebooks, 20 times", marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_moments_and_started_again_it_ends_as_if_undisturbed(words, kills, tmp_path):
    whole, home = tmp_path / "whole", tmp_path / "killed"
    random.seed(0)
    files, done = run(whole, words)
    assert done.returncode == 0, done.stdout[-3000:]
    seen = 0
    for _ in range(kills):
        _, done = run(home, words, most=random.randint(1, int(0.6 * files)))
        seen += done.returncode == -9
        opened(home)
    assert seen >= 0.6 * kills, "most were killed before they were done"
    _, done = run(home, words)
    assert done.returncode == 0, done.stdout[-3000:]
    assert opened(home) > 5
    for ending in ("metrics.json", ".png"):
        assert kept(whole, ending) and set(kept(whole, ending)) == set(kept(home, ending))
        others = [str(path) for path, content in kept(whole, ending).items() if kept(home, ending)[path] != content]
        assert not others, "other numbers or pictures"
