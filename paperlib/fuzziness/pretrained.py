"""The recorded VAE of notebook 02, to draw from."""

import torch
from torch import Tensor

from paperlib.fuzziness import experiment


class Fuzziness:
    """A VAE with a factored Gaussian p(x|z), whose means are fuzzy. Images are uint8 (N, S, S, 1), on the CPU."""

    def __init__(self, device: str = "auto") -> None:
        run = experiment.EXPERIMENT.recorded_run(device)
        self.images = experiment.load_images(run)
        self.model, self.code_dim = experiment.fit(run, self.images).main, run.settings.code_dim

    def sample(self, count: int, seed: int = 0) -> Tensor:
        """Means of p(x|z) for codes from N(0, I)."""
        generator = torch.Generator().manual_seed(seed)
        return self.decode(torch.randn(count, self.code_dim, generator=generator))

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """The mean of p(x|z) for each code (N, code_dim)."""
        means = self.model.p_x_given_z(z.to(self.images.device)).unflatten(1, self.images.shape)
        return self.images.to_uint8(2 * means - 1)
