"""The trainings of notebook 03: the sequential VAE, what it is compared with, and its control.

| model | chain | objective |
| --- | --- | --- |
| `sequential` | T steps, each with a code | equation (2) of `model` at every step |
| `one_step` | one step, a code as large as all, as much arithmetic | a KL controller holds it at `sequential`'s E KL |
| `infusion` | T steps, the code a random subset of the target's pixels | (10) |
| `no_latent` | the steps 2 .. T without codes, from the images of the trained `sequential` | log p alone |

A batch is taken through the whole chain, with an update of the weights after each of its steps.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from paperlib.data import datasets
from paperlib.data.device_images import Images
from paperlib.runs import train
from paperlib.runs.provenance import describe_code
from paperlib.runs.recorded import read_weights
from paperlib.sequential.model import (
    PixelCodes,
    SequentialVAE,
    after,
    batches,
    build,
    chain,
    no_latent_links,
    pixel_codes,
    squared_error,
    take_step,
)
from paperlib.stats import features
from paperlib.system import distributed, files
from paperlib.system.devices import seeded

MAX_LOG_KL_WEIGHT = math.log(1000.0)  # up and down, of the weight of the one-step baseline's KL


def fit(settings: Any, images: Images, directory: Path, seed: int) -> dict[str, train.Trained]:
    """Train all models of the table, or continue, each in a folder of its name below `directory`: by name."""

    def fitted(name: str, train_steps: int, **more: Any) -> train.Trained:
        return fit_model(settings, images, name, train_steps, directory, seed, **more)

    trained = {"sequential": fitted("sequential", settings.train_steps)}
    parent = trained["sequential"].model
    targets = rates(settings, images, parent, seed)
    trained["one_step"] = fitted("one_step", settings.one_step_train_steps, rates=targets)
    trained["infusion"] = fitted("infusion", settings.infusion_train_steps)
    trained["no_latent"] = fitted("no_latent", settings.ablation_train_steps, parent=parent)
    return trained


def fit_model(
    settings: Any,
    images: Images,
    name: str,
    train_steps: int,
    directory: Path,
    seed: int,
    *,
    rates: tuple[float, float] | None = None,
    parent: SequentialVAE | None = None,
) -> train.Trained:
    """Train one model into its folder below `directory`. `rates`, see there, are the targets of the KL controller of
    `one_step`; `parent` is the trained chain from whose images `no_latent` starts.
    """
    torch.manual_seed(seed)
    vae = build(settings, images.shape, name).to(images.device)
    start_from = settings.start_from if name == "sequential" else ""
    if start_from:
        vae.load_state_dict(read_weights(files.ROOT / start_from))

    def batch(rows: Tensor) -> "Chains":
        x = features.augmented(images.to_float(images.batch(rows)), mirror=settings.mirror, reach=settings.shift)
        codes = pixel_codes(vae, x) if vae.infusion else None
        return Chains(x, codes.noise[0] if codes else None, codes)

    def evaluated(vae: nn.Module) -> dict[str, float]:
        held_out = images.held_out[: settings.evaluation_images]
        return watched(evaluate(vae, images, held_out, parent), images, rates and rates[1])

    recipe = _recipe(settings, train_steps, vae.steps - (parent is not None))
    return train.fit(
        vae,
        _loss(settings, vae, rates and rates[0], parent),
        batch,
        len(images.train),
        recipe,
        directory / name,
        seed=seed,
        device=images.device,
        evaluate=evaluated,
        provenance=describe_code() | {"start_from": start_from},
        name=name,
        partial=recipe.updates > 1,
    )


def _recipe(settings: Any, train_steps: int, updates: int) -> train.Recipe:
    return train.Recipe(
        train_steps,
        settings.batch_size,
        settings.learning_rate,
        schedule=settings.schedule,
        warmup=min(settings.warmup, train_steps // 5),
        ema=settings.ema,
        precision=settings.precision,
        clip_norm=settings.clip_norm,
        updates=updates,
        evaluate_every=max(1, train_steps // settings.evaluations),
        patience=settings.patience,
        compile=settings.compile,
    )


class Chains(NamedTuple):
    """A batch on its way: targets (B, C, S, S), the images x(t) so far, and infusion's codes."""

    x: Tensor
    image: Tensor | None
    codes: PixelCodes | None


def _loss(settings: Any, vae: SequentialVAE, rate: float | None, parent: SequentialVAE | None) -> train.Loss:
    """What `fit_model` minimises: of each update, minus equation (2) of one step of the chain."""
    noise = 0.0 if vae.infusion else settings.input_noise

    def loss(model: nn.Module, chains: Chains, progress: train.Progress) -> tuple[Tensor, dict[str, Tensor], Chains]:
        x, image, codes = chains
        t = progress.update + 1
        if parent is not None:  # its step t, after which comes the control's step t + 1
            with torch.no_grad():
                image, t = after(parent, take_step(parent, t, x, image)), t + 1
        link = take_step(vae, t, x, image, noise=noise, codes=codes, call=model)
        beta = kl_annealing_factor(settings, progress.fraction) * vae.log_weight.exp()
        terms = {"log_p": link.log_p.mean(), "kl": link.kl.mean()}
        if rate is not None:
            if progress.fraction > 3 * settings.kl_annealing:  # before, KL annealing decides the rate
                update_kl_weight(vae, distributed.mean(terms["kl"]), rate, settings.kl_controller_gain)
            terms["kl_weight"] = vae.log_weight.exp()
        image = image if parent is not None else after(vae, link, codes)
        return beta * terms["kl"] - terms["log_p"], terms, Chains(x, image, codes)

    return loss


def rates(settings: Any, images: Images, vae: SequentialVAE, seed: int) -> tuple[float, float]:
    """E KL over all steps in nats per image: on training images, augmented as in training, the targets of a
    batch, and on the held-out images that a training watches.
    """
    rates = []
    known = images.batch(torch.linspace(0, len(images.train) - 1, 1000).long())
    with seeded(seed, images.device):
        moved = features.augmented(images.to_float(known), mirror=settings.mirror, reach=settings.shift)
        seen = torch.from_numpy(datasets.to_uint8(moved, images.dataset.levels))
        for pictures in (seen, images.held_out[: settings.evaluation_images]):
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
