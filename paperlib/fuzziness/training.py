"""The trainings of notebook 02: VAEs from several seeds, and decoders for a frozen encoder."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from paperlib.fuzziness.model import BERNOULLI, MAIN, VAE, Pixels, Variant, encode, perceptron
from paperlib.runs import train
from paperlib.runs.provenance import describe_code
from paperlib.runs.recorded import load_recorded_weights
from paperlib.runs.run import Run
from paperlib.stats import aggregate_posterior


@dataclass(frozen=True)
class Models:
    """What was trained: for each seed, a VAE by variant, and decoders of a frozen q by their units."""

    vaes: list[dict[Variant, train.Trained]]
    decoders: list[dict[int, train.Trained]]

    @property
    def main(self) -> VAE:
        """The VAE of the first seed under the ELBO."""
        return self.vaes[0][MAIN].model

    def __repr__(self) -> str:
        vaes, decoders = (sum(map(len, of_seeds)) for of_seeds in (self.vaes, self.decoders))
        return f"{vaes} VAEs and {decoders} decoders of a frozen encoder, {len(self.vaes)} seeds"


def fit(run: Run, images: Pixels) -> Models:
    """Train all that the claims need, or load the one recorded VAE where the run says `weights = "recorded"`."""
    if run.weights == "recorded":
        vae = VAE(images.x.shape[1], run.settings).to(run.device).eval()
        vae.load_state_dict(load_recorded_weights(run))
        return Models([{MAIN: train.Trained(vae, [], 0, 0.0, "recorded", {}, [])}], [{}])
    weights = sorted({1.0, *run.settings.kl_weights})
    variants = [BERNOULLI, *(Variant(kl_weight=weight) for weight in weights)]
    vaes, decoders = [], []
    for seed in range(run.seed, run.seed + run.settings.seeds):
        vaes.append({variant: fit_vae(run, images, variant, seed) for variant in variants})
        codes = encode(vaes[-1][MAIN].model, images.x)
        decoders.append({units: fit_decoder(run, images, codes, units, seed) for units in run.settings.decoders})
    return Models(vaes, decoders)


def fit_vae(run: Run, images: Pixels, variant: Variant, seed: int) -> train.Trained:
    """Train a VAE by maximising E_q log p(x|z) - kl_weight * KL; with weight 1, the ELBO."""

    def loss(vae: nn.Module, x: Tensor, progress: train.Progress) -> tuple[Tensor, dict[str, Tensor]]:
        log_p, kl = vae(x)
        return (variant.kl_weight * kl - log_p).mean(), {"elbo": (log_p - kl).mean(), "kl": kl.mean()}

    def evaluate(vae: nn.Module) -> dict[str, float]:
        log_p, kl = vae(images.held_out)
        return {"loss": float((variant.kl_weight * kl - log_p).mean()), "kl": float(kl.mean())}

    torch.manual_seed(seed)
    vae = VAE(images.x.shape[1], run.settings, variant.likelihood)
    return _fit(run, vae, loss, lambda rows: images.x[rows], len(images.x), seed, variant.name, evaluate)


def fit_decoder(run: Run, images: Pixels, codes: aggregate_posterior.Codes, units: int, seed: int) -> train.Trained:
    """Train a new decoder, two hidden layers of `units`, on the squared error under a frozen encoder."""
    mean, std = codes.mean.float(), codes.log_std.exp().float()

    def loss(decoder: nn.Module, rows: Tensor, progress: train.Progress) -> tuple[Tensor, dict[str, Tensor]]:
        z = mean[rows] + std[rows] * torch.randn_like(mean[rows])
        error = (torch.sigmoid(decoder(z)) - images.x[rows]).square().sum(1).mean()
        return error, {"error": error}

    torch.manual_seed(seed)
    decoder = perceptron(run.settings.code_dim, (units, units), images.x.shape[1])
    return _fit(run, decoder, loss, lambda rows: rows, len(codes), seed, f"decoder-{units}")


def _fit(run, model, loss, batch, count, seed, name, evaluate=None) -> train.Trained:
    settings = run.settings
    recipe = train.Recipe(
        settings.steps,
        settings.batch_size,
        settings.learning_rate,
        schedule="cosine",
        ema=0.999,
        evaluate_every=max(1, settings.steps // 20),
    )
    name = f"{name}-seed{seed}"
    return train.fit(
        model,
        loss,
        lambda rows: batch(rows.to(run.device)),
        count,
        recipe,
        run.directory / name,
        seed=seed,
        device=run.device,
        evaluate=evaluate,
        provenance=describe_code(),
        name=name,
    )
