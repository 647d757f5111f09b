"""The objectives and trainings of notebook 04.

All objectives have the reconstruction term; what they add is an entry of `OBJECTIVES`, in nats per image:

    (2)  L = E_q(x,z) log p(x|z) - R,   R = beta E KL(q(z|x) || N(0, I))   "elbo"
                                        R = 0                             "none"
                                        R = lambda MMD^2(q(z), N(0, I))   "mmd"

Only "elbo" with beta = 1 is a lower bound of log p(x). The `VARIANTS` are fine-tuned from one model that is pretrained
without regulariser. Against posterior collapse the decoder sees no pixel of a share of the images, falling to 0 at half
of pretraining (Bowman et al. 2016, arXiv 1511.06349, do so with words), and std(x) begins near `min_std`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from paperlib.data.device_images import Images
from paperlib.nn import likelihoods, pixelcnn
from paperlib.pixelvae.model import BATCH, PixelVAE, build
from paperlib.runs import train
from paperlib.runs.provenance import describe_code
from paperlib.stats.two_sample import gaussian_mmd
from paperlib.system import distributed, files
from paperlib.system.devices import oom_as_user_error

# R of (2), nats per image, of mean, log_std and z, (B, D).
OBJECTIVES: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Tensor]] = {
    "elbo": lambda settings, mean, log_std, z: settings.kl_weight * likelihoods.gaussian_kl(mean, log_std).mean(),
    "none": lambda settings, mean, log_std, z: z.new_zeros(()),
    "mmd": lambda settings, mean, log_std, z: settings.mmd_weight * gaussian_mmd(distributed.gathered(z)),
}


class Variant(NamedTuple):
    """One training: an entry of `OBJECTIVES`, the encoder (see `PixelVAE`), and whether it does without pretraining."""

    objective: str = "none"
    encoder: str = "conv"
    scratch: bool = False


Weights = Mapping[str, Tensor] | None  # of a pretrained model
PRETRAINING = "pretraining"
VARIANTS = {
    "none": Variant(),
    "elbo": Variant("elbo"),
    "mmd": Variant("mmd"),
    "none-scratch": Variant(scratch=True),
    "elbo-scratch": Variant("elbo", scratch=True),
    "unconditional": Variant(encoder="nothing"),
    "label": Variant(encoder="label"),
    "linear": Variant(encoder="linear"),
}
CODED = tuple(name for name, variant in VARIANTS.items() if variant.encoder in ("conv", "linear"))  # these learn a code
ABLATIONS = ("label", "linear")


def fit(settings: Any, images: Images, directory: Path, seed: int) -> dict[str, train.Trained]:
    """Train or continue `PRETRAINING`, where it has steps, and all `VARIANTS`, in folders below `directory`; by name.

    Raises `UserError` as `train.fit`, and where `start_from` names no model.
    """
    pretrained = train.load_weights(files.runs_root() / settings.start_from) if settings.start_from else None
    trained = {}
    if steps := settings.pretrain_steps:
        first = fit_variant(settings, images, PRETRAINING, Variant(), steps, directory, seed, pretrained)
        trained[PRETRAINING], pretrained = first, first.model.state_dict()
    for name, variant in VARIANTS.items():
        if variant.scratch and pretrained is None:  # nothing to do without
            trained[name] = trained[name.removesuffix("-scratch")]
            continue
        steps = settings.ablation_steps if name in ABLATIONS else settings.finetune_steps
        trained[name] = fit_variant(settings, images, name, variant, steps, directory, seed, pretrained)
    return trained


def fit_variant(
    settings: Any,
    images: Images,
    name: str,
    variant: Variant,
    steps: int,
    directory: Path,
    seed: int,
    pretrained: Weights = None,
) -> train.Trained:
    """Train one model, into the folder `name` below `directory`, from the weights of `pretrained` that match it.

    Pretraining keeps its learning rate and hides pixels from the decoder; all others follow the settings' schedule.
    """

    def batch(rows: Tensor) -> tuple[Tensor, Tensor]:
        return images.to_float(images.batch(rows)), images.labels[rows.to(images.device)]

    def evaluated(vae: nn.Module) -> dict[str, float]:
        n = settings.evaluation_images
        measured = evaluate(vae, images, images.held_out[:n], images.held_out_labels[:n])
        return {key: float(value.mean()) for key, value in measured.items()}

    schedule, input_dropout = ("constant", settings.input_dropout) if name == PRETRAINING else (settings.schedule, 0.0)
    vae, recipe = _initial(settings, images, variant, seed, pretrained), _recipe(settings, steps, schedule)
    loss = _loss(settings, OBJECTIVES[variant.objective], input_dropout)
    options = {"seed": seed, "device": images.device, "provenance": describe_code(), "name": name}
    return train.fit(vae, loss, batch, len(images.train), recipe, directory / name, evaluate=evaluated, **options)


def _initial(settings: Any, images: Images, variant: Variant, seed: int, pretrained: Weights) -> PixelVAE:
    """The model that a training starts with: matching weights of `pretrained`, or new ones set by a first batch."""
    torch.manual_seed(seed)
    vae = build(settings, images, variant.encoder)
    if vae.learns_code and not variant.scratch:
        with torch.no_grad():
            vae.encoder[-1].bias[vae.code_dim :].fill_(-3)  # std(x) near min_std
    if pretrained is not None and not variant.scratch:
        load_matching_weights(vae, pretrained)
        return vae
    first = train.batch_indices(seed, len(images.train), max(64, settings.batch_size), 0).to(images.device)
    x, labels = images.to_float(images.train[first]), images.labels[first]
    with torch.no_grad(), oom_as_user_error(f"lower batch_size (now {settings.batch_size})"):
        pixelcnn.initialise(vae.decoder, x, vae.h(vae.code(x, labels)[2]))
    return vae


def load_matching_weights(vae: PixelVAE, weights: Mapping[str, Tensor]) -> None:
    """Load those of `weights` whose name and shape agree with the model's; an encoder whole or not at all."""
    own = vae.state_dict()
    matching = {k: v for k, v in weights.items() if k in own and own[k].shape == v.shape}
    encoder = {k for k in [*own, *weights] if k.startswith("encoder.")}
    if not encoder <= set(matching):
        matching = {k: v for k, v in matching.items() if k not in encoder}
    vae.load_state_dict(own | matching)


