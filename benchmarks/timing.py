"""What the scripts of this folder share: times side by side, the machine's limit, and a table with its origin.

Alternatives are timed in turn, round after round in one process, so that what else the machine does meets all of them;
the numbers are medians over rounds and the ratios medians of the ratios within a round. Run them on an idle machine.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from paperlib.runs.provenance import describe_code, describe_device, versions
from paperlib.system import files
from paperlib.system.devices import pick_device


def options(description: str | None) -> argparse.Namespace:
    """`--device`, `--rounds` and `--quick`, which takes the smallest cases only, to see that a script works."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--device", default="auto", help="auto (default: cuda where there is one), cpu or cuda")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is timed (default 5)")
    parser.add_argument("--quick", action="store_true", help="the smallest cases, once; nothing is written")
    asked = parser.parse_args()
    asked.device = pick_device(asked.device)
    asked.rounds = 1 if asked.quick else asked.rounds
    return asked


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """How long one call takes; on a GPU by events around it."""
    if device.type == "cuda":
        with torch.cuda.device(device):  # else events are those of cuda:0
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            work()
            ended.record()
            ended.synchronize()
        return began.elapsed_time(ended) / 1000
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def side_by_side(
    works: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int, *, warm: bool = True
) -> dict[str, list[float]]:
    """Seconds of each of `works`, by name, for each round; with `warm` each is called once beforehand."""
    for work in works.values() if warm else ():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(seconds(work, device))
    return times


def ratio(slow: list[float], fast: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def matrix_rate(device: torch.device, dtype: torch.dtype = torch.float32, rounds: int = 5) -> float:
    """FLOP/s of a large matrix product, the limit that arithmetic is held against: the best of several."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = side_by_side({"product": lambda: a @ b}, device, 2 * rounds)["product"]
    return 2 * side**3 / min(times)


def flops(work: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def peak_memory(work: Callable[[], Any], device: torch.device) -> float:
    """GiB that one call holds at most beyond what was held before: of the GPU, else of the process (Linux; or nan)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - held) / 2**30
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # starts the high-water mark anew
    except OSError:
        work()
        return math.nan
    before = _held("VmRSS")
    work()
    return _held("VmHWM") - before


def _held(field: str) -> float:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(status[field].split()[0]) / 2**20


def write(
    name: str, columns: list[str], rows: Iterable[list[Any]], notes: list[str], asked: argparse.Namespace
) -> None:
    """Print the table row by row, and write it to `results/benchmarks/<name>-<cpu or cuda>.json` unless it is quick."""
    done = []
    print(" | ".join(columns), flush=True)
    for row in rows:
        print(" | ".join(map(_cell, row)), flush=True)
        done.append(row)
    content = {
        "columns": columns,
        "rows": done,
        "notes": notes,
        "rounds": asked.rounds,
        "device": describe_device(str(asked.device)),
        "versions": versions(),
        **describe_code(),
    }
    print(*notes, content["device"], sep="\n")
    if asked.quick:
        return
    path = files.results_root() / "benchmarks" / f"{name}-{asked.device.type}.json"
    with files.atomic_write(path) as file:
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
