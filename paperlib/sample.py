"""Draw from a recorded model: no data set is needed.

python -m paperlib.sample sequential --out rooms.png --count 20
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from paperlib.pretrained import MODELS, load
from paperlib.runs import plotting
from paperlib.system import files
from paperlib.system.errors import UserError, run_command


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.count < 1 or options.columns < 1:
        raise UserError("--count and --columns take whole numbers from 1")
    if options.out.suffix.lower() != ".png":
        raise UserError(f"--out is {options.out}, but takes a file that ends in .png")
    model = load(options.model, options.device)
    images = model.sample(options.count, options.seed).numpy()
    images = images[..., 0] if images.shape[-1] == 1 else images
    sheet = plotting.sheet(images, options.columns, high=model.images.dataset.levels - 1)
    with files.atomic_write(options.out) as file:
        Image.fromarray((255 * sheet).round().astype(np.uint8)).save(file, format="png")
    print(options.out)
    return 0


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(prog="python -m paperlib.sample", description=__doc__.split("\n")[0])
    command.add_argument("model", metavar="MODEL", help=", ".join(MODELS))
    command.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="where the picture goes")
    command.add_argument("--count", type=int, default=20, help="images (default 20)")
    command.add_argument("--columns", type=int, default=5, help="images to a row (default 5)")
    command.add_argument("--seed", type=int, default=0, help="of every draw (default 0)")
    command.add_argument("--device", default="auto", help="auto (default: cuda where there is one), cpu or cuda")
    return command


if __name__ == "__main__":
    run_command(main)
