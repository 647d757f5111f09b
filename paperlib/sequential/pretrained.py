"""The recorded chain of notebook 03, to draw from."""

from collections.abc import Sequence

import torch
from torch import Tensor

from paperlib.sequential import experiment
from paperlib.sequential.model import draw


class Sequential:
    """A chain of T images, a code at every step. Images are uint8 (N, S, S, C), on the CPU."""

    def __init__(self, device: str = "auto") -> None:
        run = experiment.EXPERIMENT.recorded_run(device)
        self.images = experiment.load_images(run)
        self.model = experiment.fit(run, self.images)["sequential"].model

    def chain(self, count: int, seed: int = 0) -> Tensor:
        """Noise, then the means x(1) .. x(T), codes from the fitted priors: (T + 1, count, S, S, C)."""
        generator = torch.Generator(self.images.device).manual_seed(seed)
        return draw(self.model, self.images, count, generator).states

    def sample(self, count: int, seed: int = 0) -> Tensor:
        """The last images of `chain`."""
        return self.chain(count, seed)[-1]

    @torch.no_grad()
    def decode(self, z: Sequence[Tensor]) -> Tensor:
        """x(1) .. x(T) for codes z_1 .. z_T, (N, D) each: (T, N, S, S, C)."""
        state, states = None, []
        for t, code in enumerate(z, start=1):
            state = self.model.generate(t, state, code.to(self.images.device))
            states.append(self.images.to_uint8(state))
        return torch.stack(states)
