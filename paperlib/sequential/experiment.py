"""A sequential VAE on LSUN bedrooms: codes injected while an image is made, so that what is left to guess is less.

Seen from the encoder, p(x|z) approximates q(x|z), and a factored Gaussian makes of it an average, fuzzy where many
images share a code (notebook 02). For so weak a p only a better q helps. Here q(x | z_1 .. z_t) narrows step by step:
an image is drawn, then drawn again with a further code that the encoder made while it saw what is still wrong with it.
If the post is right, each step's code reduces the error (S1), samples sharpen along the chain and beyond a VAE of one
step that spends as much arithmetic in training and as many nats on an image (S2, S4), and infusion training is the case
of a code that is a subset of the pixels (S3).

`sequential_networks`, `sequential_chain` and `sequential_model` have the networks, the equations and the trainings;
`sequential_samples` measures; `sequential_figures` draws; this module has the settings, the claims with their criteria,
and the verdicts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from paperlib.data.device_images import Images
from paperlib.runs import presets, train
from paperlib.runs.claims import Claim, Verdicts
from paperlib.runs.estimate import Estimate, rows
from paperlib.runs.experiment import Experiment
from paperlib.runs.presets import option
from paperlib.runs.provenance import describe_training
from paperlib.runs.recorded import load_recorded_arrays, save_weights
from paperlib.runs.run import Run, finish, save_arrays
from paperlib.sequential import measurements as sequential_samples
from paperlib.sequential import networks as sequential_networks
from paperlib.sequential.measurements import KINDS, SETS
from paperlib.sequential.training import fit, load_images
from paperlib.stats import intervals

NOTEBOOK = "03_lsun_sequential_vae"
HEADLINE = (
    "lsun_sequential_samples",
    "Ten samples of the sequential VAE, one to a row: noise, then the means x(1) to x(T).",
)


@dataclass(frozen=True)
class Settings:
    """What notebook 03 can be told. Raises `ValueError` for values out of range."""

    dataset: str = option("photos", "data set: photos, lsun_bedroom or own_images")
    side: int = option(16, "pixels; larger images are made smaller by means over squares")
    resident: bool = option(True, "training images on the device; else they are read from disk, batch by batch")
    steps: int = option(3, "of the chain")
    ladder: tuple[int, ...] = option((2, 3, 3, 4), "dimensions of a step's code, at side / 2, side / 4, ...")
    widths: tuple[int, ...] = option((16, 16, 24, 32), "channels at these scales")
    units: int = option(32, "of the dense layer at the coarsest scale")
    maps: tuple[int, ...] = option((4, 4, 8), "channels that codes are spread to, at all scales but the coarsest")
    kernel: int = option(3, "side of the convolutions of stride 1")
    shared: bool = option(
        True, "one network for all steps but the first, each with its own embedding and its own layers at the codes"
    )
    own_terms: bool = option(True, "every step has its own reconstruction term, gradients stopped; else only the last")
    steps_per_batch: int = option(2, "steps after the first on which a batch is trained; 0, or without own_terms, all")
    kl_weight: float = option(1.0, "of the KL")
    kl_ramp: float = option(0.03, "time constant of its rise, as a share of the training; 0 for none")
    reconstruction_scale: float | None = option(
        None, "weight of the squared error; null for a learned deviation a step"
    )
    min_sigma: float = option(0.02, "least learned deviation of p(x|z)")
    input_noise: float = option(0.1, "greatest deviation of the noise on the previous image, in training")
    single_ladder: tuple[int, ...] = option((6, 9, 9, 12), "dimensions of the code of `single`")
    single_widths: tuple[int, ...] = option((28, 36, 32, 48), "its channels")
    single_units: int = option(64, "its dense layer")
    single_maps: tuple[int, ...] = option((4, 8, 16), "its code maps")
    steering: float = option(0.05, "gain by which `single`'s KL weight follows its rate")
    infusion_start: float = option(0.05, "share of pixels that infusion shows the first step")
    infusion_step: float = option(0.05, "by which that share grows from step to step")
    updates: int = option(120, "optimiser steps of `sequential`")
    single_updates: int = option(60, "of `single`")
    infusion_updates: int = option(50, "of `infusion`")
    depth_updates: int = option(40, "of `depth`, the control without codes")
    picture_side: int = option(0, "side of the images of a further model, for the picture alone; 0 for none")
    picture_widths: tuple[int, ...] = option((16, 16, 24, 32), "its channels")
    picture_updates: int = option(40, "its optimiser steps")
    batch_size: int = option(32, "images per update")
    learning_rate: float = option(2e-3, "of Adam")
    schedule: str = option("cosine", "of the learning rate: constant or cosine")
    warmup: int = option(200, "updates over which it rises, at most a fifth of the training")
    ema: float = option(0.98, "decay of the moving average of the weights")
    precision: str = option("float32", "float32 or bfloat16 (training only)")
    clip_norm: float = option(0.0, "greatest norm of the gradient, 0 for no limit")
    compile: bool = option(False, "train through torch.compile")
    patience: int = option(0, "evaluations without improvement after which a training stops, 0 for never")
    evaluations: int = option(4, "evaluations within a training")
    evaluation_images: int = option(100, "held-out images of each")
    measured_images: int = option(200, "held-out images on which errors are measured at last")
    mirror: bool = option(True, "mirror half of the training images")
    shift: int = option(1, "pixels by which they are moved at most")
    samples: int = option(60, "images drawn from each model")

    def __post_init__(self) -> None:
        may_be_zero = {"steps_per_batch", "kl_ramp", "min_sigma", "input_noise", "infusion_start", "infusion_step"}
        may_be_zero |= {"picture_side", "warmup", "ema", "clip_norm", "patience", "shift", "steering"}
        presets.check_numbers(self, may_be_zero)
        if self.steps < 2:
            raise ValueError(f"steps is {self.steps}, but a chain has 2 or more")
        for name in ("ladder", "single_ladder", "widths", "single_widths", "picture_widths"):
            if len(getattr(self, name)) != len(self.widths):
                raise ValueError(f"{name} is {getattr(self, name)}, but there are {len(self.widths)} scales")
        sizes = [(self.side, self.widths, self.units, self.maps)]
        sizes += [(self.side, self.single_widths, self.single_units, self.single_maps)]
        sizes += [(self.picture_side, self.picture_widths, self.units, self.maps)] if self.picture_side else []
        for side, *rest in sizes:
            sequential_networks.Size(3, side, *rest)  # says what does not fit
        if self.samples < 40:
            raise ValueError(f"samples is {self.samples}, but the intervals need 40")


_smoke = Settings()
# 32 x 32, since at 64 x 64 the chain would see each photograph a few times in the time there is, too few to learn.
# Codes of a fifth of the authors' sizes, so that no step can say everything at once.
_cpu = Settings(
    dataset="lsun_bedroom",
    side=32,
    steps=8,
    ladder=(4, 6, 6, 6),
    widths=(24, 48, 96, 128),
    units=128,
    maps=(8, 16, 24),
    steering=0.02,
    single_ladder=(32, 48, 48, 48),
    single_widths=(64, 112, 160, 192),
    single_units=192,
    single_maps=(8, 16, 24),
    updates=4_800,
    single_updates=5_760,
    infusion_updates=3_000,
    depth_updates=3_400,
    picture_side=64,
    picture_widths=(16, 32, 64, 96),
    picture_updates=1_800,
    batch_size=32,
    learning_rate=1e-3,
    ema=0.999,
    patience=20,
    evaluations=20,
    evaluation_images=250,
    measured_images=248,
    shift=2,
    samples=500,
)
_gpu = replace(
    _cpu,
    side=64,
    widths=(48, 96, 144, 192),
    maps=(4, 8, 24),
    ladder=(6, 8, 8, 8),
    single_ladder=(48, 64, 64, 64),
    single_widths=(144, 192, 144, 144),
    single_units=160,
    single_maps=(4, 8, 12),
    updates=40_000,
    single_updates=14_000,
    infusion_updates=13_000,
    depth_updates=8_000,
    picture_side=0,
    batch_size=256,
    precision="bfloat16",
    compile=True,
    shift=4,
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
        steps_per_batch=0,
        reconstruction_scale=16.0,
        input_noise=0.0,
        ladder=(20, 30, 30, 30),
        single_ladder=(160, 240, 240, 240),
        single_widths=(192, 368, 600, 752),
        single_units=1024,
        single_maps=(48, 96, 192),
        kl_ramp=0.05,
        updates=200_000,
        single_updates=200_000,
        infusion_updates=200_000,
        depth_updates=200_000,
        batch_size=100,
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

CLAIMS = {
    "S1": Claim(
        "Each injected code reduces the variance of q(x|z_1..t).",
        "held-out error falls by 1 % or more at every step, interval above 0; each step's KL exceeds 1 nat; at least "
        "half of the gain is lost with the code of another image, and as much by the same step trained without a code",
        lambda least_fall, least_kl, least_lost, least_lost_without, **_: (
            least_fall.value >= 0.01
            and least_fall.low > 0
            and least_kl.value > 1
            and min(least_lost.value, least_lost_without.value) >= 0.5
        ),
        shows=("least_fall", "least_lost_without"),
    ),
    "S2": Claim(
        "Samples sharpen along the chain, beyond a VAE of one step.",
        "distance of log power spectra to held-out photographs: last step below the first and below the single step's, "
        "intervals apart, and below what both reach with the white noise that suits them best; rank correlation with "
        "the step -0.8 or less; the single step's rate within 10 % of the chain's",
        lambda first, last, single, noisy_first, noisy_single, trend, rate, rate_of_single, **_: (
            last.high < min(first.low, single.low, noisy_first.value, noisy_single.value)
            and trend.value <= -0.8
            and abs(rate_of_single.value / rate.value - 1) <= 0.1
        ),
        shows=("first", "last", "single"),
    ),
    "S3": Claim(
        "Infusion training is the special case whose code is a subset of the pixels, and whose KL is left out.",
        "for the same masks and draws, in float64, the two losses agree to 1e-12 of their size",
        lambda residual, **_: residual.value <= 1e-12,
        exact=True,
        shows=("residual",),
    ),
    "S4": Claim(
        "The chain's samples are nearer to photographs than those of a single step.",
        "kernel distance of sequential over single at most 0.8, interval below 1, on features of a random network, and "
        "not shown to be above 1 on thumbnails; the single step's rate within 10 % of the chain's",
        lambda ratio_random, ratio_thumbnails, rate, rate_of_single, **_: (
            ratio_random.value <= 0.8
            and ratio_random.high < 1
            and ratio_thumbnails.low <= 1
            and abs(rate_of_single.value / rate.value - 1) <= 0.1
        ),
        shows=("ratio_random", "ratio_thumbnails"),
    ),
}


# Measuring


def measure(run: Run, images: Images, trained: Mapping[str, train.Trained]) -> dict[str, np.ndarray]:
    """All that the figures and claims need, written to the run's `arrays.npz` and returned.

    With recorded weights, the arrays that were recorded with them. Estimates are rows of value, low, high.
    """
    if run.weights == "recorded":
        return load_recorded_arrays(run)
    models = {name: one.model for name, one in trained.items()}
    drawn = sequential_samples.drawings(run, images, models)
    return save_arrays(
        run,
        levels=images.dataset.levels,
        dims=np.prod(images.shape),
        **sequential_samples.histories(trained),
        **sequential_samples.terms(run, images, models),
        **sequential_samples.spectra(run, images, drawn),
        **sequential_samples.compared(run, images, models, drawn),
        **sequential_samples.nearest(run, images, drawn),
        **sequential_samples.pictures(run, images, models),
        **sequential_samples.exactness(run, images, models["infusion"]),
    )


# Judging


def conclude(
    run: Run, arrays: Mapping[str, np.ndarray], trained: Mapping[str, train.Trained], images: Images
) -> Verdicts:
    """Judge S1 to S4, and write `metrics.json`, `run.json` and the weights of `sequential`."""
    if run.weights == "train":
        save_weights(run, trained["sequential"].model.state_dict())
    return finish(
        run,
        CLAIMS,
        quantities(arrays),
        numbers=summary(arrays),
        data=images.dataset.describe(),
        trainings={name: describe_training(one) for name, one in trained.items()},
    )


def quantities(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, Estimate]]:
    """What each claim is judged by."""
    from scipy.stats import spearmanr

    steps = sequential_samples.per_step(arrays)
    chain, single = arrays["spectral_sequential"], Estimate.from_row(arrays["spectral_single"])
    trend = spearmanr(np.arange(len(chain)), chain[:, 0]).statistic
    general, plain = arrays["infusion_losses"]
    rate, rate_of_single = (
        intervals.mean_interval(arrays[f"{name}_kl"].sum(1), "nats") for name in ("sequential", "single")
    )
    kernel = {kind: dict(zip(SETS, arrays[f"kernel_{kind}"], strict=True)) for kind in KINDS}
    return {
        "S1": {
            "least_fall": _least(steps["fall"]),
            "least_kl": _least(steps["kl"], "nats"),
            "least_lost": _least(steps["lost"]),
            "least_lost_without": _least(steps["lost_without"]),
        },
        "S2": {
            "first": Estimate.from_row(chain[0]),
            "last": Estimate.from_row(chain[-1]),
            "single": single,
            "noisy_first": Estimate.from_row(arrays["spectral_noise_first"]),
            "noisy_single": Estimate.from_row(arrays["spectral_noise_single"]),
            "trend": Estimate(float(trend)),
            "infusion": Estimate.from_row(arrays["spectral_infusion"]),
            "training_photographs": Estimate.from_row(arrays["spectral_training"]),
            "rate": rate,
            "rate_of_single": rate_of_single,
        },
        "S3": {"residual": Estimate(float(abs(general - plain) / abs(plain)))},
        "S4": {
            **{f"ratio_{kind}": Estimate.from_row(arrays[f"ratio_{kind}"]) for kind in KINDS},
            "sequential": Estimate.from_row(kernel["random"]["sequential"]),
            "single": Estimate.from_row(kernel["random"]["single"]),
            "infusion": Estimate.from_row(kernel["random"]["infusion"]),
            "training_photographs": Estimate.from_row(kernel["random"]["training photographs"]),
            "rate": rate,
            "rate_of_single": rate_of_single,
        },
    }


def _least(steps: list[Estimate], unit: str = "") -> Estimate:
    """The least value, and the least ends of all intervals, whichever steps they are of."""
    return Estimate.from_row(rows(steps).min(0), unit)


def summary(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Further numbers of the run, by model, step or set."""
    dims = float(arrays["dims"])
    models = {}
    for name in ("sequential", "single", "infusion"):
        models[name] = {
            "error": arrays[f"{name}_error"].mean(0).tolist(),
            "kl": arrays[f"{name}_kl"].mean(0).tolist(),
            "sigma": arrays[f"sigma_{name}"].tolist(),
            "updates": float(arrays[f"{name}_history"][-1, 0]),
            "best_after": float(arrays[f"{name}_history"][arrays[f"{name}_history"][:, 2].argmin(), 0]),
        }
        if name != "infusion":
            bound = arrays[f"{name}_log_p"][:, -1] - arrays[f"{name}_kl"].sum(1)
            models[name] |= {"rate": float(arrays[f"{name}_kl"].sum(1).mean()), "bound": float(bound.mean())}
            # Grey levels lie 2 / (levels - 1) apart in [-1, 1].
            bits = -bound.mean() / dims + np.log((float(arrays["levels"]) - 1) / 2)
            models[name]["bits_per_dim_of_levels"] = float(bits / np.log(2))
    nearest = {name: float(np.median(row)) for name, row in arrays.items() if name.startswith("nearest_")}
    models["single"]["kl_weight"] = float(arrays["kl_weight_single"])
    return {
        "models": models,
        "control_over_no_step": (arrays["depth_error"].mean(0) / arrays["sequential_error"][:, :-1].mean(0)).tolist(),
        "steps": {name: [one.row for one in of_steps] for name, of_steps in sequential_samples.per_step(arrays).items()},
        "spectral_distance": arrays["spectral_sequential"].tolist(),
        "kernel_distance": {kind: dict(zip(SETS, arrays[f"kernel_{kind}"].tolist(), strict=True)) for kind in KINDS},
        "median_distance_to_the_nearest_training_image": nearest,
    }


