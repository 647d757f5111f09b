"""Fuzzy samples as averages of q(x|z): a Gaussian VAE with a small code, and the variance of q(x|z).

The encoder alone defines a joint distribution with the data: q(x, z) = p(x) q(z|x). On N training points

    (1)  q(z) = 1/N sum_n q(z|x_n)
    (2)  q(x|z) = sum_n w_n(z) delta(x - x_n),   w_n(z) = q(z|x_n) / sum_m q(z|x_m)

The reconstruction term of the ELBO fits the decoder p(x|z) to q(x|z). A Gaussian p(x|z) = N(mu(z), sigma^2 I) can do no
better than mu(z) = E_q[x|z], and what it misses is, for every z,

    (3)  E_q(x|z) |x - mu(z)|^2 = tr Var_q[x|z] + |mu(z) - E_q[x|z]|^2

so where Var_q[x|z] is large the sample is the average of images that differ: it is fuzzy (Zhao, Song, Ermon, section
"Fuzzy Generation"). `aggregate` computes (1) and (2); `fuzziness_vae` trains the VAEs; this module
measures and judges; `fuzziness_figures` draws what was measured.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paperlib.fuzziness import explorer as fuzziness_explorer
from paperlib.fuzziness.figures import COLUMNS, HEAVIEST, MADE_OF, MOSAIC, ROWS, ends, label_entropy, ranked
from paperlib.fuzziness.model import BERNOULLI, MAIN, VAE, Images, Models, Variant, encode
from paperlib.nn import likelihoods
from paperlib.runs import presets
from paperlib.runs.claims import Claim, Verdicts
from paperlib.runs.estimate import Estimate
from paperlib.runs.experiment import Experiment
from paperlib.runs.presets import option
from paperlib.runs.provenance import describe_training
from paperlib.runs.recorded import load_recorded_arrays, save_weights
from paperlib.runs.run import Run, finish, save_arrays
from paperlib.stats import aggregate_posterior, intervals, sharpness
from paperlib.system.errors import UserError

NOTEBOOK = "02_mnist_fuzziness"
HEADLINE = (
    "mnist_fuzziness",
    "Decoded digits in order of the variance of q(x|z) per ink, the least on the left; below, that variance and the "
    "entropy of the labels under q(x|z).",
)


@dataclass(frozen=True)
class Settings:
    """What notebook 02 can be told. Raises `ValueError` for values out of range."""

    dataset: str = option("digits", "data set: digits or mnist")
    code_dim: int = option(2, "dimensions of the code z, at least 2")
    sigma: float | None = option(0.25, "deviation of p(x|z), the same for all pixels; null learns it")
    hidden: tuple[int, ...] = option((64, 64), "units of each hidden layer, encoder; the decoder mirrors them")
    steps: int = option(1000, "optimiser steps of each training")
    batch_size: int = option(128, "images per step")
    learning_rate: float = option(2e-3, "of Adam, falling to zero by a cosine")
    seeds: int = option(1, "how often everything is trained, from one seed after another")
    kl_weights: tuple[float, ...] = option((0.25, 1.0, 4.0), "weights of the KL that F4 compares; 1 is the ELBO")
    decoders: tuple[int, ...] = option((4, 64), "units of the two hidden layers of decoders for a frozen q (F4)")
    codes: int = option(500, "codes drawn for each measurement")
    plane: int = option(40, "points a side of the map of the plane of codes")
    min_samples: float = option(20.0, "effective sample size from which Var q(x|z) is quoted")
    max_halves: float = option(0.05, "relative difference between N and N/2 up to which it is quoted")

    def __post_init__(self) -> None:
        presets.check_numbers(self, ())
        for name in ("kl_weights", "decoders"):
            values = getattr(self, name)
            if list(values) != sorted(set(values)) or len(values) < 2:
                raise ValueError(f"{name} is {values}, but takes two or more values in rising order")
        if self.codes < ROWS * COLUMNS:
            raise ValueError(f"codes is {self.codes}, but the picture needs {ROWS * COLUMNS}")
        if not self.hidden:
            raise ValueError("hidden is empty, but takes the units of one layer or more")
        if self.code_dim < 2:
            raise ValueError(f"code_dim is {self.code_dim}, but the map needs at least 2")


_smoke = Settings(max_halves=0.15)  # the variance over halves of 1,500 digits differs by more than over MNIST's
_cpu = Settings(
    dataset="mnist",
    sigma=0.4,
    hidden=(400, 400),
    steps=5000,
    batch_size=256,
    learning_rate=1e-3,
    seeds=3,
    kl_weights=(0.25, 1.0, 4.0, 16.0),
    decoders=(4, 16, 64, 400),
    codes=4000,
    plane=60,
)
PRESETS = {
    "smoke": _smoke,
    "cpu": _cpu,
    "gpu": replace(_cpu, hidden=(1024, 1024), seeds=5, codes=10_000, plane=100),
    "paper": _cpu,
}

CLAIMS = {
    "F1": Claim(
        "The decoder's mean is the average of q(x|z).",
        "|mu(z) - E_q[x|z]|^2 at most 10 % of the variance of E_q[x|z] between codes, z ~ q(z); error = tr Var_q + "
        "|mu - E_q[x|z]|^2 to rounding",
        lambda share, residual: share.value <= 0.10 and residual.value < 1e-6,
        shows=("share",),
    ),
    "F2": Claim(
        "Where Var q(x|z) is large, the sample is fuzzy.",
        "partial rank correlation of tr Var_q with the edge width or spectral slope of the decoded image, ink and "
        "log q(z) held fixed: 0.6 or more, interval over seeds above 0.4",
        lambda edge_width, slope: any(q.value >= 0.6 and (q.low or 0) > 0.4 for q in (edge_width, slope)),
        shows=("edge_width",),
    ),
    "F3": Claim(
        "Ranked by Var q(x|z) per ink, digits on the left are sharp and of one class, those on the right are "
        "averages of several.",
        "label entropy under q(x|z) below 0.1 nat in the left tenth, above 1 nat in the right tenth",
        lambda left, right: left.value < 0.1 and right.value > 1.0,
        shows=("left", "right"),
    ),
    "F4": Claim(
        "For a weak p only a better q helps.",
        "q frozen, the largest decoder's error at most 5 % above E tr Var_q where that is quoted; with the KL weight "
        "swept, held-out error and edge width rise with it at every step (rank correlation 1 in every seed)",
        lambda excess, worst_error_trend, worst_width_trend: (
            excess.value <= 0.05 and worst_error_trend.value > 0.999 and worst_width_trend.value > 0.999
        ),
        shows=("excess", "worst_error_trend"),
    ),
}


# Measuring


def measure(run: Run, images: Images, models: Models) -> dict[str, np.ndarray]:
    """All that the figures and claims need, written to the run's `arrays.npz` and returned.

    With recorded weights, the arrays that were recorded with them. The arrays are those of `at_prior_codes` and
    `error_split`, stacked over seeds; of `picture` and `plane`, for the first seed; of `frozen_and_swept`; and those of
    the Bernoulli decoder that F2 needs, as `bernoulli_*`.
    """
    if run.weights == "recorded":
        return load_recorded_arrays(run)
    at_prior = _stacked(
        [at_prior_codes(run, images, vaes[MAIN].model, run.seed + k) for k, vaes in enumerate(models.vaes)]
    )
    bernoulli = [at_prior_codes(run, images, vaes[BERNOULLI].model, run.seed + k) for k, vaes in enumerate(models.vaes)]
    return save_arrays(
        run,
        **at_prior,
        **{f"bernoulli_{name}": np.stack([of_seed[name] for of_seed in bernoulli]) for name in _CORRELATED},
        **picture(images, models.main, at_prior),
        **plane(run, images, models.main),
        **_stacked([error_split(run, images, vaes[MAIN].model) for vaes in models.vaes]),
        **frozen_and_swept(run, images, models),
    )


def _stacked(of_seeds: list[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    return {name: np.stack([of_seed[name] for of_seed in of_seeds]) for name in of_seeds[0]}


@torch.no_grad()
def at_prior_codes(run: Run, images: Images, vae: VAE, seed: int) -> dict[str, np.ndarray]:
    """q(x|z) and the decoded image at M codes z ~ p(z).

    Of q(x|z): `variance` tr Var_q[x|z] (grey levels in [0, 1], squared and summed), `ink` the sum of E_q[x|z] (pixels
    of full white), `samples` the effective sample size, `halves` the relative difference that leaving out half of the
    training points makes to the variance, `log_q` log q(z) in nats, `labels` the label mixture (M, K), `reliable`
    whether the variance may be quoted. Of the decoded image mu(z): `edge_width` in pixels, `slope` of its power
    spectrum, `greyness` sum m (1 - m).
    """
    settings, codes = run.settings, encode(vae, images.x)
    generator = torch.Generator(run.device).manual_seed(seed)
    z = torch.randn(settings.codes, settings.code_dim, generator=generator, device=run.device)
    found = aggregate_posterior.conditional(z, codes, images.x, images.labels, per_pixel=False)
    halves = _halves(found, z, codes, images)
    decoded = vae.p_x_given_z(z)
    pictures = images.pictures(decoded)
    found = {
        "z": z,
        "variance": found.trace,
        "ink": found.mean.sum(1),
        "samples": found.ess,
        "halves": halves,
        "log_q": found.log_q,
        "labels": found.labels,
        "reliable": _reliable(run, found, halves),
        "greyness": (decoded * (1 - decoded)).sum(1),
        "edge_width": sharpness.edge_width(pictures),
        "slope": sharpness.spectral_slope(pictures),
    }
    return {name: value.numpy(force=True) for name, value in found.items()}


def _halves(
    found: aggregate_posterior.Conditional, z: Tensor, codes: aggregate_posterior.Codes, images: Images
) -> Tensor:
    """The relative difference that leaving out half of the training points makes to tr Var_q[x|z]: (M,)."""
    rows = random_half(images)
    half = aggregate_posterior.conditional(z, codes[rows], images.x[rows], per_pixel=False)
    return (half.trace / found.trace - 1).abs()


def random_half(images: Images) -> Tensor:
    """Indices of half of the training points, always the same; drawn, since data sets may be in some order."""
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(len(images.x), generator=generator)[: len(images.x) // 2].to(images.x.device)


def _reliable(run: Run, found: aggregate_posterior.Conditional, halves: Tensor) -> Tensor:
    """Where Var q(x|z) may be quoted: (M,), bool."""
    return (found.ess >= run.settings.min_samples) & (halves <= run.settings.max_halves)


_CORRELATED = ("variance", "ink", "log_q", "reliable", "edge_width", "slope")


@torch.no_grad()
def picture(images: Images, vae: VAE, at_prior: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What the post's picture shows of the first seed: `decoded` and `average` (E_q[x|z]) of ROWS x COLUMNS codes,
    `shown`, from the least to the most variance per ink; and for MADE_OF of these, `made_of`, the decoded image,
    average, deviation of each pixel, and the `heaviest` training digits with labels and `weights`.
    """
    order, z = ranked(at_prior, 0), torch.from_numpy(at_prior["z"][0]).to(images.x.device)
    if len(order) < ROWS * COLUMNS:
        raise UserError(
            f"Var q(x|z) can be trusted at {len(order)} of {len(z)} codes, and the picture needs "
            f"{ROWS * COLUMNS}: draw more codes, or lower min_samples"
        )
    shown = order[np.linspace(0, len(order) - 1, ROWS * COLUMNS).round().astype(int)]
    made_of = shown[np.linspace(0, len(shown) - 1, MADE_OF).round().astype(int)]
    codes = encode(vae, images.x)
    z, z_few = z[shown], z[made_of]
    few = aggregate_posterior.conditional(z_few, codes, images.x)
    points, weights = aggregate_posterior.heaviest(z_few, codes, HEAVIEST)
    return {
        "shown": shown,
        "decoded": images.pictures(vae.p_x_given_z(z)),
        "average": images.pictures(aggregate_posterior.conditional(z, codes, images.x, per_pixel=False).mean).float(),
        "made_of": made_of,
        "made_of_decoded": images.pictures(vae.p_x_given_z(z_few)),
        "made_of_average": images.pictures(few.mean).float(),
        "made_of_deviation": images.pictures(few.variance.sqrt()).float(),
        "heaviest": images.pictures(images.x[points]),
        "heaviest_labels": images.labels[points],
        "weights": weights,
    }


