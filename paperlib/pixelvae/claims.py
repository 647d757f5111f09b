"""What notebook 04 claims: statements, criteria, and the numbers that decide them, from the arrays alone."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from paperlib.pixelvae.measurements import CHAINED, LAGS, PROBES, SETS
from paperlib.pixelvae.training import CODED, VARIANTS
from paperlib.runs.claims import Claim
from paperlib.runs.estimate import Estimate
from paperlib.stats import intervals

Arrays = Mapping[str, np.ndarray]
Quantities = dict[str, Estimate]

CLAIMS = {
    "P1": Claim(
        "With an autoregressive decoder the ELBO leaves z unused.",
        "KL below 0.5 nat and shuffle gap below 0.1 nat per image, from scratch and after pretraining",
        lambda kl, shuffle_gap, kl_scratch, shuffle_gap_scratch, **_: (
            max(kl.value, kl_scratch.value) < 0.5 and max(shuffle_gap.value, shuffle_gap_scratch.value) < 0.1
        ),
        shows=("kl", "shuffle_gap"),
    ),
    "P2": Claim(
        "Without the KL z is used, once pretraining has prevented posterior collapse.",
        "shuffle gap above 5 nats per image, interval above 0",
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
        "the best factored Gaussian of each class loses more than 1,000 nats per image to a PixelCNN++ for q(x|class), "
        "interval above that, and more than ten times what knowing the class gains",
        lambda nats_lost, gain_by_class, **_: nats_lost.low > 1000 and nats_lost.value > 10 * abs(gain_by_class.value),
        shows=("nats_lost",),
    ),
}


# The numbers that decide them


def quantities(arrays: Arrays) -> dict[str, Quantities]:
    """What each claim is judged by."""
    mean, kernel = partial(_mean, arrays), partial(_kernel, arrays)
    right = dict(zip(PROBES, arrays["probe_right"], strict=True))
    bound = _row(arrays, "bits_per_dim", "elbo") + _row(arrays, "kl", "elbo") / _nats_per_bit(arrays)
    return {
        "P1": {
            "kl": mean("kl", "elbo"),
            "shuffle_gap": mean("shuffle_gap", "elbo"),
            "kl_scratch": mean("kl", "elbo-scratch"),
            "shuffle_gap_scratch": mean("shuffle_gap", "elbo-scratch"),
            "negative_elbo": intervals.mean_interval(bound, "bits/dim"),
            "unconditional": mean("bits_per_dim", "unconditional", "bits/dim"),
        },
        "P2": {
            "shuffle_gap": mean("shuffle_gap", "none"),
            "shuffle_gap_scratch": mean("shuffle_gap", "none-scratch"),
            "kl": mean("kl", "none"),
        },
        "P3": {
            "prior": kernel("none: prior"),
            "chain": kernel("none: chain"),
            "q_z": kernel("none: q(z)"),
            "noise_to_data": Estimate.from_row(arrays["noise_to_data_classifier"]),
            "fitted_gaussian": kernel("none: Gaussian"),
            "fitted_mixture": kernel("none: mixture"),
            "held_out_photographs": kernel("held-out photographs"),
        },
        "P4": _gradual_chain(arrays),
        "P5": {
            "above_random": intervals.accuracy_gain(right["none"], right["random encoder"]),
            "above_components": intervals.accuracy_gain(right["none"], right["components"]),
            **{name: Estimate(float(right[name].mean())) for name in ("none", "elbo", "mmd", "pixels")},
        },
        "P6": {
            "shuffle_gap": mean("shuffle_gap", "mmd"),
            "shuffle_gap_none": mean("shuffle_gap", "none"),
            "prior": kernel("mmd: prior"),
            "q_z": kernel("mmd: q(z)"),
            "energy": Estimate.from_row(arrays["energy"][CODED.index("mmd")]),
            "energy_none": Estimate.from_row(arrays["energy"][CODED.index("none")]),
        },
        "P7": {name: Estimate(float(arrays[name])) for name in ("pixels_that_differ", "worst_parameter")},
        "D1": {
            "shuffle_gap": mean("shuffle_gap", "linear"),
            "shuffle_gap_conv": mean("shuffle_gap", "none"),
            "probe_gain": intervals.accuracy_gain(right["linear"], right["none"]),
        },
        "G1": _glasses(arrays),
    }


def _gradual_chain(arrays: Arrays) -> Quantities:
    """Both similarities are on the scale of `none`: 1 is what two decodes of one z have."""
    none, elbo = (arrays[f"similarity_{model}_pixels"] for model in ("none", "elbo"))
    neighbours, scale = Estimate.from_row(none[LAGS.index(1)]), Estimate.from_row(arrays["decodes_none_pixels"])
    return {
        "neighbours": neighbours,
        "two_decodes": scale,
        "similarity": intervals.ratio(neighbours, scale),
        "after_60_steps": Estimate.from_row(none[LAGS.index(60)]),
        "similarity_elbo": intervals.ratio(Estimate.from_row(elbo[LAGS.index(1)]), scale),
    }


def _glasses(arrays: Arrays) -> Quantities:
    scale, gaussian = _nats_per_bit(arrays), arrays["gaussian_nats"]
    pixelcnn, unconditional = (_row(arrays, "bits_per_dim", model) for model in ("label", "unconditional"))
    return {
        "nats_lost": intervals.mean_interval(gaussian - scale * pixelcnn, "nats"),
        "gain_by_class": intervals.mean_interval(scale * (unconditional - pixelcnn), "nats"),
        "gaussian": intervals.mean_interval(gaussian / scale, "bits/dim"),
        "pixelcnn": intervals.mean_interval(pixelcnn, "bits/dim"),
    }


def _row(arrays: Arrays, term: str, model: str) -> np.ndarray:
    """A term of one model on each held-out image, (n,)."""
    return arrays[term][list(VARIANTS).index(model)].astype(np.float64)


def _mean(arrays: Arrays, term: str, model: str, unit: str = "nats") -> Estimate:
    return intervals.mean_interval(_row(arrays, term, model), unit)


def _nats_per_bit(arrays: Arrays) -> float:
    """Nats per image of one bit per dimension."""
    return math.log(2) * arrays["chain_none"][0].size


def _kernel(arrays: Arrays, name: str) -> Estimate:
    return Estimate.from_row(arrays["kernel_classifier"][SETS.index(name)])


# Further numbers


def summary(arrays: Arrays) -> dict[str, Any]:
    """Further numbers of the run, by model, set or probe."""
    views = [(f"{model}_{view}", f"{model}, {view}") for model in CHAINED for view in ("pixels", "classifier")]
    kinds = "classifier", "random"
    return {
        "models": _terms(arrays),
        "information_ceiling": float(arrays["information_ceiling"]),
        "energy_distance_of_the_prior_to_itself": arrays["energy"][-1].tolist(),
        "kernel_distance": {kind: dict(zip(SETS, arrays[f"kernel_{kind}"].tolist(), strict=True)) for kind in kinds},
        "noise_to_data": {kind: arrays[f"noise_to_data_{kind}"].tolist() for kind in kinds},
        "probe": dict(zip(PROBES, arrays["probe_right"].mean(1).tolist(), strict=True)),
        "similarity_by_lag": {
            words: dict(zip(map(str, LAGS), arrays[f"similarity_{name}"].tolist(), strict=True))
            for name, words in views
        },
        "two_decodes": {words: arrays[f"decodes_{name}"].tolist() for name, words in views},
    }


def _terms(arrays: Arrays) -> dict[str, dict[str, Any]]:
    """Means over held-out images by model, and what its code tells where it learns one."""
    models: dict[str, dict[str, Any]] = {
        name: {term: float(arrays[term][k].mean()) for term in ("bits_per_dim", "kl", "shuffle_gap")}
        for k, name in enumerate(VARIANTS)
    }
    for k, name in enumerate(CODED):
        models[name] |= {term: float(arrays[term][k]) for term in ("information", "mean_spread", "std")}
        models[name]["energy_distance"] = arrays["energy"][k].tolist()
    return models


def table(arrays: Arrays) -> Any:
    """A pandas data frame of each model's terms on held-out images: `reconstruction` -E log p(x|z) in bits/dim;
    `bound`, with the KL added (empty for the class, no draw from a prior); in nats `KL`, `shuffle gap`, `I_q`."""
    import pandas

    terms = pandas.DataFrame(_terms(arrays)).T
    return pandas.DataFrame(
        {
            "reconstruction": terms["bits_per_dim"],
            "bound": (terms["bits_per_dim"] + terms["kl"].fillna(0) / _nats_per_bit(arrays)).drop("label"),
            "KL": terms["kl"],
            "shuffle gap": terms["shuffle_gap"],
            f"I_q (at most {arrays['information_ceiling']:.1f})": terms["information"],
            "energy distance": terms["energy_distance"].str[0],
        },
        index=terms.index,
        dtype=float,
    ).round(3)
