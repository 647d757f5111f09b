"""The VAEs of notebook 02: small Gaussian codes, a decoder that factors over pixels; images as vectors of pixels."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from paperlib.data import datasets
from paperlib.data.device_images import Images
from paperlib.nn import likelihoods
from paperlib.stats import aggregate_posterior


class Variant(NamedTuple):
    """Which VAE is trained: the likelihood of its decoder and the dimensions of its code."""

    likelihood: str = "gaussian"
    code_dim: int = 2

    @property
    def name(self) -> str:
        return f"{self.likelihood}-{self.code_dim}d"


MAIN, BERNOULLI = Variant(), Variant("bernoulli")


class VAE(nn.Module):
    """q(z|x) = N(mean(x), exp(2 log_std(x))) and p(x|z) = N(mu(z), sigma^2 I), pixels and mu(z) in [0, 1].

    sigma is one number, learned where it is None. With the likelihood "bernoulli" p(x|z) are bits of mean mu(z).
    """

    def __init__(self, pixels: int, settings: Any, variant: Variant = MAIN) -> None:
        super().__init__()
        self.code_dim, self.likelihood = variant.code_dim, variant.likelihood
        self.encoder = perceptron(pixels, settings.hidden, 2 * self.code_dim)
        self.decoder = perceptron(self.code_dim, settings.hidden[::-1], pixels)
        learned = settings.sigma is None and self.likelihood == "gaussian"
        self.log_sigma = nn.Parameter(torch.tensor(math.log(settings.sigma or 0.4)), requires_grad=learned)

    def q_z_given_x(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-std of q(z|x): (B, pixels) to two (B, code_dim)."""
        mean, log_std = self.encoder(x).chunk(2, dim=1)
        return mean, log_std.clamp(-7, 2)

    def p_x_given_z(self, z: Tensor) -> Tensor:
        """The mean mu(z) of p(x|z): (B, code_dim) to (B, pixels), in [0, 1]."""
        return torch.sigmoid(self.decoder(z))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two terms of the ELBO with one sample of z, each (B,) in nats: E_q log p(x|z) and KL(q(z|x) || p(z))."""
        mean, log_std = self.q_z_given_x(x)
        z = likelihoods.sample_gaussian(mean, log_std)
        if self.likelihood == "bernoulli":
            log_p = likelihoods.bernoulli_log_prob(x, self.decoder(z))
        else:
            log_p = likelihoods.gaussian_log_prob(x, self.p_x_given_z(z), self.log_sigma)
        return log_p, likelihoods.gaussian_kl(mean, log_std)


def perceptron(inputs: int, hidden: tuple[int, ...], outputs: int) -> nn.Sequential:
    layers, width = [], inputs
    for units in hidden:
        layers += [nn.Linear(width, units), nn.ReLU()]
        width = units
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def pixels(images: Images) -> tuple[Tensor, Tensor]:
    """Training and held-out images, each (N, S * S) float32 in [0, 1], on the device."""
    train, held_out = (datasets.to_unit(x, images.dataset.levels).flatten(1) for x in (images.train, images.held_out))
    return train, held_out


def square(x: Tensor) -> Tensor:
    """Vectors of pixels (..., S * S) as pictures (..., S, S)."""
    side = math.isqrt(x.shape[-1])
    return x.unflatten(-1, (side, side))


@torch.no_grad()
def encode(vae: VAE, x: Tensor) -> aggregate_posterior.Codes:
    """The Gaussians q(z|x_n) of images `x` (N, pixels): of the training set, together they are q(z), equation (1)."""
    means, log_stds = zip(*(vae.q_z_given_x(part) for part in x.split(4096)), strict=True)
    return aggregate_posterior.Codes(torch.cat(means), torch.cat(log_stds))
