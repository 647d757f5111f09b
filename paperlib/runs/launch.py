"""Train the models of a notebook without it, by one process or by several; the notebook then finds them trained.

    python -m paperlib.sequential --preset cpu
    torchrun --nproc-per-node=8 -m paperlib.pixelvae --preset paper

Settings, folder and result are the notebook's own, whatever the number of processes, and a training that was stopped
may go on with another number (`distributed` says why). All processes must see the same files. If one dies torchrun ends
the others and the job; the checkpoint stays.
"""

import argparse

from paperlib.runs import presets
from paperlib.runs.experiment import Experiment
from paperlib.system import distributed
from paperlib.system.errors import run_command


def main(experiment: Experiment) -> None:
    """The command line: train the models of one run of `experiment`. Ends the program."""

    def train() -> int:
        options = parser(experiment.notebook).parse_args()
        overrides = presets.parse(presets.choose(experiment.presets, options.preset), options.set)
        device = experiment.device(options.preset, options.device)
        with distributed.joined(str(device)):
            run = experiment.start(options.preset, options.seed, options.device, overrides)
            trained = experiment.fit(run)
            if distributed.rank_and_world()[0] == 0:
                for name, one in trained.items():
                    print(f"{name}: {one.steps} steps, {one.seconds / 60:.1f} minutes, {one.stopped}")
                print(f"in {run.directory}; notebook {experiment.notebook} goes on from there")
        return 0

    run_command(train)


def parser(notebook: str) -> argparse.ArgumentParser:
    """The options of `main`."""
    command = argparse.ArgumentParser(description=f"Train the models of notebook {notebook} without it.")
    command.add_argument("--preset", default="smoke", help="smoke (default), cpu, gpu or paper")
    command.add_argument("--seed", type=int, default=0, help="of every draw (default 0)")
    command.add_argument("--device", default="auto", help="auto (default: cuda where there is one), cpu or cuda")
    command.add_argument(
        "--set", action="append", metavar="NAME=VALUE", default=[], help="change one setting; may be repeated"
    )
    return command
