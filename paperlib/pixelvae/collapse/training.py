"""All trainings of notebook 05, in `plan`: objectives and models are those of notebook 04."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from paperlib.data.device_images import Images
from paperlib.pixelvae.training import ABLATION, VARIANTS, Variant, fit_variant
from paperlib.runs import train

FACTORED = "factored"  # the weakest decoder
NARROW = "factored-narrow"  # it has the fewest filters of the ladder: a control for width
ROUTES = ("elbo", "continued", "pretrained", "free-bits")  # ways to the strongest decoder under the ELBO
CAUSES = ("none", "none-visible", "elbo-hidden", "elbo")  # without and with the KL, pixels hidden at first or not
ELBO_MIN_STD = 0.01  # the authors' least std: under the ELBO the KL bounds what a code tells


class Planned(NamedTuple):
    """One training: what is trained, with which settings, how long, from which seed and from whose weights."""

    variant: Variant
    settings: Any
    steps: int
    seed: int
    start: str = ""


class Point(NamedTuple):
    """A model of the sweep: "code", "mmd" or "linear", the weight of the MMD, and what is trained."""

    kind: str
    weight: float
    variant: Variant
    settings: Any


def decoders(settings: Any) -> dict[str, int]:
    """The filters of each decoder by name, the weakest first."""
    return {FACTORED: settings.filters} | {
        str(filters): filters for filters in (*settings.ladder_filters, settings.filters)
    }


def rung(settings: Any, objective: str, decoder: str, k: int) -> str:
    """The name of the training with a decoder's k-th seed; of the strongest with the first seed that of notebook 04."""
    return objective if (decoder, k) == (str(settings.filters), 0) else f"{objective}-{decoder}-{k}"


def sweep(settings: Any) -> dict[str, Point]:
    """The models of the sweep by name: codes, the first of which is that of `none`, weights of the MMD, encoders."""
    none, points = VARIANTS["none"], {}
    codes = [(dims, settings.min_std) for dims in dict.fromkeys((settings.code_dim, *settings.sweep_dims))]
    codes += [(settings.code_dim, std) for std in settings.sweep_stds if std != settings.min_std]
    for dims, std in codes:
        points[f"code-{dims}-{std:g}"] = Point("code", 0, none, replace(settings, code_dim=dims, min_std=std))
    for weight in settings.mmd_weights:
        changed = replace(settings, mmd_weight=weight)
        points[f"mmd-{weight:g}"] = Point("mmd", weight, none._replace(objective="mmd"), changed)
    for dims in dict.fromkeys((settings.code_dim, *settings.linear_dims)):
        points[f"linear-{dims}"] = Point("linear", 0, none._replace(linear=True), replace(settings, code_dim=dims))
    return points


def plan(settings: Any, seed: int) -> dict[str, Planned]:
    """Every training by name, after that whose weights it starts from; runs of other seeds share none.

    A factored decoder has no unconditional counterpart here: the best there is has a closed form, see
    `measurements.independent_pixels`.
    """
    first, steps, more = seed * settings.ladder_seeds, settings.train_steps, settings.elbo_steps
    elbo, alone, under_elbo = VARIANTS["elbo"], VARIANTS["unconditional"], replace(settings, min_std=ELBO_MIN_STD)
    planned = {"none": Planned(VARIANTS["none"], settings, steps, first)}
    for decoder, filters in decoders(settings).items():
        sized, factored = replace(under_elbo, filters=filters), decoder == FACTORED
        for k in range(settings.ladder_seeds):
            variant = elbo._replace(factored=factored)
            planned[rung(settings, "elbo", decoder, k)] = Planned(variant, sized, steps, first + k)
            if not factored:
                planned[rung(settings, "unconditional", decoder, k)] = Planned(alone, sized, steps, first + k)
    narrow = replace(under_elbo, filters=min(decoders(settings).values()))
    planned[NARROW] = Planned(elbo._replace(factored=True), narrow, steps, first)
    planned["continued"] = Planned(elbo, under_elbo, more, first, "elbo")
    planned["pretrained"] = Planned(elbo, settings, more, first, "none")
    planned["unconditional-continued"] = Planned(alone, settings, more, first, "unconditional")
    for name, variant in ABLATION.items():
        planned[name] = Planned(variant, settings, settings.ablation_steps, first, "none")
    planned["free-bits"] = Planned(Variant("free-bits"), under_elbo, steps, first)
    planned["none-visible"] = Planned(Variant(), settings, steps, first)
    planned["elbo-hidden"] = Planned(elbo._replace(autoencoder_first=True), under_elbo, steps, first)
    for name, point in sweep(settings).items():
        planned[name] = Planned(point.variant, point.settings, settings.sweep_steps, first)
    planned["sweep-unconditional"] = Planned(alone, settings, settings.sweep_steps, first)
    return planned


def fit(settings: Any, images: Images, directory: Path, seed: int) -> Mapping[str, train.Trained]:
    """Train or continue all of the `plan`, in folders of their names below `directory`; by name."""
    trained: dict[str, train.Trained] = {}
    for name, one in plan(settings, seed).items():
        start = trained[one.start].model.state_dict() if one.start else None
        trained[name] = fit_variant(one.settings, images, name, one.variant, one.steps, directory, one.seed, start)
    return trained