@torch.no_grad()
def plane(run: Run, images: Images, vae: VAE) -> dict[str, Any]:
    """A map of the first two dimensions of z, from -3 to 3, the others at 0.

    On a grid of `plane` points a side, row 0 at the top: `plane_variance` per ink, `plane_samples`, `plane_trusted`
    where these suffice, and `plane_labels`; besides, `plane_decoded`, MOSAIC x MOSAIC digits.
    """
    side, codes = run.settings.plane, encode(vae, images.x)
    found = aggregate_posterior.conditional(_grid(run, side), codes, images.x, images.labels, per_pixel=False)
    return {
        "plane_variance": (found.trace / found.mean.sum(1)).reshape(side, side),
        "plane_samples": found.ess.reshape(side, side),
        "plane_trusted": (found.ess >= run.settings.min_samples).reshape(side, side),
        "plane_labels": found.labels.reshape(side, side, -1).float(),
        "plane_decoded": (images.pictures(vae.p_x_given_z(_grid(run, MOSAIC))) * 255).round().to(torch.uint8),
    }


def _grid(run: Run, side: int) -> Tensor:
    """Centres of `side` x `side` cells of the square from -3 to 3, from the top left, as codes (side^2, D)."""
    edge = 3 * (1 - 1 / side)
    across = torch.linspace(-edge, edge, side, device=run.device)
    down, right = torch.meshgrid(across.flip(0), across, indexing="ij")
    z = torch.zeros(side * side, run.settings.code_dim, device=run.device)
    z[:, 0], z[:, 1] = right.flatten(), down.flatten()
    return z


