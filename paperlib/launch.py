"""Train the models of a notebook without it, by one process or by several; the notebook then finds them trained.

    python -m paperlib.sequential --preset cpu
    torchrun --nproc-per-node=8 -m paperlib.pixelvae --preset paper

Settings, folder and result are the notebook's own, whatever the number of processes, and a training that was stopped
may go on with another number (`processes` says why). All of them must see the same files. If one dies torchrun ends the
others and the job; the checkpoint stays.
"""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from paperlib import presets, processes, results
from paperlib.errors import run_command
from paperlib.machine import pick_device


def main(
    notebook: str,
    choices: Mapping[str, Any],
    start: Callable[[str, int, str, str, Mapping[str, Any]], results.Run],
    fit: Callable[[results.Run], Mapping[str, Any]],
) -> None:
    """The command line of a notebook's module: its presets, `start` and what trains a run. Ends the program."""
    parser = argparse.ArgumentParser(description=f"Train the models of notebook {notebook} without it.")
    add = parser.add_argument
    add("--preset", default="smoke", help=f"one of {', '.join(choices)} (default smoke)")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto (default: cuda where there is one), cpu or cuda")
    add("--set", action="append", metavar="NAME=VALUE", default=[], help="change one setting; may be repeated")

    def train() -> int:
        options = parser.parse_args()
        overrides = presets.parse(presets.choose(choices, options.preset), options.set)
        device = str(pick_device(options.device))
        with processes.joined(device):
            run = start(options.preset, options.seed, device, "train", overrides)
            trained = fit(run)
            if processes.rank_and_world()[0] == 0:
                for name, one in trained.items():
                    print(f"{name}: {one.steps} steps, {one.seconds / 60:.1f} minutes, {one.stopped}")
                print(f"in {run.directory}; notebook {notebook} goes on from there")
        return 0

    run_command(train)
