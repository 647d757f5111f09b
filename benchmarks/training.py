"""Training steps a second of the PixelVAE's decoder and of the sequential VAE, against the same network run plainly.

    python benchmarks/training.py

The PixelCNN++ is held against `plain_pixelcnn`, of the same arithmetic, in eager PyTorch; the sequential VAE, whose
layers are torch's own, against itself uncompiled. A step is forward, backward and Adam. The share of the matrix rate
counts the arithmetic of convolutions and matrix products only.
"""

import statistics
from dataclasses import replace

import torch
from plain_pixelcnn import PlainPixelCNN, nats
from timing import flops, matrix_rate, options, ratio, side_by_side, write

from paperlib import likelihoods, machine, pixelcnn, sequential, sequential_chain, sequential_model
from paperlib.pixelcnn import PixelCNN, PixelCNNSettings


def main() -> None:
    asked = options(__doc__)
    precision = "bfloat16" if asked.device.type == "cuda" else "float32"
    rate = matrix_rate(asked.device, getattr(torch, precision))
    columns = ["network", "batch", "images a second", "plainly", "times", "% of matrix rate", "% plainly"]
    write(
        "training",
        columns,
        _rows(asked, precision, rate),
        [f"matrix products: {rate / 1e9:.0f} GFLOP/s in {precision}"],
        asked,
    )


def _rows(asked, precision, rate):
    on_gpu = asked.device.type == "cuda"
    for blocks, filters in [(1, 8)] if asked.quick else [(2, 40), (5, 80)]:
        batch = 2 if asked.quick else 256 if on_gpu else 16
        yield _pixelcnn(asked, blocks, filters, batch, precision, rate)
    yield _sequential(asked, "smoke" if asked.quick else "gpu" if on_gpu else "cpu", precision, rate)


def _pixelcnn(asked, blocks, filters, batch, precision, rate):
    torch.manual_seed(0)
    x = torch.rand(batch, 3, 32, 32, device=asked.device) * 2 - 1
    ours = PixelCNN(PixelCNNSettings(blocks=blocks, filters=filters))
    pixelcnn.initialise(ours, x.cpu())
    ours, plain = ours.to(asked.device), PlainPixelCNN(blocks, filters).to(asked.device)
    fast = machine.compiled(ours)

    def cost(network):
        log_p = likelihoods.discretized_mix_logistic_log_prob(x, network(x), levels=ours.settings.levels)
        return -log_p.mean()

    def plain_cost():
        return nats(x, plain(x)) / batch

    works = {
        "ours": _step(ours, lambda: cost(fast), asked.device, precision),
        "plain": _step(plain, plain_cost, asked.device, precision),
    }
    arithmetic = [flops(lambda: cost(ours).backward()), flops(lambda: plain_cost().backward())]
    return _row(f"PixelCNN++ {blocks} / {filters}", batch, works, arithmetic, asked, rate)


def _sequential(asked, preset, precision, rate):
    settings = replace(sequential.PRESETS[preset], compile=False)
    torch.manual_seed(0)
    shape = (3, settings.side, settings.side)
    x = torch.rand(settings.batch_size, *shape, device=asked.device) * 2 - 1
    vae = sequential_model.build(settings, shape, "sequential").to(asked.device)
    fast = machine.compiled(vae)
    chosen = [2, settings.steps]  # as one batch in training may choose

    def loss(call):
        links = sequential_chain.chain(vae, x, chosen=chosen, noise=settings.input_noise, call=call)
        return sequential_chain.objective([link for link in links if link.t in chosen], 1.0)[0]

    works = {
        "ours": _step(vae, lambda: loss(fast), asked.device, precision),
        "plain": _step(vae, lambda: loss(vae), asked.device, precision),
    }
    arithmetic = [flops(lambda: loss(vae).backward())] * 2
    return _row(f"sequential VAE, {preset}", settings.batch_size, works, arithmetic, asked, rate)


def _step(network, loss, device, precision):
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-5)

    def step():
        with machine.autocast(device, precision):
            value = loss()
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        optimiser.step()

    return step


def _row(name, batch, works, arithmetic, asked, rate):
    times = side_by_side(works, asked.device, 3 * asked.rounds)
    ours, plain = (statistics.median(times[name]) for name in ("ours", "plain"))
    shares = [100 * needed / one / rate for needed, one in zip(arithmetic, (ours, plain), strict=True)]
    return [name, batch, batch / ours, batch / plain, ratio(times["plain"], times["ours"]), *shares]


if __name__ == "__main__":
    main()
