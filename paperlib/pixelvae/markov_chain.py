"""Sampling without the prior: the Markov chain (4) of notebook 04, z ~ q(z|x), x' ~ p(x|z)."""

import torch
from torch import Tensor
from tqdm import tqdm

from paperlib.data.device_images import Images
from paperlib.nn.pixelcnn_sampler import Sampler
from paperlib.pixelvae.model import BATCH, PixelVAE


@torch.no_grad()
def encode(vae: PixelVAE, images: Images, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log std of q(z|x) of uint8 images `pictures` (N, S, S, C): two (N, D)."""
    parts = [vae.q_z_given_x(images.to_float(part)) for part in pictures.to(images.device).split(BATCH)]
    means, log_stds = zip(*parts, strict=True)
    return torch.cat(means), torch.cat(log_stds)


class Decoder:
    """Draws x ~ p(x|z) exactly, `batch` images at a time, with the weights that `vae` has now."""

    def __init__(self, vae: PixelVAE, images: Images, batch: int) -> None:
        _, side, _ = images.shape
        self.vae, self.images, self.batch = vae, images, batch
        self.sampler = Sampler(vae.decoder, batch, side, side)

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
    """The chain from N images at once, uint8 `start` (N, S, S, C): this and all others, (steps + 1, N, S, S, C)."""
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
    return torch.randint(images.dataset.levels, shape, generator=generator, device=generator.device).to(torch.uint8)
