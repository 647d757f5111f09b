"""Where the seconds of `make reproduce` go: imports, each in a new Python, and every notebook under `smoke`.

    python benchmarks/startup.py

Beside an import stand the heavy packages that come along. Where the seconds of `make test` go is told by
`pytest --durations=30 tests`.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from timing import options, write

from paperlib.reproduce import EXPERIMENTS
from paperlib.system import files

MODULES = ["torch", "paperlib.elbo", "paperlib.fuzziness", "paperlib.sequential", "paperlib.pixelvae", "paperlib.data"]
HEAVY = ["torchvision", "sklearn", "scipy", "pandas", "matplotlib", "seaborn", "PIL", "torch._dynamo"]


def main() -> None:
    asked = options(__doc__)
    columns = ["what", "s", "heavy packages that come along"]
    write(
        "startup", columns, _rows(asked), ["imports: seconds of a new Python; notebooks: of a new runner, once"], asked
    )


def _rows(asked):
    for module in MODULES:
        say = f"import {module}, sys, json; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
        runs = [_timed(["-c", say]) for _ in range(asked.rounds + 1)]  # the first fills the disk's cache
        loaded = json.loads(runs[-1][1])
        yield [f"import {module}", statistics.median(took for took, _ in runs[1:]), ", ".join(loaded) or "none"]
    for notebook in [] if asked.quick else EXPERIMENTS:
        with tempfile.TemporaryDirectory() as runs:
            took, _ = _timed(["-m", "paperlib.reproduce", "--only", notebook], PAPERLIB_RUNS=runs, TQDM_DISABLE="1")
        yield [f"notebook {notebook}, smoke", took, ""]


def _timed(arguments, **variables):
    """Seconds of a new Python, and what it prints."""
    began, environment = time.perf_counter(), os.environ | variables
    said = subprocess.run(
        [sys.executable, *arguments], check=True, capture_output=True, encoding="utf-8", env=environment, cwd=files.ROOT
    )
    return time.perf_counter() - began, said.stdout


if __name__ == "__main__":
    main()
