"""The sequential VAE of notebook 03: a chain of images, a new code at every step; its terms and its samples.

The equation numbers up to (4) are those of the notebook, whose (3) says what errors have to do with variances.

An image is made in steps t = 1 .. T. Nothing is known before the first; each takes a code z_t, a ladder of vectors
(`networks`), and the image so far:

    (1)  z_t ~ p(z_t),  x(1) = G_1(z_1),  x(t) = G_t(x(t-1), z_t),  p(x | z_1 .. z_t) = N(x; x(t), sigma_t^2 I)
    (5)  G_t(x', z) = g x' + (1 - g) m,   g in (0, 1) for each pixel and m both from the network
    (6)  sigma_t = sigma_min + exp(10 s_t),   s_t learned

so x(t) is a mean, and pictures show means. p(z_t) is the Gaussian that fits q(z_t) (`prior`). With a
`reconstruction_scale` w in place of learned stds sigma_t is 1 / sqrt(2 w), which makes -log p the squared error times
w, but for a constant. The encoder sees target and chain,

    (7)  q(z_t | x, x(t-1)) = N(mean, diag std^2).

Each step has an objective of its own, in nats per image, in which x(t-1) is given: no gradient goes back from a step to
those before, and the weights move after every step of the chain,

    (2)  L_t = E_q log p(x | z_1 .. z_t) - beta KL(q(z_t | x, x(t-1)) || p(z_t)),   beta = kl_weight (1 - exp(-f / a))

at the fraction f of training, with a the setting `kl_annealing`. For the chain as a whole

    (8)  log p(x) >= E log N(x; x(T), sigma_T^2 I) - sum_t E KL(q(z_t | x, x(t-1)) || p(z_t)).

That is a density of pixels in [-1, 1]; it is no probability of grey levels. (Levels lie 2 / 255 apart, so adding
log(255 / 2) nats per dimension to -log p makes bits per dimension that compare with those, roughly.)

Samples differ from reconstructions, so in training the networks see x(t-1) with noise, of stds up to
`input_noise`. What the gate blends is x(t-1) without it: a later step may then keep what it is given.

`one_step` is (1) with T = 1 and as much arithmetic, and a KL controller raises or lowers the weight of its KL until its
rate, E KL, is that of the chain. `no_latent`, the no-latent ablation, is the control for what further steps do by
themselves: the steps 2 .. T trained again without codes, on the images x(t-1) of the trained chain. `infusion` (Bordes
et al. 2017, arXiv 1703.06975) is the chain whose code is not learned, but a random subset of the target's pixels, ever
larger:

    (9)  z_t = (mask_t, mask_t x),   each pixel of mask_t is 1 with probability alpha_t = min(1, a + (t - 1) b)
    (4)  p_t(x(t) | x') = N(G_t(x'), sigma_t^2 I),   x' = mask_t x + (1 - mask_t) x(t-1),   x(0) uniform in [-1, 1]
    (10) loss = -sum_t log p_t(x | x')

with x(t) drawn, not the mean, and no mask when sampling. It runs through the code of (1) and (2): a subset of pixels
put into x(t-1) is a code that G_t sees, and there is no KL.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paperlib.data.device_images import Images
from paperlib.nn import likelihoods
from paperlib.sequential.networks import Size, Step, StepNetwork
from paperlib.sequential.prior import FittedPrior
from paperlib.system import distributed

BATCH = 100  # images at a time where nothing is trained
SIGMA_LR_SCALE = 10.0  # what multiplies s_t: Adam moves every weight alike, and a std has a long way to go


class SequentialVAE(nn.Module):
    """Equations (1) and (5) to (7), or (4); images (B, C, S, S) in [-1, 1]. Steps count from 1.

    With `shared` weights the steps from the second on have one network and differ by a learned embedding. Without a
    ladder steps have no code: `infusion`, in which the first step sees an image too, or `no_latent`, which has
    no first.
    """

    def __init__(self, settings: Any, size: Size, steps: int, ladder: tuple[int, ...], infusion: bool = False) -> None:
        super().__init__()
        self.steps, self.ladder, self.infusion = steps, ladder, infusion
        self.shape, self.min_sigma = (size.channels, size.side, size.side), settings.min_sigma
        alphas = [min(1.0, settings.infusion_start + t * settings.infusion_step) for t in range(steps)]
        self.register_buffer("alphas", torch.tensor(alphas), persistent=False)
        first = StepNetwork(size, ladder, 1, infusion) if ladder or infusion else nn.Identity()
        counts = [steps - 1] * (steps > 1) if settings.shared else [1] * (steps - 1)
        self.networks = nn.ModuleList([first, *(StepNetwork(size, ladder, count, True) for count in counts)])
        self.priors = nn.ModuleList(FittedPrior(sum(ladder)) for _ in range(steps if ladder else 0))
        self.s = None
        if settings.reconstruction_scale is None:
            self.s = nn.Parameter(torch.full((steps,), math.log(0.5) / SIGMA_LR_SCALE))
        else:
            self.fixed_sigma = 1 / math.sqrt(2 * settings.reconstruction_scale)
        self.register_buffer("positions", torch.arange(steps), persistent=False)
        self.register_buffer("log_weight", torch.tensor(math.log(settings.kl_weight)))

    def place(self, t: int) -> tuple[int, Tensor]:
        """Which network takes step t, and as which of its steps."""
        which = min(t, len(self.networks)) - 1
        return which, self.positions[t - 1 - which]

    def log_sigma(self, t: int) -> Tensor:
        """Of equation (6) at step t."""
        if self.s is None:
            return torch.full((), math.log(self.fixed_sigma), device=self.log_weight.device)
        return torch.log(self.min_sigma + torch.exp(SIGMA_LR_SCALE * self.s[t - 1]))

    def forward(self, x: Tensor, previous: Tensor | None, which: int, index: Tensor, noise: float = 0.0) -> Step:
        return self.networks[which](x, previous, index, noise)

    def generate(self, t: int, previous: Tensor | None, z: Tensor | None) -> Tensor:
        """x(t) by equation (1)."""
        which, index = self.place(t)
        return self.networks[which].generator(previous, previous, z, index)

    def kl(self, t: int, mean: Tensor, log_std: Tensor, rung: int | None = None) -> Tensor:
        """KL(q(z_t | x, x(t-1)) || p(z_t)) in nats of a batch (B, D) twice: (B,); of one rung of the ladder if told,
        against that rung's own part of the prior.
        """
        first = sum(self.ladder[:rung]) if rung else 0
        part = slice(None) if rung is None else slice(first, first + self.ladder[rung])
        return self.priors[t - 1].kl(mean, log_std, part)

    def sample_z(self, t: int, count: int, generator: torch.Generator, fitted: bool = True) -> Tensor | None:
        """z_t ~ p(z_t) (count, D), or from N(0, I) if not `fitted`; None where steps have no code."""
        if not self.ladder:
            return None
        noise = torch.randn(count, sum(self.ladder), generator=generator, device=self.positions.device)
        return self.priors[t - 1].sample(noise) if fitted else noise


def build(settings: Any, shape: tuple[int, int, int], name: str) -> SequentialVAE:
    """A new model, `name` as in the table of `training`, for images of `shape`, with weights from torch's generator."""
    channels, side, _ = shape
    size = Size(channels, side, settings.widths, settings.units, settings.maps, settings.kernel)
    if name == "one_step":
        size = replace(
            size, widths=settings.one_step_widths, units=settings.one_step_units, maps=settings.one_step_maps
        )
        return SequentialVAE(settings, size, 1, settings.one_step_ladder)
    ladder = () if name in ("infusion", "no_latent") else settings.ladder
    return SequentialVAE(settings, size, settings.chain_steps, ladder, infusion=name == "infusion")


