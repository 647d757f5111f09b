"""Fuzzy samples as averages of q(x|z): a Gaussian VAE with a small code, and the variance of q(x|z).

The encoder alone defines a joint distribution with the data: q(x, z) = p(x) q(z|x). On N training points

    (1)  q(z) = 1/N sum_n q(z|x_n)
    (2)  q(x|z) = sum_n w_n(z) delta(x - x_n),   w_n(z) = q(z|x_n) / sum_m q(z|x_m)

The reconstruction term of the ELBO fits the decoder p(x|z) to q(x|z). A Gaussian p(x|z) = N(mu(z), sigma^2 I) can do no
better than mu(z) = E_q[x|z], and what it misses is, for every z,

    (3)  E_q(x|z) |x - mu(z)|^2 = tr Var_q[x|z] + |mu(z) - E_q[x|z]|^2

so where Var_q[x|z] is large the sample is the average of images that differ: it is fuzzy (Zhao, Song, Ermon, section
"Fuzzy Generation"). `aggregate` computes (1) and (2), this module trains the VAE and draws the pictures.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from paperlib import aggregate, data, figures, likelihoods, presets, results, train
from paperlib.errors import UserError
from paperlib.presets import option
from paperlib.results import Claim, Quantity

NOTEBOOK = "02_mnist_fuzziness"


@dataclass(frozen=True)
class Settings:
    """What notebook 02 can be told. Raises `ValueError` for values out of range."""

    dataset: str = option("digits", "data set: digits or mnist")
    code_dim: int = option(2, "dimensions of the code z")
    hidden: tuple[int, ...] = option((64, 64), "units of each hidden layer, encoder; the decoder mirrors them")
    steps: int = option(1000, "optimiser steps")
    batch_size: int = option(128, "images per step")
    learning_rate: float = option(2e-3, "of Adam, falling to zero by a cosine")
    sigma: float | None = option(0.25, "deviation of p(x|z), the same for all pixels; null learns it")
    kl_weight: float = option(1.0, "weight of the KL in the objective; 1 is the ELBO")
    codes: int = option(500, "codes drawn from the prior to measure and to rank")
    min_samples: float = option(20.0, "effective sample size from which Var q(x|z) is quoted")
    max_halves: float = option(0.05, "relative difference between N and N/2 up to which it is quoted")

    def __post_init__(self) -> None:
        for name in ("code_dim", "steps", "batch_size", "codes", "learning_rate", "sigma"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be above 0")
        if not self.kl_weight >= 0:
            raise ValueError(f"kl_weight is {self.kl_weight}, but must be 0 or more")
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"hidden is {self.hidden}, but takes at least one layer of at least one unit")


_smoke = Settings(max_halves=0.15)  # the variance over halves of 1,500 digits differs by more than over MNIST's
_cpu = replace(
    Settings(),
    dataset="mnist",
    sigma=0.4,
    hidden=(400, 400),
    steps=5000,
    batch_size=256,
    learning_rate=1e-3,
    codes=4000,
)
PRESETS = {
    "smoke": _smoke,
    "cpu": _cpu,
    "gpu": replace(_cpu, hidden=(1024, 1024)),
    "paper": _cpu,
}

CLAIMS = {
    "F1": Claim(
        "The decoder's mean is the average of q(x|z).",
        "|mu(z) - E_q[x|z]|^2 at most 10 % of the variance of E_q[x|z] between codes, z ~ q(z)",
        lambda share: share.value <= 0.10,
    ),
    "F3": Claim(
        "Ranked by Var q(x|z) per ink, digits on the left are sharp and of one class, those on the right are "
        "averages of several.",
        "label entropy under q(x|z) below 0.1 nat in the left tenth, above 1 nat in the right tenth",
        lambda left, right: left.value < 0.1 and right.value > 1.0,
    ),
}


class VAE(nn.Module):
    """q(z|x) = N(mean(x), exp(2 log_std(x))) and p(x|z) = N(mu(z), sigma^2 I), pixels in [0, 1], mu(z) as well.

    Both networks are multilayer perceptrons with ReLU. sigma is one number for all pixels and codes, learned where it
    is None. A learned sigma ends near 0.19 on MNIST; with it, codes become so narrow that the list (2) of most holds
    fewer than ten images and no variance can be measured. A fixed one of 0.4 gives broader codes.
    """

    def __init__(self, pixels: int, code_dim: int, hidden: tuple[int, ...], sigma: float | None) -> None:
        super().__init__()
        self.encoder = _perceptron(pixels, hidden, 2 * code_dim)
        self.decoder = _perceptron(code_dim, hidden[::-1], pixels)
        log_sigma = torch.tensor(math.log(sigma or 0.4))
        self.log_sigma = nn.Parameter(log_sigma, requires_grad=sigma is None)

    def q_z_given_x(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-deviation of q(z|x): (B, pixels) to two (B, code_dim)."""
        mean, log_std = self.encoder(x).chunk(2, dim=1)
        return mean, log_std.clamp(-7, 2)

    def p_x_given_z(self, z: Tensor) -> Tensor:
        """The mean mu(z) of p(x|z): (B, code_dim) to (B, pixels), in [0, 1]."""
        return torch.sigmoid(self.decoder(z))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two terms of the ELBO with one sample of z, each (B,) in nats: E_q log p(x|z) and KL(q(z|x) || p(z))."""
        mean, log_std = self.q_z_given_x(x)
        z = likelihoods.sample_gaussian(mean, log_std)
        log_p = likelihoods.gaussian_log_prob(x, self.p_x_given_z(z), self.log_sigma)
        return log_p, likelihoods.gaussian_kl(mean, log_std)


def _perceptron(inputs: int, hidden: tuple[int, ...], outputs: int) -> nn.Sequential:
    layers, width = [], inputs
    for units in hidden:
        layers += [nn.Linear(width, units), nn.ReLU()]
        width = units
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def start(preset: str, seed: int, device: str, weights: str, overrides: Mapping[str, Any]) -> results.Run:
    """Open the run that the notebook's parameters ask for. Raises `UserError` for any that it does not know."""
    settings = presets.choose(PRESETS, preset, overrides)
    if settings.dataset not in ("digits", "mnist"):
        raise UserError(f"unknown data set {settings.dataset!r}: choose from digits, mnist")
    return results.start(NOTEBOOK, preset, settings, seed, str(train.pick_device(device)), weights)


