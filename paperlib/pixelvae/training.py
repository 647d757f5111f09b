"""The objectives of notebooks 04 and 05, and the trainings of 04.

All objectives have the reconstruction term; what they add is an entry of `OBJECTIVES`, in nats per image:

    (2)  L = E_q(x,z) log p(x|z) - R,   R = beta E KL(q(z|x) || N(0, I))   "elbo"
                                        R = 0                             "none"
                                        R = max(E KL(q(z|x) || N(0, I)), lambda)   "free-bits"
                                        R = w MMD^2(q(z), N(0, I))        "mmd"

Only "elbo" with beta = 1 is a lower bound of log p(x). Without a KL a code can be learned at leisure, and is learned
best before the pixels are: at first the decoder of `none` sees no pixel of any image, and the model is an autoencoder;
the share of images of which it sees none falls to 0 at half of the training (input dropout: Bowman et al. 2016, arXiv
1511.06349, do so with words). There std(x) also begins near `min_std`.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from paperlib.data.device_images import Images
from paperlib.nn import likelihoods, pixelcnn
from paperlib.pixelvae.markov_chain import two_decodes
from paperlib.pixelvae.model import BATCH, PixelVAE, build
from paperlib.runs import train
from paperlib.runs.provenance import describe_code
from paperlib.runs.recorded import read_weights
from paperlib.stats.autocorrelation import pair_correlation
from paperlib.stats.two_sample import gaussian_mmd
from paperlib.system import distributed, files
from paperlib.system.devices import oom_as_user_error, stream

# R of (2), nats per image, of mean, log_std and z, (B, D).
OBJECTIVES: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Tensor]] = {
    "elbo": lambda settings, mean, log_std, z: settings.kl_weight * likelihoods.gaussian_kl(mean, log_std).mean(),
    "none": lambda settings, mean, log_std, z: z.new_zeros(()),
    "free-bits": lambda settings, mean, log_std, z: (
        likelihoods.gaussian_kl(mean, log_std).mean().clamp(min=settings.free_bits)
    ),
    "mmd": lambda settings, mean, log_std, z: settings.mmd_weight * gaussian_mmd(distributed.gathered(z)),
}


class Variant(NamedTuple):
    """One training: an entry of `OBJECTIVES`, whether there is a code, whether pixels are at first hidden from the
    decoder, so that it begins as an autoencoder, and the kinds of encoder and decoder, see `PixelVAE`."""

    objective: str = "none"
    coded: bool = True
    autoencoder_first: bool = False
    linear: bool = False
    factored: bool = False


Weights = Mapping[str, Tensor] | None
VARIANTS = {
    "none": Variant(autoencoder_first=True),
    "elbo": Variant("elbo"),
    "unconditional": Variant(coded=False),
}
# `none` trained on with all pixels seen, with its code and without: the difference is what the decoder wins by it.
ABLATION = {"trained-on": Variant(), "without-code": Variant(coded=False)}
WATCHED_DECODES = 40  # codes of which two decodes are compared while training


def sweep(settings: Any) -> dict[str, tuple[int, float]]:
    """Code dimension and least std of each model of the sweep, by name: those of `sweep_dims`, then `sweep_stds`."""
    points = [(dims, settings.min_std) for dims in settings.sweep_dims]
    points += [(settings.code_dim, std) for std in settings.sweep_stds if std != settings.min_std]
    return {f"sweep-{dims}-{std:g}": (dims, std) for dims, std in points}


def fit(settings: Any, images: Images, directory: Path, seed: int) -> dict[str, train.Trained]:
    """Train or continue `VARIANTS`, `ABLATION`, then the `sweep`, in folders of their names below `directory`; by name.

    The models of the sweep start from `none`, but for the layers that read and write another number of dimensions, and
    go through its schedule once more in `sweep_steps`; so does "sweep-without-code", without a code.
    """
    steps = {"none": settings.train_steps, "elbo": settings.elbo_steps, "unconditional": settings.train_steps}
    trained = {}
    for name, variant in VARIANTS.items():
        trained[name] = fit_variant(settings, images, name, variant, steps[name], directory, seed)
    start, none = trained["none"].model.state_dict(), VARIANTS["none"]
    for name, variant in ABLATION.items():
        trained[name] = fit_variant(settings, images, name, variant, settings.ablation_steps, directory, seed, start)
    planned = {name: (none, replace(settings, code_dim=d, min_std=s)) for name, (d, s) in sweep(settings).items()}
    planned["sweep-without-code"] = none._replace(coded=False), settings
    for name, (variant, changed) in planned.items():
        trained[name] = fit_variant(changed, images, name, variant, settings.sweep_steps, directory, seed, start)
    return trained


def fit_variant(
    settings: Any,
    images: Images,
    name: str,
    variant: Variant,
    steps: int,
    directory: Path,
    seed: int,
    start: Weights = None,
) -> train.Trained:
    """Train one model, into the folder `name` below `directory`, from the weights of `start` that match it, `none` from
    those that `settings.start_from` names.

    Held-out images give `bits_per_dim` of the reconstruction term, where there is a code the `kl` in nats, and where it
    is learned first the pixel correlation of `two_decodes` of one code.
    """

    def batch(rows: Tensor) -> Tensor:
        return images.to_float(images.batch(rows))

    def evaluated(vae: nn.Module) -> dict[str, float]:
        measured = evaluate(vae, images, images.held_out[: settings.evaluation_images])
        numbers = {key: float(value.mean()) for key, value in measured.items()}
        if variant.coded and variant.autoencoder_first:
            pair = two_decodes(vae, images, images.held_out[:WATCHED_DECODES], stream(seed, 14, images.device))
            numbers["two_decodes"] = pair_correlation(*(pictures.flatten(1) for pictures in pair)).value
        return numbers

    start_from = settings.start_from if name == "none" else ""
    if start_from:
        start = read_weights(files.ROOT / start_from)
    vae, recipe = _initial(settings, images, variant, seed, start), _recipe(settings, steps)
    provenance = describe_code() | {"start_from": start_from}
    options = {"seed": seed, "device": images.device, "provenance": provenance, "name": name}
    return train.fit(
        vae, _loss(settings, variant), batch, len(images.train), recipe, directory / name, evaluate=evaluated, **options
    )


def _initial(settings: Any, images: Images, variant: Variant, seed: int, start: Weights) -> PixelVAE:
    """The model that a training starts with: matching weights of `start`, or new ones set by a first batch."""
    torch.manual_seed(seed)
    vae = build(settings, images, variant.coded, variant.linear, variant.factored)
    if variant.coded and variant.autoencoder_first:
        with torch.no_grad():
            vae.encoder[-1].bias[vae.code_dim :].fill_(-3)  # std(x) near min_std
    if start is not None:
        load_matching_weights(vae, start)
        return vae
    first = train.batch_indices(seed, len(images.train), max(64, settings.batch_size), 0)
    x = images.to_float(images.batch(first))
    with torch.no_grad(), oom_as_user_error(f"lower batch_size (now {settings.batch_size})"):
        pixelcnn.initialise(vae.decoder, vae.sees * x, vae.h(vae.code(x)[2]))
    return vae


def load_matching_weights(vae: PixelVAE, weights: Mapping[str, Tensor]) -> None:
    """Load those of `weights` whose name and shape agree with the model's."""
    own = vae.state_dict()
    vae.load_state_dict(own | {k: v for k, v in weights.items() if k in own and own[k].shape == v.shape})


