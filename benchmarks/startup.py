"""Where the seconds before the first computation go: imports, each in a new Python, and the heavy packages behind them.

python benchmarks/startup.py
"""

import json
import statistics
import subprocess
import sys
import time

from timing import options, write

MODULES = ["torch", "paperlib.elbo", "paperlib.fuzziness", "paperlib.sequential", "paperlib.pixelvae", "paperlib.data"]
HEAVY = ["torchvision", "sklearn", "scipy", "pandas", "matplotlib", "seaborn", "PIL", "torch._dynamo"]


def main() -> None:
    asked = options(__doc__)
    columns = ["import", "s", "heavy packages that come along"]
    write("startup", columns, _rows(asked.rounds), ["seconds of a new Python"], asked)


def _rows(rounds):
    for module in MODULES:
        say = f"import {module}, sys, json; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
        times, loaded = [], []
        for _ in range(rounds + 1):  # the first fills the disk's cache
            began = time.perf_counter()
            said = subprocess.run([sys.executable, "-c", say], check=True, capture_output=True, text=True)
            times.append(time.perf_counter() - began)
            loaded = json.loads(said.stdout)
        yield [module, statistics.median(times[1:]), ", ".join(loaded) or "none"]


if __name__ == "__main__":
    main()
