"""A PixelVAE on CIFAR-10: what a decoder that can do everything does to z, and sampling by a Markov chain.

The ELBO against its reconstruction term alone, and sampling by a Markov chain in place of the prior:

    (4)  z ~ q(z|x),  x' ~ p(x|z)

It leaves p(x) invariant where p(x|z) = q(x|z) (claim E6).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from paperlib.data import datasets, device_images
from paperlib.data.device_images import Images
from paperlib.pixelvae import measurements, training
from paperlib.pixelvae.claims import CLAIMS, quantities, summary
from paperlib.pixelvae.glasses import glasses
from paperlib.pixelvae.markov_chain import markov_chain
from paperlib.pixelvae.model import build
from paperlib.pixelvae.training import VARIANTS
from paperlib.runs import presets, recorded, train
from paperlib.runs.claims import Verdicts
from paperlib.runs.experiment import Experiment
from paperlib.runs.presets import option
from paperlib.runs.recorded import load_recorded_arrays
from paperlib.runs.run import Run, save_arrays

NOTEBOOK = "04_cifar_pixelvae"


@dataclass(frozen=True)
class Settings:
    """What notebook 04 can be told. Raises `ValueError` for values out of range."""

    dataset: str = option("digits", "data set: digits or cifar10")
    code_dim: int = option(8, "dimensions of the code z")
    min_std: float = option(0.2, "least std of q(z|x); the greatest is 1")
    encoder_channels: tuple[int, ...] = option(
        (16, 32), "channels of the encoder's convolutions, each halving the image"
    )
    encoder_units: int = option(64, "units of the encoder's dense layer")
    code_channels: tuple[int, ...] = option(
        (16, 8), "channels of the network that makes a map of z for the decoder, each doubling its side"
    )
    blocks: int = option(1, "gated blocks per stage of the PixelCNN++")
    filters: int = option(12, "features of the PixelCNN++")
    mixtures: int = option(4, "logistics per pixel")
    dropout: float = option(0.0, "dropout within the blocks of the PixelCNN++")
    kl_weight: float = option(1.0, "weight of the KL in the objective elbo; 1 is the ELBO")
    train_steps: int = option(80, "optimiser steps of none and unconditional")
    elbo_steps: int = option(40, "optimiser steps of elbo")
    ablation_steps: int = option(20, "optimiser steps by which none is trained on, with its code and without")
    sweep_dims: tuple[int, ...] = option((2, 8), "code dimensions of the sweep, with min_std")
    sweep_stds: tuple[float, ...] = option((0.5,), "least stds of the sweep, with code_dim")
    sweep_steps: int = option(20, "optimiser steps of each model of the sweep")
    start_from: str = option("", "start none from the weights in a file, such as one below results/unfinished")
    batch_size: int = option(32, "images per step")
    learning_rate: float = option(2e-3, "learning rate of Adam")
    schedule: str = option("cosine", "learning rate: constant, cosine or exponential")
    decay: float = option(1.0, "factor per step of the exponential schedule")
    betas: tuple[float, ...] = option((0.9, 0.999), "momenta of Adam")
    ema: float = option(0.99, "decay of the moving average of the weights")
    precision: str = option("float32", "float32 or bfloat16 (training only)")
    clip_norm: float = option(0.0, "greatest norm of the gradient, 0 for no limit")
    compile: bool = option(False, "train through torch.compile")
    evaluations: int = option(3, "evaluations within a training")
    evaluation_images: int = option(100, "held-out images of each evaluation")
    measured_images: int = option(297, "held-out images on which terms are measured at last")
    classifier_steps: int = option(200, "optimiser steps of the classifier whose features the kernel distance uses")
    classifier_width: int = option(32, "channels of the classifier's last layers")
    chain_steps: int = option(60, "steps of the Markov chain")
    chains: int = option(40, "Markov chains of each kind, a multiple of 20")
    draws: int = option(100, "images drawn from every other distribution")
    sweep_chains: int = option(40, "Markov chains of each model of the sweep, a multiple of 20")

    def __post_init__(self) -> None:
        presets.check_numbers(self, {"dropout", "kl_weight", "clip_norm", "ema"})
        if not max([self.min_std, *self.sweep_stds]) < 1:
            raise ValueError(f"min_std and sweep_stds are {self.min_std} and {self.sweep_stds}, but must be below 1")
        if self.schedule not in train.SCHEDULES:  # else noticed only in training
            raise ValueError(f"unknown schedule {self.schedule!r}: choose from {', '.join(train.SCHEDULES)}")
        if len(self.betas) != 2:
            raise ValueError(f"betas is {self.betas}, but takes two numbers")
        for name in ("chains", "sweep_chains"):
            if (count := getattr(self, name)) < 40 or count % 20:
                raise ValueError(f"{name} is {count}, but takes a multiple of 20, 40 or more")
        if self.draws < self.chains:
            raise ValueError(f"draws is {self.draws}, but must be at least chains, {self.chains}")
        if self.chain_steps < (least := max(measurements.SHOWN)):
            raise ValueError(f"chain_steps is {self.chain_steps}, but must be at least {least}")


_cpu = Settings(
    dataset="cifar10",
    code_dim=48,
    min_std=0.15,
    encoder_channels=(64, 128, 256),
    encoder_units=256,
    code_channels=(128, 64, 32),
    filters=32,
    mixtures=5,
    train_steps=36_000,
    elbo_steps=18_000,
    ablation_steps=4500,
    sweep_dims=(16, 32, 48, 64),
    sweep_stds=(0.05, 0.4),
    sweep_steps=3000,
    batch_size=16,
    learning_rate=1e-3,
    ema=0.999,
    precision="bfloat16",
    compile=True,
    evaluations=25,
    evaluation_images=250,
    measured_images=5000,
    classifier_steps=4500,
    classifier_width=128,
    chains=100,
    draws=500,
    sweep_chains=60,
)
_gpu = replace(
    _cpu,
    blocks=3,
    filters=69,
    mixtures=10,
    dropout=0.05,
    train_steps=12_000,
    elbo_steps=6000,
    ablation_steps=900,
    sweep_steps=600,
    batch_size=256,
    evaluation_images=2000,
    chains=500,
    draws=2000,
    sweep_chains=200,
)
PRESETS = {
    "smoke": Settings(),
    "cpu": _cpu,
    "gpu": _gpu,
    "paper": replace(
        _gpu,
        encoder_units=512,
        code_dim=2,
        min_std=0.01,
        blocks=5,
        filters=120,
        mixtures=8,
        dropout=0.5,
        train_steps=200_000,
        elbo_steps=200_000,
        ablation_steps=20_000,
        sweep_dims=(2, 8, 32),
        sweep_stds=(0.1, 0.4),
        sweep_steps=20_000,
        batch_size=64,
        schedule="exponential",
        decay=0.999995,
        betas=(0.95, 0.9995),
        ema=0.9995,
    ),
}


def load_images(run: Run) -> Images:
    """The run's data set, on its device; of a recorded run its shape alone. Raises `UserError` as `datasets.load`."""
    if run.recorded:
        return device_images.load(datasets.without_images(recorded.provenance(run)["data"]), run.device)
    return device_images.load(datasets.load(run.settings.dataset), run.device)


