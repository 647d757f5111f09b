"""Each script under benchmarks/ runs by one command, and what it says of itself is so."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from paperlib.stats import aggregate_posterior
from paperlib.system import files

FOLDER = files.ROOT / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["aggregates", "sampling", "startup", "training"])
def test_a_quick_run_prints_its_table_and_writes_nothing(name, tmp_path):
    environment = os.environ | {"PAPERLIB_RESULTS": str(tmp_path)}
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--quick", "--device", "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) >= 4 and not list(tmp_path.iterdir())


def test_the_plain_network_has_the_arithmetic_of_ours(scripts):
    from plain_pixelcnn import PlainPixelCNN
    from timing import flops

    from paperlib.nn.pixelcnn import PixelCNN, PixelCNNSettings

    x = torch.zeros(1, 3, 32, 32)
    ours, plain = PixelCNN(PixelCNNSettings(blocks=2, filters=8)), PlainPixelCNN(2, 8)
    assert flops(lambda: plain(x)) == pytest.approx(flops(lambda: ours(x)), rel=0.05)


@pytest.mark.parametrize("dims", [2, 10])
def test_the_usual_way_computes_what_ours_does(scripts, dims):
    import aggregates

    rng, std = np.random.default_rng(0), np.exp(-0.5)
    mean, z, x = rng.normal(size=(300, dims)), rng.normal(size=(7, dims)), rng.integers(256, size=(300, 20))
    usual = aggregates.usual_variance(z, mean, std, x.astype(np.uint8))
    codes = aggregate_posterior.Codes(torch.from_numpy(mean), torch.tensor(-0.5))
    z, x = torch.from_numpy(z), torch.from_numpy(x).byte()
    np.testing.assert_allclose(usual, aggregate_posterior.conditional(z, codes, x).variance, rtol=1e-4)
    density = aggregates.usual_log_density(z.numpy(), mean, std)
    np.testing.assert_allclose(density, aggregate_posterior.log_density(z, codes), atol=1e-6)


def test_peak_memory_is_that_of_the_work(scripts):
    from timing import peak_memory

    assert peak_memory(lambda: np.ones(2**25), torch.device("cpu")) == pytest.approx(0.25, abs=0.05)
