"""What the library does on a GPU, on the emulated one: see `emulated_cuda` for what that can and cannot see."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from paperlib.system import files

TESTS = Path(__file__).parent
MOST_WAITS = 0.1  # of the host for the device, per training step: every tenth reads the loss

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed, which compiles the emulated device"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The emulated device, compiled for the torch that is installed."""
    output, source = tmp_path_factory.mktemp("emulated_cuda") / "backend.so", TESTS / "emulated_cuda" / "backend.cpp"
    (folder,) = cpp_extension.library_paths()
    headers = [f"-I{path}" for path in cpp_extension.include_paths()]
    libraries = [f"-L{folder}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{folder}"]
    command = ["g++", "-shared", "-fPIC", "-std=c++20", *headers, str(source), "-o", str(output), *libraries]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:2000]
    return output


@pytest.fixture
def found(library, tmp_path):
    """What a check of `emulated_cuda.checks` finds, in a process of its own."""

    def run(check, *cases):
        variables = {"PYTHONPATH": str(TESTS), "PAPERLIB_RUNS": str(tmp_path), "PAPERLIB_RESULTS": str(tmp_path)}
        command = [sys.executable, "-m", "emulated_cuda", str(library), check, *cases]
        done = subprocess.run(command, cwd=files.ROOT, env=os.environ | variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_planted_faults_are_seen(found):
    said = {
        "item": "_local_scalar_dense while a graph is captured",
        "condition": "_local_scalar_dense while a graph is captured",
        "constant": "a copy to cuda while a graph is captured",
        "draw": "rand draws while a graph is captured",
        "devices": "add of tensors on cpu and cuda",
        "generator": "rand on cuda with a generator for cpu",
    }
    assert {fault: message.partition(",")[0] for fault, message in found("planted", *said).items()} == said


def test_captured_graphs_draw_the_images_of_the_cpu(found):
    same = found("sampler", "alone", "with h")
    assert len(same) == 2 and all(all(one.values()) for one in same.values()), same


@pytest.mark.parametrize("case", ["01", "02", "03", "03 from disk", "04"])
def test_a_notebook_keeps_the_rules_and_its_trainings_hardly_wait(case, found):
    """In bfloat16 where it can be, at toy size, from its data to its verdicts."""
    waits = found("notebook", case)[case]
    assert bool(waits) == (case != "01")  # which computes on the CPU whatever the device
    assert all(sum(by_place.values()) <= MOST_WAITS for by_place in waits.values()), waits