@torch.no_grad()
def error_split(run: Run, images: Images, vae: VAE) -> dict[str, np.ndarray]:
    """The terms of equation (3) at M codes z ~ q(z): `error` its left side, `spread` tr Var_q[x|z], `gap`
    |mu(z) - E_q[x|z]|^2; `between`, the variance of E_q[x|z] over these codes.

    Two numbers say how much of the gap is not the decoder's fault. `noise` tr Var_q[x|z] / (samples - 1): by about so
    much the average of a finite list misses the average of all images that there could be (the variance of a list of n
    is too small by the factor 1 - 1/n). `gap_held_out`: |mu(z) -
    E_q[x|z]|^2 with the list made of held-out images, and its `noise_held_out`.
    """
    codes, held_out = encode(vae, images.x), encode(vae, images.held_out)
    z = _aggregate_codes(run, codes)
    mu = vae.p_x_given_z(z.float()).double()
    found = aggregate_posterior.conditional(z, codes, images.x, per_pixel=False)
    other = aggregate_posterior.conditional(z, held_out, images.held_out, per_pixel=False)
    split = {
        "error": squared_error(mu, z, codes, images.x),
        "spread": found.trace,
        "gap": (mu - found.mean).square().sum(1),
        "noise": _noise(found),
        "gap_held_out": (mu - other.mean).square().sum(1),
        "noise_held_out": _noise(other),
        "between": found.mean.var(0, correction=0).sum(),
    }
    return {name: value.numpy(force=True) for name, value in split.items()}