def _recipe(settings: Any, steps: int, schedule: str) -> train.Recipe:
    same = ("batch_size", "learning_rate", "decay", "betas", "ema", "precision", "clip_norm", "compile")
    taken, every = {name: getattr(settings, name) for name in same}, max(1, steps // settings.evaluations)
    return train.Recipe(steps, **taken, schedule=schedule, warmup=min(200, steps // 5), evaluate_every=every)


def _loss(settings: Any, objective: Callable[..., Tensor], input_dropout: float) -> train.Loss:
    """-L of (2) in nats per image; `input_dropout` is the share of images not seen, falling to 0 at half the steps."""

    def loss(vae: nn.Module, batch: Any, progress: train.Progress) -> tuple[Tensor, dict[str, Tensor]]:
        x, labels = batch
        hidden = input_dropout * max(0.0, 1 - 2 * progress.fraction)
        seen = distributed.rand((len(x), 1, 1, 1), device=x.device) >= hidden
        terms = vae(x, labels, seen.to(x.dtype))
        reconstruction = -terms.log_p.mean()
        logged = {"bits_per_dim": likelihoods.bits_per_dim(reconstruction.detach(), x[0].numel())}
        if terms.mean is None:
            return reconstruction, logged
        logged["kl"] = likelihoods.gaussian_kl(terms.mean, terms.log_std).mean()
        logged["mmd"] = gaussian_mmd(distributed.gathered(terms.z))
        return reconstruction + objective(settings, terms.mean, terms.log_std, terms.z), logged

    return loss


@torch.no_grad()
def evaluate(vae: PixelVAE, images: Images, pictures: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Each (N,), for uint8 images `pictures`: `bits_per_dim` of the reconstruction term, and where z is learned,
    in nats, `kl` and (3) `shuffle_gap` log p(x|z) - log p(x|z'), z' that of the next image, the last one's the first.
    """
    log_p, shuffled, kl = [], [], []
    for rows in torch.arange(len(pictures), device=pictures.device).split(BATCH):
        x, after = images.to_float(pictures[rows]), (rows + 1) % len(pictures)
        mean, log_std, z = vae.code(x, labels[rows])
        log_p.append(vae.p_x_given_z(x, z).double())
        if vae.learns_code:
            kl.append(likelihoods.gaussian_kl(mean, log_std).double())
            *_, others = vae.code(images.to_float(pictures[after]), labels[after])
            shuffled.append(vae.p_x_given_z(x, others).double())
    measured = {"bits_per_dim": likelihoods.bits_per_dim(-torch.cat(log_p), pictures[0].numel())}
    if vae.learns_code:
        measured |= {"kl": torch.cat(kl), "shuffle_gap": torch.cat(log_p) - torch.cat(shuffled)}
    return measured
