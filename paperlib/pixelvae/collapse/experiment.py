"""Posterior collapse on MNIST: the PixelVAE of notebook 04 with decoders of growing power, and its Markov chain."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from paperlib.data import datasets, device_images
from paperlib.data.device_images import Images
from paperlib.pixelvae import experiment, model
from paperlib.pixelvae import measurements as shared
from paperlib.pixelvae.collapse import measurements, training
from paperlib.pixelvae.collapse.claims import CLAIMS, quantities, summary
from paperlib.runs import recorded, train
from paperlib.runs.claims import Verdicts
from paperlib.runs.experiment import Experiment
from paperlib.runs.presets import option
from paperlib.runs.recorded import load_recorded_arrays
from paperlib.runs.run import Run, save_arrays

NOTEBOOK = "05_mnist_collapse"
KEPT = (
    *("none", "elbo", "unconditional", "continued", "pretrained", "free-bits", "unconditional-continued"),
    *("none-visible", "elbo-hidden"),
)  # models whose weights are recorded


@dataclass(frozen=True)
class Settings(experiment.Settings):
    """What notebook 05 can be told: the settings of notebook 04, and its own. Raises `ValueError` as there."""

    dataset: str = option("digits", "data set: digits or mnist24")
    filters: int = option(12, "features of the strongest decoder, a PixelCNN++")
    train_steps: int = option(80, "optimiser steps of every decoder of the ladder, and of none with its variants")
    elbo_steps: int = option(20, "optimiser steps by which none, elbo and unconditional are trained on")
    schedule: str = option("constant", "learning rate: constant, cosine or exponential")
    ladder_filters: tuple[int, ...] = option((4,), "features of the weaker PixelCNN++s, rising")
    ladder_seeds: int = option(2, "seeds of each decoder of the ladder, 2 or more")
    free_bits: float = option(5.0, "nats of KL that cost nothing in the objective free-bits")
    mmd_weight: float = option(100.0, "weight of the MMD in the objective mmd; the sweep puts mmd_weights here")
    mmd_weights: tuple[float, ...] = option((10.0, 1000.0), "weights of the MMD in the sweep")
    linear_dims: tuple[int, ...] = option((2,), "code dimensions of the sweep's linear encoders, beside code_dim")
    probe_labels: int = option(300, "labels of the probe that gets few")
    probe_noise: float = option(0.1, "std of the noise on standardised features before a probe")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ladder_seeds < 2:
            raise ValueError(f"ladder_seeds is {self.ladder_seeds}, but must be at least 2")


_cpu = Settings(
    dataset="mnist24",
    code_dim=12,
    min_std=0.3,
    encoder_channels=(32, 64),
    encoder_units=128,
    code_channels=(64, 32, 16),
    filters=16,
    ladder_filters=(2, 6),
    ladder_seeds=3,
    train_steps=2200,
    elbo_steps=1100,
    ablation_steps=1100,
    sweep_dims=(2, 6, 32),
    sweep_stds=(0.1, 0.6),
    sweep_steps=1200,
    mmd_weights=(300.0, 1000.0, 3000.0, 10_000.0),
    linear_dims=(2, 32),
    batch_size=32,
    learning_rate=1e-3,
    ema=0.99,
    precision="bfloat16",
    clip_norm=500.0,
    compile=True,
    evaluations=12,
    evaluation_images=500,
    measured_images=2000,
    classifier_steps=2000,
    classifier_width=64,
    chains=100,
    draws=500,
    sweep_chains=60,
    probe_labels=1000,
)
_gpu = replace(
    _cpu,
    blocks=2,
    filters=48,
    ladder_filters=(2, 6, 16),
    train_steps=6000,
    elbo_steps=3000,
    ablation_steps=3000,
    sweep_steps=3000,
    batch_size=128,
    ema=0.999,
    measured_images=10_000,
    chains=500,
    draws=2000,
    sweep_chains=200,
)
PRESETS = {
    "smoke": Settings(
        train_steps=16,
        elbo_steps=4,
        ablation_steps=4,
        sweep_steps=4,
        sweep_dims=(2,),
        mmd_weights=(100.0,),
        classifier_steps=60,
        evaluations=4,
        measured_images=100,
    ),
    "cpu": _cpu,
    "gpu": _gpu,
    "paper": replace(
        _gpu,
        blocks=5,
        filters=120,
        mixtures=8,
        train_steps=20_000,
        batch_size=64,
        learning_rate=1e-3,
        betas=(0.95, 0.9995),
        ema=0.9995,
    ),
}


def load_images(run: Run) -> Images:
    """The run's data set, on its device; of a recorded run its shape alone. Raises `UserError` as `datasets.load`."""
    if run.recorded:
        return device_images.load(datasets.without_images(recorded.provenance(run)["data"]), run.device)
    return device_images.load(datasets.load(run.settings.dataset), run.device)


def fit(run: Run, images: Images) -> Mapping[str, train.Trained]:
    """All trainings of the run by name, see `training.plan`; with recorded weights, KEPT alone."""
    if not run.recorded:
        return training.fit(run.settings, images, run.directory, run.seed)
    planned = training.plan(run.settings, run.seed)
    kept = {name: planned[name] for name in KEPT}
    models = {name: model.build(one.settings, images, one.variant.coded) for name, one in kept.items()}
    loaded = recorded.load_model(run, nn.ModuleDict(models))
    return {name: replace(loaded, model=one) for name, one in loaded.model.items()}


def measure(run: Run, images: Images, trained: Mapping[str, train.Trained]) -> dict[str, np.ndarray]:
    """All that figures and claims need, written to the run's `arrays.npz` and returned; recorded where weights are."""
    if run.recorded:
        return load_recorded_arrays(run)
    settings, seed, models = run.settings, run.seed, {name: one.model for name, one in trained.items()}
    classifier = shared.fit_classifier(settings, images, run.directory, seed)
    extract = shared.extractors(images, classifier)
    swept = {name: models[name] for name in training.sweep(settings)}
    drawn = shared.draw(settings, images, models, seed)
    return save_arrays(
        run,
        levels=images.dataset.levels,
        **measurements.ladder(settings, images, trained, seed),
        **measurements.routes(settings, images, trained, seed),
        **measurements.causes(settings, images, models, seed),
        **shared.samples(images, drawn, extract),
        **measurements.classes(images, drawn, classifier),
        **shared.capacity(settings, images, swept, models["sweep-unconditional"], extract, seed),
        **measurements.priors(settings, images, models, extract["classifier"], seed),
        **measurements.probes(settings, images, models, seed),
    )


def conclude(
    run: Run, arrays: Mapping[str, np.ndarray], trained: Mapping[str, train.Trained], images: Images
) -> Verdicts:
    """Judge the CLAIMS, and write `metrics.json`, `run.json` and the weights of KEPT."""
    kept, data = nn.ModuleDict({name: trained[name].model for name in KEPT}), images.dataset.describe()
    return recorded.conclude(run, CLAIMS, quantities(arrays), summary(arrays), data, trained, kept)


EXPERIMENT = Experiment(
    notebook=NOTEBOOK,
    presets=PRESETS,
    claims=CLAIMS,
    recompute=lambda run: quantities(load_recorded_arrays(run)),
    fit=lambda run: fit(run, load_images(run)),
    datasets=("digits", "mnist24"),
)
start = EXPERIMENT.start