@dataclass(frozen=True)
class Images:
    """A data set ready to train on: pixels (N, height * width) in [0, 1] and labels (N,), on the run's device."""

    dataset: data.Dataset
    x: Tensor
    labels: Tensor
    held_out: Tensor
    shape: tuple[int, int]

    def __repr__(self) -> str:
        return (
            f"{self.dataset.name}: {len(self.x):,} training and {len(self.held_out):,} held-out images, "
            f"{self.shape[0]} x {self.shape[1]} pixels, {self.dataset.levels} grey levels"
        )


def load_images(run: results.Run) -> Images:
    dataset = data.load(run.settings.dataset)

    def flat(images: np.ndarray) -> Tensor:
        return data.to_unit(images, dataset.levels, run.device).flatten(1)

    labels = torch.as_tensor(np.array(dataset.train.labels), device=run.device)
    shape = dataset.train.images.shape[1:3]
    return Images(dataset, flat(dataset.train.images), labels, flat(dataset.held_out.images), shape)


def fit(run: results.Run, images: Images) -> train.Trained:
    """Train the VAE by maximising the ELBO, or load the recorded one where the run says so."""
    settings = run.settings
    torch.manual_seed(run.seed)
    vae = VAE(images.x.shape[1], settings.code_dim, settings.hidden, settings.sigma)
    if run.weights == "recorded":
        vae.load_state_dict(results.load_recorded_weights(run))
        return train.Trained(vae.to(run.device).eval(), [], 0, 0.0, "recorded", {}, [])
    recipe = train.Recipe(
        settings.steps,
        settings.batch_size,
        settings.learning_rate,
        schedule="cosine",
        ema=0.999,
        evaluate_every=max(1, settings.steps // 20),
    )

    def loss(model: nn.Module, x: Tensor, progress: train.Progress) -> tuple[Tensor, dict[str, Tensor]]:
        log_p, kl = model(x)
        return (settings.kl_weight * kl - log_p).mean(), {"elbo": (log_p - kl).mean(), "kl": kl.mean()}

    def evaluate(model: nn.Module) -> dict[str, float]:
        log_p, kl = model(images.held_out)
        return {"loss": float((kl - log_p).mean()), "kl": float(kl.mean())}

    return train.fit(
        vae,
        loss,
        lambda rows: images.x[rows.to(images.x.device)],
        len(images.x),
        recipe,
        run.directory / "vae",
        seed=run.seed,
        device=run.device,
        evaluate=evaluate,
        provenance=results.describe_code(),
        name="vae",
    )


@torch.no_grad()
def encode(vae: VAE, images: Images) -> aggregate.Codes:
    """The N Gaussians q(z|x_n) of the training set: together they are q(z), equation (1)."""
    means, log_stds = zip(*(vae.q_z_given_x(x) for x in images.x.split(4096)), strict=True)
    return aggregate.Codes(torch.cat(means), torch.cat(log_stds))


ROWS, COLUMNS = 5, 14  # of the picture: codes of like variance stand in one column
MADE_OF = 6  # columns of the picture of what q(x|z) is made of
HEAVIEST = 5  # training digits shown for each


@torch.no_grad()
def measure(run: results.Run, vae: VAE, images: Images) -> dict[str, np.ndarray]:
    """All that the figures and claims need, written to the run's `arrays.npz` and returned.

    For M codes z ~ p(z): `z` (M, D), `variance` tr Var_q[x|z] and `ink` the sum of E_q[x|z] (both in pixels of full
    white), `samples` the effective sample size, `halves` the relative difference that leaving out every second
    training point makes to the variance, `log_q` log q(z) in nats, `labels` the label mixture (M, K), `reliable`
    whether the variance may be quoted, `order` the reliable codes from least to most variance per ink. For the codes
    of the picture, ROWS x COLUMNS of them: `decoded` and `average`; for MADE_OF of these the `heaviest` training
    digits with their `weights`. For M codes z ~ q(z), the terms of equation (3): `error` by its
    left side, `spread` tr Var_q[x|z] and `gap` |mu(z) - E_q[x|z]|^2; and `between`, the variance of E_q[x|z] over
    these codes, with `total`, that of all training points.
    """
    settings, codes = run.settings, encode(vae, images)
    generator = torch.Generator(run.device).manual_seed(run.seed)
    shape = (settings.codes, settings.code_dim)
    z = torch.randn(shape, generator=generator, device=run.device)

    found = aggregate.conditional(z, codes, images.x, images.labels, per_pixel=False)
    half = aggregate.conditional(z, codes[::2], images.x[::2], per_pixel=False)
    disagreement = (half.trace / found.trace - 1).abs()
    reliable = (found.ess >= settings.min_samples) & (disagreement <= settings.max_halves)
    ink = found.mean.sum(1)
    order = torch.argsort(found.trace / ink)
    order = order[reliable[order]]
    if len(order) < ROWS * COLUMNS:
        raise UserError(
            f"Var q(x|z) can be trusted at {len(order)} of {len(z)} codes, and the figure needs {ROWS * COLUMNS}: "
            f"draw more codes, or lower min_samples"
        )
    shown = order[torch.linspace(0, len(order) - 1, ROWS * COLUMNS, device=order.device).round().long()]
    made_of = shown[torch.linspace(0, len(shown) - 1, MADE_OF, device=order.device).round().long()]
    points, weights = aggregate.heaviest(z[made_of], codes, HEAVIEST)

    rows = torch.randint(len(codes), (settings.codes,), generator=generator, device=run.device)
    z_q = likelihoods.sample_gaussian(codes.mean[rows], codes.log_std[rows], generator=generator)
    joint = aggregate.conditional(z_q, codes, images.x, per_pixel=False)
    mu = vae.p_x_given_z(z_q.float()).double()

    def pictures(x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], *images.shape)

    return results.save_arrays(
        run,
        z=z,
        variance=found.trace,
        ink=ink,
        samples=found.ess,
        halves=disagreement,
        log_q=found.log_q,
        labels=found.labels,
        reliable=reliable,
        order=order,
        shown=shown,
        decoded=pictures(vae.p_x_given_z(z[shown])),
        average=pictures(found.mean[shown]).float(),
        made_of=made_of,
        heaviest=pictures(images.x[points]),
        heaviest_labels=images.labels[points],
        weights=weights,
        decoded_made_of=pictures(vae.p_x_given_z(z[made_of])),
        average_made_of=pictures(found.mean[made_of]).float(),
        error=_squared_error(mu, z_q, codes, images.x),
        spread=joint.trace,
        gap=(mu - joint.mean).square().sum(1),
        between=joint.mean.var(0, correction=0).sum(),
        total=images.x.double().var(0, correction=0).sum(),
    )


