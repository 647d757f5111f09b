"""Training steps of the PixelVAE and of the sequential VAE, against the same network run plainly.

    python benchmarks/training.py

A step is forward, backward and Adam. The PixelVAE (its decoder, without code and dropout) is held against
`plain_pixelcnn`, of the same arithmetic, in eager PyTorch; the sequential VAE, whose layers are torch's own, against
itself uncompiled. The share of the matrix rate counts the arithmetic of convolutions and matrix products only: what the
plain network's share leaves to 100 % is all that can be gained in its precision. That is bfloat16 on a GPU, else
float32; on a CPU that multiplies faster in bfloat16 there are rows for that too (`SET=precision=bfloat16`), against the
plain network as before.
"""

import statistics
from dataclasses import replace

import torch
from plain_pixelcnn import PlainPixelCNN, nats
from timing import flops, matrix_rate, options, ratio, side_by_side, write

from paperlib.nn import pixelcnn
from paperlib.pixelvae import experiment as pixelvae
from paperlib.pixelvae.model import PixelVAE
from paperlib.sequential import experiment as sequential
from paperlib.sequential.model import build, take_step
from paperlib.system import devices


def main() -> None:
    asked = options(__doc__)
    rates = {name: matrix_rate(asked.device, getattr(torch, name)) for name in ("float32", "bfloat16")}
    if asked.device.type == "cuda":
        del rates["float32"]  # nobody trains in it there
    elif rates["bfloat16"] < 1.2 * rates["float32"]:
        del rates["bfloat16"]
    columns = ["network", "precision", "batch", "images a second", "plainly", "times", "% of matrix rate", "% plainly"]
    notes = [f"matrix products: {rate / 1e9:.0f} GFLOP/s in {precision}" for precision, rate in rates.items()]
    write("training", columns, _rows(asked, rates), notes, asked)


def _rows(asked, rates):
    on_gpu = asked.device.type == "cuda"
    for blocks, filters in [(1, 8)] if asked.quick else [(2, 40), (5, 80)]:
        batch = 2 if asked.quick else 256 if on_gpu else 16
        yield from _pixelvae(asked, blocks, filters, batch, rates)
    yield _sequential(asked, "smoke" if asked.quick else "gpu" if on_gpu else "cpu", rates)


def _pixelvae(asked, blocks, filters, batch, rates):
    torch.manual_seed(0)
    x = torch.rand(batch, 3, 32, 32, device=asked.device) * 2 - 1
    settings = replace(pixelvae.PRESETS["cpu"], blocks=blocks, filters=filters, mixtures=10)
    ours = PixelVAE(settings, channels=3, side=32, levels=256, coded=False).to(asked.device)
    pixelcnn.initialise(ours.decoder, x)
    plain, fast = PlainPixelCNN(blocks, filters).to(asked.device), devices.compiled(ours)

    def cost():
        return -fast(x).log_p.mean()

    def plain_cost():
        return nats(x, plain(x)) / batch

    usual = "bfloat16" if asked.device.type == "cuda" else "float32"
    works = {"plain": _step(plain, plain_cost, asked.device, usual)}
    works |= {precision: _step(ours, cost, asked.device, precision, fused=True) for precision in rates}
    times = side_by_side(works, asked.device, 3 * asked.rounds)
    arithmetic = flops(lambda: ours(x).log_p.mean().backward()), flops(lambda: plain_cost().backward())
    for precision, rate in rates.items():
        pair = times[precision], times["plain"]
        yield _row(f"PixelVAE {blocks} / {filters}", precision, batch, pair, arithmetic, (rate, rates[usual]))


def _sequential(asked, preset, rates):
    precision = "bfloat16" if asked.device.type == "cuda" else "float32"
    settings = replace(sequential.PRESETS[preset], compile=False)
    torch.manual_seed(0)
    shape = (3, settings.side, settings.side)
    x = torch.rand(settings.batch_size, *shape, device=asked.device) * 2 - 1
    vae = build(settings, shape, "sequential").to(asked.device)
    fast = devices.compiled(vae)

    def loss(call):
        """Of a step of the chain but the first, which sees an image: what one update is for."""
        link = take_step(vae, 2, x, x, noise=settings.input_noise, call=call)
        return (link.kl - link.log_p).mean()

    works = {
        "ours": _step(vae, lambda: loss(fast), asked.device, precision, fused=True),
        "plain": _step(vae, lambda: loss(vae), asked.device, precision),
    }
    times = side_by_side(works, asked.device, 3 * asked.rounds)
    arithmetic = [flops(lambda: loss(vae).backward())] * 2
    pair = times["ours"], times["plain"]
    return _row(f"sequential VAE, {preset}", precision, settings.batch_size, pair, arithmetic, [rates[precision]] * 2)


def _step(network, loss, device, precision, fused=False):
    """Forward, backward and Adam; `fused` as `train.fit` takes it, else torch's default."""
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-5, fused=fused or None)

    def step():
        with devices.autocast(device, precision):
            value = loss()
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        optimiser.step()

    return step


def _row(name, precision, batch, times, arithmetic, rates):
    """Of two: ours, and plainly."""
    shares = [
        100 * done / statistics.median(each) / rate for done, each, rate in zip(arithmetic, times, rates, strict=True)
    ]
    each = [batch / statistics.median(one) for one in times]
    return [name, precision, batch, *each, ratio(times[1], times[0]), *shares]


if __name__ == "__main__":
    main()
