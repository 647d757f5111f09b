"""What notebook 05 claims: statements, criteria, and the numbers that decide them, from the arrays alone."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from paperlib.pixelvae.collapse.measurements import PROBED
from paperlib.pixelvae.collapse.training import CAUSES, ROUTES
from paperlib.pixelvae.measurements import LAGS, SETS, WARM_UP
from paperlib.runs.claims import Claim
from paperlib.runs.estimate import Estimate
from paperlib.stats import intervals

Arrays = Mapping[str, np.ndarray]
Quantities = dict[str, Estimate]
SETTLED = (0.5, 0.1)  # what a settled KL changes at most in the last quarter of a training: nats, or this share of it

CLAIMS = {
    "P1": Claim(
        "With an ever more powerful decoder the ELBO leaves z unused.",
        "from the factored decoder to the strongest by its own likelihood KL and code gain fall, intervals over seeds "
        "below 0, and at no step between does the KL rise, interval above 0; the strongest has a KL below 3 nats and "
        "at most a tenth of the factored decoder's. Tested if every decoder's KL has settled: it changes by at most "
        "0.5 nats or a tenth in the last quarter",
        lambda kl, kl_factored, fall_of_kl, fall_of_gain, greatest_rise, **_: (
            fall_of_kl.high < 0
            and fall_of_gain.high < 0
            and greatest_rise.low <= 0
            and kl.value < 3
            and kl.value <= 0.1 * kl_factored.value
        ),
        premise=lambda unsettled, **_: unsettled.value == 0,
        reading=(
            "KL and code gain are {kl_factored} and {code_gain_factored} with the factored decoder, {kl} and "
            "{code_gain} with the strongest."
        ),
    ),
    "P1b": Claim(
        "The ELBO neither forbids z nor rewards it.",
        "the strongest decoder, started from `none` and trained on with the ELBO, keeps more than 3 nats and more than "
        "twice the KL of the ELBO from scratch trained as long, intervals above that, and their bounds differ by less "
        "than 2 nats, interval included. Tested if from scratch the KL is below 3 nats, and both KLs have settled",
        lambda kl_pretrained, more_than_twice, bound_won, **_: (
            kl_pretrained.low > 3 and more_than_twice.low > 0 and -2 < bound_won.low and bound_won.high < 2
        ),
        premise=lambda kl_scratch, unsettled, **_: kl_scratch.value < 3 and unsettled.value == 0,
        reading=(
            "Started from `none`, the KL is {kl_pretrained}, where from scratch it is {kl_scratch}; the bound is "
            "better by {bound_won}."
        ),
    ),
    "P2m": Claim(
        "Without the KL z is used, with digits.",
        "code gain, the nats per held-out image that the decoder of `none`, trained on, wins with z over the same "
        "decoder trained on as long without it, above 10, interval above 0; two decodes of one z agree: pixel "
        "correlation 0.5 or more",
        lambda code_gain, two_decodes, **_: code_gain.value > 10 and code_gain.low > 0 and two_decodes.value >= 0.5,
        reading="The decoder wins {code_gain} per image with z; two decodes of one z correlate {two_decodes}.",
    ),
    "P3m": Claim(
        "Then decoding the prior fails, and the Markov chain works, with digits.",
        "kernel distance to held-out digits on a classifier's features: N(0, I) above the chain, interval of the "
        "difference above 0; chains from noise and from digits differ by less than a tenth of that of N(0, I), "
        "interval included. Tested if the code is used",
        lambda prior, prior_minus_chain, noise_to_data, **_: (
            prior_minus_chain.low > 0 and noise_to_data.high < 0.1 * prior.value
        ),
        premise=lambda code_gain, **_: code_gain.low > 0,
        reading=(
            "Kernel distance to digits: {prior} from N(0, I), {chain} from the chain; the difference is "
            "{prior_minus_chain}."
        ),
    ),
    "P4m": Claim(
        "The chain moves gradually; under the ELBO it jumps, with digits.",
        "neighbours keep their class more often than under the ELBO, intervals apart; of what they agree above chance "
        "at most half is left after 20 steps; each class has 1 % or more of the states of chains from noise, interval "
        "over chains above that. Tested if the code is used",
        lambda keeps, keeps_20, chance, keeps_elbo, rarest_class, **_: (
            keeps.low > keeps_elbo.high
            and keeps_20.value - chance.value <= 0.5 * (keeps.value - chance.value)
            and rarest_class.low >= 0.01
        ),
        premise=lambda code_gain, **_: code_gain.low > 0,
        reading=(
            "The next state keeps its class with probability {keeps}, under the ELBO {keeps_elbo}, and the state after "
            "20 steps {keeps_20} (chance {chance}); the rarest class has {rarest_class:%} of the states."
        ),
    ),
    "P5": Claim(
        "The features are useful.",
        "accuracy of a linear probe on the means of `none`, equal noise for all: above a random encoder, as many "
        "principal components, and `elbo`, with all labels and with few, intervals above 0. Tested if the code is used",
        lambda **gains: min(gain.low for name, gain in gains.items() if name.startswith("above")) > 0,
        premise=lambda code_gain, **_: code_gain.low > 0,
        reading=(
            "A linear probe reads the class off the means with {none:%} accuracy: {above_random:%} above a random "
            "encoder, {above_PCA:%} above principal components, {above_elbo:%} above the code of the ELBO; with few "
            "labels {above_random_few:%}, {above_PCA_few:%} and {above_elbo_few:%}."
        ),
    ),
    "P6": Claim(
        "A sample-based regulariser (MMD) has both: z is used, and the prior can be decoded.",
        "at one weight of the sweep, by distance chosen on other digits: code gain at least half of that without, "
        "interval above that, and squared kernel distance of prior draws at most 1.5 times that of draws from q(z), by "
        "the high end of the ratio's interval. Tested if the code is used without it, and the distance of those from "
        "q(z) above 0",
        lambda share_of_gain, prior_ratio, **_: share_of_gain.low >= 0.5 and prior_ratio.high <= 1.5,
        premise=lambda gain_without, q_z, **_: gain_without.low > 0 and q_z.low > 0,
        reading=(
            "At weight {weight:value}, {share_of_gain:%} of the code gain remains, and draws from the prior are "
            "{prior_ratio} times as far from digits as draws from q(z)."
        ),
        own=True,
    ),
    "D1": Claim(
        "The generator complex, the inference simple: a linear encoder will do.",
        "code gain at least half of the convolutional encoder's, of equal code and budget, interval above that. Tested "
        "if the convolutional encoder's code is used",
        lambda share_of_gain, **_: share_of_gain.low >= 0.5,
        premise=lambda gain_convolutional, **_: gain_convolutional.low > 0,
        reading="A linear encoder has {share_of_gain:%} of the code gain.",
        own=True,
    ),
}


def quantities(arrays: Arrays) -> dict[str, Quantities]:
    """What each claim is judged by."""
    at = {name: k for k, name in enumerate(CAUSES)}
    gain = {name: intervals.mean_interval(arrays["causes_gain"][k], "nats") for name, k in at.items()}
    used = {"code_gain": intervals.mean_interval(arrays["ablation_gain"], "nats")}
    without = intervals.mean_interval(arrays["sweep_gains"][0], "nats")
    return {
        "P1": _ladder(arrays),
        "P1b": _routes(arrays),
        "P2m": used
        | {
            "two_decodes": Estimate.from_row(arrays["causes_decodes"][at["none"]]),
            **{f"over_unconditional_{name.replace('-', '_')}": gain[name] for name in CAUSES},
        },
        "P3m": used
        | {
            "prior": _kernel(arrays, "none: prior"),
            "chain": _kernel(arrays, "none: chain"),
            "prior_minus_chain": Estimate.from_row(arrays["prior_minus_chain_classifier"]),
            "noise_to_data": Estimate.from_row(arrays["noise_to_data_classifier"]),
            "fitted_gaussian": _kernel(arrays, "none: Gaussian"),
            "fitted_mixture": _kernel(arrays, "none: mixture"),
            "held_out": _kernel(arrays, "held-out photographs"),
        },
        "P4m": used | _classes(arrays),
        "P5": used | _probes(arrays),
        "P6": {"gain_without": without} | _mmd(arrays),
        "D1": {"gain_convolutional": without, "share_of_gain": _share(arrays, _of_kind(arrays, "linear")[0])},
    }


def _ladder(arrays: Arrays) -> Quantities:
    over_seeds, order = intervals.interval_over_seeds, np.argsort(arrays["ladder_own"].mean(1))
    kl, gain, bound, own = (arrays[f"ladder_{key}"][order] for key in ("kl", "gain", "bound", "own"))
    rises = [over_seeds(step, "nats") for step in np.diff(kl, axis=0)]
    histories = arrays["ladder_history"].mean(1)
    return {
        "kl": over_seeds(kl[-1], "nats"),
        "kl_factored": over_seeds(arrays["ladder_kl"][0], "nats"),
        "kl_factored_narrow": Estimate(float(arrays["narrow"][0]), unit="nats"),
        "code_gain": over_seeds(gain[-1], "nats"),
        "code_gain_factored": over_seeds(arrays["ladder_gain"][0], "nats"),
        "bound_above_own": over_seeds((bound - own)[-1], "nats"),
        "fall_of_kl": over_seeds(kl[-1] - arrays["ladder_kl"][0], "nats"),
        "fall_of_gain": over_seeds(gain[-1] - arrays["ladder_gain"][0], "nats"),
        "greatest_rise": max(rises, key=lambda rise: rise.low),
        "unsettled": Estimate(sum(not _settled(arrays["ladder_steps"], history) for history in histories)),
    }


def _settled(steps: np.ndarray, kl: np.ndarray) -> bool:
    """Whether a KL (E,) at `steps` (E,), the last three quarters of the way in, is the same in the end."""
    before = kl[np.abs(steps - steps[0] - 0.75 * (steps[-1] - steps[0])).argmin()]
    nats, share = SETTLED
    return abs(kl[-1] - before) <= max(nats, share * kl[-1])


def _routes(arrays: Arrays) -> Quantities:
    at = {name: k for k, name in enumerate(ROUTES)}
    bound, kl, gain = ({name: arrays[f"routes_{key}"][k] for name, k in at.items()} for key in ("bound", "kl", "gain"))
    mean = intervals.mean_interval
    ways = [arrays[f"{name}_route"][:, :2].T for name in ("pretrained", "continued")]
    return {
        "kl_pretrained": mean(kl["pretrained"], "nats"),
        "kl_scratch": mean(kl["continued"], "nats"),
        "more_than_twice": mean(kl["pretrained"] - 2 * kl["continued"], "nats"),
        "bound_won": mean(bound["pretrained"] - bound["continued"], "nats"),
        "unsettled": Estimate(sum(not _settled(*way) for way in ways)),
        "code_gain_pretrained": mean(gain["pretrained"], "nats"),
        "code_gain_scratch": mean(gain["continued"], "nats"),
        "kl_free_bits": mean(kl["free-bits"], "nats"),
        "code_gain_free_bits": mean(gain["free-bits"], "nats"),
        "bound_won_free_bits": mean(bound["free-bits"] - bound["elbo"], "nats"),
    }


def _kernel(arrays: Arrays, name: str) -> Estimate:
    return Estimate.from_row(arrays["kernel_classifier"][SETS.index(name)])


def keeps(classes: np.ndarray, lag: int = 1) -> Estimate:
    """The probability that the state `lag` steps later has the same class, of chains (T, N) but for their first states;
    interval over chains."""
    late = classes[WARM_UP:]
    return intervals.mean_interval((late[lag:] == late[:-lag]).mean(0))


def class_shares(classes: np.ndarray) -> list[Estimate]:
    """The share of each of ten classes in the states of chains (T, N) but for their first; interval over chains."""
    late = classes[WARM_UP:]
    return [intervals.mean_interval((late == label).mean(0)) for label in range(10)]


def visited(classes: np.ndarray) -> Estimate:
    """How many classes one chain of (T, N) visits after its first states; over chains."""
    return intervals.mean_interval(np.array([len(np.unique(chain)) for chain in classes[WARM_UP:].T], dtype=float))


def _lasts(keeping: Estimate) -> Estimate:
    """How many states in a row have one class, 1 / (1 - p), where the next keeps it with probability p."""
    return Estimate.from_row([1 / max(1 - end, 1e-9) for end in keeping.row])


def _classes(arrays: Arrays) -> Quantities:
    none, elbo = arrays["classes_none"], arrays["classes_elbo"]
    shares = class_shares(none)
    return {
        "keeps": keeps(none),
        "keeps_20": keeps(none, 20),
        "chance": Estimate(sum(share.value**2 for share in shares)),
        "keeps_elbo": keeps(elbo),
        "keeps_from_data": keeps(arrays["classes_none_data"]),
        "lasts": _lasts(keeps(none)),
        "lasts_elbo": _lasts(keeps(elbo)),
        "visited_by_a_chain": visited(none),
        "rarest_class": min(shares, key=lambda share: share.value),
        "rarest_class_from_data": min(class_shares(arrays["classes_none_data"]), key=lambda share: share.value),
        "accuracy": Estimate(float(arrays["accuracy"])),
    }


def _probes(arrays: Arrays) -> Quantities:
    right = dict(zip(PROBED, arrays["probe_right"], strict=True))
    numbers = {name: intervals.mean_interval(rows[0]) for name, rows in right.items()}
    for k, few in enumerate(("", "_few")):
        for name in PROBED[1:]:
            numbers[f"above_{name}{few}"] = intervals.mean_interval(right["none"][k] - right[name][k])
    return numbers


def _of_kind(arrays: Arrays, kind: str) -> np.ndarray:
    """The rows of the sweep of one kind; the first of "code" and of "linear" have the code of `none`."""
    return np.flatnonzero(arrays["sweep_kinds"] == kind)


def _share(arrays: Arrays, k: int) -> Estimate:
    """The code gain of a model of the sweep as a share of that of the first, whose code is that of `none`."""
    return intervals.ratio_of_means(arrays["sweep_gains"][k], arrays["sweep_gains"][0])


def _mmd(arrays: Arrays) -> Quantities:
    """At the weight whose prior draws are best on one half of the digits, among those that keep half of the gain, or
    else among all; what is judged is of the other half."""
    chosen_by, judged_by = 0, 1
    every = _of_kind(arrays, "mmd")
    among = [k for k in every if _share(arrays, k).low >= 0.5] or every
    best = min(among, key=lambda k: arrays["sweep_ratio"][k, chosen_by, 2])
    return {
        "share_of_gain": _share(arrays, best),
        "prior_ratio": Estimate.from_row(arrays["sweep_ratio"][best, judged_by]),
        "q_z": Estimate.from_row(arrays["sweep_q_z"][best, judged_by]),
        "prior_ratio_none": Estimate.from_row(arrays["sweep_ratio"][0, judged_by]),
        "weight": Estimate(float(arrays["sweep_weights"][best])),
        "mmd": Estimate(float(arrays["sweep_mmd"][best])),
        "mmd_none": Estimate(float(arrays["sweep_mmd"][0])),
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
        "routes": {key: arrays[f"routes_{key}"].mean(1).tolist() for key in ("kl", "gain", "bound")},
        "causes": {key: arrays[f"causes_{key}"].mean(1).tolist() for key in ("kl", "gain")},
        "sweep": {
            key: arrays[f"sweep_{key}"].tolist()
            for key in ("names", "rate", "gain", "decodes", "time", "prior", "q_z", "mmd")
        },
    }


def decoder_names(arrays: Arrays) -> list[str]:
    """The decoders of the ladder in words."""
    return [f"{filters} filters" if filters else "factored" for filters in arrays["ladder_filters"]]


def ladder_table(arrays: Arrays) -> Any:
    """A pandas data frame of the decoders, means over seeds in nats per image; a narrow factored one as a control."""
    import pandas

    means = {key: arrays[f"ladder_{key}"].mean(1) for key in ("own", "bound", "kl", "gain")}
    titles = ("own log-likelihood", "ELBO", "KL", "code gain")
    table = pandas.DataFrame(dict(zip(titles, means.values(), strict=True)), index=decoder_names(arrays))
    (kl, gain), own = arrays["narrow"], means["own"][0]
    table.loc[f"factored, {arrays['ladder_filters'][1:].min()} filters"] = own, own + gain - kl, kl, gain
    return table.round(2)


def routes_table(arrays: Arrays) -> Any:
    """A pandas data frame of ROUTES: KL, code gain and ELBO, in nats per held-out image."""
    import pandas

    columns = {"KL": "kl", "code gain": "gain", "ELBO": "bound"}
    means = {title: arrays[f"routes_{key}"].mean(1) for title, key in columns.items()}
    return pandas.DataFrame(means, index=list(ROUTES)).round(2)


def causes_table(arrays: Arrays) -> Any:
    """A pandas data frame of CAUSES: KL and gain in nats per held-out image, correlation of two decodes."""
    import pandas

    words = {"none": ("no", "yes"), "none-visible": ("no", "no"), "elbo-hidden": ("yes", "yes"), "elbo": ("yes", "no")}
    columns = {
        "KL in the objective": [words[name][0] for name in CAUSES],
        "pixels hidden at first": [words[name][1] for name in CAUSES],
        "KL": arrays["causes_kl"].mean(1).round(2),
        "over unconditional": arrays["causes_gain"].mean(1).round(2),
        "two decodes": arrays["causes_decodes"][:, 0].round(2),
    }
    return pandas.DataFrame(columns, index=list(CAUSES))


def sweep_table(arrays: Arrays) -> Any:
    """A pandas data frame of the sweep: what each code tells, how far its q(z) is from N(0, I), and how far images from
    the prior and from q(z) are from digits."""
    import pandas

    columns = {
        "rate": arrays["sweep_rate"],
        "code gain": arrays["sweep_gain"][:, 0],
        "two decodes": arrays["sweep_decodes"][:, 0],
        "MMD": arrays["sweep_mmd"],
        "z ~ N(0, I)": arrays["sweep_prior"][:, 1, 0],
        "z ~ q(z)": arrays["sweep_q_z"][:, 1, 0],
    }
    return pandas.DataFrame(columns, index=arrays["sweep_names"]).round(3)
