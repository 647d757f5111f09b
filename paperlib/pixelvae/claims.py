"""What notebook 04 claims: statements, criteria, and the numbers that decide them, from the arrays alone."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from paperlib.pixelvae.glasses import FEATURES
from paperlib.pixelvae.measurements import CODED, LAGS, MEASURED, SETS
from paperlib.pixelvae.training import ABLATION, VARIANTS
from paperlib.runs.claims import Claim
from paperlib.runs.estimate import Estimate
from paperlib.stats import intervals

Arrays = Mapping[str, np.ndarray]
Quantities = dict[str, Estimate]

CLAIMS = {
    "P2": Claim(
        "Without the KL z is used.",
        "code gain, the nats per held-out image that the decoder of `none`, trained on, wins with z over the same "
        "decoder trained on as long without it, above 30, interval above 0; two decodes of one z agree: pixel "
        "correlation 0.5 or more",
        lambda code_gain, two_decodes, **_: code_gain.value > 30 and code_gain.low > 0 and two_decodes.value >= 0.5,
        reading="The decoder wins {code_gain} per image with z; two decodes of one z correlate {two_decodes}.",
    ),
    "P3": Claim(
        "Then decoding the prior fails, and the Markov chain works.",
        "squared kernel distance to photographs on a classifier's features: N(0, I) above the chain, interval of the "
        "difference above 0; between chains from noise and from data, at steps 40 to 60, not shown (by its interval) "
        "to exceed a tenth of the chain's",
        lambda prior_minus_chain, chain, noise_to_data, **_: (
            prior_minus_chain.low > 0 and noise_to_data.low <= 0.1 * chain.value
        ),
        reading=(
            "Kernel distance to photographs: {prior} from N(0, I), {chain} from the chain; the difference is "
            "{prior_minus_chain}."
        ),
    ),
    "P4": Claim(
        "The chain moves gradually; under the ELBO it jumps.",
        "correlation of neighbouring states, the data mean taken off: without the KL at least 0.6, and at least 0.3 "
        "above the ELBO's; at lag 20 at most half of that at lag 1",
        lambda neighbours, neighbours_elbo, lag_20, **_: (
            neighbours.value >= 0.6
            and neighbours.value - neighbours_elbo.value >= 0.3
            and lag_20.value <= 0.5 * neighbours.value
        ),
        reading=(
            "Neighbouring states correlate {neighbours} without the KL and {neighbours_elbo} under the ELBO; {lag_20}"
            " at lag 20."
        ),
    ),
    "G1": Claim(
        "The glasses: for a given feature the needed p(x|z) is complex.",
        "for each of class, brightness and upper half of the image, a factored Gaussian fitted to it falls short of "
        "q(x|feature) by more than 1,000 nats per image, interval above that",
        lambda **lost: min(loss.low for loss in lost.values()) > 1000,
        reading=(
            "A factored Gaussian falls short by {class} per image given the class, {brightness} given the brightness,"
            " {upper_half} given the upper half."
        ),
    ),
}


# The numbers that decide them


def quantities(arrays: Arrays) -> dict[str, Quantities]:
    """What each claim is judged by."""
    mean, kernel = partial(_mean, arrays), partial(_kernel, arrays)
    correlation = {model: arrays[f"correlation_{model}"] for model in CODED}
    lost = arrays["gaussian_nats"] - arrays["pixelcnn_nats"]
    return {
        "P2": {
            "code_gain": intervals.mean_interval(_gain(arrays, "trained-on", "without-code"), "nats"),
            "two_decodes": Estimate.from_row(arrays["decodes_none"]),
            "rate": Estimate(_rate(arrays, "none"), unit="nats"),
            "over_unconditional": intervals.mean_interval(_gain(arrays, "none"), "nats"),
            "over_unconditional_elbo": intervals.mean_interval(_gain(arrays, "elbo"), "nats"),
            "kl_elbo": mean("kl", "elbo"),
            "unconditional": mean("bits_per_dim", "unconditional", "bits/dim"),
        },
        "P3": {
            "prior": kernel("none: prior"),
            "chain": kernel("none: chain"),
            "prior_minus_chain": Estimate.from_row(arrays["prior_minus_chain_classifier"]),
            "noise_to_data": Estimate.from_row(arrays["noise_to_data_classifier"]),
            "q_z": kernel("none: q(z)"),
            "fitted_gaussian": kernel("none: Gaussian"),
            "fitted_mixture": kernel("none: mixture"),
            "unconditional": kernel("unconditional"),
            "held_out_photographs": kernel("held-out photographs"),
        },
        "P4": {
            "neighbours": Estimate.from_row(correlation["none"][LAGS.index(1)]),
            "lag_5": Estimate.from_row(correlation["none"][LAGS.index(5)]),
            "lag_20": Estimate.from_row(correlation["none"][LAGS.index(20)]),
            "neighbours_elbo": Estimate.from_row(correlation["elbo"][LAGS.index(1)]),
        },
        "G1": {
            name.replace(" ", "_"): intervals.mean_interval(row, "nats")
            for name, row in zip(FEATURES, lost, strict=True)
        },
    }


def _row(arrays: Arrays, term: str, model: str) -> np.ndarray:
    """A term of one model on each held-out image, (n,)."""
    return arrays[term][MEASURED.index(model)].astype(np.float64)


def _mean(arrays: Arrays, term: str, model: str, unit: str = "nats") -> Estimate:
    return intervals.mean_interval(_row(arrays, term, model), unit)


def _gain(arrays: Arrays, model: str, control: str = "unconditional") -> np.ndarray:
    """Nats by which `model` is better than `control`, a model without a code, on each held-out image, (n,)."""
    bits = _row(arrays, "bits_per_dim", control) - _row(arrays, "bits_per_dim", model)
    return _nats_per_bit(arrays) * bits


def _rate(arrays: Arrays, model: str) -> float:
    return float(arrays["rate"][CODED.index(model)])


def _nats_per_bit(arrays: Arrays) -> float:
    """Nats per image of one bit per dimension."""
    return math.log(2) * arrays["chain_none"][0].size


def _kernel(arrays: Arrays, name: str) -> Estimate:
    return Estimate.from_row(arrays["kernel_classifier"][SETS.index(name)])


# Further numbers


def summary(arrays: Arrays) -> dict[str, Any]:
    """Further numbers of the run, by model, set or point of the sweep."""
    kinds, views = ("classifier", "random"), ("", "_classifier")
    return {
        "models": {
            name: {term: float(arrays[term][k].mean()) for term in ("bits_per_dim", "kl")}
            for k, name in enumerate(MEASURED)
        },
        "codes": {
            name: {term: float(arrays[term][k]) for term in ("rate", "mean_spread", "std")}
            for k, name in enumerate(CODED)
        },
        "kernel_distance": {kind: dict(zip(SETS, arrays[f"kernel_{kind}"].tolist(), strict=True)) for kind in kinds},
        "prior_minus_chain": {kind: arrays[f"prior_minus_chain_{kind}"].tolist() for kind in kinds},
        "noise_to_data": {kind: arrays[f"noise_to_data_{kind}"].tolist() for kind in kinds},
        "correlation_by_lag": {
            f"{model}{view}": dict(zip(map(str, LAGS), arrays[f"correlation_{model}{view}"].tolist(), strict=True))
            for model in CODED
            for view in views
        },
        "two_decodes": {
            f"{model}{view}": arrays[f"decodes_{model}{view}"].tolist() for model in CODED for view in views
        },
        "glasses": {
            name: {kind: float(arrays[f"{kind}_nats"][k].mean()) for kind in ("gaussian", "pixelcnn")}
            for k, name in enumerate(FEATURES)
        },
        "sweep": {
            key: arrays[f"sweep_{key}"].tolist()
            for key in ("dims", "stds", "rate", "gain", "decodes", "correlation", "time", "drift")
        },
    }


def table(arrays: Arrays) -> Any:
    """A pandas data frame of each model's terms on held-out images.

    In bits/dim `reconstruction`, -E log p(x|z), and two bounds of -log p(x): with the KL to N(0, I) added, and with
    `rate`, the KL to the Gaussian fitted to q(z), which is measured of CODED. In nats per image `KL`, `rate`, and
    `over control`: "without-code" for the models of ABLATION, else "unconditional".
    """
    import pandas

    scale, rows = _nats_per_bit(arrays), {}
    for name, variant in (VARIANTS | ABLATION).items():
        bits = _row(arrays, "bits_per_dim", name).mean()
        kl = _row(arrays, "kl", name).mean() if variant.coded else 0.0
        cost = _rate(arrays, name) if name in CODED else math.nan if variant.coded else 0.0
        rows[name] = {
            "reconstruction": bits,
            "bound, N(0, I)": bits + kl / scale,
            "bound, fitted Gaussian": bits + cost / scale,
            "over control": _gain(arrays, name, "without-code" if name in ABLATION else "unconditional").mean(),
            "KL": kl,
            "rate": cost,
        }
    return pandas.DataFrame(rows).T.round(3)


def sweep_table(arrays: Arrays) -> Any:
    """A pandas data frame of the sweep, a row for each code: what it tells, and what its chain does."""
    import pandas

    values = {key: arrays[f"sweep_{key}"] for key in ("dims", "stds", "rate", "gain", "decodes", "time", "drift")}
    lags = arrays["sweep_correlation"][..., 0].T
    return pandas.DataFrame(
        {
            "dimensions": values["dims"],
            "least std": values["stds"],
            "rate": values["rate"].round(1),
            "code gain": values["gain"][:, 0].round(1),
            "two decodes": values["decodes"][:, 0].round(2),
            **{f"lag {lag}": row.round(2) for lag, row in zip(LAGS, lags, strict=True) if lag in (1, 5, 20)},
            "autocorrelation time": values["time"].round(1),
            "kernel distance": values["drift"][:, 0].round(2),
        }
    )
