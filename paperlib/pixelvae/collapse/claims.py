"""What notebook 05 claims: statements, criteria, and the numbers that decide them, from the arrays alone."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from paperlib.pixelvae.collapse.measurements import PROBED
from paperlib.pixelvae.collapse.training import ROUTES
from paperlib.pixelvae.measurements import LAGS, SETS, WARM_UP
from paperlib.runs.claims import Claim
from paperlib.runs.estimate import Estimate
from paperlib.stats import intervals

Arrays = Mapping[str, np.ndarray]
Quantities = dict[str, Estimate]
FLAT = 0.5  # nats: the most that a flat KL changes in the last quarter of a training

CLAIMS = {
    "P1": Claim(
        "With an ever more powerful decoder the ELBO leaves z unused.",
        "from decoder to decoder, ordered by its own likelihood, KL and code gain fall; for the strongest the KL is "
        "below 3 nats and at most a tenth of the factored decoder's, and changes by at most 0.5 nats in the last "
        "quarter of the training",
        lambda kl, kl_factored, rise_of_kl, rise_of_gain, **_: (
            rise_of_kl.value < 0 and rise_of_gain.value < 0 and kl.value < 3 and kl.value <= 0.1 * kl_factored.value
        ),
        premise=lambda change, **_: change.value <= FLAT,
        reading=(
            "KL and code gain are {kl_factored} and {code_gain_factored} with the factored decoder, {kl} and "
            "{code_gain} with the strongest."
        ),
    ),
    "P1b": Claim(
        "The ELBO does not forbid z, it does not pay for it.",
        "the strongest decoder, started from `none` and trained on with the ELBO: KL at least twice that of the ELBO "
        "from scratch trained as long, and a bound that is less than 1 nat better, interval below that",
        lambda kl_pretrained, kl_scratch, bound_won, **_: (
            kl_pretrained.value >= 2 * kl_scratch.value and bound_won.high < 1
        ),
        reading=(
            "Started from `none`, the KL is {kl_pretrained}, where from scratch it is {kl_scratch}; the bound is "
            "better by {bound_won}."
        ),
    ),
    "P2m": Claim(
        "Without the KL z is used, with digits.",
        "code gain above 10 nats, interval above 0; two decodes of one z agree: pixel correlation 0.5 or more",
        lambda code_gain, two_decodes, **_: code_gain.value > 10 and code_gain.low > 0 and two_decodes.value >= 0.5,
        reading="The decoder wins {code_gain} per image with z; two decodes of one z correlate {two_decodes}.",
    ),
    "P3m": Claim(
        "Then decoding the prior fails, and the Markov chain works, with digits.",
        "kernel distance to held-out digits on a classifier's features: N(0, I) above the chain, interval of the "
        "difference above 0",
        lambda prior_minus_chain, **_: prior_minus_chain.low > 0,
        reading=(
            "Kernel distance to digits: {prior} from N(0, I), {chain} from the chain; the difference is "
            "{prior_minus_chain}."
        ),
    ),
    "P4m": Claim(
        "The chain moves gradually; under the ELBO it jumps, with digits.",
        "neighbours keep their class more often than under the ELBO, intervals apart; each class has 1 % or more of "
        "the late states of chains from noise",
        lambda keeps, keeps_elbo, rarest_class, **_: keeps.low > keeps_elbo.high and rarest_class.value >= 0.01,
        reading=(
            "The next state keeps its class with probability {keeps}, under the ELBO {keeps_elbo}; the rarest class "
            "has {rarest_class:%} of the states."
        ),
    ),
    "P5": Claim(
        "The features are useful.",
        "accuracy of a linear probe on the means of `none`, equal noise for all: above a random encoder, as many "
        "principal components, and `elbo`, with all labels and with few, intervals above 0",
        lambda **gains: min(gain.low for name, gain in gains.items() if name.startswith("above")) > 0,
        reading=(
            "A linear probe reads the class off the means with {none:%} accuracy: {above_random:%} above a random "
            "encoder, {above_PCA:%} above principal components, {above_elbo:%} above the code of the ELBO."
        ),
    ),
    "P6": Claim(
        "A sample-based regulariser (MMD) has both: z is used, and the prior can be decoded.",
        "at one weight of the sweep: code gain at least half of that without, interval above that, and kernel "
        "distance of prior draws at most 1.5 times that of draws from q(z), by the high end of the ratio's interval",
        lambda share_of_gain, prior_ratio, **_: share_of_gain.low >= 0.5 and prior_ratio.high <= 1.5,
        reading=(
            "At the best weight, {share_of_gain:%} of the code gain remain, and draws from the prior are "
            "{prior_ratio} times as far from digits as draws from q(z)."
        ),
        own=True,
    ),
    "D1": Claim(
        "The generator complex, the inference simple: a linear encoder will do.",
        "code gain at least half of the convolutional encoder's, of equal code and budget, interval above that",
        lambda share_of_gain, **_: share_of_gain.low >= 0.5,
        reading="A linear encoder has {share_of_gain:%} of the code gain.",
        own=True,
    ),
}


def quantities(arrays: Arrays) -> dict[str, Quantities]:
    """What each claim is judged by."""
    return {
        "P1": _ladder(arrays),
        "P1b": _routes(arrays),
        "P2m": {
            "code_gain": intervals.mean_interval(_nats(arrays, "unconditional") - _nats(arrays, "none"), "nats"),
            "two_decodes": Estimate.from_row(arrays["decodes_none"]),
        },
        "P3m": {
            "prior": _kernel(arrays, "none: prior"),
            "chain": _kernel(arrays, "none: chain"),
            "prior_minus_chain": Estimate.from_row(arrays["prior_minus_chain_classifier"]),
            "fitted_gaussian": _kernel(arrays, "none: Gaussian"),
            "fitted_mixture": _kernel(arrays, "none: mixture"),
            "held_out": _kernel(arrays, "held-out photographs"),
        },
        "P4m": _classes(arrays),
        "P5": _probes(arrays),
        "P6": _mmd(arrays),
        "D1": {"share_of_gain": _share(arrays, _linear(arrays))},
    }


def _ladder(arrays: Arrays) -> Quantities:
    over_seeds, kl, gain = intervals.interval_over_seeds, arrays["ladder_kl"], arrays["ladder_gain"]
    order = np.argsort(arrays["ladder_own"].mean(1))
    last = np.abs(arrays["ladder_history"][-1, :, -1] - arrays["ladder_history"][-1, :, _three_quarters(arrays)])
    return {
        "kl": over_seeds(kl[-1], "nats"),
        "kl_factored": over_seeds(kl[0], "nats"),
        "code_gain": over_seeds(gain[-1], "nats"),
        "code_gain_factored": over_seeds(gain[0], "nats"),
        "bound_above_own": over_seeds((arrays["ladder_bound"] - arrays["ladder_own"])[-1], "nats"),
        "rise_of_kl": Estimate(float(np.diff(kl.mean(1)[order]).max()), unit="nats"),
        "rise_of_gain": Estimate(float(np.diff(gain.mean(1)[order]).max()), unit="nats"),
        "change": Estimate(float(last.max()), unit="nats"),
    }


def _three_quarters(arrays: Arrays) -> int:
    """The evaluation nearest to three quarters of a training of the ladder."""
    steps = arrays["ladder_steps"]
    return int(np.abs(steps - 0.75 * steps[-1]).argmin())


def _routes(arrays: Arrays) -> Quantities:
    at = {name: k for k, name in enumerate(ROUTES)}
    bound, kl = arrays["routes_bound"], arrays["routes_kl"]
    return {
        "kl_pretrained": intervals.mean_interval(kl[at["pretrained"]], "nats"),
        "kl_scratch": intervals.mean_interval(kl[at["continued"]], "nats"),
        "bound_won": intervals.mean_interval(bound[at["pretrained"]] - bound[at["continued"]], "nats"),
        "bound_won_free_bits": intervals.mean_interval(bound[at["free-bits"]] - bound[at["elbo"]], "nats"),
        "kl_free_bits": intervals.mean_interval(kl[at["free-bits"]], "nats"),
    }


def _nats(arrays: Arrays, model: str) -> np.ndarray:
    """-E log p(x|z) of each held-out image, (n,)."""
    row = ("none", "elbo", "unconditional").index(model)
    return arrays["bits_per_dim"][row].astype(np.float64) * np.log(2) * arrays["chain_none"][0].size


def _kernel(arrays: Arrays, name: str) -> Estimate:
    return Estimate.from_row(arrays["kernel_classifier"][SETS.index(name)])


def keeps(classes: np.ndarray) -> Estimate:
    """The probability that the next state keeps the class, of chains (T, N) but for their first states; over chains."""
    late = classes[WARM_UP:]
    return intervals.mean_interval((late[1:] == late[:-1]).mean(0))


def run_length(classes: np.ndarray) -> Estimate:
    """How many states in a row have one class, of chains (T, N) but for their first: states over runs, cut at ends."""
    late = classes[WARM_UP:]
    runs = 1 + (late[1:] != late[:-1]).sum(0)
    return intervals.ratio_of_means(np.full(len(runs), len(late)), runs)


def visited(classes: np.ndarray) -> Estimate:
    """How many classes one chain of (T, N) visits after its first states; over chains."""
    return intervals.mean_interval(np.array([len(np.unique(chain)) for chain in classes[WARM_UP:].T], dtype=float))


def _classes(arrays: Arrays) -> Quantities:
    none, elbo = arrays["classes_none"], arrays["classes_elbo"]
    return {
        "keeps": keeps(none),
        "keeps_elbo": keeps(elbo),
        "keeps_from_data": keeps(arrays["classes_none_data"]),
        "run_length": run_length(none),
        "run_length_elbo": run_length(elbo),
        "visited_by_a_chain": visited(none),
        "rarest_class": Estimate(float(arrays["class_shares"][SETS.index("none: chain")].min())),
        "rarest_class_from_data": Estimate(float(arrays["class_shares"][SETS.index("none: chain from data")].min())),
        "accuracy": Estimate(float(arrays["accuracy"])),
    }


def _probes(arrays: Arrays) -> Quantities:
    right = dict(zip(PROBED, arrays["probe_right"], strict=True))
    numbers = {name: Estimate(float(rows[0].mean())) for name, rows in right.items()}
    for k, few in enumerate(("", "_few")):
        for name in PROBED[1:]:
            numbers[f"above_{name}{few}"] = intervals.accuracy_gain(right["none"][k], right[name][k])
    return numbers


def _at(arrays: Arrays, name: str) -> int:
    return arrays["sweep_names"].tolist().index(name)


def _base(arrays: Arrays) -> int:
    """The code of the sweep that the MMD and a linear encoder are compared with: that of the MMD's models."""
    mmd = next(k for k, name in enumerate(arrays["sweep_names"]) if name.startswith("mmd"))
    return _at(arrays, f"code-{arrays['sweep_dims'][mmd]}-{arrays['sweep_stds'][mmd]:g}")


