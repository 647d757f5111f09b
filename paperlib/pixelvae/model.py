"""The PixelVAE of notebook 04, its objectives, its trainings and its Markov chain.

The equation numbers up to (4) are those of the notebook. A PixelCNN++ is the decoder p(x|z): it can be any distribution
over images, with or without z. The encoder is a Gaussian

    (5)  q(z|x) = N(mean(x), diag std(x)^2),   std(x) = floor + (1 - floor) sigmoid(s(x))

and a small deconvolution turns z into a map of biases that is added inside every gated block of the decoder. All
objectives have the reconstruction term; what they add is an entry of `OBJECTIVES`, in nats an image:

    (2)  L = E_q(x,z) log p(x|z) - R,   R = beta E KL(q(z|x) || N(0, I))   "elbo"
                                        R = 0                             "none"
                                        R = lambda MMD^2(q(z), N(0, I))   "mmd"

Under "elbo" with beta = 1 the whole is a lower bound of log p(x). **Without the KL the reconstruction term bounds
nothing**: z may carry the image past the decoder, and -E log p(x|z) can fall below the entropy of the data.

The settings of a run (`pixelvae.Settings`) say how large all this is. Trainings share their beginning: the *trunk* is
trained without regulariser, and each *branch* of `VARIANTS` starts from its weights and goes on with its own objective
or encoder.

The trunk needs help. The neighbours of a pixel tell a decoder thousands of nats and a code tens, so for thousands of
steps a code is a nuisance to it, and the encoder is rid of it by making the codes of all images alike. So in the first
half of the trunk the decoder sees no pixel of a falling share of the images (Bowman et al. 2016, arXiv 1511.06349, do
so with words): for these, all must come from z. It also begins with std(x) near its floor. The branches train on what
(2) says and nothing else. "none-scratch" and "elbo-scratch" start without trunk and help, and are their controls.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from paperlib.data import datasets, device_images
from paperlib.data.device_images import Images
from paperlib.nn import likelihoods, pixelcnn
from paperlib.nn.pixelcnn import PixelCNN, PixelCNNSettings
from paperlib.nn.pixelcnn_sampler import Sampler
from paperlib.runs import train
from paperlib.runs.provenance import describe_code
from paperlib.runs.recorded import load_recorded_weights
from paperlib.runs.run import Run
from paperlib.stats.two_sample import gaussian_mmd
from paperlib.system import distributed, files
from paperlib.system.devices import oom_as_user_error

# What each objective adds to the reconstruction term, equation (2): nats an image, from mean, log_std and z, (B, D).
OBJECTIVES: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Tensor]] = {
    "elbo": lambda settings, mean, log_std, z: settings.kl_weight * likelihoods.gaussian_kl(mean, log_std).mean(),
    "none": lambda settings, mean, log_std, z: z.new_zeros(()),
    "mmd": lambda settings, mean, log_std, z: settings.mmd_weight * gaussian_mmd(distributed.gathered(z)),
}


class Variant(NamedTuple):
    """One training: an entry of `OBJECTIVES`, how z comes from x, and whether it starts from the trunk.

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


class Terms(NamedTuple):
    """What a PixelVAE says of a batch: log p(x|z) in nats (B,), and mean, log_std and the sample z (B, D).

    With a code that is not learned the last three are None.
    """

    log_p: Tensor
    mean: Tensor | None
    log_std: Tensor | None
    z: Tensor | None