def _noise(found: aggregate_posterior.Conditional) -> Tensor:
    return found.trace / (found.ess - 1).clamp(min=0.1)  # a list of one image has no variance to tell by


def _aggregate_codes(run: Run, codes: aggregate_posterior.Codes) -> Tensor:
    """M codes z ~ q(z), by way of random training points."""
    generator = torch.Generator(run.device).manual_seed(run.seed)
    rows = torch.randint(len(codes), (run.settings.codes,), generator=generator, device=run.device)
    return likelihoods.sample_gaussian(codes.mean[rows], codes.log_std[rows], generator=generator)


def squared_error(mu: Tensor, z: Tensor, codes: aggregate_posterior.Codes, x: Tensor) -> Tensor:
    """E_q(x|z) |x - mu|^2 for each row of `mu` (M, P), by the weights of all N points: the left side of (3)."""
    x = x.double()
    squares, errors = x.square().sum(1), []
    for mu_rows, z_rows in zip(mu.split(512), z.split(512), strict=True):
        weights = aggregate_posterior.log_weights(z_rows, codes).exp()
        errors.append(weights @ squares - 2 * ((weights @ x) * mu_rows).sum(1) + mu_rows.square().sum(1))
    return torch.cat(errors)


@torch.no_grad()
def frozen_and_swept(run: Run, images: Images, models: Models) -> dict[str, Any]:
    """What F4 compares, each with one row a seed.

    Frozen q, over those of M codes z ~ q(z) where the variance may be quoted: `floor` E tr Var_q[x|z] (S,), and
    `frozen_error` (S, decoders), the error E|x - mu(z)|^2 of each decoder by (3). KL weight swept, (S, weights) each:
    `swept_information` I_q(x;z), which stops at log N, and `swept_rate`, the KL on held-out images, in nats;
    `swept_error`, their squared error; `swept_variance`, E tr Var_q[x|z] over the codes where it may be quoted, times
    1 / (1 - 1 / samples) because the lists differ in length; `swept_reliable`, the share of these codes; `swept_width`,
    the mean edge width of the decoded images of all M codes. Every seed and weight is measured with the same draws.
    """
    rows: dict[str, list] = {name: [] for name in ("floor", "frozen_error", *_SWEPT)}
    for vaes, decoders in zip(models.vaes, models.decoders, strict=True):
        z, found, good = _at_aggregate_codes(run, images, vaes[MAIN].model)
        gaps = [
            (torch.sigmoid(trained.model(z.float())).double() - found.mean).square().sum(1)
            for trained in decoders.values()
        ]
        rows["floor"].append(found.trace[good].mean())
        rows["frozen_error"].append(torch.stack([(found.trace + gap)[good].mean() for gap in gaps]))
        swept = [_swept(run, images, vaes[Variant(kl_weight=weight)].model) for weight in run.settings.kl_weights]
        for name in _SWEPT:
            rows[name].append(torch.tensor([of_weight[name] for of_weight in swept]))
    return {name: torch.stack(row) for name, row in rows.items()} | {
        "kl_weights": np.array(run.settings.kl_weights),
        "frozen_units": np.array(run.settings.decoders),
    }