def _linear(arrays: Arrays) -> int:
    return _at(arrays, f"linear-{arrays['sweep_dims'][_base(arrays)]}")


def _share(arrays: Arrays, k: int) -> Estimate:
    """The code gain of a model of the sweep as a share of that of `_base`."""
    return intervals.ratio_of_means(arrays["sweep_gains"][k], arrays["sweep_gains"][_base(arrays)])


def _mmd(arrays: Arrays) -> Quantities:
    """At the weight whose prior draws are best, among those that keep half of the gain, or else among all."""
    every = [k for k, name in enumerate(arrays["sweep_names"]) if name.startswith("mmd")]
    among = [k for k in every if _share(arrays, k).low >= 0.5] or every
    best = min(among, key=lambda k: arrays["sweep_prior_ratio"][k, 2])
    return {
        "share_of_gain": _share(arrays, best),
        "prior_ratio": Estimate.from_row(arrays["sweep_prior_ratio"][best]),
        "prior_ratio_none": Estimate.from_row(arrays["sweep_prior_ratio"][_base(arrays)]),
        "weight": Estimate(float(str(arrays["sweep_names"][best]).removeprefix("mmd-"))),
    }


def summary(arrays: Arrays) -> dict[str, Any]:
    """Further numbers of the run, by decoder, set or point of the sweep."""
    return {
        "ladder": {k: arrays[f"ladder_{k}"].tolist() for k in ("filters", "kl", "gain", "bound", "own")},
        "class_shares": dict(zip(SETS, arrays["class_shares"].tolist(), strict=True)),
        "correlation_by_lag": {
            model: dict(zip(map(str, LAGS), arrays[f"correlation_{model}"].tolist(), strict=True))
            for model in ("none", "elbo")
        },
        "sweep": {
            key: arrays[f"sweep_{key}"].tolist() for key in ("names", "rate", "gain", "decodes", "time", "prior", "q_z")
        },
    }


