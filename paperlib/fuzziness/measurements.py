"""What notebook 02 measures on trained VAEs; pixels `x` and `held_out` (N, P) in [0, 1], variances summed over them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paperlib.fuzziness.claims import ends, mixtures, ranked
from paperlib.fuzziness.model import MAIN, VAE, Variant, encode, square
from paperlib.fuzziness.training import Models
from paperlib.nn import likelihoods
from paperlib.stats import aggregate_posterior, sharpness
from paperlib.stats.aggregate_posterior import Codes, Conditional
from paperlib.system.errors import UserError

ROWS, COLUMNS = 5, 3  # of each of the two groups of the post's picture
MADE_OF = 6  # codes of which is shown what q(x|z) is made of
HEAVIEST = 4  # training digits shown for each
MOSAIC = 20  # decoded digits per side of the map
WALK, RADIUS = 36, 1.2  # codes on a circle around 0, and its radius
SWEPT = ("swept_information", "swept_rate", "swept_error", "swept_variance", "swept_reliable", "swept_width")


@torch.no_grad()
def at_prior_codes(settings: Any, vae: VAE, x: Tensor, labels: Tensor, seed: int) -> dict[str, np.ndarray]:
    """At M codes z ~ p(z), `z` (M, D): of q(x|z), `variance` tr Var_q[x|z], `ink` the sum of E_q[x|z], `samples` the
    effective sample size, `halves` the relative change of the variance without half of the training points, `log_q`
    log q(z) in nats, `labels` the label mixture (M, K), `reliable` whether the variance may be quoted; of the decoded
    image mu(z), `edge_width` in pixels, `slope` of its power spectrum, `greyness` sum mu (1 - mu).
    """
    generator, codes = torch.Generator(x.device).manual_seed(seed), encode(vae, x)
    z = torch.randn(settings.codes, vae.code_dim, generator=generator, device=x.device)
    conditional, halves, reliable = _at_codes(settings, z, codes, x, labels)
    decoded = vae.p_x_given_z(z)
    arrays = {
        "z": z,
        "variance": conditional.trace,
        "ink": conditional.mean.sum(1),
        "samples": conditional.ess,
        "halves": halves,
        "log_q": conditional.log_q,
        "labels": conditional.labels,
        "reliable": reliable,
        "greyness": (decoded * (1 - decoded)).sum(1),
        "edge_width": sharpness.edge_width(square(decoded)),
        "slope": sharpness.spectral_slope(square(decoded)),
    }
    return {name: array.numpy(force=True) for name, array in arrays.items()}


def _at_codes(
    settings: Any, z: Tensor, codes: Codes, x: Tensor, labels: Tensor | None = None
) -> tuple[Conditional, Tensor, Tensor]:
    """q(x|z) at codes z (M, D), and `halves` and `reliable` of `at_prior_codes`, (M,) each."""
    conditional = aggregate_posterior.conditional(z, codes, x, labels, per_pixel=False)
    rows = random_half(len(x)).to(x.device)
    half = aggregate_posterior.conditional(z, codes[rows], x[rows], per_pixel=False)
    halves = (half.trace / conditional.trace - 1).abs()
    return conditional, halves, (conditional.ess >= settings.min_samples) & (halves <= settings.max_halves)


def random_half(count: int) -> Tensor:
    """Indices of half of `count` points, always the same; drawn, since data sets may be in some order."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[: count // 2]


