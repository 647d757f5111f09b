"""The objectives and trainings of notebook 04.

All objectives have the reconstruction term; what they add is an entry of `OBJECTIVES`, in nats per image:

    (2)  L = E_q(x,z) log p(x|z) - R,   R = beta E KL(q(z|x) || N(0, I))   "elbo"
                                        R = 0                             "none"
                                        R = lambda MMD^2(q(z), N(0, I))   "mmd"

Under "elbo" with beta = 1 the whole is a lower bound of log p(x). **Without the KL the reconstruction term bounds
nothing**: z may carry the image past the decoder, and -E log p(x|z) can fall below the entropy of the data.

Trainings share their beginning: pretraining without regulariser, from whose weights each of `VARIANTS` is fine-tuned
with its own objective or encoder.

Pretraining needs help. The neighbours of a pixel tell a decoder thousands of nats and a code tens, so for thousands of
steps the decoder ignores z and the posterior collapses: the codes of all images become alike. So in the first half of
pretraining the decoder sees no pixel of a falling share of the images (Bowman et al. 2016, arXiv 1511.06349, do so with
words): for these, all must come from z. It also begins with std(x) near its minimum. Fine-tuning trains on what (2)
says and nothing else. "none-scratch" and "elbo-scratch" start without pretraining and help, and are their controls.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from paperlib.data.device_images import Images
from paperlib.nn import likelihoods, pixelcnn
from paperlib.pixelvae.model import BATCH, PixelVAE
from paperlib.runs import train
from paperlib.runs.provenance import describe_code
from paperlib.runs.recorded import load_recorded_weights
from paperlib.runs.run import Run
from paperlib.stats.two_sample import gaussian_mmd
from paperlib.system import distributed, files
from paperlib.system.devices import oom_as_user_error

# What each objective adds to the reconstruction term, equation (2): nats per image, from mean, log_std and z, (B, D).
OBJECTIVES: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Tensor]] = {
    "elbo": lambda settings, mean, log_std, z: settings.kl_weight * likelihoods.gaussian_kl(mean, log_std).mean(),
    "none": lambda settings, mean, log_std, z: z.new_zeros(()),
    "mmd": lambda settings, mean, log_std, z: settings.mmd_weight * gaussian_mmd(distributed.gathered(z)),
}


class Variant(NamedTuple):
    """One training: an entry of `OBJECTIVES`, how z comes from x, and whether it starts without pretraining.

    Encoders: "conv", "linear", "label" (z is the class of the image, one-hot, not learned) and "nothing" (no z: an
    unconditional PixelCNN++).
    """

    objective: str = "none"
    encoder: str = "conv"
    scratch: bool = False


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


def build(settings: Any, images: Images, encoder: str = "conv") -> PixelVAE:
    """A new model for these images, with weights from torch's generator."""
    channels, side, _ = images.shape
    return PixelVAE(settings, channels, side, images.dataset.levels, images.classes, encoder).to(images.device)


def fit(run: Run, images: Images) -> dict[str, train.Trained]:
    """Pretrain, then fine-tune every one of `VARIANTS`, or continue, or load the recorded model `none`: by name.

    Under "pretraining" the model that all share, where it has steps.
    """
    settings = run.settings
    if run.weights == "recorded":
        vae = build(settings, images).eval()
        vae.load_state_dict(load_recorded_weights(run))
        return {"none": train.Trained(vae, [], 0, 0.0, "recorded", {}, [])}
    parent, trained = None, {}
    if settings.start_from:
        parent = train.load_weights(files.runs_root() / settings.start_from)
    if settings.pretrain_steps:
        trained["pretraining"] = fit_variant(run, images, "pretraining", Variant(), settings.pretrain_steps, parent)
        parent = trained["pretraining"].model.state_dict()
    for name, variant in VARIANTS.items():
        if variant.scratch and parent is None:  # nothing to do without
            trained[name] = trained[name.removesuffix("-scratch")]
            continue
        steps = settings.ablation_steps if name in ABLATIONS else settings.finetune_steps
        trained[name] = fit_variant(run, images, name, variant, steps, parent)
    return trained


ABLATIONS = ("label", "linear")


def fit_variant(
    run: Run,
    images: Images,
    name: str,
    variant: Variant,
    steps: int,
    parent: Mapping[str, Tensor] | None = None,
) -> train.Trained:
    """Train one model into the run's folder, from the weights of `parent` that fit it where there is one."""
    held_out = slice(0, run.settings.evaluation_images)
    pictures, labels = images.held_out[held_out], images.held_out_labels[held_out]
    pretraining = name == "pretraining"
    return train.fit(
        _initialised(run, images, variant, parent),
        _loss(run.settings, variant, run.settings.input_dropout if pretraining else 0.0),
        lambda rows: (images.to_float(images.train[rows.to(run.device)]), images.labels[rows.to(run.device)]),
        len(images.train),
        _recipe(run.settings, steps, pretraining),
        run.directory / name,
        seed=run.seed,
        device=run.device,
        evaluate=lambda vae: {
            key: float(value.mean()) for key, value in evaluate(vae, images, pictures, labels).items()
        },
        provenance=describe_code(),
        name=name,
    )


