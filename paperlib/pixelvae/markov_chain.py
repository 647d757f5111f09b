"""Sampling without the prior: the Markov chain (4) of notebook 04, z ~ q(z|x), x' ~ p(x|z)."""

import torch
from torch import Tensor
from tqdm import tqdm

from paperlib.data.device_images import Images
from paperlib.nn import likelihoods
from paperlib.nn.pixelcnn_sampler import Sampler
from paperlib.pixelvae.model import BATCH, PixelVAE


@torch.no_grad()
def encode(vae: PixelVAE, images: Images, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log std of q(z|x) of uint8 images `pictures` (N, S, S, C): two (N, D)."""
    parts = [vae.q_z_given_x(images.to_float(part)) for part in pictures.to(images.device).split(BATCH)]
    means, log_stds = zip(*parts, strict=True)
    return torch.cat(means), torch.cat(log_stds)


@torch.no_grad()
def sampled(vae: PixelVAE, images: Images, pictures: Tensor, generator: torch.Generator) -> Tensor:
    """One z ~ q(z|x) for each of uint8 images `pictures` (N, S, S, C): (N, D)."""
    return likelihoods.sample_gaussian(*encode(vae, images, pictures), generator=generator)


class Decoder:
    """Draws x ~ p(x|z) exactly, `batch` images at a time, with the weights that `vae` has now."""

    def __init__(self, vae: PixelVAE, images: Images, batch: int) -> None:
        _, side, _ = images.shape
        self.vae, self.images, self.batch = vae, images, batch
        self.sampler = Sampler(vae.decoder, batch, side, side)

    @torch.no_grad()
    def __call__(self, z: Tensor, generator: torch.Generator, top: Tensor | None = None) -> Tensor:
        """Images (N, S, S, C), uint8 on the CPU, one for each code (N, D), where D is 0 for a model without a code.

        With the first rows of each image given as `top`, (N, C, R, S) in [-1, 1], the others are drawn.
        """
        drawn = []
        for start in range(0, len(z), self.batch):
            here, above = (None if all_ is None else _padded(all_[start:], self.batch) for all_ in (z, top))
            x = self.sampler.draw(self.vae.h(here), generator=generator, top=above, progress=False)
            drawn.append(self.images.to_uint8(x[: len(z) - start]))
        return torch.cat(drawn)


def _padded(rows: Tensor, count: int) -> Tensor:
    """The first `count` of rows (N, ...), the last one repeated where there are fewer."""
    return rows[torch.arange(count, device=rows.device).clamp(max=len(rows) - 1)]


def two_decodes(vae: PixelVAE, images: Images, pictures: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two draws of p(x|z) for one z ~ q(z|x) of each of uint8 images (N, S, S, C): twice the like, on the CPU."""
    z, decode = sampled(vae, images, pictures, generator), Decoder(vae, images, min(len(pictures), 250))
    return decode(z, generator), decode(z, generator)


@torch.no_grad()
def markov_chain(
    vae: PixelVAE, images: Images, start: Tensor, steps: int, generator: torch.Generator, name: str = "chain"
) -> Tensor:
    """The chain from N images at once, uint8 `start` (N, S, S, C): this and all others, (steps + 1, N, S, S, C)."""
    decode = Decoder(vae, images, len(start))
    states = [start.cpu()]
    for _ in tqdm(range(steps), desc=name, leave=False):
        states.append(decode(sampled(vae, images, states[-1], generator), generator))
    return torch.stack(states)


def noise_images(images: Images, count: int, generator: torch.Generator) -> Tensor:
    """Images of independent uniform grey levels, uint8 (count, S, S, C)."""
    shape = (count, *images.train.shape[1:])
    return torch.randint(images.dataset.levels, shape, generator=generator, device=generator.device).to(torch.uint8)
