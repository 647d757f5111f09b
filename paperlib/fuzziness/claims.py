"""What notebook 02 claims: statements, criteria, and the numbers that decide them, from the arrays alone."""

from collections.abc import Mapping

import numpy as np

from paperlib.runs.claims import Claim, markdown_table
from paperlib.runs.estimate import Estimate
from paperlib.stats import intervals, rank_correlation

Arrays = Mapping[str, np.ndarray]

CLAIMS = {
    "F1": Claim(
        "The decoder's mean is the average of q(x|z).",
        "|mu(z) - E_q[x|z]|^2 at most 10 % of the variance of E_q[x|z] between codes, z ~ q(z); error = tr Var_q + "
        "|mu - E_q[x|z]|^2 to rounding",
        lambda share, residual: share.value <= 0.10 and residual.value < 1e-6,
        reading="The decoder's mean misses the average by {share:%} of the variance between codes.",
    ),
    "F2": Claim(
        "Where Var q(x|z) is large, the sample is fuzzy.",
        "partial rank correlation of tr Var_q with the edge width or spectral slope of the decoded image, ink and "
        "log q(z) held fixed: 0.6 or more, interval over seeds (of one seed, over codes) above 0.4",
        lambda edge_width, slope: any(q.value >= 0.6 and (q.low or 0) > 0.4 for q in (edge_width, slope)),
        reading="The rank correlation of variance and edge width, ink and density held fixed, is {edge_width}.",
    ),
    "F3": Claim(
        "Ranked by Var q(x|z) per ink, digits on the left are sharp, those on the right are averages of several.",
        "in every seed, right tenth against left tenth of the codes: edge width at least 1.2 times, label entropy at "
        "least 0.8 nat more",
        lambda least_width_ratio, least_entropy_gain, **reported: (
            least_width_ratio.value >= 1.2 and least_entropy_gain.value >= 0.8
        ),
        reading=(
            "In the worst of the seeds, edges on the right are {least_width_ratio} times as wide as on the left and "
            "labels have {least_entropy_gain} more entropy."
        ),
    ),
    "F4": Claim(
        "For a weak p only a better q helps.",
        "q frozen, the largest decoder's error at most 5 % above E tr Var_q where that is quoted; with more dimensions "
        "of the code, held-out error and edge width fall at every step (rank correlation -1 in every seed)",
        lambda excess, worst_error_trend, worst_width_trend: (
            excess.value <= 0.05 and worst_error_trend.value < -0.999 and worst_width_trend.value < -0.999
        ),
        reading=(
            "With q frozen, the error of ever larger decoders ends {excess:%} above E tr Var_q; with more dimensions "
            "of the code, the rank correlation is {worst_error_trend} for error and {worst_width_trend} for edge "
            "width in the worst seed."
        ),
    ),
}
MIXED = (4, 9, 5)  # the digits that the post sees averaged
MIXED_FROM = 0.1  # the weight of each, from which a code counts as a mixture of them


def label_entropy(labels: np.ndarray) -> np.ndarray:
    """Entropy in nats of label mixtures (..., K): 0 where q(x|z) is one class."""
    return -(labels * np.log(np.clip(labels, 1e-300, 1))).sum(-1)


def ranked(arrays: Arrays, seed: int) -> np.ndarray:
    """The codes of one seed where Var q(x|z) may be quoted, from least to most variance per ink."""
    order = np.argsort(arrays["variance"][seed] / arrays["ink"][seed])
    return order[arrays["reliable"][seed][order]]


