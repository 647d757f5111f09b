"""Mistakes and accidents, each through its command: exit code, one line that says what to do, nothing lost.

A fault sets something up in a copy of a folder that holds all roots, and runs one command there. Commands run two at a
time, before the tests look at them.
"""

import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import commands
import numpy as np
import pytest
import torch
from commands import NOTEBOOK
from PIL import Image

from paperlib.fuzziness import experiment as fuzziness
from paperlib.system import files

SMALL = {"train_steps": 2, "elbo_steps": 1, "sweep_steps": 1, "evaluations": 1, "filters": 4, "mixtures": 2}
REPRODUCE = ["paperlib.reproduce", "--only", "02"]
RECORDED = [*REPRODUCE, "--preset", "recorded"]
SEQUENTIAL = ["paperlib.sequential"]
LAUNCH = ["paperlib.pixelvae", *commands.settings(SMALL)]
CIFAR10 = [*LAUNCH, "--set", "dataset=cifar10"]
FULL = {"FSIZE": 8 << 10}  # bytes of a file, as where the disk is full
MEMORY = {"AS": 1 << 30}
PREPARE = ["paperlib.data", "prepare"]
LSUN = [*PREPARE, "lsun_bedroom"]


@dataclass(frozen=True)
class Fault:
    """`set_up` gets the folder of the roots, and returns words to add to the command or a dict of variables."""

    id: str
    command: list[str]
    says: str  # a regular expression, in what the command prints
    code: int = 2
    set_up: Callable[[Path], object] = lambda home: None
    limits: dict[str, int] = field(default_factory=dict)
    forked: bool = True  # else by the command line itself


# What is set up


def file_in_place(home):
    without_runs(home)
    (home / "runs").write_text("a file")


def nowhere(home):
    """A place in which not even the superuser can make a folder."""
    return {"PAPERLIB_RUNS": "/proc/paperlib"}


def not_allowed(home):
    """A folder in which nobody may write; the superuser may not write into that of the kernel's own."""
    if os.geteuid() == 0:
        return {"PAPERLIB_RUNS": "/sys/paperlib"}
    (home / "runs").chmod(0o555)


def prepared(home, name, side, channels):
    """Few black images of a data set, as `prepare` would write them: their folder."""
    folder = home / "data" / "prepared" / name
    folder.mkdir(parents=True)
    for part, count in (("train", 30), ("test", 10)):
        np.save(folder / f"{part}-images.npy", np.zeros((count, side, side, channels), np.uint8))
        np.save(folder / f"{part}-labels.npy", np.arange(count) % 10)
    return folder


def mnist_cut_short(home):
    file = prepared(home, "mnist", 28, 1) / "train-images.npy"
    file.write_bytes(file.read_bytes()[:-100])


def cifar10_without_test(home):
    (prepared(home, "cifar10", 32, 3) / "test-labels.npy").unlink()


def damaged_archive(home):
    raw = home / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte.gz").write_bytes(b"half a download")


