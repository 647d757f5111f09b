"""Prepare and list data sets.

    python -m paperlib.data prepare lsun_bedroom --source FOLDER
    python -m paperlib.data prepare lsun_bedroom --source bedroom_train_lmdb --subset
    python -m paperlib.data list

The first writes all images of a folder, of LSUN's LMDB or of an .npy file, the second those 10,000 of LSUN on which
recorded runs trained. These runs had re-encodings of them at 256 pixels, so the pixels may differ from theirs a little.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from paperlib.data import datasets
from paperlib.system.errors import run_command


def main() -> None:
    options = _parser().parse_args()
    if options.command == "prepare":
        folder = datasets.prepare(options.name, options.source, options.side, options.subset)
        count = len(np.load(folder / "train-images.npy", mmap_mode="r"))
        print(f"{count:,} images to train with", file=sys.stderr)
        print(folder)
        return
    for name, source in datasets.SETS.items():
        print(f"{name}: {datasets.whereabouts(name)}; {source}")


def _parser() -> argparse.ArgumentParser:
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
    return parser


if __name__ == "__main__":
    run_command(main)
