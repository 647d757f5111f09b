"""What notebook 03 claims: statements, criteria, and the numbers that decide them, from the arrays alone."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from paperlib.runs.claims import Claim
from paperlib.runs.estimate import Estimate, rows
from paperlib.sequential.measurements import KINDS, SETS
from paperlib.stats import intervals

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
        "distance of log power spectra to held-out photographs: last step below the first and below the one-step "
        "baseline's, intervals apart, and below what both reach with the white noise that suits them best; rank "
        "correlation with the step -0.8 or less; the baseline's rate within 10 % of the chain's",
        lambda first, last, one_step, noisy_first, noisy_one_step, trend, rate, rate_of_one_step, **_: (
            last.high < min(first.low, one_step.low, noisy_first.value, noisy_one_step.value)
            and trend.value <= -0.8
            and abs(rate_of_one_step.value / rate.value - 1) <= 0.1
        ),
        shows=("first", "last", "one_step"),
    ),
    "S3": Claim(
        "Infusion training is the special case whose code is a subset of the pixels, and whose KL is left out.",
        "for the same masks and draws, in float64, the two losses agree to 1e-12 of their size",
        lambda residual, **_: residual.value <= 1e-12,
        exact=True,
        shows=("residual",),
    ),
    "S4": Claim(
        "The chain's samples are nearer to photographs than those of a one-step VAE.",
        "kernel distance of sequential over one-step at most 0.8, interval below 1, on features of a random network, "
        "and not shown to be above 1 on thumbnails; the baseline's rate within 10 % of the chain's",
        lambda ratio_random, ratio_thumbnails, rate, rate_of_one_step, **_: (
            ratio_random.value <= 0.8
            and ratio_random.high < 1
            and ratio_thumbnails.low <= 1
            and abs(rate_of_one_step.value / rate.value - 1) <= 0.1
        ),
        shows=("ratio_random", "ratio_thumbnails"),
    ),
}


def quantities(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, Estimate]]:
    """What each claim is judged by."""
    from scipy.stats import spearmanr

    steps = per_step(arrays)
    chain, one_step = arrays["spectral_sequential"], Estimate.from_row(arrays["spectral_one_step"])
    trend = spearmanr(np.arange(len(chain)), chain[:, 0]).statistic
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
            "first": Estimate.from_row(chain[0]),
            "last": Estimate.from_row(chain[-1]),
            "one_step": one_step,
            "noisy_first": Estimate.from_row(arrays["spectral_noise_first"]),
            "noisy_one_step": Estimate.from_row(arrays["spectral_noise_one_step"]),
            "trend": Estimate(float(trend)),
            "infusion": Estimate.from_row(arrays["spectral_infusion"]),
            "training_photographs": Estimate.from_row(arrays["spectral_training"]),
            "rate": rate,
            "rate_of_one_step": rate_of_one_step,
        },
        "S3": {"residual": Estimate(float(abs(general - plain) / abs(plain)))},
        "S4": {
            **{f"ratio_{kind}": Estimate.from_row(arrays[f"ratio_{kind}"]) for kind in KINDS},
            "sequential": Estimate.from_row(kernel["random"]["sequential"]),
            "one_step": Estimate.from_row(kernel["random"]["one_step"]),
            "infusion": Estimate.from_row(kernel["random"]["infusion"]),
            "training_photographs": Estimate.from_row(kernel["random"]["training photographs"]),
            "rate": rate,
            "rate_of_one_step": rate_of_one_step,
        },
    }


def _least(steps: list[Estimate], unit: str = "") -> Estimate:
    """The least value, and the least ends of all intervals, whichever steps they are of."""
    return Estimate.from_row(rows(steps).min(0), unit)


def per_step(arrays: Mapping[str, np.ndarray]) -> dict[str, list[Estimate]]:
    """What S1 says of each step t, means over held-out images with intervals of paired differences.

    `fall` of the error, relative to that before (of the first step, to the mean training image's); `kl` in nats; the
    share of that gain that is lost, `lost` with another image's code, `lost_without`, from the second step on, by the
    control, the same step trained without a code. Where the control is worse than no step at all, that is it.
    """
    before = np.column_stack([arrays["mean_error"], arrays["sequential_error"][:, :-1]])
    error, swapped, no_latent = arrays["sequential_error"], arrays["swapped_error"], arrays["no_latent_error"]

    def relative(difference: np.ndarray, t: int) -> Estimate:
        scale = before[:, t].mean()
        return Estimate.from_row(np.array(intervals.mean_interval(difference).row) / scale)

    steps = range(error.shape[1])
    fall = [relative(before[:, t] - error[:, t], t) for t in steps]
    loss = [relative(swapped[:, t] - error[:, t], t) for t in steps]
    control = [min(no_latent[:, t - 1], before[:, t], key=np.mean) for t in steps[1:]]
    without = [relative(control[t - 1] - error[:, t], t) for t in steps[1:]]
    return {
        "fall": fall,
        "kl": [intervals.mean_interval(arrays["sequential_kl"][:, t]) for t in steps],
        "lost": [intervals.ratio(a, b) for a, b in zip(loss, fall, strict=True)],
        "lost_without": [intervals.ratio(a, b) for a, b in zip(without, fall[1:], strict=True)],
    }


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
        "spectral_distance": arrays["spectral_sequential"].tolist(),
        "kernel_distance": {kind: dict(zip(SETS, arrays[f"kernel_{kind}"].tolist(), strict=True)) for kind in KINDS},
        "median_distance_to_the_nearest_training_image": nearest,
    }


def table(arrays: Mapping[str, np.ndarray]) -> Any:
    """What each step of the chain adds, on held-out images, as a table (a pandas data frame).

    `error`: squared, per dimension of [-1, 1], and `in training` that of training images; `fall`, and the shares of it
    `lost by swap` and `lost without` a code, in per cent (`per_step`); `KL` in nats; `sigma_t`;
    `spectra`: distance of log power spectra of samples to photographs'.
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
            "spectra": arrays["spectral_sequential"][t, 0],
        }
    table = pandas.DataFrame(rows).T.round(4)
    table.index.name = "step"
    return table