def table(arrays: Mapping[str, np.ndarray]) -> Any:
    """What each step of the chain adds, on held-out images, as a table (a pandas data frame).

    `error`: squared, per dimension of [-1, 1], and `in training` that of training images; `fall`, and the shares of it
    `lost by swap` and `lost without` a code, in per cent (`sequential_samples.per_step`); `KL` in nats; `sigma_t`;
    `spectra`: distance of log power spectra of samples to photographs'.
    """
    import pandas

    steps = sequential_samples.per_step(arrays)
    rows = {}
    for t, error in enumerate(arrays["sequential_error"].mean(0)):
        rows[t + 1] = {
            "error": error,
            "in training": arrays["training_error"][:, t].mean(),
            "fall (%)": 100 * steps["fall"][t].value,
            "lost by swap (%)": 100 * steps["lost"][t].value,
            "lost without (%)": 100 * steps["lost_without"][t - 1].value if t else np.nan,
            "KL (nats)": steps["kl"][t].value,
            "sigma": arrays["sigma_sequential"][t],
            "spectra": arrays["spectral_sequential"][t, 0],
        }
    found = pandas.DataFrame(rows).T.round(4)
    found.index.name = "step"
    return found


def recompute(run: Run) -> dict[str, dict[str, Estimate]]:
    """The numbers that decide each claim, from the recorded arrays."""
    return quantities(load_recorded_arrays(run))


EXPERIMENT = Experiment(
    notebook=NOTEBOOK,
    headline=HEADLINE,
    presets=PRESETS,
    claims=CLAIMS,
    recompute=recompute,
    fit=lambda run: fit(run, load_images(run)),
    datasets=("photos", "lsun_bedroom", "own_images"),
)
start = EXPERIMENT.start
