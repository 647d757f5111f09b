"""Two processes train as one, and a training that one number of them began goes on with another."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from toy_training import DATA, leaves, load, run_noisily

from paperlib.system import distributed, files

WORKER = """
import pathlib, shutil, sys, torch
import toy_training
two, then_one = map(pathlib.Path, sys.argv[1:])
torch.distributed.init_process_group("gloo")
try:
    toy_training.run_noisily(two, batch=toy_training.killed_at(9))
    raise SystemExit("was not killed")
except toy_training.Killed:
    torch.distributed.barrier()
if torch.distributed.get_rank() == 0:
    shutil.copytree(two, then_one)
torch.distributed.barrier()
assert toy_training.run_noisily(two).steps == 20
torch.distributed.destroy_process_group()
"""


def by_two(tmp_path, *folders):
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(tmp_path / "worker.py"), *map(str, folders)]
    path = os.pathsep.join([str(files.ROOT), str(files.ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, said = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said[-2000:]


def test_two_processes_train_as_one_and_another_number_of_them_goes_on(tmp_path):
    by_two(tmp_path, tmp_path / "two", tmp_path / "two then one")
    assert load(tmp_path / "two then one")["state"]["step"] == 9
    run_noisily(tmp_path / "two then one")
    run_noisily(tmp_path / "one")
    one = load(tmp_path / "one")
    for other in ("two", "two then one"):
        two = load(tmp_path / other)
        for key, tensor in leaves(one["average"]).items():
            torch.testing.assert_close(tensor, leaves(two["average"])[key], rtol=0, atol=1e-9)
        for a, b in zip(one["state"]["history"], two["state"]["history"], strict=True):
            assert a == pytest.approx(b, rel=1e-9)
    quiet = run_noisily(tmp_path / "another", batch=lambda rows: DATA[rows] + distributed.randn((len(rows), 6)))
    assert quiet.history != one["state"]["history"], "noise has an effect"
