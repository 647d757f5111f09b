"""Prepare and list data sets; docs/running.md says from what."""

import argparse
import sys
from pathlib import Path

import numpy as np

from paperlib.data import datasets
from paperlib.system.errors import run_command


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m paperlib.data", description="Prepare and list data sets.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the data sets, and which of them are there")
    command = commands.add_parser("prepare", help="write a data set's arrays below the data root")
    command.add_argument("name", metavar="NAME", help=", ".join(datasets.PREPARED))
    source = "lsun_bedroom, own_images: a folder of images, LSUN's LMDB or an .npy file"
    command.add_argument("--source", type=Path, metavar="PATH", help=source)
    side = "lsun_bedroom, own_images: pixels a side (default 64)"
    command.add_argument("--side", type=int, default=64, metavar="N", help=side)
    subset = "lsun_bedroom from bedroom_train_lmdb: only the 10,000 images of recorded runs"
    command.add_argument("--subset", action="store_true", help=subset)
    options = parser.parse_args()
    if options.command == "prepare":
        folder = datasets.prepare(options.name, options.source, options.side, options.subset)
        count = len(np.load(folder / "train-images.npy", mmap_mode="r"))
        print(f"{count:,} images to train with", file=sys.stderr)
        print(folder)
    else:
        for name, source in datasets.SETS.items():
            print(f"{name}: {datasets.whereabouts(name)}; {source}")


if __name__ == "__main__":
    run_command(main)
