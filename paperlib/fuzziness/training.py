"""The trainings of notebook 02: VAEs from several seeds, and decoders for a frozen encoder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paperlib.fuzziness.model import BERNOULLI, MAIN, VAE, Variant, encode, perceptron
from paperlib.runs import train
from paperlib.runs.provenance import describe_code
from paperlib.stats.aggregate_posterior import Codes
from paperlib.system.devices import to_device


@dataclass(frozen=True)
class Models:
    """What was trained: for each seed, a VAE by variant, and decoders of a frozen q by their units."""

    vaes: list[dict[Variant, train.Trained]]
    decoders: list[dict[int, train.Trained]]

    @property
    def main(self) -> VAE:
        """The VAE of the first seed with a code of two dimensions."""
        return self.vaes[0][MAIN].model

    def by_name(self, seed: int) -> dict[str, train.Trained]:
        """All trainings by the names of their folders, where the first seed is `seed`."""
        trainings = {}
        for k, (vaes, decoders) in enumerate(zip(self.vaes, self.decoders, strict=True)):
            per_seed = {variant.name: trained for variant, trained in vaes.items()}
            per_seed |= {f"decoder-{units}": trained for units, trained in decoders.items()}
            trainings |= {f"{name}-seed{seed + k}": trained for name, trained in per_seed.items()}
        return trainings

    def __repr__(self) -> str:
        vaes, decoders = (sum(map(len, per_seed)) for per_seed in (self.vaes, self.decoders))
        return f"{vaes} VAEs and {decoders} decoders of a frozen encoder, {len(self.vaes)} seeds"


def fit(settings: Any, x: Tensor, held_out: Tensor, directory: Path, seed: int) -> Models:
    """Train all that the claims need on pixels `x` (N, P), on their device, each in a folder below `directory`."""
    variants = [BERNOULLI, *(Variant(code_dim=dims) for dims in sorted({MAIN.code_dim, *settings.code_dims}))]
    vaes, decoders = [], []
    for this_seed in range(seed, seed + settings.seeds):
        vaes.append({variant: fit_vae(settings, x, held_out, variant, directory, this_seed) for variant in variants})
        codes = encode(vaes[-1][MAIN].model, x)
        decoders.append(
            {units: fit_decoder(settings, x, codes, units, directory, this_seed) for units in settings.decoders}
        )
    return Models(vaes, decoders)


def fit_vae(settings: Any, x: Tensor, held_out: Tensor, variant: Variant, directory: Path, seed: int) -> train.Trained:
    """Train a VAE by maximising the ELBO."""

    def loss(vae: nn.Module, rows: Tensor, progress: train.Progress) -> tuple[Tensor, dict[str, Tensor]]:
        log_p, kl = vae(x[rows])
        elbo = (log_p - kl).mean()
        return -elbo, {"elbo": elbo, "kl": kl.mean()}

    def evaluate(vae: nn.Module) -> dict[str, float]:
        log_p, kl = vae(held_out)
        return {"loss": float((kl - log_p).mean()), "kl": float(kl.mean())}

    torch.manual_seed(seed)
    vae = VAE(x.shape[1], settings, variant)
    return _fit(settings, vae, loss, x, directory / f"{variant.name}-seed{seed}", seed, evaluate=evaluate)


def fit_decoder(settings: Any, x: Tensor, codes: Codes, units: int, directory: Path, seed: int) -> train.Trained:
    """Train a new decoder, two hidden layers of `units`, on the squared error under a frozen encoder."""
    mean, std = codes.mean.float(), codes.log_std.exp().float()

    def loss(decoder: nn.Module, rows: Tensor, progress: train.Progress) -> tuple[Tensor, dict[str, Tensor]]:
        z = mean[rows] + std[rows] * torch.randn_like(mean[rows])
        error = (torch.sigmoid(decoder(z)) - x[rows]).square().sum(1).mean()
        return error, {"error": error}

    torch.manual_seed(seed)
    decoder = perceptron(MAIN.code_dim, (units, units), x.shape[1])
    return _fit(settings, decoder, loss, x, directory / f"decoder-{units}-seed{seed}", seed)


def _fit(
    settings: Any, model: nn.Module, loss: train.Loss, x: Tensor, directory: Path, seed: int, **options: Any
) -> train.Trained:
    steps, every = settings.steps, max(1, settings.steps // 20)
    numbers = (steps, settings.batch_size, settings.learning_rate)
    recipe = train.Recipe(*numbers, schedule="cosine", ema=0.999, evaluate_every=every)
    options |= {"seed": seed, "device": x.device, "provenance": describe_code(), "name": directory.name}
    return train.fit(model, loss, lambda rows: to_device(rows, x.device), len(x), recipe, directory, **options)