class PixelCodes(NamedTuple):
    """What infusion draws: masks (T, B, 1, S, S) of 0 and 1, and noise (T, B, C, S, S).

    The first noise is x(0), uniform in [-1, 1]; the others are standard Gaussian, for x(1) .. x(T-1).
    """

    masks: Tensor
    noise: Tensor


def pixel_codes(vae: SequentialVAE, x: Tensor, generator: torch.Generator | None = None) -> PixelCodes:
    """Equation (9) for a batch (B, C, S, S)."""
    options = {"generator": generator, "dtype": x.dtype, "device": x.device}
    alphas = vae.alphas.to(x.dtype).view(-1, 1, 1, 1, 1)
    masks = distributed.rand((len(x), vae.steps, 1, *x.shape[2:]), **options).transpose(0, 1) < alphas
    noise = distributed.randn((len(x), vae.steps, *x.shape[1:]), **options).transpose(0, 1).contiguous()
    noise[0] = 2 * distributed.rand(x.shape, **options) - 1
    return PixelCodes(masks.to(x.dtype), noise)


class Link(NamedTuple):
    """Step t of the chain for a batch: what the networks said, log p(x | z_1 .. z_t) and KL, both (B,) in nats."""

    t: int
    step: Step
    log_p: Tensor
    kl: Tensor


def take_step(
    vae: SequentialVAE,
    t: int,
    x: Tensor,
    previous: Tensor | None,
    *,
    noise: float = 0.0,
    codes: PixelCodes | None = None,
    call: Callable[..., Step] | None = None,
) -> Link:
    """Step t for targets x (B, C, S, S) after the image x(t-1), its code from q(z_t | x, x(t-1)) by torch's generator.

    `noise` is added to what the networks see of x(t-1). `codes` are those of infusion. `call` stands in for `vae`,
    which may be compiled. In training mode the moments of the step's prior follow its codes.
    """
    if codes is not None:
        previous = codes.masks[t - 1] * x + (1 - codes.masks[t - 1]) * previous
    step = (vae if call is None else call)(x, previous, *vae.place(t), noise)
    log_p = likelihoods.gaussian_log_prob(x, step.image, vae.log_sigma(t))
    if step.mean is None:
        return Link(t, step, log_p, log_p.new_zeros(len(x)))
    if vae.training:
        vae.priors[t - 1].update(step.mean, step.log_std)
    return Link(t, step, log_p, vae.kl(t, step.mean, step.log_std))