def ends(arrays: Arrays, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The codes of the left and of the right tenth of `ranked`."""
    order = ranked(arrays, seed)
    tenth = max(1, len(order) // 10)
    return order[:tenth], order[-tenth:]


def mixtures(labels: np.ndarray) -> np.ndarray:
    """The least weight among the labels 4, 9 and 5 in label mixtures (..., K): 1/3 where they mix evenly."""
    return labels[..., MIXED].min(-1)


def quantities(arrays: Arrays) -> dict[str, dict[str, Estimate]]:
    """What each claim is judged by."""
    from scipy.stats import spearmanr

    share = _over_seeds(arrays["gap"].mean(1) / arrays["between"])
    residual = np.abs(arrays["error"] - arrays["spread"] - arrays["gap"]).max() / arrays["error"].mean()
    entropy, width = _at_ends(arrays, label_entropy(arrays["labels"])), _at_ends(arrays, arrays["edge_width"])
    _, mixed = _at_ends(arrays, mixtures(arrays["labels"]) >= MIXED_FROM)
    excess = _over_seeds(arrays["frozen_error"][:, -1] / arrays["floor"] - 1)
    trends = {
        f"worst_{name}_trend": Estimate(np.max([spearmanr(arrays["code_dims"], row).statistic for row in rows]))
        for name, rows in (("error", arrays["swept_error"]), ("width", arrays["swept_width"]))
    }
    return {
        "F1": {"share": share, "residual": Estimate(residual)},
        "F2": {"edge_width": _correlation(arrays, "edge_width"), "slope": _correlation(arrays, "slope", -1)},
        "F3": {
            "least_width_ratio": Estimate(float(np.min(width[1] / width[0]))),
            "least_entropy_gain": Estimate(float(np.min(entropy[1] - entropy[0])), unit="nats"),
            "mixtures_of_4_9_5": _over_seeds(100 * mixed, "%"),
        },
        "F4": {"excess": excess, **trends},
    }


def _over_seeds(values: np.ndarray, unit: str = "") -> Estimate:
    """The mean over seeds with its interval, where there is more than one seed; nan where a seed has no number."""
    if len(values) == 1 or not np.isfinite(values).all():
        return Estimate(float(values.mean()), unit=unit)
    return intervals.interval_over_seeds(values, unit)


def _correlation(arrays: Arrays, name: str, sign: int = 1) -> Estimate:
    """`sign` times `correlations`, with an interval over seeds, or, of one seed, over its codes."""
    values = sign * correlations(arrays, name)
    if len(values) > 1 or not np.isfinite(values).all():
        return _over_seeds(values)
    count = int((arrays["reliable"][0] & np.isfinite(arrays[name][0])).sum())
    return Estimate(float(values[0]), *rank_correlation.correlation_interval(float(values[0]), count, controls=2))


def _at_ends(arrays: Arrays, values: np.ndarray) -> np.ndarray:
    """The mean of `values` (S, M) over the left and over the right tenth of each seed's codes: (2, S)."""
    return np.array([[np.nanmean(values[k][codes]) for codes in ends(arrays, k)] for k in range(len(values))]).T


def correlations(
    arrays: Arrays, name: str, prefix: str = "", *, within_classes: bool = False, also_fixed: tuple[str, ...] = ()
) -> np.ndarray:
    """The partial rank correlation of tr Var_q with `name`, ink and log q(z) held fixed, `within_classes` also which
    label weighs most: (S,), nan for a seed with fewer than ten codes to go by."""
    results = []
    for k, reliable in enumerate(arrays[f"{prefix}reliable"]):
        chosen = reliable & np.isfinite(arrays[prefix + name][k])
        if chosen.sum() < 10:
            results.append(np.nan)
            continue
        used = ("variance", name, "ink", "log_q", *also_fixed)
        variance, other, *fixed = (arrays[prefix + n][k][chosen] for n in used)
        if within_classes:
            best = arrays["labels"][k][chosen].argmax(1)
            fixed += [best == label for label in np.unique(best)[1:]]
        results.append(rank_correlation.partial_rank_correlation(variance, other, fixed))
    return np.array(results)


class Controls(dict):
    """Numbers by name, one per seed; shows itself as a table."""

    def _repr_markdown_(self) -> str:
        rows = ((name, ", ".join(f"{value:.3f}" for value in values)) for name, values in self.items())
        return markdown_table(("control", "by seed"), rows)


def controls(arrays: Arrays) -> Controls:
    """What the claims' numbers become under other conditions, one number per seed."""
    between, everywhere = arrays["between"], dict(arrays) | {"reliable": np.ones_like(arrays["reliable"])}
    pure, _ = _at_ends(arrays, arrays["labels"].max(-1))
    first_left, first_right = _at_ends(arrays, label_entropy(arrays["labels"]))
    left, right = _at_ends(everywhere, label_entropy(arrays["labels"]))
    narrow, wide = _at_ends(everywhere, arrays["edge_width"])
    return Controls(
        {
            "F1: part of the share that is estimation noise": arrays["noise"].mean(1) / between,
            "F1: share, average over held-out images": arrays["gap_held_out"].mean(1) / between,
            "F1: part of that share that is estimation noise": arrays["noise_held_out"].mean(1) / between,
            "F2: greyness (F1 restated)": correlations(arrays, "greyness"),
            "F2: edge width, greyness held fixed too": correlations(arrays, "edge_width", also_fixed=("greyness",)),
            "F2: edge width, Bernoulli decoder": correlations(arrays, "edge_width", "bernoulli_"),
            "F2: spectral slope, Bernoulli decoder": -correlations(arrays, "slope", "bernoulli_"),
            "F2: edge width, all codes": correlations(everywhere, "edge_width"),
            "F2: spectral slope, all codes": -correlations(everywhere, "slope"),
            "F2: edge width, within classes": correlations(arrays, "edge_width", within_classes=True),
            "F2: spectral slope, within classes": -correlations(arrays, "slope", within_classes=True),
            "F3: weight of the largest class in the left tenth": pure,
            "F3: label entropy in the left tenth (nats; first criterion: below 0.1)": first_left,
            "F3: label entropy in the right tenth (nats; first criterion: above 1)": first_right,
            "F3: edge width right / left, all codes": wide / narrow,
            "F3: label entropy right - left, all codes (nats)": right - left,
            "share of codes that pass the criterion of section 2": arrays["reliable"].mean(1),
            "share of codes that pass it, Bernoulli decoder": arrays["bernoulli_reliable"].mean(1),
        }
    )
