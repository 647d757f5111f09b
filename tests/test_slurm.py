"""The Slurm scripts: read by shellcheck where it is installed, and run dry, with commands that only say their name."""

import os
import shutil
import subprocess

import pytest

from paperlib import reproduce
from paperlib.experiments import EXPERIMENTS
from paperlib.runs import launch
from paperlib.system import files

SCRIPTS = sorted((files.ROOT / "slurm").glob("*.sbatch"))


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_shellcheck_finds_nothing(script):
    said = subprocess.run(["shellcheck", "-e", "SC1091", str(script)], capture_output=True, text=True)
    assert said.returncode == 0, said.stdout


def dry(script, tmp_path, **variables):
    """What the script would run, with stand-ins for its commands that print their arguments."""
    stubs = tmp_path / ".venv" / "bin"
    stubs.mkdir(parents=True)
    (stubs / "activate").write_text(f'PATH="{stubs}:$PATH"\n')
    for name, does in {"python": 'echo "$@"', "srun": 'echo "$@"', "scontrol": "printf 'one\\ntwo\\n'"}.items():
        (stubs / name).write_text(f"#!/bin/sh\n{does}\n")
        (stubs / name).chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(tmp_path)} | variables
    said = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    return said.stdout.split()


def test_the_array_runs_each_notebook_once(tmp_path):
    script = files.ROOT / "slurm" / "notebooks.sbatch"
    (array,) = (line for line in script.read_text().split("\n") if line.startswith("#SBATCH --array="))
    assert array == f"#SBATCH --array=1-{len(EXPERIMENTS)}"
    for task in range(1, len(EXPERIMENTS) + 1):
        module, name, *arguments = dry(script, tmp_path / str(task), SLURM_ARRAY_TASK_ID=str(task), PRESET="cpu")
        assert (module, name) == ("-m", "paperlib.reproduce")
        options = reproduce.parser().parse_args(arguments)
        assert (options.preset, options.device, options.seed) == ("cpu", "cuda", 0)
        (notebook,) = reproduce.select(options.only)
        assert notebook.stem.startswith(f"0{task}")


@pytest.mark.parametrize("module", ["pixelvae", "sequential"])
def test_a_training_over_nodes(module, tmp_path):
    variables = {"SLURM_JOB_NODELIST": "x", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "4"}
    variables |= {"SLURM_CPUS_PER_TASK": "12"}
    said = dry(files.ROOT / "slurm" / "train.sbatch", tmp_path, MODULE=module, **variables)
    assert said[:2] == ["--cpus-per-task=12", "torchrun"], "srun does not inherit it from sbatch"
    assert {"--nnodes=2", "--nproc-per-node=4", "--rdzv-endpoint=one:20007", "--rdzv-id=7"} <= set(said)
    at = said.index("-m")
    assert said[at + 1] == f"paperlib.{module}"
    options = launch.parser("").parse_args(said[at + 2 :])
    assert (options.preset, options.device, options.seed) == ("paper", "cuda", 0)
