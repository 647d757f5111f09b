"""Two processes train as one, and a training that one number of them began goes on with another."""

import shutil
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from toy_training import DATA, Killed, killed_at, leaves, load, run_noisily

from paperlib.system import distributed


def one_of_two(rank, folder):
    """A training that is killed, copied, and goes on."""
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", meeting, timedelta(seconds=120), rank=rank, world_size=2)
    with pytest.raises(Killed):
        run_noisily(folder / "two", batch=killed_at(9))
    dist.barrier()
    if rank == 0:
        shutil.copytree(folder / "two", folder / "two then one")
    dist.barrier()
    assert run_noisily(folder / "two").steps == 20
    dist.destroy_process_group()


def test_two_processes_train_as_one_and_another_number_of_them_goes_on(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (tmp_path,), nprocs=2)
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