class PixelVAE(nn.Module):
    """q(z|x) and p(x|z), see the module; images (B, C, S, S) in [-1, 1] with S a multiple of 8."""

    def __init__(self, settings: Any, channels: int, side: int, levels: int, classes: int, encoder: str) -> None:
        super().__init__()
        self.kind, self.floor, self.classes = encoder, settings.floor, classes
        self.code_dim = {"label": classes, "nothing": 0}.get(encoder, settings.code_dim)
        outputs = 2 * self.code_dim
        if encoder == "linear":
            self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(channels * side * side, outputs))
        elif encoder == "conv":
            self.encoder = _convolutions(channels, side, settings.encoder_channels, settings.encoder_units, outputs)
        if self.code_dim:
            self.expand = _deconvolutions(self.code_dim, side, settings.code_channels)
        self.decoder = PixelCNN(
            PixelCNNSettings(
                channels=channels,
                levels=levels,
                blocks=settings.blocks,
                filters=settings.filters,
                mixtures=settings.mixtures,
                dropout=settings.dropout,
                conditioning=settings.code_channels if self.code_dim else 0,
            )
        )
        _keep_deviations(self)

    @property
    def learns_code(self) -> bool:
        return self.kind in ("conv", "linear")

    def q_z_given_x(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-deviation of q(z|x), equation (5): two (B, D), never in half precision."""
        encoded = self.encoder(x)
        mean, s = encoded.to(torch.promote_types(encoded.dtype, torch.float32)).chunk(2, 1)
        return mean, torch.log(self.floor + (1 - self.floor) * torch.sigmoid(s))

    def h(self, z: Tensor | None) -> Tensor | None:
        """What the decoder gets to see of z (B, D): a map (B, code_channels, S/2, S/2). None for a model without z."""
        return None if z is None else self.expand(z)

    def p_x_given_z(self, x: Tensor, z: Tensor | None) -> Tensor:
        """log p(x|z) in nats, (B,)."""
        return pixelcnn.log_prob(self.decoder, x, self.h(z))

    def sample_z(self, x: Tensor, labels: Tensor) -> Tensor | None:
        """z ~ q(z|x), (B, D); the class where that is the code."""
        if self.kind == "nothing":
            return None
        if self.kind == "label":
            return F.one_hot(labels, self.classes).to(x.dtype)
        return likelihoods.sample_gaussian(*self.q_z_given_x(x))

    def forward(self, x: Tensor, labels: Tensor, seen: Tensor | None = None) -> Terms:
        """`seen` (B, 1, 1, 1) is 0 for images of which the decoder sees no pixel, 1 for the others."""
        mean = log_std = None
        if self.learns_code:
            mean, log_std = self.q_z_given_x(x)
            z = likelihoods.sample_gaussian(mean, log_std)
        else:
            z = self.sample_z(x, labels)
        if seen is None:
            return Terms(self.p_x_given_z(x, z), mean, log_std, z)
        params = self.decoder(x * seen, self.h(z))
        levels = self.decoder.settings.levels
        return Terms(likelihoods.discretized_mix_logistic_log_prob(x, params, levels=levels), mean, log_std, z)


def _convolutions(channels: int, side: int, widths: tuple[int, ...], units: int, outputs: int) -> nn.Sequential:
    """4 x 4 convolutions, each halving the image, and a dense layer: the authors' encoder, with normalised layers.

    Without the normalisation Adam's first steps, which move a sum of 4,096 inputs by several units, leave every unit
    saturated and the means the same for all images.
    """
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.GroupNorm(4, width), nn.ELU()]
        channels, side = width, side // 2
    layers += [nn.Flatten(), nn.Linear(channels * side * side, units), nn.LayerNorm(units), nn.ELU()]
    return nn.Sequential(*layers, nn.Linear(units, outputs))


def _deconvolutions(code_dim: int, side: int, channels: int) -> nn.Sequential:
    """z (B, D) to a map (B, channels, side / 2, side / 2)."""
    wide, base = 2 * channels, side // 8
    return nn.Sequential(
        nn.Linear(code_dim, wide * base * base),
        nn.Unflatten(1, (wide, base, base)),
        nn.ELU(),
        nn.ConvTranspose2d(wide, wide, 4, stride=2, padding=1),
        nn.ELU(),
        nn.ConvTranspose2d(wide, channels, 4, stride=2, padding=1),
    )


@torch.no_grad()
def _keep_deviations(vae: PixelVAE) -> None:
    """Initial weights that keep deviations from layer to layer: about 1 for the means over images and for the map.

    torch's own shrink them at every layer, the means to a tenth of the noise.
    """
    layers = [*vae.expand] if vae.code_dim else []
    layers += [*vae.encoder] if vae.learns_code else []
    for layer in layers:
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            heard = layer.weight[0].numel()  # inputs of an output
            if isinstance(layer, nn.ConvTranspose2d):
                heard = layer.weight[:, 0].numel() // math.prod(layer.stride)
            nn.init.normal_(layer.weight, std=1.25 / math.sqrt(heard))  # 1.25: what an ELU takes away
            nn.init.zeros_(layer.bias)
    if vae.learns_code:
        vae.encoder[-1].weight[vae.code_dim :].mul_(0.1)  # std(x) alike for all images


def load_images(run: Run) -> Images:
    return device_images.load(datasets.load(run.settings.dataset), run.device)


def build(run: Run, images: Images, encoder: str = "conv") -> PixelVAE:
    """A new model for these images, with weights from torch's generator."""
    channels, side, _ = images.shape
    return PixelVAE(run.settings, channels, side, images.dataset.levels, images.classes, encoder).to(run.device)


def fit(run: Run, images: Images) -> dict[str, train.Trained]:
    """Train the trunk and every one of `VARIANTS`, or continue, or load the recorded model `none`.

    By name; the trunk, under "trunk", where it has steps.
    """
    settings = run.settings
    if run.weights == "recorded":
        vae = build(run, images).eval()
        vae.load_state_dict(load_recorded_weights(run))
        return {"none": train.Trained(vae, [], 0, 0.0, "recorded", {}, [])}
    parent, trained = None, {}
    if settings.start_from:
        parent = train.load_weights(files.runs_root() / settings.start_from)
    if settings.trunk_steps:
        trained["trunk"] = fit_variant(run, images, "trunk", Variant(), settings.trunk_steps, parent)
        parent = trained["trunk"].model.state_dict()
    for name, variant in VARIANTS.items():
        if variant.scratch and parent is None:  # nothing to do without
            trained[name] = trained[name.removesuffix("-scratch")]
            continue
        steps = settings.control_steps if name in CONTROLS else settings.branch_steps
        trained[name] = fit_variant(run, images, name, variant, steps, parent)
    return trained


CONTROLS = ("label", "linear")


def fit_variant(
    run: Run,
    images: Images,
    name: str,
    variant: Variant,
    steps: int,
    parent: Mapping[str, Tensor] | None = None,
) -> train.Trained:
    """Train one model, into the run's folder; it starts from the weights of `parent` that fit it, where there is one.

    The trunk keeps its learning rate; a branch lets it fall to zero by a cosine, as does a variant without trunk.
    """
    settings, device = run.settings, run.device
    torch.manual_seed(run.seed)
    vae = build(run, images, variant.encoder)
    if vae.learns_code and not variant.scratch:
        with torch.no_grad():
            vae.encoder[-1].bias[vae.code_dim :].fill_(-3)  # std(x) near its floor
    if parent is not None and not variant.scratch:
        inherit(vae, parent)
    else:
        first = train.batch_indices(run.seed, len(images.train), max(64, settings.batch_size), 0).to(device)
        x, labels = images.to_float(images.train[first]), images.labels[first]
        with torch.no_grad(), oom_as_user_error(f"lower batch_size (now {settings.batch_size})"):
            pixelcnn.initialise(vae.decoder, x, vae.h(vae.sample_z(x, labels)))
    recipe = train.Recipe(
        steps,
        settings.batch_size,
        settings.learning_rate,
        schedule="constant" if name == "trunk" else settings.schedule,
        decay=settings.decay,
        warmup=min(200, steps // 5),
        betas=settings.betas,
        ema=settings.ema,
        precision=settings.precision,
        clip_norm=settings.clip_norm,
        evaluate_every=max(1, steps // settings.evaluations),
        compile=settings.compile,
    )

    def loss(
        vae: nn.Module, batch: tuple[Tensor, Tensor], progress: train.Progress
    ) -> tuple[Tensor, dict[str, Tensor]]:
        x, labels = batch
        rate = settings.input_dropout * max(0.0, 1 - 2 * progress.fraction) if name == "trunk" else 0.0
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

    held_out = slice(0, settings.evaluation_images)
    return train.fit(
        vae,
        loss,
        lambda rows: (images.to_float(images.train[rows.to(device)]), images.labels[rows.to(device)]),
        len(images.train),
        recipe,
        run.directory / name,
        seed=run.seed,
        device=device,
        evaluate=lambda vae: {
            key: float(value.mean())
            for key, value in evaluate(vae, images, images.held_out[held_out], images.held_out_labels[held_out]).items()
        },
        provenance=describe_code(),
        name=name,
    )


def inherit(vae: PixelVAE, parent: Mapping[str, Tensor]) -> list[str]:
    """Take over the weights of `parent` whose name and shape agree, and return the names of those that stay new.

    An encoder is taken over whole or not at all.
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
    in nats and `shuffle_gap`, equation (3), what the decoder loses in nats an image when z is that of another image.

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


BATCH = 128  # images at a time where nothing is trained


def _encoded(vae: PixelVAE, images: Images, pictures: Tensor, labels: Tensor) -> tuple[Tensor | None, Tensor]:
    """A sample z, and KL(q(z|x) || N(0, I)) (B,), 0 where the code is not learned."""
    x = images.to_float(pictures)
    if not vae.learns_code:
        return vae.sample_z(x, labels), x.new_zeros(len(x))
    mean, log_std = vae.q_z_given_x(x)
    return likelihoods.sample_gaussian(mean, log_std), likelihoods.gaussian_kl(mean, log_std).double()


@torch.no_grad()
def encode(vae: PixelVAE, images: Images, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-deviation of q(z|x) of uint8 images `pictures` (N, S, S, C): two (N, D)."""
    parts = [vae.q_z_given_x(images.to_float(part)) for part in pictures.to(images.train.device).split(BATCH)]
    means, log_stds = zip(*parts, strict=True)
    return torch.cat(means), torch.cat(log_stds)


# Drawing


class Decoder:
    """Draws x ~ p(x|z) exactly, `batch` images at a time, with the weights that `vae` has now."""

    def __init__(self, vae: PixelVAE, images: Images, batch: int) -> None:
        _, side, _ = images.shape
        self.vae, self.images = vae, images
        self.sampler = Sampler(vae.decoder, batch, side, side)
        self.batch = batch

    @torch.no_grad()
    def __call__(self, z: Tensor, generator: torch.Generator) -> Tensor:
        """Images (N, S, S, C), uint8 on the CPU, one for each code (N, D)."""
        drawn = []
        for part in z.split(self.batch):
            padded = torch.cat([part, part[-1:].expand(self.batch - len(part), -1)])
            x = self.sampler.draw(self.vae.h(padded), generator=generator, progress=False)
            drawn.append(self.images.to_uint8(x[: len(part)]))
        return torch.cat(drawn)


@torch.no_grad()
def markov_chain(
    vae: PixelVAE, images: Images, start: Tensor, steps: int, generator: torch.Generator, name: str = "chain"
) -> Tensor:
    """The chain (4), z ~ q(z|x), x ~ p(x|z), from N images at once: all states, uint8 (steps + 1, N, S, S, C).

    `start` (N, S, S, C) is uint8, noise (`noise_images`) or pictures, and the first state.
    """
    decode = Decoder(vae, images, len(start))
    states = [start.cpu()]
    for _ in tqdm(range(steps), desc=name, leave=False):
        mean, log_std = encode(vae, images, states[-1])
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        states.append(decode(mean + log_std.exp() * noise, generator))
    return torch.stack(states)


def noise_images(images: Images, count: int, generator: torch.Generator) -> Tensor:
    """Images of independent uniform grey levels, uint8 (count, S, S, C)."""
    shape = (count, *images.train.shape[1:])
    pixels = torch.randint(images.dataset.levels, shape, generator=generator, device=generator.device)
    return pixels.to(torch.uint8)
