"""The trainings of notebook 03: the sequential VAE, what it is compared with, and its control.

| model | chain | objective |
| --- | --- | --- |
| `sequential` | T steps, each with a code | equation (2) of `sequential_chain`, every step's own term or the last's |
| `single` | one step, a code as large as all, as much arithmetic | the KL's weight steered to `sequential`'s E KL |
| `infusion` | T steps, the code a random subset of the target's pixels | (10) |
| `depth` | the steps 2 .. T without codes, from the images of the trained `sequential` | log p alone |

On a data set that memory cannot hold (`resident` off) training images stay on disk and are read a batch at a time.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from paperlib.data import datasets, device_images
from paperlib.data.device_images import Images
from paperlib.runs import train
from paperlib.runs.provenance import describe_code
from paperlib.runs.recorded import load_recorded_weights
from paperlib.runs.run import Run
from paperlib.sequential.model import (
    SequentialVAE,
    batches,
    chain,
    depth_links,
    objective,
    random_steps,
    squared_error,
)
from paperlib.sequential.networks import Size
from paperlib.stats import features
from paperlib.system import distributed
from paperlib.system.errors import UserError

STEERED_AT_MOST = math.log(1000.0)  # up and down, of the weight of single's KL


def load_images(run: Run, side: int = 0) -> Images:
    """The run's data set at `side` (the setting, if 0) pixels, larger images made smaller by means over squares.

    Patches of photographs, which lie side by side, have their held-out part put into random order. Raises `UserError`
    for too few held-out images, and as `data.load` does.
    """
    settings = run.settings
    side = side or settings.side
    if settings.dataset == "photos":
        dataset = datasets.load("photos", side=side)
        order = torch.randperm(len(dataset.held_out.images), generator=torch.Generator().manual_seed(0))
        dataset = replace(dataset, held_out=datasets.Split(dataset.held_out.images[order.numpy()]))
    else:
        dataset = smaller(datasets.load(settings.dataset), side)
    found, least = len(dataset.held_out.images), max(80, settings.evaluation_images + 40)
    if found < least:
        raise UserError(
            f"{settings.dataset} holds out {found} images ({dataset.source}), and intervals need {least}: prepare "
            f"{10 * least} images or more, or lower evaluation_images"
        )
    return device_images.load(dataset, run.device, training_set=settings.resident)


def smaller(dataset: datasets.Dataset, side: int) -> datasets.Dataset:
    """The same with each image `side` pixels wide, uint8 means over squares of pixels; itself where it is so already.

    Raises `ValueError` where the images' side is no multiple.
    """
    found = dataset.train.images.shape[1]
    if found == side:
        return dataset
    if found % side:
        raise ValueError(f"images of {found} pixels have no squares that make {side}")

    def means(split: datasets.Split) -> datasets.Split:
        parts = np.array_split(split.images, max(1, len(split.images) // 1000))
        squares = [part.reshape(-1, side, found // side, side, found // side, part.shape[3]) for part in parts]
        return datasets.Split(
            np.concatenate([np.rint(one.mean((2, 4))).astype(np.uint8) for one in squares]), split.labels
        )

    source = f"{dataset.source}, means over squares of {found // side} x {found // side} pixels"
    return replace(dataset, train=means(dataset.train), held_out=means(dataset.held_out), source=source)


def build(settings: Any, shape: tuple[int, int, int], name: str) -> SequentialVAE:
    """A new model, `name` as in the module's table, for images of `shape`, with weights from torch's generator."""
    channels, side, _ = shape
    size = Size(channels, side, settings.widths, settings.units, settings.maps, settings.kernel)
    if name == "single":
        size = replace(size, widths=settings.single_widths, units=settings.single_units, maps=settings.single_maps)
        return SequentialVAE(settings, size, 1, settings.single_ladder)
    if name == "picture":
        size = replace(size, widths=settings.picture_widths)
    ladder = () if name in ("infusion", "depth") else settings.ladder
    return SequentialVAE(settings, size, settings.steps, ladder, infusion=name == "infusion")


def fit(run: Run, images: Images) -> dict[str, train.Trained]:
    """Train all models of the table, or continue, or load the recorded model `sequential`: by name.

    Where the settings ask for one there is also `picture`, the same chain on larger images, for the figure alone.
    """
    settings = run.settings
    if run.weights == "recorded":
        vae = build(settings, images.shape, "sequential").to(run.device).eval()
        vae.load_state_dict(load_recorded_weights(run))
        return {"sequential": train.Trained(vae, [], 0, 0.0, "recorded", {}, [])}
    trained = {"sequential": fit_model(run, images, "sequential", settings.updates)}
    parent = trained["sequential"].model
    trained["single"] = fit_model(run, images, "single", settings.single_updates, rates=rates(run, images, parent))
    trained["infusion"] = fit_model(run, images, "infusion", settings.infusion_updates)
    trained["depth"] = fit_model(run, images, "depth", settings.depth_updates, parent=parent)
    if settings.picture_side:
        larger = load_images(run, settings.picture_side)
        trained["picture"] = fit_model(run, larger, "picture", settings.picture_updates)
    return trained


def fit_model(
    run: Run,
    images: Images,
    name: str,
    updates: int,
    *,
    rates: tuple[float, float] | None = None,
    parent: SequentialVAE | None = None,
) -> train.Trained:
    """Train one model into the run's folder. `rates`, see there, are what `single` is steered to; `parent` the trained
    chain from whose images `depth` starts.
    """
    settings, device = run.settings, torch.device(run.device)
    torch.manual_seed(run.seed)
    vae = build(settings, images.shape, name).to(device)
    recipe = train.Recipe(
        updates,
        settings.batch_size,
        settings.learning_rate,
        schedule=settings.schedule,
        warmup=min(settings.warmup, updates // 5),
        ema=settings.ema,
        precision=settings.precision,
        clip_norm=settings.clip_norm,
        evaluate_every=max(1, updates // settings.evaluations),
        patience=settings.patience,
        compile=settings.compile,
    )
    own_terms = settings.own_terms or name in ("infusion", "depth")
    steps = list(range(2 if name == "depth" else 1, vae.steps + 1))

    def loss(model: nn.Module, x: Tensor, progress: train.Progress) -> tuple[Tensor, dict[str, Tensor]]:
        first = [t for t in steps if t == 1]  # has a network of its own
        chosen = random_steps(steps, settings.steps_per_batch if own_terms else 0, always=first)
        noise = 0.0 if vae.infusion else settings.input_noise
        if parent is not None:
            links = depth_links(vae, x, parent, chosen=list(chosen), noise=noise, call=model)
        else:
            links = chain(vae, x, own_terms=own_terms, chosen=list(chosen), noise=noise, call=model)
        links = [link for link in links if link.t in chosen]
        beta = ramp(settings, progress.fraction) * vae.log_weight.exp()
        value, terms = objective(links, beta, weights=chosen, own_terms=own_terms)
        if rates is not None:
            if progress.fraction > 3 * settings.kl_ramp:  # before, the ramp decides the rate
                steer(vae, distributed.mean(terms["kl"]), rates[0], settings.steering)
            terms["kl_weight"] = vae.log_weight.exp()
        return value, terms

    def batch(rows: Tensor) -> Tensor:
        x = images.signed(images.batch(rows))
        return features.augmented(x, mirror=settings.mirror, reach=settings.shift)

    def evaluated(vae: nn.Module) -> dict[str, float]:
        held_out = images.held_out[: settings.evaluation_images]
        return watched(evaluate(vae, images, held_out, parent), images, rates and rates[1])

    return train.fit(
        vae,
        loss,
        batch,
        len(images.train),
        recipe,
        run.directory / name,
        seed=run.seed,
        device=device,
        evaluate=evaluated,
        provenance=describe_code(),
        name=name,
        partial=own_terms and 0 < settings.steps_per_batch < len(steps) - 1,
    )


def rates(run: Run, images: Images, vae: SequentialVAE) -> tuple[float, float]:
    """E KL over all steps in nats an image: on training images, augmented as in training, by which a batch can be
    steered, and on the held-out images that a training watches.
    """
    settings, found = run.settings, []
    known = images.batch(torch.linspace(0, len(images.train) - 1, 1000).long())
    with run.seeded():
        moved = features.augmented(images.signed(known), mirror=settings.mirror, reach=settings.shift)
        for pictures in (torch.from_numpy(datasets.from_signed(moved, images.dataset.levels)), images.held_out):
            pictures = pictures[: settings.evaluation_images] if pictures is images.held_out else pictures
            found.append(float(evaluate(vae, images, pictures)["kl"].sum(1).mean()))
    return found[0], found[1]


def watched(measured: dict[str, Tensor], images: Images, rate: float | None = None) -> dict[str, float]:
    """What a training watches on held-out images, the first of which decides where it stops.

    Minus the bound (8) in nats per dimension; for chains without codes minus the mean log p. Where the rate is steered,
    minus log p and ten nats for each nat of rate that is further than 5 % from its target: what has not yet come down
    to the rate would have the least error.
    """
    dims = math.prod(images.shape)
    kl = measured["kl"].sum(1).mean().item()
    error = {"error": measured["error"][:, -1].mean().item(), "kl": kl}
    log_p = measured["log_p"][:, -1].mean().item()
    if rate is not None:
        return {"distortion_at_the_rate": (10 * max(0.0, kl - 1.05 * rate, 0.95 * rate - kl) - log_p) / dims, **error}
    if not kl:
        return {"negative_log_p": -measured["log_p"].mean().item() / dims, **error}
    return {"negative_bound": (kl - log_p) / dims, **error}


def ramp(settings: Any, fraction: float) -> float:
    """What multiplies the KL's weight at a fraction of training, beta of equation (2)."""
    return 1 - math.exp(-fraction / settings.kl_ramp) if settings.kl_ramp else 1.0


