"""The trainings of notebook 03: the sequential VAE, what it is compared with, and its control.

| model | chain | objective |
| --- | --- | --- |
| `sequential` | T steps, each with a code | equation (2) of `model`, every step's own term or the last's |
| `one_step` | one step, a code as large as all, as much arithmetic | a KL controller holds it at `sequential`'s E KL |
| `infusion` | T steps, the code a random subset of the target's pixels | (10) |
| `no_latent` | the steps 2 .. T without codes, from the images of the trained `sequential` | log p alone |

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
from paperlib.runs.recorded import load_model
from paperlib.runs.run import Run
from paperlib.sequential.model import (
    SequentialVAE,
    batches,
    chain,
    no_latent_links,
    objective,
    random_steps,
    squared_error,
)
from paperlib.sequential.networks import Size
from paperlib.stats import features
from paperlib.system import distributed
from paperlib.system.errors import UserError

MAX_LOG_KL_WEIGHT = math.log(1000.0)  # up and down, of the weight of the one-step baseline's KL


def load_images(settings: Any, device: torch.device | str, side: int = 0) -> Images:
    """The data set at `side` (the setting, if 0) pixels, larger images made smaller by means over squares.

    Patches of photographs, which lie side by side, have their held-out part put into random order. Raises `UserError`
    for too few held-out images, and as `data.load` does.
    """
    side = side or settings.side
    if settings.dataset == "photos":
        dataset = datasets.load("photos", side=side)
        order = torch.randperm(len(dataset.held_out.images), generator=torch.Generator().manual_seed(0))
        dataset = replace(dataset, held_out=datasets.Split(dataset.held_out.images[order.numpy()]))
    else:
        dataset = smaller(datasets.load(settings.dataset), side)
    count, least = len(dataset.held_out.images), max(80, settings.evaluation_images + 40)
    if count < least:
        raise UserError(
            f"{settings.dataset} holds out {count} images ({dataset.source}), and intervals need {least}: prepare "
            f"{10 * least} images or more, or lower evaluation_images"
        )
    return device_images.load(dataset, device, training_set=settings.resident)


def smaller(dataset: datasets.Dataset, side: int) -> datasets.Dataset:
    """The same with each image `side` pixels wide, uint8 means over squares of pixels; itself where it is so already.

    Raises `ValueError` where the images' side is no multiple.
    """
    width = dataset.train.images.shape[1]
    if width == side:
        return dataset
    if width % side:
        raise ValueError(f"images of {width} pixels have no squares that make {side}")

    def means(split: datasets.Split) -> datasets.Split:
        parts = np.array_split(split.images, max(1, len(split.images) // 1000))
        squares = [part.reshape(-1, side, width // side, side, width // side, part.shape[3]) for part in parts]
        return datasets.Split(
            np.concatenate([np.rint(one.mean((2, 4))).astype(np.uint8) for one in squares]), split.labels
        )

    source = f"{dataset.source}, means over squares of {width // side} x {width // side} pixels"
    return replace(dataset, train=means(dataset.train), held_out=means(dataset.held_out), source=source)


def build(settings: Any, shape: tuple[int, int, int], name: str) -> SequentialVAE:
    """A new model, `name` as in the module's table, for images of `shape`, with weights from torch's generator."""
    channels, side, _ = shape
    size = Size(channels, side, settings.widths, settings.units, settings.maps, settings.kernel)
    if name == "one_step":
        size = replace(
            size, widths=settings.one_step_widths, units=settings.one_step_units, maps=settings.one_step_maps
        )
        return SequentialVAE(settings, size, 1, settings.one_step_ladder)
    if name == "picture":
        size = replace(size, widths=settings.picture_widths)
    ladder = () if name in ("infusion", "no_latent") else settings.ladder
    return SequentialVAE(settings, size, settings.chain_steps, ladder, infusion=name == "infusion")


def fit(run: Run, images: Images) -> dict[str, train.Trained]:
    """Train all models of the table, or continue, or load the recorded model `sequential`: by name.

    Where the settings ask for one there is also `picture`, the same chain on larger images, for the figure alone.
    """
    settings = run.settings
    if run.weights == "recorded":
        return {"sequential": load_model(run, build(settings, images.shape, "sequential").to(run.device))}
    trained = {"sequential": fit_model(run, images, "sequential", settings.train_steps)}
    parent = trained["sequential"].model
    trained["one_step"] = fit_model(
        run, images, "one_step", settings.one_step_train_steps, rates=rates(run, images, parent)
    )
    trained["infusion"] = fit_model(run, images, "infusion", settings.infusion_train_steps)
    trained["no_latent"] = fit_model(run, images, "no_latent", settings.ablation_train_steps, parent=parent)
    if settings.picture_side:
        larger = load_images(settings, run.device, settings.picture_side)
        trained["picture"] = fit_model(run, larger, "picture", settings.picture_train_steps)
    return trained


def fit_model(
    run: Run,
    images: Images,
    name: str,
    train_steps: int,
    *,
    rates: tuple[float, float] | None = None,
    parent: SequentialVAE | None = None,
) -> train.Trained:
    """Train one model into the run's folder. `rates`, see there, are the targets of the KL controller of `one_step`;
    `parent` is the trained chain from whose images `no_latent` starts.
    """
    settings = run.settings
    torch.manual_seed(run.seed)
    vae = build(settings, images.shape, name).to(run.device)
    per_step_loss = settings.per_step_loss or name in ("infusion", "no_latent")
    steps = list(range(2 if name == "no_latent" else 1, vae.steps + 1))

    def batch(rows: Tensor) -> Tensor:
        x = images.to_float(images.batch(rows))
        return features.augmented(x, mirror=settings.mirror, reach=settings.shift)

    def evaluated(vae: nn.Module) -> dict[str, float]:
        held_out = images.held_out[: settings.evaluation_images]
        return watched(evaluate(vae, images, held_out, parent), images, rates and rates[1])

    return train.fit(
        vae,
        _loss(settings, vae, steps, per_step_loss, rates, parent),
        batch,
        len(images.train),
        _recipe(settings, train_steps),
        run.directory / name,
        seed=run.seed,
        device=torch.device(run.device),
        evaluate=evaluated,
        provenance=describe_code(),
        name=name,
        partial=per_step_loss and 0 < settings.steps_per_batch < len(steps) - 1,
    )


def _recipe(settings: Any, train_steps: int) -> train.Recipe:
    return train.Recipe(
        train_steps,
        settings.batch_size,
        settings.learning_rate,
        schedule=settings.schedule,
        warmup=min(settings.warmup, train_steps // 5),
        ema=settings.ema,
        precision=settings.precision,
        clip_norm=settings.clip_norm,
        evaluate_every=max(1, train_steps // settings.evaluations),
        patience=settings.patience,
        compile=settings.compile,
    )


def _loss(
    settings: Any,
    vae: SequentialVAE,
    steps: list[int],
    per_step_loss: bool,
    rates: tuple[float, float] | None,
    parent: SequentialVAE | None,
) -> train.Loss:
    """What `fit_model` minimises: equation (2) over steps drawn for each batch, those of network 1 always."""
    noise = 0.0 if vae.infusion else settings.input_noise
    first = [t for t in steps if t == 1]  # has a network of its own

    def loss(model: nn.Module, x: Tensor, progress: train.Progress) -> tuple[Tensor, dict[str, Tensor]]:
        chosen = random_steps(steps, settings.steps_per_batch if per_step_loss else 0, always=first)
        if parent is not None:
            links = no_latent_links(vae, x, parent, chosen=list(chosen), noise=noise, call=model)
        else:
            links = chain(vae, x, per_step_loss=per_step_loss, chosen=list(chosen), noise=noise, call=model)
        links = [link for link in links if link.t in chosen]
        beta = kl_annealing_factor(settings, progress.fraction) * vae.log_weight.exp()
        value, terms = objective(links, beta, weights=chosen, per_step_loss=per_step_loss)
        if rates is not None:
            if progress.fraction > 3 * settings.kl_annealing:  # before, KL annealing decides the rate
                update_kl_weight(vae, distributed.mean(terms["kl"]), rates[0], settings.kl_controller_gain)
            terms["kl_weight"] = vae.log_weight.exp()
        return value, terms

    return loss


def rates(run: Run, images: Images, vae: SequentialVAE) -> tuple[float, float]:
    """E KL over all steps in nats per image: on training images, augmented as in training, the targets of a
    batch, and on the held-out images that a training watches.
    """
    settings, rates = run.settings, []
    known = images.batch(torch.linspace(0, len(images.train) - 1, 1000).long())
    with run.seeded():
        moved = features.augmented(images.to_float(known), mirror=settings.mirror, reach=settings.shift)
        for pictures in (torch.from_numpy(datasets.to_uint8(moved, images.dataset.levels)), images.held_out):
            pictures = pictures[: settings.evaluation_images] if pictures is images.held_out else pictures
            rates.append(float(evaluate(vae, images, pictures)["kl"].sum(1).mean()))
    return rates[0], rates[1]


def watched(measured: dict[str, Tensor], images: Images, rate: float | None = None) -> dict[str, float]:
    """What a training watches on held-out images, the first of which decides where it stops.

    Minus the bound (8) in nats per dimension; for chains without codes minus the mean log p. Where the rate has a
    target, minus log p and ten nats for each nat of rate that is further than 5 % from its target: what has not yet
    come down to the rate would have the least error.
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


