"""A PixelVAE on CIFAR-10: what a decoder that can do everything does to z, and sampling by a Markov chain.

Seen from the encoder, p(x|z) approximates q(x|z). A PixelCNN++ could be q(x|z) whatever the encoder is, and so could be
p(x) while z says nothing: with the KL in the objective nothing is gained by using z, without it everything is (claims
E5, P1, P2). What is given up is p(z): q(z) is then no N(0, I), and decoding draws from the prior fails (P3). But

    (4)  z ~ q(z|x),  x' ~ p(x|z)

is a Markov chain that leaves p(x) as it is wherever p(x|z) = q(x|z) (claim E6), so it can be run in place of the prior
(numbered as in the notebook).

`pixelvae_model` has the model, the objectives, the trainings and the chain; `pixelvae_samples` measures;
`pixelvae_figures` draws; this module has the settings, the claims with their criteria, and the verdicts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from paperlib.pixelvae import measurements as pixelvae_samples
from paperlib.pixelvae.measurements import CODED, LAGS, PROBES, SETS
from paperlib.pixelvae.model import VARIANTS, Images, fit, load_images
from paperlib.runs import presets, train
from paperlib.runs.claims import Claim, Verdicts
from paperlib.runs.estimate import Estimate
from paperlib.runs.experiment import Experiment
from paperlib.runs.presets import option
from paperlib.runs.provenance import describe_training
from paperlib.runs.recorded import load_recorded_arrays, save_weights
from paperlib.runs.run import Run, finish, save_arrays
from paperlib.stats import intervals

NOTEBOOK = "04_cifar_pixelvae"
HEADLINE = (
    "cifar_chain",
    "One Markov chain z ~ q(z|x), x ~ p(x|z) of 60 states in reading order, from noise: above without the KL, below "
    "under the ELBO.",
)


@dataclass(frozen=True)
class Settings:
    """What notebook 04 can be told. Raises `ValueError` for values out of range."""

    dataset: str = option("digits", "data set: digits or cifar10")
    code_dim: int = option(8, "dimensions of the code z")
    floor: float = option(0.2, "least deviation of q(z|x); the greatest is 1")
    encoder_channels: tuple[int, ...] = option((16, 32), "of the encoder's convolutions, each halving the image")
    encoder_units: int = option(64, "of its dense layer")
    code_channels: int = option(8, "of the map that z becomes for the decoder")
    blocks: int = option(1, "gated blocks per stage of the PixelCNN++")
    filters: int = option(12, "its features")
    mixtures: int = option(4, "logistics per pixel")
    dropout: float = option(0.0, "within its blocks")
    kl_weight: float = option(1.0, "of the KL in the objective elbo; 1 is the ELBO")
    mmd_weight: float = option(1e4, "of the MMD in the objective mmd, in nats an image")
    trunk_steps: int = option(40, "optimiser steps without regulariser that the branches share; 0 for no trunk")
    branch_steps: int = option(
        15, "of none, elbo, mmd, unconditional, and of none-scratch and elbo-scratch, which have no trunk"
    )
    control_steps: int = option(8, "of the branches label and linear")
    input_dropout: float = option(
        0.5, "share of images of which the trunk's decoder sees no pixel, falling to 0 at half its steps"
    )
    start_from: str = option("", "start the trunk from the weights of another run's model: a folder below runs")
    batch_size: int = option(32, "images per step")
    learning_rate: float = option(2e-3, "of Adam")
    schedule: str = option("cosine", "of the branches' learning rate: constant, cosine or exponential")
    decay: float = option(1.0, "per step of the exponential schedule")
    betas: tuple[float, ...] = option((0.9, 0.999), "momenta of Adam")
    ema: float = option(0.99, "decay of the moving average of the weights")
    precision: str = option("float32", "float32 or bfloat16 (training only)")
    clip_norm: float = option(0.0, "greatest norm of the gradient, 0 for no limit")
    compile: bool = option(False, "train through torch.compile")
    evaluations: int = option(3, "evaluations within a training")
    evaluation_images: int = option(100, "held-out images of each")
    measured_images: int = option(297, "held-out images on which terms and probes are measured at last")
    classifier_steps: int = option(200, "optimiser steps of the classifier whose features the kernel distance uses")
    classifier_width: int = option(32, "channels of its last layers")
    chain_steps: int = option(60, "of the Markov chain")
    chains: int = option(40, "Markov chains of each kind, a multiple of 20")
    draws: int = option(100, "images drawn from every other law")

    def __post_init__(self) -> None:
        may_be_zero = {"dropout", "input_dropout", "kl_weight", "mmd_weight", "trunk_steps", "clip_norm", "ema"}
        presets.check_numbers(self, may_be_zero)
        if not self.floor < 1:
            raise ValueError(f"floor is {self.floor}, but must be below 1, the greatest deviation")
        if len(self.betas) != 2:
            raise ValueError(f"betas is {self.betas}, but takes two numbers")
        if self.chains < 40 or self.chains % 20:
            raise ValueError(f"chains is {self.chains}, but takes a multiple of 20, 40 or more")
        if self.draws < self.chains:
            raise ValueError(f"draws is {self.draws}, but must be at least chains, {self.chains}")
        if self.chain_steps < max(LAGS):
            raise ValueError(f"chain_steps is {self.chain_steps}, but the largest lag is {max(LAGS)}")


_smoke = Settings()
_cpu = Settings(
    dataset="cifar10",
    code_dim=16,
    encoder_channels=(64, 128, 256),
    encoder_units=256,
    code_channels=16,
    filters=24,
    mixtures=5,
    trunk_steps=6000,
    branch_steps=2000,
    control_steps=1500,
    batch_size=16,
    learning_rate=1e-3,
    ema=0.999,
    compile=True,
    evaluations=20,
    evaluation_images=250,
    measured_images=5000,
    classifier_steps=4500,
    classifier_width=128,
    chains=200,
    draws=1000,
)
_gpu = replace(
    _cpu,
    blocks=3,
    filters=72,
    mixtures=10,
    code_channels=32,
    dropout=0.05,
    trunk_steps=10_000,
    branch_steps=4500,
    control_steps=1500,
    batch_size=256,
    precision="bfloat16",
    evaluation_images=2000,
    chains=500,
    draws=2000,
)
PRESETS = {
    "smoke": _smoke,
    "cpu": _cpu,
    "gpu": _gpu,
    "paper": replace(
        _gpu,
        encoder_units=512,
        code_dim=2,
        floor=0.01,
        blocks=5,
        filters=120,
        mixtures=8,
        dropout=0.5,
        mmd_weight=1e5,
        trunk_steps=0,
        input_dropout=0.0,
        branch_steps=200_000,
        control_steps=200_000,
        batch_size=64,
        schedule="exponential",
        decay=0.999995,
        betas=(0.95, 0.9995),
        ema=0.9995,
    ),
}

CLAIMS = {
    "P1": Claim(
        "With an autoregressive decoder the ELBO leaves z unused.",
        "KL below 0.5 nat and shuffle gap below 0.1 nat an image, from scratch and from the trained trunk",
        lambda kl, shuffle_gap, kl_scratch, shuffle_gap_scratch, **_: (
            max(kl.value, kl_scratch.value) < 0.5 and max(shuffle_gap.value, shuffle_gap_scratch.value) < 0.1
        ),
        shows=("kl", "shuffle_gap"),
    ),
    "P2": Claim(
        "Without the KL z is used, once the decoder has been made to listen.",
        "shuffle gap above 5 nats an image, interval above 0",
        lambda shuffle_gap, **_: shuffle_gap.value > 5 and shuffle_gap.low > 0,
        shows=("shuffle_gap",),
    ),
    "P3": Claim(
        "Then decoding the prior fails, and the Markov chain works.",
        "kernel distance to photographs: of N(0, I) above the chain's, intervals apart; of the chain at most 1.2 times "
        "that of z ~ q(z) of held-out images; between chains from noise and from data not shown (by its interval) to "
        "exceed a tenth of the chain's",
        lambda prior, chain, q_z, noise_to_data, **_: (
            prior.low > chain.high and chain.value <= 1.2 * q_z.value and noise_to_data.low <= 0.1 * chain.value
        ),
        shows=("prior", "chain", "q_z"),
    ),
    "P4": Claim(
        "The chain moves gradually; under the ELBO it jumps.",
        "autocorrelation of pixels: without the KL neighbouring states above 0.05, interval included, and above 0.5 "
        "of what two decodes of one z have; after 60 steps less than half of it; under the ELBO neighbours below 0.05 "
        "on the same scale",
        lambda neighbours, similarity, after_60_steps, similarity_elbo, **_: (
            neighbours.low > 0.05
            and similarity.value > 0.5
            and after_60_steps.value < 0.5 * neighbours.value
            and similarity_elbo.value < 0.05
        ),
        shows=("neighbours", "similarity", "similarity_elbo"),
    ),
    "P5": Claim(
        "The features are useful.",
        "linear probe on sampled z of `none`: 3 points above the means of a random encoder and above as many principal "
        "components, intervals above 0",
        lambda above_random, above_components, **_: (
            min(above_random.value, above_components.value) >= 0.03 and min(above_random.low, above_components.low) > 0
        ),
        shows=("above_random", "above_components"),
    ),
    "P6": Claim(
        "A sample-based regulariser (MMD) has both: z is used, and the prior can be decoded.",
        "shuffle gap at least half of `none`'s; kernel distance of prior samples at most 1.2 times that of z ~ q(z); "
        "energy distance of q(z) to p(z) at most a tenth of `none`'s",
        lambda shuffle_gap, shuffle_gap_none, prior, q_z, energy, energy_none, **_: (
            shuffle_gap.value >= 0.5 * shuffle_gap_none.value
            and prior.value <= 1.2 * q_z.value
            and energy.value <= 0.1 * energy_none.value
        ),
        shows=("shuffle_gap", "shuffle_gap_none"),
    ),
    "P7": Claim(
        "The incremental sampler is exact.",
        "float64: the same images as one full pass per pixel; float32: parameters within 1e-5 of the network's, "
        "relative above 1",
        lambda pixels_that_differ, worst_parameter: pixels_that_differ.value == 0 and worst_parameter.value <= 1e-5,
        exact=True,
        shows=("pixels_that_differ",),
    ),
    "D1": Claim(
        "The generator complex, the inference simple: with a linear encoder z is used and useful as well.",
        "shuffle gap at least half of the convolutional encoder's; linear probe at most 3 points below",
        lambda shuffle_gap, shuffle_gap_conv, probe_gain, **_: (
            shuffle_gap.value >= 0.5 * shuffle_gap_conv.value and probe_gain.value >= -0.03
        ),
        shows=("shuffle_gap", "shuffle_gap_conv"),
    ),
    "G1": Claim(
        "The glasses: for a given feature, here the class, the needed p(x|z) is complex.",
        "the best factored Gaussian of each class loses more than 1,000 nats an image to a PixelCNN++ for q(x|class), "
        "interval above that, and more than ten times what knowing the class gains",
        lambda nats_lost, gain_by_class, **_: nats_lost.low > 1000 and nats_lost.value > 10 * abs(gain_by_class.value),
        shows=("nats_lost",),
    ),
}


# Measuring


def measure(run: Run, images: Images, trained: Mapping[str, train.Trained]) -> dict[str, np.ndarray]:
    """All that the figures and claims need, written to the run's `arrays.npz` and returned.

    With recorded weights, the arrays that were recorded with them. Estimates are rows of value, low, high.
    """
    if run.weights == "recorded":
        return load_recorded_arrays(run)
    models = {name: trained[name].model for name in VARIANTS}
    describe = pixelvae_samples.extractors(run, images)
    return save_arrays(
        run,
        levels=images.dataset.levels,
        **pixelvae_samples.histories(trained),
        **pixelvae_samples.terms(run, images, models),
        **pixelvae_samples.codes(run, images, models),
        **pixelvae_samples.probes(run, images, models),
        **pixelvae_samples.samples(run, images, models, describe),
        **pixelvae_samples.glasses(run, images, models["label"]),
        **pixelvae_samples.exactness(run, images, models["none"]),
    )


# Judging


def conclude(
    run: Run, arrays: Mapping[str, np.ndarray], trained: Mapping[str, train.Trained], images: Images
) -> Verdicts:
    """Judge P1 to P7, D1 and G1, and write `metrics.json`, `run.json` and the weights of `none`."""
    if run.weights == "train":
        save_weights(run, trained["none"].model.state_dict())
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
    of = {name: k for k, name in enumerate(VARIANTS)}
    kernel = {name: Estimate.from_row(row) for name, row in zip(SETS, arrays["kernel_classifier"], strict=True)}
    right = dict(zip(PROBES, arrays["probe_right"], strict=True))
    energy = {name: Estimate.from_row(row) for name, row in zip(CODED, arrays["energy"][:-1], strict=True)}
    bits = arrays["bits_per_dim"].astype(np.float64)
    in_nats = math.log(2) * arrays["chain_none"][0].size
    kl, gap = ({name: arrays[term][k] for name, k in of.items()} for term in ("kl", "shuffle_gap"))

    def mean(values: np.ndarray, unit: str = "nats") -> Estimate:
        return intervals.mean_interval(values.astype(np.float64), unit)

    lost = arrays["gaussian_nats"] - in_nats * bits[of["label"]]
    gained = in_nats * (bits[of["unconditional"]] - bits[of["label"]])
    scale = Estimate.from_row(arrays["decodes_none_pixels"])
    similarity = {
        model: intervals.ratio(Estimate.from_row(arrays[f"similarity_{model}_pixels"][LAGS.index(1)]), scale)
        for model in ("none", "elbo")
    }
    return {
        "P1": {
            "kl": mean(kl["elbo"]),
            "shuffle_gap": mean(gap["elbo"]),
            "kl_scratch": mean(kl["elbo-scratch"]),
            "shuffle_gap_scratch": mean(gap["elbo-scratch"]),
            "negative_elbo": mean(bits[of["elbo"]] + kl["elbo"] / in_nats, "bits/dim"),
            "unconditional": mean(bits[of["unconditional"]], "bits/dim"),
        },
        "P2": {
            "shuffle_gap": mean(gap["none"]),
            "shuffle_gap_scratch": mean(gap["none-scratch"]),
            "kl": mean(kl["none"]),
        },
        "P3": {
            "prior": kernel["none: prior"],
            "chain": kernel["none: chain"],
            "q_z": kernel["none: q(z)"],
            "noise_to_data": Estimate.from_row(arrays["noise_to_data_classifier"]),
            "fitted_gaussian": kernel["none: Gaussian"],
            "fitted_mixture": kernel["none: mixture"],
            "held_out_photographs": kernel["held-out photographs"],
        },
        "P4": {
            "neighbours": Estimate.from_row(arrays["similarity_none_pixels"][LAGS.index(1)]),
            "two_decodes": scale,
            "similarity": similarity["none"],
            "after_60_steps": Estimate.from_row(arrays["similarity_none_pixels"][LAGS.index(60)]),
            "similarity_elbo": similarity["elbo"],
        },
        "P5": {
            "above_random": intervals.accuracy_gain(right["none"], right["random encoder"]),
            "above_components": intervals.accuracy_gain(right["none"], right["components"]),
            **{
                name.replace("-", "_"): Estimate(float(right[name].mean()))
                for name in ("none", "elbo", "mmd", "pixels")
            },
        },
        "P6": {
            "shuffle_gap": mean(gap["mmd"]),
            "shuffle_gap_none": mean(gap["none"]),
            "prior": kernel["mmd: prior"],
            "q_z": kernel["mmd: q(z)"],
            "energy": energy["mmd"],
            "energy_none": energy["none"],
        },
        "P7": {
            "pixels_that_differ": Estimate(float(arrays["pixels_that_differ"])),
            "worst_parameter": Estimate(float(arrays["worst_parameter"])),
        },
        "D1": {
            "shuffle_gap": mean(gap["linear"]),
            "shuffle_gap_conv": mean(gap["none"]),
            "probe_gain": intervals.accuracy_gain(right["linear"], right["none"]),
        },
        "G1": {
            "nats_lost": mean(lost),
            "gain_by_class": mean(gained),
            "gaussian": mean(arrays["gaussian_nats"] / in_nats, "bits/dim"),
            "pixelcnn": mean(bits[of["label"]], "bits/dim"),
        },
    }


def summary(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Further numbers of the run, by model, set or probe."""
    models = {
        name: {term: float(arrays[term][k].mean()) for term in ("bits_per_dim", "kl", "shuffle_gap")}
        for k, name in enumerate(VARIANTS)
    }
    for k, name in enumerate(CODED):
        models[name] |= {term: float(arrays[term][k]) for term in ("information", "mean_spread", "deviation")} | {
            "energy_distance": arrays["energy"][k].tolist()
        }
    return {
        "models": models,
        "information_ceiling": float(arrays["information_ceiling"]),
        "energy_distance_of_the_prior_to_itself": arrays["energy"][-1].tolist(),
        "kernel_distance": {
            kind: dict(zip(SETS, arrays[f"kernel_{kind}"].tolist(), strict=True)) for kind in ("classifier", "random")
        },
        "noise_to_data": {kind: arrays[f"noise_to_data_{kind}"].tolist() for kind in ("classifier", "random")},
        "probe": dict(zip(PROBES, arrays["probe_right"].mean(1).tolist(), strict=True)),
        "similarity_by_lag": {
            f"{model}, {view}": dict(zip(map(str, LAGS), arrays[f"similarity_{model}_{view}"].tolist(), strict=True))
            for model in ("none", "elbo")
            for view in ("pixels", "classifier")
        },
        "two_decodes": {
            f"{model}, {view}": arrays[f"decodes_{model}_{view}"].tolist()
            for model in ("none", "elbo")
            for view in ("pixels", "classifier")
        },
    }


def table(arrays: Mapping[str, np.ndarray]) -> Any:
    """The terms of each model on held-out images, as a table (a pandas data frame).

    `reconstruction` -E log p(x|z) in bits/dim, no bound on -log p(x) where z is learned without the KL; `bound`, with
    the KL added (empty for the class, which is no draw from a prior); in nats an image `KL`, `shuffle gap`, `I_q`.
    """
    import pandas

    in_bits = math.log(2) * arrays["chain_none"][0].size
    rows = {}
    for name, terms in summary(arrays)["models"].items():
        bound = math.nan if name == "label" else terms["bits_per_dim"] + np.nan_to_num(terms["kl"]) / in_bits
        rows[name] = {
            "reconstruction": terms["bits_per_dim"],
            "bound": bound,
            "KL": terms["kl"],
            "shuffle gap": terms["shuffle_gap"],
            f"I_q (at most {arrays['information_ceiling']:.1f})": terms.get("information", math.nan),
            "energy distance": terms.get("energy_distance", [math.nan])[0],
        }
    return pandas.DataFrame(rows).T.round(3)


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
    datasets=("digits", "cifar10"),
)
start = EXPERIMENT.start
