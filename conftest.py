"""Settings that both the tests and the notebooks under nbval need, wherever pytest is started."""

import os
import tempfile
from pathlib import Path

from paperlib.system import kernels

# Kernels inherit these: no progress bars in outputs, and runs of their own, so that tests neither re-use nor touch
# what is under runs/.
os.environ["TQDM_DISABLE"] = "1"
_runs = tempfile.TemporaryDirectory(prefix="paperlib-runs-")
os.environ["PAPERLIB_RUNS"] = _runs.name
for name in ("PAPERLIB_RESULTS", "PAPERLIB_FIGURES", "PAPERLIB_PROGRESS", "WORLD_SIZE", "MPLBACKEND"):
    os.environ.pop(name, None)  # what a user has set changes no test

ROOT = Path(__file__).parent
# As committed, and with `preset = "smoke"`.
NOTEBOOKS = ROOT / "notebooks", ROOT / "build"


def pytest_configure(config):
    if config.option.nbval or config.option.nbval_lax:
        config.option.nbval_cell_timeout = min(config.option.nbval_cell_timeout, 300)
        config.option.nbval_current_env = True
        os.environ.update(kernels.environment(Path(_runs.name) / "kernels"))


def pytest_ignore_collect(collection_path):
    """Of all notebooks only these are tests, not executed copies."""
    if collection_path.suffix == ".ipynb" and collection_path.parent not in NOTEBOOKS:
        return True


def pytest_unconfigure():
    _runs.cleanup()
