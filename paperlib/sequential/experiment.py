"""A sequential VAE on LSUN bedrooms: codes injected while an image is made, so that what is left to guess is less.

Seen from the encoder, p(x|z) approximates q(x|z), and a factored Gaussian makes of it an average, fuzzy where many
images share a code (notebook 02). For so weak a p only a better q helps. Here q(x | z_1 .. z_t) narrows step by step:
an image is drawn, then drawn again with a further code that the encoder made while it saw what is still wrong with it.
If the post is right, each step's code reduces the error (S1), samples sharpen along the chain and beyond a VAE of one
step that spends as much arithmetic in training and as many nats per image (S2, S4), and infusion training is the case
of a code that is a subset of the pixels (S3).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from paperlib.data import datasets, device_images
from paperlib.data.device_images import Images
from paperlib.runs import presets, recorded, train
from paperlib.runs.claims import Verdicts
from paperlib.runs.experiment import Experiment
from paperlib.runs.presets import option
from paperlib.runs.recorded import load_model, load_recorded_arrays
from paperlib.runs.run import Run, save_arrays
from paperlib.sequential import measurements, training
from paperlib.sequential.claims import CLAIMS, quantities, summary
from paperlib.sequential.model import build
from paperlib.sequential.networks import Size
from paperlib.system.errors import UserError

NOTEBOOK = "03_lsun_sequential_vae"
MODELS = ("sequential", "one_step", "infusion", "no_latent")
KEPT = ("sequential", "no_latent")  # of these the weights are small enough to be recorded


@dataclass(frozen=True)
class Settings:
    """What notebook 03 can be told. Raises `ValueError` for values out of range."""

    dataset: str = option("photos", "data set: photos, lsun_bedroom or own_images")
    side: int = option(16, "side of the images in pixels; larger ones are made smaller by means over squares")
    resident: bool = option(True, "training images on the device, up to 4 GiB; else read from disk by the batch")
    chain_steps: int = option(3, "steps of the chain")
    ladder: tuple[int, ...] = option((2, 3, 3, 4), "dimensions of a step's code, at side / 2, side / 4, ...")
    widths: tuple[int, ...] = option((16, 16, 24, 32), "channels of the networks at these scales")
    units: int = option(32, "units of the dense layer at the coarsest scale")
    maps: tuple[int, ...] = option((4, 4, 8), "channels that codes are spread to, at all scales but the coarsest")
    kernel: int = option(3, "kernel size of the convolutions of stride 1")
    shared: bool = option(
        True, "one network for all steps but the first, each with its own embedding and its own layers at the codes"
    )
    kl_weight: float = option(1.0, "weight of the KL")
    kl_annealing: float = option(0.03, "time constant of KL annealing, as a share of the training; 0 for none")
    reconstruction_scale: float | None = option(None, "weight of the squared error; null for a learned std per step")
    min_sigma: float = option(0.02, "least learned std of p(x|z)")
    input_noise: float = option(0.1, "greatest std of the noise on the previous image, in training")
    one_step_widths: tuple[int, ...] = option((28, 36, 32, 48), "channels of the one-step baseline")
    one_step_units: int = option(64, "units of the dense layer of the one-step baseline")
    one_step_maps: tuple[int, ...] = option(
        (4, 8, 16), "channels that the codes of the one-step baseline are spread to"
    )
    kl_controller_gain: float = option(0.05, "gain of the KL controller of the one-step baseline")
    infusion_start: float = option(0.05, "share of pixels that infusion shows the first step")
    infusion_step: float = option(0.05, "growth of infusion's share of pixels from step to step")
    train_steps: int = option(80, "training steps of `sequential`, each with an update after every step of the chain")
    one_step_train_steps: int = option(60, "training steps of the one-step baseline")
    start_from: str = option("", "start `sequential` from the weights in a file, such as one below results/unfinished")
    infusion_train_steps: int = option(30, "training steps of `infusion`")
    ablation_train_steps: int = option(30, "training steps of the no-latent ablation")
    batch_size: int = option(32, "images per training step")
    learning_rate: float = option(2e-3, "learning rate of Adam")
    schedule: str = option("cosine", "learning-rate schedule: constant or cosine")
    warmup: int = option(200, "training steps over which the learning rate rises, at most a fifth of all")
    ema: float = option(0.98, "decay of the moving average of the weights")
    precision: str = option("float32", "float32 or bfloat16 (training only)")
    clip_norm: float = option(0.0, "greatest norm of the gradient, 0 for no limit")
    compile: bool = option(False, "train through torch.compile")
    patience: int = option(0, "evaluations without improvement after which a training stops, 0 for never")
    evaluations: int = option(4, "evaluations within a training")
    evaluation_images: int = option(100, "held-out images of each evaluation")
    measured_images: int = option(200, "held-out images on which errors are measured at last")
    mirror: bool = option(True, "mirror half of the training images")
    shift: int = option(1, "pixels by which training images are moved at most")
    samples: int = option(60, "images drawn from each model")

    def __post_init__(self) -> None:
        may_be_zero = {"kl_annealing", "min_sigma", "input_noise", "infusion_start", "infusion_step"}
        may_be_zero |= {"warmup", "ema", "clip_norm", "patience", "shift", "kl_controller_gain"}
        presets.check_numbers(self, may_be_zero)
        if self.chain_steps < 2:
            raise ValueError(f"chain_steps is {self.chain_steps}, but a chain has 2 or more")
        for name in ("ladder", "widths", "one_step_widths"):
            if len(getattr(self, name)) != len(self.widths):
                raise ValueError(f"{name} is {getattr(self, name)}, but there are {len(self.widths)} scales")
        Size(3, self.side, self.widths, self.units, self.maps)  # says what does not fit
        Size(3, self.side, self.one_step_widths, self.one_step_units, self.one_step_maps)
        if self.samples < 40:
            raise ValueError(f"samples is {self.samples}, but the intervals need 40")

    @property
    def one_step_ladder(self) -> tuple[int, ...]:
        """Dimensions of the code of the one-step baseline, by scale: those of all steps of the chain together."""
        return tuple(self.chain_steps * dims for dims in self.ladder)


_smoke = Settings()


# The chain and the one-step baseline see as many images, at equal arithmetic each. Most of a step's code is for the
# fine scales: coarse codes of later steps would lay the room out anew, apart from what is there already.
_cpu = Settings(
    dataset="lsun_bedroom",
    side=64,
    chain_steps=8,
    ladder=(12, 14, 10, 8),
    widths=(32, 64, 96, 128),
    units=128,
    maps=(4, 8, 16),
    kl_annealing=0.05,
    kl_controller_gain=0.02,
    one_step_widths=(160, 192, 160, 192),
    one_step_units=192,
    one_step_maps=(8, 16, 24),
    train_steps=16_000,
    one_step_train_steps=16_000,
    infusion_train_steps=4_000,
    ablation_train_steps=4_000,
    batch_size=32,
    learning_rate=1e-3,
    ema=0.999,
    precision="bfloat16",
    patience=40,
    evaluations=40,
    evaluation_images=250,
    measured_images=248,
    shift=4,
    samples=500,
)


_gpu = replace(
    _cpu,
    widths=(48, 96, 128, 160),
    one_step_widths=(256, 240, 128, 112),
    one_step_units=128,
    one_step_maps=(4, 8, 8),
    train_steps=10_000,
    one_step_train_steps=10_000,
    infusion_train_steps=4_000,
    ablation_train_steps=4_000,
    batch_size=256,
    compile=True,
)


PRESETS = {
    "smoke": _smoke,
    "cpu": _cpu,
    "gpu": _gpu,
    "paper": replace(
        _gpu,
        resident=False,
        widths=(48, 96, 192, 384),
        units=512,
        maps=(48, 96, 192),
        kernel=4,
        shared=False,
        reconstruction_scale=16.0,
        input_noise=0.0,
        ladder=(20, 30, 30, 30),
        one_step_widths=(192, 368, 600, 752),
        one_step_units=1024,
        one_step_maps=(48, 96, 192),
        kl_annealing=0.05,
        train_steps=200_000,
        one_step_train_steps=200_000,
        infusion_train_steps=200_000,
        ablation_train_steps=200_000,
        batch_size=96,  # the authors' 100 is no multiple of 16 processes
        learning_rate=2e-4,
        schedule="constant",
        warmup=0,
        ema=0.0,
        precision="float32",
        compile=False,
        patience=0,
        mirror=False,
        shift=0,
    ),
}


def load_images(run: Run) -> Images:
    """The run's data set at its setting `side`, larger images made smaller by means over squares.

    Of a recorded run its shape alone. Patches of photographs, which lie side by side, have their held-out part put into
    random order. Raises `UserError` for too few held-out images, and as `datasets.load` does.
    """
    if run.recorded:
        return device_images.load(datasets.without_images(recorded.provenance(run)["data"]), run.device)
    settings, side = run.settings, run.settings.side
    if settings.dataset == "photos":
        dataset = datasets.load("photos", side=side)
        order = torch.randperm(len(dataset.held_out.images), generator=torch.Generator().manual_seed(0))
        dataset = replace(dataset, held_out=datasets.Split(dataset.held_out.images[order.numpy()]))
    else:
        dataset = smaller(datasets.load(settings.dataset), side)
    count, least = len(dataset.held_out.images), max(80, settings.evaluation_images + 40)
    if count < least:
        raise UserError(
            f"{settings.dataset} holds out {count} images ({dataset.source}), and intervals need {least}: prepare "
            f"{10 * least} images or more, or lower evaluation_images"
        )
    return device_images.load(dataset, run.device, training_set=settings.resident)


def smaller(dataset: datasets.Dataset, side: int) -> datasets.Dataset:
    """The same with each image `side` pixels wide, uint8 means over squares of pixels; itself where it is so already.

    Raises `ValueError` where the images' side is no multiple.
    """
    width = dataset.train.images.shape[1]
    if width == side:
        return dataset
    if width % side:
        raise ValueError(f"images of {width} pixels have no squares that make {side}")

    def means(split: datasets.Split) -> datasets.Split:
        parts = np.array_split(split.images, max(1, len(split.images) // 1000))
        squares = [part.reshape(-1, side, width // side, side, width // side, part.shape[3]) for part in parts]
        return datasets.Split(
            np.concatenate([np.rint(one.mean((2, 4))).astype(np.uint8) for one in squares]), split.labels
        )

    source = f"{dataset.source}, means over squares of {width // side} x {width // side} pixels"
    return replace(dataset, train=means(dataset.train), held_out=means(dataset.held_out), source=source)


def fit(run: Run, images: Images) -> dict[str, train.Trained]:
    """All trainings of the run by name, see `training.fit`; with recorded weights, those of `KEPT`."""
    if not run.recorded:
        return training.fit(run.settings, images, run.directory, run.seed)
    models = nn.ModuleDict({name: build(run.settings, images.shape, name) for name in KEPT}).to(run.device).eval()
    load_model(run, models)
    return {name: train.Trained(vae, [], 0, 0.0, "recorded", {}, []) for name, vae in models.items()}


def measure(run: Run, images: Images, trained: Mapping[str, train.Trained]) -> dict[str, np.ndarray]:
    """All that the figures and claims need, written to the run's `arrays.npz` and returned.

    With recorded weights, the arrays that were recorded with them. Estimates are rows of value, low, high.
    """
    if run.recorded:
        return load_recorded_arrays(run)
    settings, seed, models = run.settings, run.seed, {name: one.model for name, one in trained.items()}
    priors, mixture = measurements.priors(seed, images, models)
    drawn = measurements.drawings(settings, seed, images, models, mixture)
    return save_arrays(
        run,
        levels=images.dataset.levels,
        dims=np.prod(images.shape),
        **measurements.histories(trained),
        **measurements.terms(settings, seed, images, models),
        **priors,
        **measurements.sharpness_along_the_chain(settings, seed, images, drawn),
        **measurements.compared(settings, seed, images, models, drawn),
        **measurements.nearest(settings, images, drawn),
        **measurements.pictures(seed, images, models),
        **measurements.exactness(seed, images, models["infusion"]),
    )


def draw_more(run: Run, images: Images, trained: Mapping[str, train.Trained]) -> np.ndarray:
    """Samples of `sequential` that no figure shows: noise and x(1) .. x(T), uint8 (T + 1, 5, S, S, C)."""
    return measurements.draw_more(run.seed, images, trained["sequential"].model)


def conclude(
    run: Run, arrays: Mapping[str, np.ndarray], trained: Mapping[str, train.Trained], images: Images
) -> Verdicts:
    """Judge S1 to S4, and write `metrics.json`, `run.json` and the weights of `KEPT`."""
    kept, data = nn.ModuleDict({name: trained[name].model for name in KEPT}), images.dataset.describe()
    return recorded.conclude(run, CLAIMS, quantities(arrays), summary(arrays), data, trained, kept)


EXPERIMENT = Experiment(
    notebook=NOTEBOOK,
    presets=PRESETS,
    claims=CLAIMS,
    recompute=lambda run: quantities(load_recorded_arrays(run)),
    fit=lambda run: fit(run, load_images(run)),
    datasets=("photos", "lsun_bedroom", "own_images"),
)


start = EXPERIMENT.start