def kl_annealing_factor(settings: Any, fraction: float) -> float:
    """What multiplies the KL's weight at a fraction of training, beta of equation (2)."""
    return 1 - math.exp(-fraction / settings.kl_annealing) if settings.kl_annealing else 1.0


@torch.no_grad()
def update_kl_weight(vae: SequentialVAE, kl: Tensor, target: float, gain: float) -> None:
    """The KL controller: multiply the weight of the KL by (kl / target)^gain, so that a KL above target raises it.

    One step multiplies or divides by at most e^gain. The weight is kept among the model's buffers, by its logarithm,
    so a resumed training goes on with it.
    """
    error = torch.log(kl.clamp(min=1e-6) / target).clamp(-1, 1)
    vae.log_weight.add_(gain * error.to(vae.log_weight.dtype)).clamp_(-MAX_LOG_KL_WEIGHT, MAX_LOG_KL_WEIGHT)


@torch.no_grad()
def evaluate(
    vae: SequentialVAE, images: Images, pictures: Tensor, parent: SequentialVAE | None = None
) -> dict[str, Tensor]:
    """Of uint8 `pictures` (N, S, S, C), each (N, T): `error`, the squared error per dimension of x(t), `log_p` and `kl`
    in nats. Codes are samples, from torch's generator. For `no_latent`, given its `parent`, T is one less.
    """
    terms: dict[str, list[Tensor]] = {"error": [], "log_p": [], "kl": []}
    for x in batches(images, pictures):
        links = chain(vae, x) if parent is None else no_latent_links(vae, x, parent)
        terms["error"].append(torch.stack([squared_error(link.step.image, x) for link in links], 1))
        terms["log_p"].append(torch.stack([link.log_p for link in links], 1))
        terms["kl"].append(torch.stack([link.kl for link in links], 1))
    return {name: torch.cat(parts).double() for name, parts in terms.items()}