def _recipe(settings: Any, steps: int) -> train.Recipe:
    same = ("batch_size", "learning_rate", "schedule", "decay", "betas", "ema", "precision", "clip_norm", "compile")
    taken, every = {name: getattr(settings, name) for name in same}, max(1, steps // settings.evaluations)
    return train.Recipe(steps, **taken, warmup=min(200, steps // 5), evaluate_every=every)


def _loss(settings: Any, variant: Variant) -> train.Loss:
    """-L of (2) in nats per image, with input dropout for a variant that begins as an autoencoder."""
    regulariser = OBJECTIVES[variant.objective]

    def loss(vae: nn.Module, x: Tensor, progress: train.Progress) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = max(0.0, 1 - 2 * progress.fraction) if variant.autoencoder_first else 0.0
        seen = distributed.rand((len(x), 1, 1, 1), device=x.device) >= hidden
        terms = vae(x, seen.to(x.dtype))
        reconstruction = -terms.log_p.mean()
        logged = {"bits_per_dim": likelihoods.bits_per_dim(reconstruction.detach(), x[0].numel())}
        if terms.mean is None:
            return reconstruction, logged
        logged["kl"] = likelihoods.gaussian_kl(terms.mean, terms.log_std).mean()
        return reconstruction + regulariser(settings, *terms[1:]), logged

    return loss


@torch.no_grad()
def evaluate(vae: PixelVAE, images: Images, pictures: Tensor) -> dict[str, Tensor]:
    """Each (N,), for uint8 images `pictures`: `bits_per_dim` of the reconstruction term, and for a model with a code
    `kl`, KL(q(z|x) || N(0, I)) in nats. Codes are samples, from torch's generator.
    """
    log_p, kl = [], []
    for part in pictures.split(BATCH):
        terms = vae(images.to_float(part))
        log_p.append(terms.log_p.double())
        if terms.mean is not None:
            kl.append(likelihoods.gaussian_kl(terms.mean, terms.log_std).double())
    measured = {"bits_per_dim": likelihoods.bits_per_dim(-torch.cat(log_p), pictures[0].numel())}
    return measured | ({"kl": torch.cat(kl)} if kl else {})
