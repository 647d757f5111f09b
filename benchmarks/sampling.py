"""Drawing from a PixelCNN++: incrementally, against one full pass of the network for every pixel.

    python benchmarks/sampling.py

Both draw the same images (a test says so). A full pass is timed and multiplied by the number of pixels, since drawing
so takes hours: these numbers are extrapolated, and the table calls them so. The arithmetic that the incremental sampler
has to do is that of one forward pass; its share of the machine's matrix rate is what is left of the limit.
"""

import statistics

import torch
from timing import flops, matrix_rate, options, ratio, side_by_side, write

from paperlib.nn.pixelcnn import PixelCNN, PixelCNNSettings, initialise
from paperlib.nn.pixelcnn_sampler import Sampler


def main() -> None:
    asked = options(__doc__)
    rate = matrix_rate(asked.device)
    sizes = [(2, 40, batch, 32) for batch in (1, 16, 64, 256)] + [(5, 80, batch, 32) for batch in (1, 16, 64, 256)]
    sizes += [(2, 40, 16, 16), (2, 40, 16, 64)]
    if asked.quick:
        sizes = [(1, 8, 2, 16)]
    columns = ["blocks / filters", "side", "batch", "ms an image", "by full passes (s, extrapolated)", "times"]
    notes = [f"matrix products: {rate / 1e9:.0f} GFLOP/s in float32"]
    write("sampling", [*columns, "% of matrix rate"], _rows(asked, sizes, rate), notes, asked)


def _rows(asked, sizes, rate):
    for blocks, filters, batch, side in sizes:
        torch.manual_seed(0)
        network = PixelCNN(PixelCNNSettings(blocks=blocks, filters=filters, dropout=0.0))
        initialise(network, torch.rand(8, 3, 32, 32) * 2 - 1)
        network = network.to(asked.device).eval()
        x = torch.rand(batch, 3, side, side, device=asked.device) * 2 - 1
        sampler = Sampler(network, batch, side, side)
        with torch.inference_mode():
            needed = flops(lambda: network(x))  # noqa: B023
            works = {"incremental": lambda: sampler.draw(progress=False), "pass": lambda: network(x)}  # noqa: B023
            times = side_by_side(works, asked.device, asked.rounds)
        full = [side * side * one for one in times["pass"]]
        drawn = statistics.median(times["incremental"])
        each = 1000 * drawn / batch, statistics.median(full) / batch
        gain = ratio(full, times["incremental"])
        yield [f"{blocks} / {filters}", side, batch, *each, gain, 100 * needed / drawn / rate]


if __name__ == "__main__":
    main()