def fit(run: Run, images: Images) -> dict[str, train.Trained]:
    """All trainings of the run by name, see `training.fit`; with recorded weights, the recorded models alone."""
    if not run.recorded:
        return training.fit(run.settings, images, run.directory, run.seed)
    models = {name: build(run.settings, images, variant.coded) for name, variant in VARIANTS.items()}
    loaded = recorded.load_model(run, nn.ModuleDict(models))
    return {name: replace(loaded, model=model) for name, model in loaded.model.items()}


def measure(run: Run, images: Images, trained: Mapping[str, train.Trained]) -> dict[str, np.ndarray]:
    """All that figures and claims need, written to the run's `arrays.npz` and returned; recorded where weights are."""
    if run.recorded:
        return load_recorded_arrays(run)
    settings, seed, models = run.settings, run.seed, {name: one.model for name, one in trained.items()}
    extract = measurements.extractors(images, measurements.fit_classifier(settings, images, run.directory, seed))
    swept = {name: models[name] for name in training.sweep(settings)}
    return save_arrays(
        run,
        levels=images.dataset.levels,
        **measurements.histories(trained),
        **measurements.terms(settings, images, models, seed),
        **measurements.codes(images, models),
        **measurements.samples(images, measurements.draw(settings, images, models, seed), extract),
        **measurements.capacity(settings, images, swept, models["sweep-without-code"], extract, seed),
        **glasses(settings, images, models["unconditional"], seed),
    )


def continue_chain(
    run: Run, images: Images, trained: Mapping[str, train.Trained], arrays: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Three states of the chain of `none` from each of five held-out photographs: uint8 (4, 5, S, S, C)."""
    photographs = torch.from_numpy(arrays["from_data_none"][0, :5])
    return markov_chain(trained["none"].model, images, photographs, 3, run.generator(11, True)).numpy()


def conclude(
    run: Run, arrays: Mapping[str, np.ndarray], trained: Mapping[str, train.Trained], images: Images
) -> Verdicts:
    """Judge P2 to P4 and G1, and write `metrics.json`, `run.json` and the weights of VARIANTS."""
    kept, data = nn.ModuleDict({name: trained[name].model for name in VARIANTS}), images.dataset.describe()
    return recorded.conclude(run, CLAIMS, quantities(arrays), summary(arrays), data, trained, kept)


EXPERIMENT = Experiment(
    notebook=NOTEBOOK,
    presets=PRESETS,
    claims=CLAIMS,
    recompute=lambda run: quantities(load_recorded_arrays(run)),
    fit=lambda run: fit(run, load_images(run)),
    datasets=("digits", "cifar10"),
)
start = EXPERIMENT.start