def _squared_error(mu: Tensor, z: Tensor, codes: aggregate.Codes, x: Tensor) -> Tensor:
    """E_q(x|z) |x - mu|^2 for each row of `mu` (M, P), by the weights of all N points: the left side of (3)."""
    x = x.double()
    squares, errors = x.square().sum(1), []
    for mu_rows, z_rows in zip(mu.split(512), z.split(512), strict=True):
        weights = aggregate.log_weights(z_rows, codes).exp()
        errors.append(weights @ squares - 2 * ((weights @ x) * mu_rows).sum(1) + mu_rows.square().sum(1))
    return torch.cat(errors)


def label_entropy(labels: np.ndarray) -> np.ndarray:
    """Entropy in nats of label mixtures (M, K): 0 where q(x|z) is one class."""
    return -(labels * np.log(np.clip(labels, 1e-300, 1))).sum(1)


def ends(arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The codes of the left and of the right tenth, by rank of variance per ink among the reliable ones."""
    tenth = max(1, len(arrays["order"]) // 10)
    return arrays["order"][:tenth], arrays["order"][-tenth:]


def conclude(
    run: results.Run, arrays: Mapping[str, np.ndarray], trained: train.Trained, images: Images
) -> results.Verdicts:
    """Judge F1 and F3 and write what the run found."""
    entropy = label_entropy(arrays["labels"])
    left, right = ends(arrays)
    measured = {
        "F1": {"share": Quantity(arrays["gap"].mean() / arrays["between"])},
        "F3": {
            "left": Quantity(entropy[left].mean(), unit="nats"),
            "right": Quantity(entropy[right].mean(), unit="nats"),
        },
    }
    results.save_weights(run, trained.model.state_dict())
    numbers = {
        "reliable_share": arrays["reliable"].mean(),
        "variance_total": arrays["total"],
        "identity_residual": np.abs(arrays["error"] - arrays["spread"] - arrays["gap"]).max() / arrays["error"].mean(),
    }
    if trained.history:
        numbers |= {"held_out_elbo": -trained.history[-1]["held_out_loss"]}
    trainings = {"vae": {"steps": trained.steps, "seconds": round(trained.seconds, 1), **trained.provenance}}
    return results.finish(run, CLAIMS, measured, numbers, images.dataset.describe(), trainings)


HEADLINE = (
    "mnist_fuzziness",
    "Decoded digits from the least (left) to the most (right) variance of q(x|z) per ink: sharp digits become averages "
    "of several classes.",
)


def plot_fuzziness(arrays: Mapping[str, np.ndarray]) -> Any:
    """The post's picture: decoder means in order of Var q(x|z) per ink, with variance and label entropy below."""
    order, entropy = arrays["order"], label_entropy(arrays["labels"])
    figure, (top, bottom) = figures.new(rows=2, height=4.2, height_ratios=[ROWS * 1.0, 3.6])
    by_column = arrays["decoded"].reshape(COLUMNS, ROWS, *arrays["decoded"].shape[1:]).swapaxes(0, 1)
    figures.show_images(top, by_column.reshape(-1, *by_column.shape[2:]), COLUMNS)
    top.set_title("decoder mean of codes z ~ p(z), ordered from left to right by Var q(x|z) per ink")

    rank = np.linspace(0, 100, len(order))
    left, right = figures.PALETTE[0], figures.PALETTE[3]
    bottom.plot(rank, (arrays["variance"] / arrays["ink"])[order], color=left)
    bottom.set(xlabel="rank among the codes where Var q(x|z) can be trusted (%)", xlim=(0, 100))
    bottom.set_ylabel("tr Var q(x|z)\nper ink", color=left)
    other = bottom.twinx()
    other.plot(rank, entropy[order], ".", markersize=2, color=right, alpha=0.3)
    other.plot(rank, _running_mean(entropy[order]), color=right)
    other.set_ylabel("label entropy under\nq(x|z) (nats)", color=right)
    return figure


def _running_mean(values: np.ndarray) -> np.ndarray:
    window = np.ones(max(1, len(values) // 20))
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def plot_made_of(arrays: Mapping[str, np.ndarray]) -> Any:
    """For codes from low to high variance: the decoder's mean, E_q[x|z], and the heaviest training digits of q(x|z)."""
    figure, axes = figures.new(MADE_OF, 2 + HEAVIEST, height=8.8)
    for k, column in enumerate(axes.T):
        figures.show_images(column[0], arrays["decoded_made_of"][k : k + 1], 1)
        figures.show_images(column[1], arrays["average_made_of"][k : k + 1], 1)
        code = arrays["made_of"][k]
        column[0].set_title(f"tr Var {arrays['variance'][code]:.1f}\n{arrays['samples'][code]:.0f} samples")
        column[1].set_title(_mixture(arrays["labels"][code]))
        for row in range(HEAVIEST):
            figures.show_images(column[2 + row], arrays["heaviest"][k, row : row + 1], 1)
            column[2 + row].set_title(f"{arrays['heaviest_labels'][k, row]}:  {100 * arrays['weights'][k, row]:.1f} %")
    for row, text in ((0, r"decoder $\mu(z)$"), (1, r"$E_q[x|z]$"), (2, "heaviest\ntraining\ndigits")):
        axes[row, 0].set_ylabel(text, rotation=0, ha="right", va="center")
    return figure


def _mixture(labels: np.ndarray) -> str:
    best = [label for label in np.argsort(-labels)[:4] if labels[label] >= 0.01]
    words = [f"{label}: {100 * labels[label]:.0f} %" for label in best]
    return "\n".join(",  ".join(words[k : k + 2]) for k in (0, 2) if words[k:])


def plot_identity(arrays: Mapping[str, np.ndarray]) -> Any:
    """Equation (3) at codes z ~ q(z): the decoder's error against Var q(x|z); the height above the line is its gap."""
    figure, axis = figures.new(width=4.2, height=3.4)
    limit = 1.05 * arrays["error"].max()
    axis.plot([0, limit], [0, limit], color="black", linewidth=0.8, label=r"$\mu(z) = E_q[x|z]$: the least possible")
    axis.scatter(arrays["spread"], arrays["error"], s=4, alpha=0.4, color=figures.PALETTE[0], label="codes z ~ q(z)")
    axis.set(xlim=(0, limit), ylim=(0, limit), xlabel=r"tr Var$_q[x|z]$ (squared pixels)")
    axis.set_ylabel(r"$E_{q(x|z)}\,|x - \mu(z)|^2$ (squared pixels)")
    axis.legend(loc="lower right", frameon=False)
    return figure


def plot_plane(arrays: Mapping[str, np.ndarray]) -> Any:
    """The plane of codes: variance per ink, label entropy, effective sample size; crosses where it is too small."""
    figure, axes = figures.new(3, height=2.7, sharex=True, sharey=True)
    z, good = arrays["z"][:, :2], arrays["reliable"]
    values = {
        "tr Var q(x|z) per ink": arrays["variance"] / arrays["ink"],
        "label entropy (nats)": label_entropy(arrays["labels"]),
        "effective sample size": arrays["samples"],
    }
    for axis, (title, value) in zip(axes, values.items(), strict=True):
        axis.scatter(*z[~good].T, s=4, marker="x", linewidth=0.3, color="#bbbbbb")
        dots = axis.scatter(*z[good].T, c=value[good], s=3, cmap="viridis")
        axis.set(title=title, xlabel="$z_1$", aspect="equal")
        figure.colorbar(dots, ax=axis, shrink=0.75)
    axes[0].set_ylabel("$z_2$")
    return figure