def after(vae: SequentialVAE, link: Link, codes: PixelCodes | None = None) -> Tensor:
    """x(t) as the next step is given it, without gradient: the mean, for infusion a draw."""
    image = link.step.image.detach()
    if codes is None or link.t == vae.steps:
        return image
    return image + vae.log_sigma(link.t).detach().exp() * codes.noise[link.t]


def chain(vae: SequentialVAE, x: Tensor, codes: PixelCodes | None = None) -> list[Link]:
    """The whole chain for targets x (B, C, S, S): a link for each step. `codes` of infusion are drawn unless given."""
    if vae.infusion and codes is None:
        codes = pixel_codes(vae, x)
    image, links = codes.noise[0] if codes else None, []
    for t in range(1, vae.steps + 1):
        links.append(take_step(vae, t, x, image, codes=codes))
        image = after(vae, links[-1], codes)
    return links


def no_latent_links(vae: SequentialVAE, x: Tensor, parent: SequentialVAE) -> list[Link]:
    """The control's steps 2 .. T, each from the image x(t-1) of the `parent`'s chain, whose codes it draws."""
    before = chain(parent, x)
    return [take_step(vae, link.t + 1, x, after(parent, link)) for link in before[:-1]]


# Reconstructing, swapping and drawing


@torch.no_grad()
def reconstruct(vae: SequentialVAE, images: Images, pictures: Tensor) -> Tensor:
    """x(1) .. x(T) with codes of uint8 `pictures` (N, S, S, C): uint8 (T, N, S, S, C)."""
    parts = []
    for x in batches(images, pictures):
        parts.append(torch.stack([images.to_uint8(link.step.image) for link in chain(vae, x)]))
    return torch.cat(parts, 1)


@torch.no_grad()
def swap(vae: SequentialVAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """x(t) of a batch with its own codes, and with the code of step t alone taken from another image: two
    (T, B, C, S, S).

    The other image is the next one of the batch, the last one's the first, and its code is what its own chain says.
    """
    links = chain(vae, x)
    own = torch.stack([link.step.image for link in links])
    swapped = [vae.generate(link.t, own[link.t - 2] if link.t > 1 else None, link.step.z.roll(-1, 0)) for link in links]
    return own, torch.stack(swapped)


@torch.no_grad()
def swap_errors(vae: SequentialVAE, images: Images, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error per dimension of both of `swap`, for uint8 `pictures` (N, S, S, C): two (N, T)."""
    parts = []
    for x in batches(images, pictures):
        parts.append([torch.stack([squared_error(image, x) for image in kind], 1).double() for kind in swap(vae, x)])
    own, swapped = zip(*parts, strict=True)
    return torch.cat(own), torch.cat(swapped)


class Drawn(NamedTuple):
    """Images drawn from a model, uint8 on the CPU: noise and x(1) .. x(T), (T + 1, N, S, S, C); and the last means.

    The states are means too, but for infusion's, which are draws.
    """

    states: Tensor
    means: Tensor


@torch.no_grad()
def draw(
    vae: SequentialVAE,
    images: Images,
    count: int,
    generator: torch.Generator,
    *,
    fitted: bool = True,
    first: Tensor | None = None,
) -> Drawn:
    """`count` images by equation (1) or (4), from a generator on the model's device.

    Codes are from N(0, I) if not `fitted`; z_1 is `first` (count, D) where given.
    """
    device, parts = images.held_out.device, []
    for part in torch.arange(count).split(BATCH):
        size = len(part)
        noise = 2 * torch.rand(size, *vae.shape, generator=generator, device=device) - 1
        state, states = noise if vae.infusion else None, [noise]
        for t in range(1, vae.steps + 1):
            z = vae.sample_z(t, size, generator, fitted) if t > 1 or first is None else first[part.to(device)]
            state = mean = vae.generate(t, state, z)
            if vae.infusion:
                state = likelihoods.sample_gaussian(mean, vae.log_sigma(t), generator=generator)
            states.append(state)
        parts.append([torch.stack([images.to_uint8(one) for one in states]), images.to_uint8(mean)])
    states, means = zip(*parts, strict=True)
    return Drawn(torch.cat(states, 1), torch.cat(means))


# Helpers


def batches(images: Images, pictures: Tensor) -> Iterator[Tensor]:
    """In [-1, 1], some at a time, of sizes that differ by one at most."""
    for part in pictures.tensor_split(max(1, -(-len(pictures) // BATCH))):
        yield images.to_float(part.to(images.held_out.device))


def squared_error(image: Tensor, x: Tensor) -> Tensor:
    """Per dimension: (B, C, S, S) twice to (B,)."""
    return F.mse_loss(image, x, reduction="none").flatten(1).mean(1)