def source(*names, write=lambda file: file.write_bytes(b"no image")):
    """A source of images with files of these names."""

    def set_up(home):
        for name in names:
            (home / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            write(home / "source" / name)
        return ["--source", str(home / "source")]

    return set_up


images = source(*(f"{k}.png" for k in range(40)), write=lambda file: Image.new("RGB", (64, 64)).save(file))


def checkpoint(home):
    """The newest checkpoint of one of the trainings that the fixture `trained` left."""
    return min((home / "runs").glob("*/*/*/last.pt"))


def both_damaged(home):
    last = checkpoint(home)
    for name in ("previous.pt", "last.pt"):
        last.with_name(name).write_bytes(last.read_bytes()[:2000])


def without_runs(home):
    shutil.rmtree(home / "runs")


def of_another_format(home):
    torch.save({"a": 1}, checkpoint(home))


def recorded(home, name):
    return home / "results" / "smoke" / fuzziness.NOTEBOOK / name


def without_results(home):
    shutil.rmtree(home / "results")


def weights_missing(home):
    recorded(home, "weights.safetensors").unlink()
    run = files.load_json(recorded(home, "run.json"))
    files.write_json(recorded(home, "run.json"), run | {"settings": asdict(fuzziness.PRESETS["smoke"])})


def record_damaged(home):
    recorded(home, "run.json").write_text("{")


AT_ONCE = [  # mistakes on the command line, said before anything is begun
    Fault("preset", [*REPRODUCE, "--preset", "smokee"], "unknown preset 'smokee': choose from recorded, smoke"),
    Fault("notebook", ["paperlib.reproduce", "--only", "7"], "no notebook '7': choose from 01_elbo", forked=False),
    Fault("setting", [*REPRODUCE, "--set", "stepz=3"], "unknown setting 'stepz': choose from dataset, code_dims"),
    Fault("word for int", [*REPRODUCE, "--set", "steps=many"], "'steps' is 'many', but takes a whole number"),
    Fault("zero", [*REPRODUCE, "--set", "steps=0"], "steps is 0, but must be above 0"),
    Fault("negative", [*LAUNCH, "--set", "learning_rate=-1"], "learning_rate is -1.0, but must be above 0"),
    Fault("not a number", [*LAUNCH, "--set", "learning_rate=NaN"], "learning_rate is nan, but must be"),
    Fault("too few chains", [*LAUNCH, "--set", "chains=30"], "chains is 30, but takes a multiple of 20"),
    Fault("no precision", [*LAUNCH, "--set", "precision=half"], "unknown precision 'half': choose from float32"),
    Fault("ladder", [*SEQUENTIAL, "--set", "ladder=[1]"], r"ladder is \(1,\), but there", forked=False),
    Fault("widths", [*SEQUENTIAL, "--set", "widths=[6,8,8,8]"], r"widths \[6\] are no multiples of 4"),
    Fault("odd side", [*SEQUENTIAL, "--set", "side=18"], "18 pixels cannot be halved 4 times"),
    Fault("too few", [*SEQUENTIAL, "--set", "evaluation_images=1600"], "holds out 1560 .*need 1640"),
    Fault("data set", [*REPRODUCE, "--set", "dataset=mnits"], "unknown data set 'mnits': choose from digits"),
    Fault("seed", [*REPRODUCE, "--seed", "-1"], "seed is -1, but takes a whole number from 0"),
    Fault("too large a seed", [*REPRODUCE, "--seed", "4294967296"], "seed is 4294967296, but .* to 4294967295"),
    Fault("text for float", [*LAUNCH, "--set", 'learning_rate="1e-3"'], "'learning_rate' is text: write 0.001"),
    Fault("device", [*REPRODUCE, "--device", "tpu"], "unknown device 'tpu': choose auto, cpu, cuda"),
    Fault("no such GPU", [*REPRODUCE, "--device", "cuda:99"], "torch sees . CUDA devices; use auto or cpu"),
    Fault("change what is recorded", [*RECORDED, "--set", "steps=9"], "recorded trains nothing: drop overrides"),
    Fault("record a change", [*REPRODUCE, "--record", "--set", "steps=9"], "drop --set"),
    Fault("record recorded", [*RECORDED, "--record"], "choose a preset that trains"),
]
FAULTS = [
    *AT_ONCE,
    # Folders
    Fault("runs is a file", LAUNCH, "a file stands where a folder is needed", set_up=file_in_place),
    Fault("runs nowhere", LAUNCH, "no such folder can be made there; choose another", set_up=nowhere),
    Fault("runs not allowed", LAUNCH, "cannot write .*; allow writing there", set_up=not_allowed),
    Fault("no room", LAUNCH, "no space left to write .*last.pt", set_up=without_runs, limits=FULL),
    Fault("no room, notebook", NOTEBOOK, "02_mnist_fuzziness: .*no space left to write", 1, limits=FULL),
    # Data
    Fault("data unknown", [*PREPARE, "mnits"], "unknown data set 'mnits': choose from digits", forked=False),
    Fault("data embedded", [*PREPARE, "digits"], "comes with scikit-learn: there is nothing to prepare"),
    Fault("source missing", LSUN, "say where the images are: .*--source FOLDER"),
    Fault("source not there", [*LSUN, "--source", "nix"], "nix does not exist: --source takes"),
    Fault("source empty", LSUN, "holds no images", set_up=source("a.txt")),
    Fault("source no image", LSUN, "none of the 2 .*be read", set_up=source("a.png", "b.jpg")),
    Fault("side", [*LSUN, "--side", "0"], "--side is 0, but takes", set_up=images),
    Fault("mnist source", [*PREPARE, "mnist", "--source", "x"], "takes no --source: its archives belong below"),
    Fault("no room for data", LSUN, "no space left to write", set_up=images, limits=FULL),
    Fault("archive damaged", [*PREPARE, "mnist"], "wrong checksum.*put train-images", set_up=damaged_archive),
    Fault("no CIFAR-10", CIFAR10, "data set 'cifar10' cannot be had.*put cifar-10"),
    Fault("no LSUN", [*SEQUENTIAL, "--set", "dataset=lsun_bedroom"], "has no .*; write it with .* prepare lsun"),
    Fault("mnist cut short", [*NOTEBOOK, "--set", "dataset=mnist"], "damaged .*: write it again", 1, mnist_cut_short),
    Fault("no CIFAR-10 test", CIFAR10, "cannot be had.*put", set_up=cifar10_without_test),
    # Trainings and checkpoints
    Fault("both damaged", LAUNCH, "no whole checkpoint in .*--fresh", set_up=both_damaged),
    Fault("other format", LAUNCH, "not a checkpoint of this", set_up=of_another_format),
    Fault("starts from nothing", [*LAUNCH, "--set", "start_from=nix"], ".*nix cannot be read"),
    Fault("diverges", [*LAUNCH, "--set", "learning_rate=1e30"], "not finite at step .*lower learning_rate"),
    Fault("too little memory", [*LAUNCH, "--set", "batch_size=1000000"], "out of memory: lower", limits=MEMORY),
    # What is recorded
    Fault("nothing recorded", RECORDED, "nothing is recorded of 02_mnist_fuzziness", set_up=without_results),
    Fault("other settings", RECORDED, "recorded with other settings than smoke has now: run smoke", 1),
    Fault("weights missing", RECORDED, "nothing is recorded at", 1, weights_missing),
    Fault("record damaged", RECORDED, "run.json is damaged", 1, record_damaged),
]  # fmt: skip


# Running


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Roots with a finished tiny PixelVAE under runs/ and a recorded notebook 02 under results/."""
    home = tmp_path_factory.mktemp("home")
    for root in commands.ROOTS:
        (home / root).mkdir()
    with ThreadPoolExecutor(2) as pool:
        for said in pool.map(lambda command: commands.run(command, home), (LAUNCH, NOTEBOOK)):
            assert said.returncode == 0, said.stderr + said.stdout
    (folder,) = (home / "runs" / fuzziness.NOTEBOOK).iterdir()
    (home / "results" / "smoke").mkdir()
    folder.rename(recorded(home, ""))
    return home


def contents(home):
    return {path.relative_to(home): path.read_bytes() for path in sorted(home.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def outcomes(request, trained, tmp_path_factory):
    """By the id of each fault that is to be tested: a future of what was said, and of the files before and after."""
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    chosen = {given["fault"].id: given["fault"] for given in parameters if isinstance(given.get("fault"), Fault)}

    def one(fault):
        home = tmp_path_factory.mktemp("fault") / "home"
        shutil.copytree(trained, home)
        added = fault.set_up(home)
        before = contents(home)
        words = fault.command + (added if isinstance(added, list) else [])
        said = commands.run(words, home, added if isinstance(added, dict) else None, fault.limits, fault.forked)
        return said, before, contents(home)

    with ThreadPoolExecutor(2) as pool:
        yield {fault: pool.submit(one, chosen[fault]) for fault in chosen}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_a_fault_is_said_in_one_line_and_nothing_is_lost(fault, outcomes):
    said, before, after = outcomes[fault.id].result()
    text = said.stdout + said.stderr
    assert said.returncode == fault.code, text[-2000:]
    (line,) = {line for line in text.split("\n") if re.search(fault.says, line)} or {""}
    assert line, text[-2000:]
    assert len(line) < 900 and "Traceback" not in text
    if fault.code == 2:
        assert line.startswith("error: ") and said.stderr.endswith(f"{line}\n")
    if fault in AT_ONCE:
        assert text == f"{line}\n"
    lost = [str(path) for path, content in before.items() if after.get(path) != content and path.name != files.LOCK]
    assert not lost
    assert not [path for path in after if ".partial" in path.name], "half a file stays"
    if fault in AT_ONCE:
        assert set(after) == set(before)
