"""The checks: what the library does on the emulated device, for a test to judge."""

from collections import Counter
from unittest import mock

import torch

from emulated_cuda import host
from emulated_cuda.tensors import DeviceError
from paperlib import elbo, fuzziness, pixelvae, sequential
from paperlib.elbo.experiment import SECTIONS
from paperlib.nn import pixelcnn_sampler
from paperlib.nn.likelihoods import mix_logistic_noise
from paperlib.nn.pixelcnn import PixelCNN, PixelCNNSettings, initialise
from paperlib.nn.pixelcnn_sampler import Sampler
from paperlib.runs import train

FEW = {"evaluations": 1, "evaluation_images": 40, "batch_size": 16, "precision": "bfloat16"}
SETTINGS = {
    "01": dict.fromkeys(("models", "gaussian_models", "estimated_models", "chains", "wrong_decoders"), 4)
    | {"samples": 200, "ascent_steps": 20, "starts": 4, "flow_steps": 20},
    "02": {"steps": 20, "plane": 4, "codes": 150, "max_halves": 10.0, "min_samples": 1.0},
    "03": {"train_steps": 20, "one_step_train_steps": 20, "infusion_train_steps": 10, "ablation_train_steps": 10}
    | {"ladder": (2, 2), "widths": (8, 8), "one_step_widths": (8, 8)}
    | {"maps": (4,), "one_step_maps": (4,), "clip_norm": 10.0, "patience": 5, "measured_images": 40, "samples": 40}
    | FEW,
    "04": {"train_steps": 10, "elbo_steps": 10, "sweep_steps": 2, "classifier_steps": 10, "draws": 40}
    | {"filters": 8, "mixtures": 2, "dropout": 0.05, "measured_images": 40}
    | FEW,
}
# As the authors' settings do it: images from disk, networks of their own for all steps, a fixed std.
SETTINGS["03 from disk"] = SETTINGS["03"] | {"resident": False, "shared": False, "reconstruction_scale": 16.0}


def sampler(case: str) -> dict[str, bool]:
    """Whether the images that graphs draw are those of the CPU, once and again, with another h in between."""
    channels, conditioning = {"alone": (1, 0), "with h": (3, 3)}[case]
    settings = PixelCNNSettings(channels=channels, blocks=2, filters=8, mixtures=3, conditioning=conditioning)
    torch.manual_seed(0)
    network = PixelCNN(settings).double().eval()
    x = torch.randint(256, (4, channels, 8, 8)).double() / 127.5 - 1
    h, other = (torch.randn(4, 3, 4, 4).double() if conditioning else None for _ in range(2))
    noise = mix_logistic_noise((4, 8, 8), 3, channels, dtype=torch.float64)
    with torch.no_grad():
        initialise(network, x, h)
    on_cpu = Sampler(network, 4, 8, 8)
    expected = [on_cpu.draw(h, noise=noise), on_cpu.draw(other, noise=noise), on_cpu.teacher_forced(x, h)]

    on_gpu = Sampler(network.cuda(), 4, 8, 8)
    x, noise, h, other = (None if one is None else one.cuda() for one in (x, noise, h, other))
    first, second = on_gpu.draw(h, noise=noise), on_gpu.draw(other, noise=noise)
    found = {"first": first, "another h": second, "teacher forced": on_gpu.teacher_forced(x, h)}
    same = {name: torch.equal(one.cpu(), true) for (name, one), true in zip(found.items(), expected, strict=True)}
    return same | {"again": torch.equal(on_gpu.draw(h, noise=noise), first), "6 graphs": len(on_gpu.graphs) == 6}


FAULTS = {
    "item": lambda image: image.sum().item(),
    "condition": lambda image: bool((image > 0).any()),
    "constant": lambda image: torch.tensor([1.0, 2.0], device="cuda"),
    "draw": lambda image: torch.rand(3, device="cuda"),
    "devices": lambda image: image + torch.ones(image.shape),
    "generator": lambda image: torch.rand(3, device="cuda", generator=torch.Generator()),
}


def planted(fault: str) -> str:
    """What is said of a fault in the work of a row, which a graph captures."""
    true = pixelcnn_sampler._Streams.begin_row

    def begin_row(self: object, kind: int) -> None:
        true(self, kind)
        FAULTS[fault](self.image)

    sampler = Sampler(PixelCNN(PixelCNNSettings(blocks=1, filters=8, mixtures=2)).cuda(), 2, 4, 4)
    with mock.patch.object(pixelcnn_sampler._Streams, "begin_row", begin_row):
        try:
            sampler.draw()
        except (host.CaptureError, DeviceError) as error:
            return str(error)
    return ""


def notebook(case: str) -> dict[str, dict[str, float]]:
    """Train, measure and judge at toy size. Waits per training step, by training and by what the host waits for."""
    waits: dict[str, Counter[str]] = {}
    steps: Counter[str] = Counter()
    true = train._step

    def step(training: train.Training, *rest: object) -> None:
        before = host.waits.copy()
        true(training, *rest)
        waits.setdefault(training.name, Counter()).update(host.waits - before)
        steps[training.name] += 1

    chapter = {"01": elbo, "02": fuzziness, "03": sequential, "04": pixelvae}[case[:2]]
    run = chapter.start("smoke", 0, "auto", SETTINGS[case])
    if case == "01":
        elbo.conclude(run, *(elbo.measure(run, claim) for claim in SECTIONS))
        return {}
    images = chapter.load_images(run)
    with mock.patch.object(train, "_step", step):
        trained = chapter.fit(run, images)
    arrays = chapter.measure(run, images, trained)
    chapter.conclude(run, arrays, trained, images)
    if case == "02":
        fuzziness.explore(run, images, trained, arrays)
    elif case == "04":
        pixelvae.continue_chain(run, images, trained, arrays)
    else:
        sequential.draw_more(run, images, trained)
    chapter.fit(run, images)  # from the checkpoints
    return {name: {wait: n / steps[name] for wait, n in counted.items()} for name, counted in waits.items()}