_SWEPT = ("swept_information", "swept_rate", "swept_error", "swept_variance", "swept_reliable", "swept_width")


def _at_aggregate_codes(run: Run, images: Images, vae: VAE) -> tuple[Tensor, aggregate_posterior.Conditional, Tensor]:
    """M codes z ~ q(z), what q(x|z) is there, and where its variance may be quoted."""
    codes = encode(vae, images.x)
    z = _aggregate_codes(run, codes)
    found = aggregate_posterior.conditional(z, codes, images.x, per_pixel=False)
    return z, found, _reliable(run, found, _halves(found, z, codes, images))


def _swept(run: Run, images: Images, vae: VAE) -> dict[str, float]:
    z, found, good = _at_aggregate_codes(run, images, vae)
    generator = torch.Generator(run.device).manual_seed(run.seed)
    mean, log_std = vae.q_z_given_x(images.held_out)
    decoded = vae.p_x_given_z(likelihoods.sample_gaussian(mean, log_std, generator=generator))
    widths = sharpness.edge_width(images.pictures(vae.p_x_given_z(z.float())))
    information = aggregate_posterior.mutual_information(
        encode(vae, images.x), points=min(len(images.x), 2000), generator=generator
    )
    return {
        "swept_information": information.nats,
        "swept_rate": likelihoods.gaussian_kl(mean, log_std).mean().item(),
        "swept_error": (decoded - images.held_out).square().sum(1).mean().item(),
        "swept_variance": (found.trace / (1 - 1 / found.ess))[good].mean().item(),
        "swept_reliable": good.double().mean().item(),
        "swept_width": widths.nanmean().item(),
    }


