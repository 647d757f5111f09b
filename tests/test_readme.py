"""What README and docs tell people to type: commands and settings are known, files exist, recipes run."""

import functools
import re
import shlex
import subprocess

import commands
import nbformat
import numpy as np
import pytest
from PIL import Image

from paperlib.experiments import EXPERIMENTS
from paperlib.pixelvae import training
from paperlib.reproduce import select
from paperlib.runs import presets
from paperlib.system import files

README = (files.ROOT / "README.md").read_text()
TEXT = "\n".join([README, *(path.read_text() for path in (files.ROOT / "docs").glob("*.md"))])
LINES = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]
TYPED = {line.split("  #")[0].strip() for line in LINES} | set(re.findall(r"`((?:make|python -m) [^`\n]+)`", TEXT))
WORDS = [[word for word in shlex.split(line) if not re.match(r"PIP_\w+=", word)] for line in sorted(TYPED)]
RECIPES = README.split("## Trying an idea")[1].split("\n## ")[0]


def typed(*programs):
    """A parameter of a test: what is typed for these programs."""
    chosen = [words for words in WORDS if words[0] in programs]
    return pytest.mark.parametrize("words", chosen, ids=map(shlex.join, chosen))


@pytest.fixture(scope="module")
def help_of(tmp_path_factory):
    """What `python -m` with these words and `--help` says."""
    home = tmp_path_factory.mktemp("help")

    @functools.cache
    def ask(*called):
        done = commands.run([*called, "--help"], home)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return ask


def test_every_program_is_tried_here():
    assert {words[0] for words in WORDS} == {"make", "python", "torchrun", "papermill", "sbatch"}


@typed("make")
def test_make_has_the_target_and_the_settings(words, tmp_path):
    done = subprocess.run([*words, "-n", f"VENV={tmp_path}"], cwd=files.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    given = dict(word.split("=", 1) for word in words if "=" in word)
    for notebook in select([given["ONLY"]] if "ONLY" in given else []):
        settings = EXPERIMENTS[notebook.stem].settings
        preset = given.get("PRESET", "smoke")
        settings(preset, presets.parse(settings(preset), given.get("SET", "").split()))


@typed("python", "torchrun")
def test_a_module_has_the_options(words, help_of):
    module, *rest = words[words.index("-m") + 1 :]
    command = [word for word in rest[:1] if not word.startswith("-")]
    said = help_of(module, *command)
    assert all(re.search(rf"{word}\b", said) for word in rest if word.startswith("--"))


@typed("papermill")
def test_a_notebook_has_the_parameters(words):
    cells = nbformat.read(files.ROOT / words[1], 4).cells
    parameters = next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
    named = [words[k + 1] for k, word in enumerate(words) if word == "-p"]
    assert named and all(f"{name}:" in parameters for name in named)


@typed("sbatch")
def test_a_script_reads_what_is_exported(words):
    script = (files.ROOT / words[-1]).read_text()
    exported = [name for word in words for name in re.findall(r"(\w+)=", word.partition("--export=ALL,")[2])]
    assert all(f"${{{name}:-" in script for name in exported)


def test_flags_and_settings_named_in_prose_exist(help_of):
    assert all(flag in help_of("paperlib.reproduce") for flag in re.findall(r"FLAGS=\W*(--[\w-]+)", TEXT))
    known = {name for experiment in EXPERIMENTS.values() for name in vars(experiment.presets["smoke"])}
    assert known >= set(re.findall(r"SET=\W?(\w+)=", TEXT))


def test_files_exist():
    named = re.findall(r"(?:\]\(|src=\")((?!http)[^)\"#]+)", TEXT)  # links and pictures
    named += re.findall(r"`((?:paperlib|docs|results|figures|slurm|notebooks|benchmarks|tests)/[^`<>*]*)`", TEXT)
    assert len(named) > 20
    missing = [name for name in named if not any((root / name).exists() for root in (files.ROOT, files.ROOT / "docs"))]
    assert not missing


def test_the_recipe_of_a_new_objective(tmp_path, monkeypatch, capsys):
    for name, value in commands.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(training, "OBJECTIVES", dict(training.OBJECTIVES))
    (code,) = re.findall(r"```python\n(.*?)```", RECIPES, re.DOTALL)
    assert len(code.splitlines()) <= 10
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102
    measured = eval(capsys.readouterr().out.splitlines()[-1], {"__builtins__": {}})
    assert measured["bits_per_dim"] > 0 and measured["kl"] > 0
    assert list((tmp_path / "runs").rglob("20 nats/last.pt"))


def test_the_recipes_of_another_data_set_and_number_of_steps(tmp_path):
    """One run with all settings that they give, in trainings of a few steps."""
    (tmp_path / "images").mkdir()
    noise = np.random.default_rng(0).integers(256, size=(1400, 40, 48, 3), dtype=np.uint8)
    for k, pixels in enumerate(noise):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{k}.png", compress_level=0)
    lines = "\n".join(re.findall(r"```sh\n(.*?)```", RECIPES, re.DOTALL)).replace("FOLDER", str(tmp_path / "images"))
    prepare, *runs = [shlex.split(line) for line in lines.splitlines() if line]
    assert all(words[:3] == ["make", "reproduce", "ONLY=03"] for words in runs)
    asked = [pair for words in runs for word in words if word.startswith("SET=") for pair in word[4:].split()]
    few = [f"{kind}train_steps=4" for kind in ("", "one_step_", "infusion_", "ablation_")]
    options = [word for pair in [*asked, *few] for word in ("--set", pair)]
    for words in (prepare[2:], ["paperlib.reproduce", "--only", "03", *options]):
        done = commands.run(words, tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (tmp_path / "runs").rglob("run.json")
    asked = dict(pair.split("=") for pair in asked)
    assert asked["dataset"] == "own_images" == files.load_json(run)["settings"]["dataset"]
    chain = np.load(run.with_name("arrays.npz"))["chain"]
    assert chain.shape[2:] == (int(asked["side"]), int(asked["side"]), 3)
    assert len(chain) == int(asked["chain_steps"]) + 1  # noise, then a mean for every step