@torch.no_grad()
def steer(vae: SequentialVAE, kl: Tensor, target: float, gain: float) -> None:
    """Multiply the weight of the KL by (kl / target)^gain, so that too high a rate makes rate dearer.

    One step multiplies or divides by at most e^gain. The weight is kept among the model's buffers, by its logarithm,
    so a resumed training goes on with it.
    """
    error = torch.log(kl.clamp(min=1e-6) / target).clamp(-1, 1)
    vae.log_weight.add_(gain * error.to(vae.log_weight.dtype)).clamp_(-STEERED_AT_MOST, STEERED_AT_MOST)


@torch.no_grad()
def evaluate(
    vae: SequentialVAE, images: Images, pictures: Tensor, parent: SequentialVAE | None = None
) -> dict[str, Tensor]:
    """Of uint8 `pictures` (N, S, S, C), each (N, T): `error`, the squared error per dimension of x(t), `log_p` and `kl`
    in nats. Codes are samples, from torch's generator. For `depth`, given its `parent`, T is one less.
    """
    found: dict[str, list[Tensor]] = {"error": [], "log_p": [], "kl": []}
    for x in batches(images, pictures):
        links = chain(vae, x) if parent is None else depth_links(vae, x, parent)
        found["error"].append(torch.stack([squared_error(link.step.image, x) for link in links], 1))
        found["log_p"].append(torch.stack([link.log_p for link in links], 1))
        found["kl"].append(torch.stack([link.kl for link in links], 1))
    return {name: torch.cat(parts).double() for name, parts in found.items()}