# Judging


def correlations(
    arrays: Mapping[str, np.ndarray],
    name: str,
    prefix: str = "",
    *,
    within_classes: bool = False,
    held_fixed: tuple[str, ...] = ("ink", "log_q"),
) -> list[float]:
    """For each seed the partial rank correlation of tr Var_q with `name`, given the arrays `held_fixed` (claim F2).

    `within_classes` also holds fixed which label weighs most. nan for a seed with fewer than ten codes to go by.
    """
    found = []
    for k, good in enumerate(arrays[f"{prefix}reliable"]):
        good = good & np.isfinite(arrays[prefix + name][k])
        if good.sum() < 10:
            found.append(np.nan)
            continue
        variance, other, *controls = (arrays[prefix + n][k][good] for n in ("variance", name, *held_fixed))
        if within_classes:
            best = arrays["labels"][k][good].argmax(1)
            controls += [best == label for label in np.unique(best)[1:]]
        found.append(sharpness.partial_rank_correlation(variance, other, controls))
    return found


def controls(arrays: Mapping[str, np.ndarray]) -> "Controls":
    """What the claims' numbers become under other conditions, one number a seed."""
    between, everywhere = arrays["between"], dict(arrays) | {"reliable": np.ones_like(arrays["reliable"])}
    entropy = [label_entropy(labels) for labels in arrays["labels"]]

    def end_entropies(arrays: Mapping[str, np.ndarray], end: int) -> list[float]:
        return [float(entropy[k][ends(arrays, k)[end]].mean()) for k in range(len(entropy))]

    return Controls(
        {
            "F1: of which noise of the list": arrays["noise"].mean(1) / between,
            "F1: share, average over held-out images": arrays["gap_held_out"].mean(1) / between,
            "F1: of which noise of the held-out list": arrays["noise_held_out"].mean(1) / between,
            "F2: greyness (F1 restated)": correlations(arrays, "greyness"),
            "F2: edge width, greyness held fixed too": correlations(
                arrays, "edge_width", held_fixed=("ink", "log_q", "greyness")
            ),
            "F2: edge width, Bernoulli decoder": correlations(arrays, "edge_width", "bernoulli_"),
            "F2: spectral slope, Bernoulli decoder": [-r for r in correlations(arrays, "slope", "bernoulli_")],
            "F2: edge width, no code set aside": correlations(everywhere, "edge_width"),
            "F2: spectral slope, no code set aside": [-r for r in correlations(everywhere, "slope")],
            "F2: edge width, within classes": correlations(arrays, "edge_width", within_classes=True),
            "F2: spectral slope, within classes": [-r for r in correlations(arrays, "slope", within_classes=True)],
            "F3: weight of the largest class in the left tenth": [
                arrays["labels"][k][ends(arrays, k)[0]].max(1).mean() for k in range(len(entropy))
            ],
            "F3: left, no code set aside (nats)": end_entropies(everywhere, 0),
            "F3: right, no code set aside (nats)": end_entropies(everywhere, 1),
            "F4: share of codes where Var q(x|z) may be quoted, smallest KL weight": arrays["swept_reliable"][:, 0],
            "share of codes where Var q(x|z) may be quoted": arrays["reliable"].mean(1),
            "the same, Bernoulli decoder": arrays["bernoulli_reliable"].mean(1),
        }
    )