@torch.no_grad()
def picture(vae: VAE, x: Tensor, labels: Tensor, at_prior: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Of the first seed: `sharp`, ROWS x COLUMNS codes from the left tenth at equal distances in rank, and `mixed`, so
    many of the right tenth that are most a mixture of 4, 9 and 5, both in order of variance per ink; `sharp_decoded`
    and `mixed_decoded`; of MADE_OF codes from the least to the most variance per ink, `made_of`, the decoded image,
    average, std of each pixel, and the `heaviest` training digits with labels and `weights`. Raises `UserError` where
    the variance may be quoted at too few codes.
    """
    order, z = ranked(at_prior, 0), torch.from_numpy(at_prior["z"][0]).to(x.device)
    left, right = ends(at_prior, 0)
    if len(right) < ROWS * COLUMNS:
        trusted = f"Var q(x|z) can be trusted at {len(order)} of {len(z)} codes"
        raise UserError(f"{trusted}, and the picture needs {10 * ROWS * COLUMNS}: draw more, or lower min_samples")
    sharp = left[np.linspace(0, len(left) - 1, ROWS * COLUMNS).round().astype(int)]
    mixed = right[np.sort(np.argsort(mixtures(at_prior["labels"][0][right]))[-ROWS * COLUMNS :])]
    made_of = order[np.linspace(0, len(order) - 1, MADE_OF).round().astype(int)]
    codes, few = encode(vae, x), z[made_of]
    conditional = aggregate_posterior.conditional(few, codes, x)
    points, weights = aggregate_posterior.heaviest(few, codes, HEAVIEST)
    return {
        "sharp": sharp,
        "sharp_decoded": square(vae.p_x_given_z(z[sharp])),
        "mixed": mixed,
        "mixed_decoded": square(vae.p_x_given_z(z[mixed])),
        "made_of": made_of,
        "made_of_decoded": square(vae.p_x_given_z(few)),
        "made_of_average": square(conditional.mean).float(),
        "made_of_std": square(conditional.variance.sqrt()).float(),
        "heaviest": square(x[points]),
        "heaviest_labels": labels[points],
        "weights": weights,
    }


@torch.no_grad()
def plane(settings: Any, vae: VAE, x: Tensor, labels: Tensor) -> dict[str, Any]:
    """A map of the plane of codes z, from -3 to 3: on a grid of `plane` points per side, row
    0 at the top, `plane_variance` per ink, `plane_samples`, `plane_trusted` where these suffice, and `plane_labels`;
    `plane_decoded`, MOSAIC x MOSAIC digits, uint8."""
    side = settings.plane
    z, mosaic = (_grid(points, x.device) for points in (side, MOSAIC))
    conditional = aggregate_posterior.conditional(z, encode(vae, x), x, labels, per_pixel=False)
    return {
        "plane_variance": (conditional.trace / conditional.mean.sum(1)).reshape(side, side),
        "plane_samples": conditional.ess.reshape(side, side),
        "plane_trusted": (conditional.ess >= settings.min_samples).reshape(side, side),
        "plane_labels": conditional.labels.reshape(side, side, -1).float(),
        "plane_decoded": (square(vae.p_x_given_z(mosaic)) * 255).round().to(torch.uint8),
    }


def _grid(side: int, device: torch.device) -> Tensor:
    """Centres of `side` x `side` cells of the square from -3 to 3, from the top left, as codes (side^2, 2)."""
    edge = 3 * (1 - 1 / side)
    across = torch.linspace(-edge, edge, side, device=device)
    return torch.cartesian_prod(across.flip(0), across).flip(1)


@torch.no_grad()
def walk(vae: VAE, x: Tensor, labels: Tensor) -> dict[str, Any]:
    """WALK codes on a circle, `walk_z` (WALK, 2), and what each stands for: `walk_decoded`, `walk_average` and
    `walk_std` (white: 0.5), uint8; `walk_labels`, the label mixture; `walk_variance` per ink and `walk_samples`;
    `walk_heaviest` (WALK, HEAVIEST, H, W), the training digits that weigh most, uint8, and `walk_weights`.
    """
    angle = torch.arange(WALK, device=x.device) * (2 * torch.pi / WALK)
    z, codes = RADIUS * torch.stack([angle.cos(), angle.sin()], 1), encode(vae, x)
    conditional = aggregate_posterior.conditional(z, codes, x, labels)
    points, weights = aggregate_posterior.heaviest(z, codes, HEAVIEST)
    pictures = {
        "decoded": vae.p_x_given_z(z),
        "average": conditional.mean,
        "std": (2 * conditional.variance.sqrt()).clamp(max=1),
        "heaviest": x[points],
    }
    arrays = {name: (square(images) * 255).round().to(torch.uint8) for name, images in pictures.items()}
    arrays |= {"z": z, "labels": conditional.labels, "samples": conditional.ess, "weights": weights}
    arrays["variance"] = conditional.trace / conditional.mean.sum(1)
    return {f"walk_{name}": array for name, array in arrays.items()}


@torch.no_grad()
def error_split(settings: Any, vae: VAE, x: Tensor, held_out: Tensor, seed: int) -> dict[str, np.ndarray]:
    """The terms of equation (3) at M codes z ~ q(z): `error` its left side, `spread` tr Var_q[x|z], `gap`
    |mu(z) - E_q[x|z]|^2; `between`, the variance of E_q[x|z] over these codes; `noise` tr Var_q[x|z] / (samples - 1),
    about what the average of a finite list misses of that of all possible images; `gap_held_out` and `noise_held_out`,
    the same with the list made of held-out images.
    """
    codes = encode(vae, x)
    z = aggregate_codes(codes, settings.codes, seed)
    mu = vae.p_x_given_z(z.float()).double()
    arrays = {"error": squared_error(mu, z, codes, x)}
    for suffix, images, encoded in (("_held_out", held_out, encode(vae, held_out)), ("", x, codes)):
        conditional = aggregate_posterior.conditional(z, encoded, images, per_pixel=False)
        arrays[f"gap{suffix}"] = (mu - conditional.mean).square().sum(1)
        # A list of one image has no variance to tell by.
        arrays[f"noise{suffix}"] = conditional.trace / (conditional.ess - 1).clamp(min=0.1)
    arrays |= {"spread": conditional.trace, "between": conditional.mean.var(0, correction=0).sum()}
    return {name: array.numpy(force=True) for name, array in arrays.items()}


def aggregate_codes(codes: Codes, count: int, seed: int) -> Tensor:
    """Codes z ~ q(z), by way of random training points: (count, D), float64."""
    device = codes.mean.device
    generator = torch.Generator(device).manual_seed(seed)
    rows = torch.randint(len(codes), (count,), generator=generator, device=device)
    return likelihoods.sample_gaussian(codes.mean[rows], codes.log_std[rows], generator=generator)


def squared_error(mu: Tensor, z: Tensor, codes: Codes, x: Tensor) -> Tensor:
    """The left side of (3) for each row of `mu` (M, P), by the weights of all N points: (M,)."""
    x = x.double()
    squares, errors = x.square().sum(1), []
    for mu_rows, z_rows in zip(mu.split(512), z.split(512), strict=True):
        weights = aggregate_posterior.log_weights(z_rows, codes).exp()
        errors.append(weights @ squares - 2 * ((weights @ x) * mu_rows).sum(1) + mu_rows.square().sum(1))
    return torch.cat(errors)


@torch.no_grad()
def frozen_and_swept(settings: Any, models: Models, x: Tensor, held_out: Tensor, seed: int) -> dict[str, Any]:
    """What F4 compares, each with one row per seed; every seed and code is measured with the same draws.

    Frozen q, over those of M codes z ~ q(z) where the variance may be quoted: `floor` E tr Var_q[x|z] (S,), and
    `frozen_error` (S, decoders), the error of each decoder by (3). Code dimension swept, (S, dims) each:
    `swept_information` I_q(x;z) and `swept_rate`, the held-out KL, in nats; `swept_error`, squared, held out;
    `swept_variance`, E tr Var_q[x|z] over codes where it may be quoted, times 1 / (1 - 1 / samples) because the lists
    differ in length; `swept_reliable`, their share; `swept_width`, the mean edge width of decoded images of all codes.
    """
    rows: dict[str, list] = {name: [] for name in ("floor", "frozen_error", *SWEPT)}
    for vaes, decoders in zip(models.vaes, models.decoders, strict=True):
        codes = encode(vaes[MAIN].model, x)
        z = aggregate_codes(codes, settings.codes, seed)
        conditional, _, reliable = _at_codes(settings, z, codes, x)
        means = (torch.sigmoid(trained.model(z.float())).double() for trained in decoders.values())
        gaps = [(mu - conditional.mean).square().sum(1) for mu in means]
        rows["floor"].append(conditional.trace[reliable].mean())
        rows["frozen_error"].append(torch.stack([(conditional.trace + gap)[reliable].mean() for gap in gaps]))
        variants = (Variant(code_dim=dims) for dims in settings.code_dims)
        swept = [_swept(settings, vaes[variant].model, x, held_out, seed) for variant in variants]
        for name in SWEPT:
            rows[name].append(torch.tensor([numbers[name] for numbers in swept]))
    swept_over = {"code_dims": np.array(settings.code_dims), "frozen_units": np.array(settings.decoders)}
    return {name: torch.stack(row) for name, row in rows.items()} | swept_over


def _swept(settings: Any, vae: VAE, x: Tensor, held_out: Tensor, seed: int) -> dict[str, float]:
    codes = encode(vae, x)
    z = aggregate_codes(codes, settings.codes, seed)
    conditional, _, reliable = _at_codes(settings, z, codes, x)
    generator = torch.Generator(x.device).manual_seed(seed)
    mean, log_std = vae.q_z_given_x(held_out)
    decoded = vae.p_x_given_z(likelihoods.sample_gaussian(mean, log_std, generator=generator))
    widths = sharpness.edge_width(square(vae.p_x_given_z(z.float())))
    information = aggregate_posterior.mutual_information(codes, points=min(len(x), 2000), generator=generator)
    return {
        "swept_information": information.nats,
        "swept_rate": likelihoods.gaussian_kl(mean, log_std).mean().item(),
        "swept_error": (decoded - held_out).square().sum(1).mean().item(),
        "swept_variance": (conditional.trace / (1 - 1 / conditional.ess))[reliable].mean().item(),
        "swept_reliable": reliable.double().mean().item(),
        "swept_width": widths.nanmean().item(),
    }