def _initialised(run: Run, images: Images, variant: Variant, parent: Mapping[str, Tensor] | None) -> PixelVAE:
    """A model to start from: with the weights of `parent` that fit, or its decoder initialised on the first batch."""
    settings = run.settings
    torch.manual_seed(run.seed)
    vae = build(settings, images, variant.encoder)
    if vae.learns_code and not variant.scratch:
        with torch.no_grad():
            vae.encoder[-1].bias[vae.code_dim :].fill_(-3)  # std(x) near its minimum
    if parent is not None and not variant.scratch:
        load_matching_weights(vae, parent)
        return vae
    first = train.batch_indices(run.seed, len(images.train), max(64, settings.batch_size), 0).to(run.device)
    x, labels = images.to_float(images.train[first]), images.labels[first]
    with torch.no_grad(), oom_as_user_error(f"lower batch_size (now {settings.batch_size})"):
        pixelcnn.initialise(vae.decoder, x, vae.h(vae.sample_z(x, labels)))
    return vae


def _recipe(settings: Any, steps: int, pretraining: bool) -> train.Recipe:
    """Pretraining keeps its learning rate; every other training lets it fall by the schedule."""
    return train.Recipe(
        steps,
        settings.batch_size,
        settings.learning_rate,
        schedule="constant" if pretraining else settings.schedule,
        decay=settings.decay,
        warmup=min(200, steps // 5),
        betas=settings.betas,
        ema=settings.ema,
        precision=settings.precision,
        clip_norm=settings.clip_norm,
        evaluate_every=max(1, steps // settings.evaluations),
        compile=settings.compile,
    )


def _loss(settings: Any, variant: Variant, input_dropout: float) -> train.Loss:
    """Minus equation (2); the decoder sees no pixel of a share of images, `input_dropout` falling to 0 at half-time."""

    def loss(
        vae: nn.Module, batch: tuple[Tensor, Tensor], progress: train.Progress
    ) -> tuple[Tensor, dict[str, Tensor]]:
        x, labels = batch
        rate = input_dropout * max(0.0, 1 - 2 * progress.fraction)
        seen = distributed.rand((len(x), 1, 1, 1), device=x.device) >= rate
        terms = vae(x, labels, seen.to(x.dtype))
        reconstruction = -terms.log_p.mean()
        logged = {"bits_per_dim": likelihoods.bits_per_dim(reconstruction.detach(), x[0].numel())}
        if terms.mean is None:
            return reconstruction, logged
        added = OBJECTIVES[variant.objective](settings, terms.mean, terms.log_std, terms.z)
        logged["kl"] = likelihoods.gaussian_kl(terms.mean, terms.log_std).mean()
        logged["mmd"] = gaussian_mmd(distributed.gathered(terms.z))
        return reconstruction + added, logged

    return loss


def load_matching_weights(vae: PixelVAE, parent: Mapping[str, Tensor]) -> list[str]:
    """Load the weights of `parent` whose name and shape agree, and return the names of those that stay new.

    An encoder is loaded whole or not at all.
    """
    own = vae.state_dict()
    fits = {k: v for k, v in parent.items() if k in own and own[k].shape == v.shape}
    encoder = {k for k in [*own, *parent] if k.startswith("encoder.")}
    if not encoder <= set(fits):
        fits = {k: v for k, v in fits.items() if k not in encoder}
    vae.load_state_dict(own | fits)
    return [k for k in own if k not in fits]


@torch.no_grad()
def evaluate(vae: PixelVAE, images: Images, pictures: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Each (N,), for uint8 images `pictures`: `bits_per_dim` of the reconstruction term, and where z is learned `kl`
    in nats and `shuffle_gap`, equation (3), what the decoder loses in nats per image when z is that of another image.

    z is one sample of q(z|x), from torch's generator; the other image is the next one, the last one's the first.
    """
    log_p, shuffled, kl = [], [], []
    for rows in torch.arange(len(pictures), device=pictures.device).split(BATCH):
        x, (z, divergence) = images.to_float(pictures[rows]), _encoded(vae, images, pictures[rows], labels[rows])
        log_p.append(vae.p_x_given_z(x, z).double())
        kl.append(divergence)
        if vae.learns_code:
            after = (rows + 1) % len(pictures)
            others, _ = _encoded(vae, images, pictures[after], labels[after])
            shuffled.append(vae.p_x_given_z(x, others).double())
    measured = {"bits_per_dim": likelihoods.bits_per_dim(-torch.cat(log_p), pictures[0].numel())}
    if vae.learns_code:
        measured |= {"kl": torch.cat(kl), "shuffle_gap": torch.cat(log_p) - torch.cat(shuffled)}
    return measured


def _encoded(vae: PixelVAE, images: Images, pictures: Tensor, labels: Tensor) -> tuple[Tensor | None, Tensor]:
    """A sample z, and KL(q(z|x) || N(0, I)) (B,), 0 where the code is not learned."""
    x = images.to_float(pictures)
    if not vae.learns_code:
        return vae.sample_z(x, labels), x.new_zeros(len(x))
    mean, log_std = vae.q_z_given_x(x)
    return likelihoods.sample_gaussian(mean, log_std), likelihoods.gaussian_kl(mean, log_std).double()
