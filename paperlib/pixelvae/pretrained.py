"""The recorded PixelVAE of notebook 04 that was trained without the KL, to draw from."""

import torch
from torch import Tensor

from paperlib.pixelvae import experiment
from paperlib.pixelvae.markov_chain import Decoder, markov_chain, noise_images


class Chain:
    """Sampling without the prior: z ~ q(z|x), x ~ p(x|z). Images are uint8 (N, S, S, C), on the CPU."""

    def __init__(self, device: str = "auto") -> None:
        run = experiment.EXPERIMENT.recorded_run(device)
        self.images = experiment.load_images(run)
        self.model = experiment.fit(run, self.images)["none"].model

    def chain(self, steps: int, count: int = 1, seed: int = 0, start: Tensor | None = None) -> Tensor:
        """States of `count` chains from noise, or from images `start`: (steps + 1, count, S, S, C)."""
        generator = torch.Generator(self.images.device).manual_seed(seed)
        if start is None:
            start = noise_images(self.images, count, torch.Generator().manual_seed(seed))
        return markov_chain(self.model, self.images, start, steps, generator)

    def sample(self, count: int, seed: int = 0, steps: int = 20) -> Tensor:
        """The last states of `chain`."""
        return self.chain(steps, count, seed)[-1]

    def decode(self, z: Tensor, seed: int = 0) -> Tensor:
        """An image x ~ p(x|z) for each code (N, 48)."""
        generator = torch.Generator(self.images.device).manual_seed(seed)
        return Decoder(self.model, self.images, min(len(z), 250))(z.to(self.images.device), generator)