def ladder_table(arrays: Arrays) -> Any:
    """A pandas data frame of the decoders, means over seeds in nats per image."""
    import pandas

    names = [f"{filters} filters" if filters else "factored" for filters in arrays["ladder_filters"]]
    means = {key: arrays[f"ladder_{key}"].mean(1) for key in ("own", "bound", "kl", "gain")}
    titles = ("own log-likelihood", "ELBO", "KL", "code gain")
    return pandas.DataFrame(dict(zip(titles, means.values(), strict=True)), index=names).round(2)


def routes_table(arrays: Arrays) -> Any:
    """A pandas data frame of ROUTES: KL and ELBO, in nats per held-out image."""
    import pandas

    columns = {"KL": arrays["routes_kl"].mean(1), "ELBO": arrays["routes_bound"].mean(1)}
    return pandas.DataFrame(columns, index=list(ROUTES)).round(2)


def sweep_table(arrays: Arrays) -> Any:
    """A pandas data frame of the sweep: what each code tells, and how near draws from the prior come to digits."""
    import pandas

    keys = ("gain", "decodes", "prior", "q_z")
    columns = {"rate": arrays["sweep_rate"], **{key: arrays[f"sweep_{key}"][:, 0] for key in keys}}
    return pandas.DataFrame(columns, index=arrays["sweep_names"]).round(2)
