"""What README and docs tell people to type: commands are known, recipes run."""

import os
import re
import shlex
import subprocess
import sys

import nbformat
import numpy as np
import pytest
from PIL import Image

from paperlib.system import files

README = (files.ROOT / "README.md").read_text()
TEXT = README + (files.ROOT / "docs" / "running.md").read_text()
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [line.split("  #")[0].strip() for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]
COMMANDS += [words for words in re.findall(r"`((?:make|python -m|source) [^`\n]+)`", TEXT)]
RECIPES = README.split("## Trying an idea")[1].split("\n## ")[0]


def said_by(words, **options):
    done = subprocess.run(words, cwd=files.ROOT, capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, f"{shlex.join(words)}: {(done.stdout + done.stderr)[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def help_of():
    """What `python -m CALLED --help` says."""
    known = {}

    def ask(called):
        if called not in known:
            known[called] = said_by([sys.executable, "-m", *called.split(), "--help"])
        return known[called]

    return ask


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_a_command_is_known(command, help_of, tmp_path):
    words = [word for word in shlex.split(command) if not re.match(r"PIP_\w+=", word)]
    if words[0] == "make":
        said_by([*words, "-n", f"VENV={tmp_path}"])
    elif words[0] in ("python", "torchrun"):
        after = words[words.index("-m") + 1 :]
        called = " ".join(after[:2] if after[0] in ("paperlib.data", "paperlib.report") and after[1:] else after[:1])
        assert all(flag in help_of(called) for flag in after if flag.startswith("--"))
    elif words[0] == "papermill":
        source = nbformat.read(files.ROOT / words[1], 4)
        parameters = next(c.source for c in source.cells if "parameters" in c.metadata.get("tags", []))
        named = [words[k + 1] for k, word in enumerate(words) if word == "-p"]
        assert named and all(f"{name}:" in parameters for name in named)
    else:
        assert words[0] in ("source", "apt-get", "conda"), "nothing here tries this command"


def environment(tmp_path):
    roots = {f"PAPERLIB_{name}": str(tmp_path / name) for name in ("RUNS", "DATA", "RESULTS", "FIGURES")}
    return os.environ | roots | {"TQDM_DISABLE": "1"}


def test_the_recipe_of_a_new_objective(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", RECIPES, re.DOTALL)
    assert len(code.splitlines()) <= 10
    said = said_by([sys.executable, "-c", code], env=environment(tmp_path))
    measured = eval(said.splitlines()[-1], {"__builtins__": {}})
    assert measured["bits_per_dim"] > 0 and measured["kl"] > 0
    assert list((tmp_path / "RUNS").rglob("free bits/last.pt"))


def test_the_recipes_of_another_data_set_and_of_more_steps(tmp_path):
    """Together in one run; updates are few, as the notebook itself is tested elsewhere."""
    folder = tmp_path / "images"
    folder.mkdir()
    for k in range(1500):
        Image.fromarray(np.random.default_rng(k).integers(256, size=(40, 48, 3), dtype=np.uint8)).save(
            folder / f"{k}.png"
        )
    lines = [line for block in re.findall(r"```sh\n(.*?)```", RECIPES, re.DOTALL) for line in block.splitlines()]
    prepare, *runs = [shlex.split(line.replace("FOLDER", str(folder))) for line in lines]
    said_by([sys.executable, *prepare[1:]], env=environment(tmp_path))
    settings = [pair for words in runs for word in words if word.startswith("SET=") for pair in word[4:].split()]
    assert {pair.split("=")[0] for pair in settings} == {"dataset", "side", "chain_steps"}
    assert all("ONLY=03" in words for words in runs)
    few = [f"{name}=4" for name in ("train_steps", "one_step_train_steps", "infusion_train_steps", "ablation_train_steps")]
    asked = [word for pair in [*settings, *few] for word in ("--set", pair)]
    said_by([sys.executable, "-m", "paperlib.reproduce", "--only", "03", *asked], env=environment(tmp_path))
    (arrays,) = (tmp_path / "RUNS").rglob("arrays.npz")
    chain = np.load(arrays)["chain"]
    steps = int(dict(pair.split("=") for pair in settings)["chain_steps"])
    assert chain.shape == (steps + 1, 10, 32, 32, 3)
