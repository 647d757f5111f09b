"""What notebook 03 claims: statements, criteria, and the numbers that decide them, from the arrays alone."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from paperlib.runs.claims import Claim
from paperlib.runs.estimate import Estimate, rows
from paperlib.sequential.measurements import KINDS, MIXTURES, SETS
from paperlib.stats import intervals

PRIORS = ("N(0, I)", "fitted Gaussian", *(f"mixture of {count}" for count in MIXTURES))


def _equal_rates(rate: Estimate, rate_of_one_step: Estimate, **_: Estimate) -> bool:
    return abs(rate_of_one_step.value / rate.value - 1) <= 0.1


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
        reading=(
            "Held-out error falls by at least {least_fall:%} at every step; trained without a code, a step loses at "
            "least {least_lost_without:%} of its gain."
        ),
    ),
    "S2": Claim(
        "Samples sharpen along the chain, beyond a VAE of one step.",
        "edge width, and the distance of log power spectra to held-out photographs, fall from the first to the last "
        "step, intervals apart, each with a rank correlation with the step of -0.8 or less, and end below the one-step "
        "baseline's, intervals apart; the baseline's rate within 10 % of the chain's",
        lambda trend, edge_trend, **ends: (
            all(
                ends[f"{name}last"].high < min(ends[f"{name}first"].low, ends[f"{name}one_step"].low)
                for name in ("", "edge_")
            )
            and max(trend.value, edge_trend.value) <= -0.8
        ),
        premise=_equal_rates,
        reading=(
            "Edges narrow from {edge_first:value} to {edge_last}, with one step to {edge_one_step}; the distance of "
            "spectra falls from {first:value} to {last}, with one step to {one_step}."
        ),
    ),
    "S3": Claim(
        "Infusion training is the special case whose code is a subset of the pixels, and whose KL is left out.",
        "for the same masks and draws, in float64, the two losses agree to 1e-12 of their size",
        lambda residual, **_: residual.value <= 1e-12,
        exact=True,
        reading="The two losses differ by {residual} of their size.",
    ),
    "S4": Claim(
        "The chain's samples are nearer to photographs than those of a one-step VAE.",
        "each drawn from its own fitted prior: kernel distance of sequential over one-step at most 0.8, interval below "
        "1, on features of a random network and on thumbnails, where the baseline's own distance is above 0, interval "
        "included; the baseline's rate within 10 % of the chain's",
        lambda ratio_random, ratio_thumbnails, one_step, one_step_thumbnails, **_: (
            max(ratio_random.value, ratio_thumbnails.value) <= 0.8
            and max(ratio_random.high, ratio_thumbnails.high) < 1
            and min(one_step.low, one_step_thumbnails.low) > 0
        ),
        premise=_equal_rates,
        reading=(
            "Kernel distance to photographs on random features: {sequential} of the chain's samples, {one_step} of the "
            "baseline's; on thumbnails {sequential_thumbnails} and {one_step_thumbnails}."
        ),
    ),
}


def quantities(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, Estimate]]:
    """What each claim is judged by."""
    from scipy.stats import spearmanr

    steps = per_step(arrays)

    def along(name: str) -> dict[str, Estimate]:
        """The first and the last step, the one-step baseline, and the rank correlation with the step."""
        rows = arrays[f"{name}_sequential"]
        trend = Estimate(float(spearmanr(np.arange(len(rows)), rows[:, 0]).statistic))
        ends = {"first": rows[0], "last": rows[-1], "one_step": arrays[f"{name}_one_step"]}
        return {key: Estimate.from_row(row) for key, row in ends.items()} | {"trend": trend}

    general, plain = arrays["infusion_losses"]
    rate, rate_of_one_step = (
        intervals.mean_interval(arrays[f"{name}_kl"].sum(1), "nats") for name in ("sequential", "one_step")
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
            **{f"edge_{key}": value for key, value in along("edge").items()},
            "edge_photographs": Estimate.from_row(arrays["edge_photographs"], "pixels"),
            **along("spectral"),
            "noisy_first": Estimate.from_row(arrays["spectral_noise_first"]),
            "noisy_one_step": Estimate.from_row(arrays["spectral_noise_one_step"]),
            "infusion": Estimate.from_row(arrays["spectral_infusion"]),
            "training_photographs": Estimate.from_row(arrays["spectral_training"]),
            "rate": rate,
            "rate_of_one_step": rate_of_one_step,
        },
        "S3": {"residual": Estimate(float(abs(general - plain) / abs(plain)))},
        "S4": {
            **{f"ratio_{kind}": Estimate.from_row(arrays[f"ratio_{kind}"]) for kind in KINDS},
            **{f"ratio_standard_{kind}": Estimate.from_row(arrays[f"ratio_standard_{kind}"]) for kind in KINDS},
            "sequential": Estimate.from_row(kernel["random"]["sequential"]),
            "one_step": Estimate.from_row(kernel["random"]["one_step"]),
            "infusion": Estimate.from_row(kernel["random"]["infusion"]),
            "training_photographs": Estimate.from_row(kernel["random"]["training photographs"]),
            "sequential_thumbnails": Estimate.from_row(kernel["thumbnails"]["sequential"]),
            "one_step_thumbnails": Estimate.from_row(kernel["thumbnails"]["one_step"]),
            "rate": rate,
            "rate_of_one_step": rate_of_one_step,
        },
    }


def _least(steps: list[Estimate], unit: str = "") -> Estimate:
    """The least value, the least lower end and the least upper end, each over all steps."""
    return Estimate.from_row(rows(steps).min(0), unit)


def per_step(arrays: Mapping[str, np.ndarray]) -> dict[str, list[Estimate]]:
    """What S1 says of each step t, means over held-out images with intervals of paired differences.

    `fall` of the error, relative to that before (of the first step, to the mean training image's); `kl` in nats; the
    share of that gain that is lost, `lost` with another image's code, `lost_without`, from the second step on, by the
    control, the same step trained without a code. Where the control is worse than no step, no step is compared.
    As an image is swapped with the next one, the interval of `lost` is over blocks of neighbours.
    """
    before = np.column_stack([arrays["mean_error"], arrays["sequential_error"][:, :-1]])
    error, swapped, no_latent = arrays["sequential_error"], arrays["swapped_error"], arrays["no_latent_error"]
    steps = range(error.shape[1])
    gain = before - error
    control = [min(no_latent[:, t - 1], before[:, t], key=np.mean) for t in steps[1:]]
    return {
        "fall": [intervals.ratio_of_means(gain[:, t], before[:, t]) for t in steps],
        "kl": [intervals.mean_interval(arrays["sequential_kl"][:, t]) for t in steps],
        "lost": [
            intervals.ratio_of_means(_in_blocks(swapped[:, t] - error[:, t]), _in_blocks(gain[:, t])) for t in steps
        ],
        "lost_without": [intervals.ratio_of_means(control[t - 1] - error[:, t], gain[:, t]) for t in steps[1:]],
    }


def _in_blocks(values: np.ndarray) -> np.ndarray:
    """Sums over blocks of eight neighbours or a few more, (n,) to (n // 8,)."""
    return np.array([block.sum() for block in np.array_split(values, len(values) // 8)])


def summary(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Further numbers of the run, by model, step or set."""
    dims = float(arrays["dims"])
    models = {}
    for name in ("sequential", "one_step", "infusion"):
        models[name] = {
            "error": arrays[f"{name}_error"].mean(0).tolist(),
            "kl": arrays[f"{name}_kl"].mean(0).tolist(),
            "sigma": arrays[f"sigma_{name}"].tolist(),
            "train_steps": float(arrays[f"{name}_history"][-1, 0]),
            "best_after": float(arrays[f"{name}_history"][arrays[f"{name}_history"][:, 2].argmin(), 0]),
        }
        if name != "infusion":
            bound = arrays[f"{name}_log_p"][:, -1] - arrays[f"{name}_kl"].sum(1)
            models[name] |= {"rate": float(arrays[f"{name}_kl"].sum(1).mean()), "bound": float(bound.mean())}
            # Grey levels lie 2 / (levels - 1) apart in [-1, 1].
            bits = -bound.mean() / dims + np.log((float(arrays["levels"]) - 1) / 2)
            models[name]["bits_per_dim_of_levels"] = float(bits / np.log(2))
    nearest = {name: float(np.median(row)) for name, row in arrays.items() if name.startswith("nearest_")}
    models["one_step"]["kl_weight"] = float(arrays["kl_weight_one_step"])
    return {
        "models": models,
        "control_over_no_step": (
            arrays["no_latent_error"].mean(0) / arrays["sequential_error"][:, :-1].mean(0)
        ).tolist(),
        "steps": {name: [one.row for one in of_steps] for name, of_steps in per_step(arrays).items()},
        **{f"{name}_by_step": arrays[f"{name}_sequential"].tolist() for name in ("edge", "slope", "spectral")},
        "kl_by_step_and_rung": arrays["kl_by_rung"].tolist(),
        "prior_gap_by_step": arrays["prior_gap"].tolist(),
        "prior_gap_one_step": arrays["prior_gap_one_step"].tolist(),
        "prior_log_prob": dict(zip(PRIORS, arrays["prior_log_prob"].tolist(), strict=True)),
        "kernel_distance": {kind: dict(zip(SETS, arrays[f"kernel_{kind}"].tolist(), strict=True)) for kind in KINDS},
        "median_distance_to_the_nearest_training_image": nearest,
    }


def table(arrays: Mapping[str, np.ndarray]) -> Any:
    """What each step of the chain adds, on held-out images, as a table (a pandas data frame).

    `error`: squared, per dimension of [-1, 1], and `in training` that of training images; `fall`, and the shares of it
    `lost by swap` and `lost without` a code, in per cent (`per_step`); `KL` in nats; `sigma_t`;
    of samples `edges`, their mean edge width in pixels, and `spectra`, distance of log power to photographs'.
    """
    import pandas

    steps = per_step(arrays)
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
            "edges": arrays["edge_sequential"][t, 0],
            "spectra": arrays["spectral_sequential"][t, 0],
        }
    table = pandas.DataFrame(rows).T.round(4)
    table.index.name = "step"
    return table


def codes_table(arrays: Mapping[str, np.ndarray]) -> Any:
    """What the codes of each step tell, in nats, as a table (a pandas data frame).

    The KL of each rung of the ladder, named by the side of the maps where it is read, finest first; `KL`, of all
    together to the prior; and KL(N(m, C) || p), what the prior's moments cost: of `N(0, I)`, and of the prior `used`.
    """
    import pandas

    rungs = arrays["kl_by_rung"]
    side = arrays["chain"].shape[2]
    table = pandas.DataFrame(rungs, columns=[f"at {side // 2 ** (k + 1)} pixels" for k in range(rungs.shape[1])])
    table["KL"] = arrays["sequential_kl"].mean(0)
    table[["gap of N(0, I)", "gap of the prior used"]] = arrays["prior_gap"]
    table.index = pandas.RangeIndex(1, len(table) + 1, name="step")
    return table.round(1)