class Controls(dict):
    """Numbers by name, one a seed; shows itself as a table."""

    def _repr_markdown_(self) -> str:
        rows = [f"| {name} | {', '.join(f'{value:.3f}' for value in values)} |" for name, values in self.items()]
        return "\n".join(
            ["| control | by seed |", "| --- | --- |", *(row.replace("q(x|z)", "q(x\\|z)") for row in rows)]
        )


def conclude(run: Run, arrays: Mapping[str, np.ndarray], models: Models, images: Images) -> Verdicts:
    """Judge the claims and write what the run found."""
    numbers = {
        "controls": dict(controls(arrays)),
    } | {name: arrays[name] for name in ("floor", "frozen_error", *_SWEPT)}
    if run.weights == "train":
        save_weights(run, models.main.state_dict())
    trainings = {
        f"{getattr(key, 'name', f'decoder-{key}')}-seed{run.seed + k}": describe_training(trained)
        for k in range(len(models.vaes))
        for key, trained in (models.vaes[k] | models.decoders[k]).items()
        if trained.history
    }
    return finish(run, CLAIMS, quantities(arrays), numbers, images.dataset.describe(), trainings)


def quantities(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, Estimate]]:
    """What each claim is judged by."""
    from scipy.stats import spearmanr

    seeds = range(len(arrays["variance"]))
    entropy = [label_entropy(labels) for labels in arrays["labels"]]
    left, right = zip(*([entropy[k][codes].mean() for codes in ends(arrays, k)] for k in seeds), strict=True)
    residual = np.abs(arrays["error"] - arrays["spread"] - arrays["gap"]).max() / arrays["error"].mean()
    trends = {
        name: np.min([spearmanr(arrays["kl_weights"], of_seed).statistic for of_seed in arrays[name]])
        for name in ("swept_error", "swept_width")
    }
    return {
        "F1": {
            "share": _over_seeds(arrays["gap"].mean(1) / arrays["between"]),
            "residual": Estimate(residual),
        },
        "F2": {
            "edge_width": _over_seeds(correlations(arrays, "edge_width")),
            "slope": _over_seeds([-r for r in correlations(arrays, "slope")]),
        },
        "F3": {"left": _over_seeds(left, "nats"), "right": _over_seeds(right, "nats")},
        "F4": {
            "excess": _over_seeds(arrays["frozen_error"][:, -1] / arrays["floor"] - 1),
            "worst_error_trend": Estimate(trends["swept_error"]),
            "worst_width_trend": Estimate(trends["swept_width"]),
        },
    }


def _over_seeds(values: Any, unit: str = "") -> Estimate:
    """The mean over seeds with Student's 95 % interval, where there is more than one; nan where a seed has none."""
    if len(values) == 1 or not np.isfinite(values).all():
        return Estimate(float(np.mean(values)), unit=unit)
    return intervals.interval_over_seeds(values, unit)


def explore(images: Images, models: Models) -> fuzziness_explorer.Explorer:
    """Sliders for the code of the main VAE, to be shown in a running notebook."""
    codes = encode(models.main, images.x)
    return fuzziness_explorer.Explorer(models.main.p_x_given_z, codes, images.x, images.labels, images.shape)


def recompute(run: Run) -> dict[str, dict[str, Estimate]]:
    """The numbers that decide each claim, from the recorded arrays."""
    return quantities(load_recorded_arrays(run))


EXPERIMENT = Experiment(
    notebook=NOTEBOOK,
    headline=HEADLINE,
    presets=PRESETS,
    claims=CLAIMS,
    recompute=recompute,
    datasets=("digits", "mnist"),
)
start = EXPERIMENT.start
