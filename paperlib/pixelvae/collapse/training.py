"""All trainings of notebook 05, in `plan`: objectives and models are those of notebook 04."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from paperlib.data.device_images import Images
from paperlib.pixelvae.training import VARIANTS, Variant, fit_variant
from paperlib.runs import train

FACTORED = "factored"  # the weakest decoder
ROUTES = ("elbo", "continued", "pretrained", "free-bits")  # ways to the strongest decoder under the ELBO


class Planned(NamedTuple):
    """One training: what is trained, with which settings, how long, from which seed and from whose weights."""

    variant: Variant
    settings: Any
    steps: int
    seed: int
    start: str = ""


def decoders(settings: Any) -> dict[str, int]:
    """The filters of each decoder by name, the weakest first."""
    return {FACTORED: settings.filters} | {
        str(filters): filters for filters in (*settings.ladder_filters, settings.filters)
    }


def rung(settings: Any, objective: str, decoder: str, k: int) -> str:
    """The name of the training with a decoder's k-th seed; of the strongest with the first seed that of notebook 04."""
    return objective if (decoder, k) == (str(settings.filters), 0) else f"{objective}-{decoder}-{k}"


def sweep(settings: Any) -> dict[str, tuple[Variant, Any]]:
    """Variant and settings of each model of the sweep by name: codes, weights of the MMD, linear encoders."""
    none, points = VARIANTS["none"], {}
    codes = [(dims, settings.min_std) for dims in dict.fromkeys((settings.code_dim, *settings.sweep_dims))]
    codes += [(settings.code_dim, std) for std in settings.sweep_stds if std != settings.min_std]
    for dims, std in codes:
        points[f"code-{dims}-{std:g}"] = none, replace(settings, code_dim=dims, min_std=std)
    for weight in settings.mmd_weights:
        points[f"mmd-{weight:g}"] = none._replace(objective="mmd"), replace(settings, mmd_weight=weight)
    for dims in dict.fromkeys((settings.code_dim, *settings.linear_dims)):
        points[f"linear-{dims}"] = none._replace(linear=True), replace(settings, code_dim=dims)
    return points


def plan(settings: Any, seed: int) -> dict[str, Planned]:
    """Every training by name, after that whose weights it starts from.

    A factored decoder has no unconditional counterpart here: the best there is has a closed form, see
    `measurements.independent_pixels`.
    """
    steps, planned = settings.train_steps, {"none": Planned(VARIANTS["none"], settings, settings.train_steps, seed)}
    for decoder, filters in decoders(settings).items():
        sized, factored = replace(settings, filters=filters), decoder == FACTORED
        for k in range(settings.ladder_seeds):
            elbo = Variant("elbo", factored=factored)
            planned[rung(settings, "elbo", decoder, k)] = Planned(elbo, sized, steps, seed + k)
            if not factored:
                without = VARIANTS["unconditional"]
                planned[rung(settings, "unconditional", decoder, k)] = Planned(without, sized, steps, seed + k)
    elbo, more = VARIANTS["elbo"], settings.elbo_steps
    planned["continued"] = Planned(elbo, settings, more, seed, "elbo")
    planned["pretrained"] = Planned(elbo, settings, more, seed, "none")
    planned["free-bits"] = Planned(Variant("free-bits"), settings, steps, seed)
    for name, (variant, changed) in sweep(settings).items():
        planned[name] = Planned(variant, changed, settings.sweep_steps, seed)
    planned["sweep-unconditional"] = Planned(VARIANTS["unconditional"], settings, settings.sweep_steps, seed)
    return planned


def fit(settings: Any, images: Images, directory: Path, seed: int) -> Mapping[str, train.Trained]:
    """Train or continue all of the `plan`, in folders of their names below `directory`; by name."""
    trained: dict[str, train.Trained] = {}
    for name, one in plan(settings, seed).items():
        start = trained[one.start].model.state_dict() if one.start else None
        trained[name] = fit_variant(one.settings, images, name, one.variant, one.steps, directory, one.seed, start)
    return trained
