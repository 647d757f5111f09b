"""What notebook 02 measures on trained VAEs: q(x|z), its variance, and the decoder's error.

Every function returns arrays by name. Grey levels are in [0, 1]. Where the variance of q(x|z) rests on too few
training points it is not quoted: see `reliable` in `at_prior_codes`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paperlib.fuzziness.claims import ranked
from paperlib.fuzziness.model import MAIN, VAE, Pixels, Variant, encode
from paperlib.fuzziness.training import Models
from paperlib.nn import likelihoods
from paperlib.stats import aggregate_posterior, sharpness
from paperlib.system.errors import UserError

ROWS, COLUMNS = 5, 14  # of the post's picture: codes of like variance stand in one column


MADE_OF = 6  # codes of which is shown what q(x|z) is made of


HEAVIEST = 4  # training digits shown for each


MOSAIC = 20  # decoded digits a side of the map


@torch.no_grad()
def at_prior_codes(settings: Any, images: Pixels, vae: VAE, seed: int) -> dict[str, np.ndarray]:
    """q(x|z) and the decoded image at M codes z ~ p(z).

    Of q(x|z): `variance` tr Var_q[x|z] (grey levels in [0, 1], squared and summed), `ink` the sum of E_q[x|z] (pixels
    of full white), `samples` the effective sample size, `halves` the relative difference that leaving out half of the
    training points makes to the variance, `log_q` log q(z) in nats, `labels` the label mixture (M, K), `reliable`
    whether the variance may be quoted. Of the decoded image mu(z): `edge_width` in pixels, `slope` of its power
    spectrum, `greyness` sum m (1 - m).
    """
    codes, device = encode(vae, images.x), images.x.device
    generator = torch.Generator(device).manual_seed(seed)
    z = torch.randn(settings.codes, settings.code_dim, generator=generator, device=device)
    found = aggregate_posterior.conditional(z, codes, images.x, images.labels, per_pixel=False)
    halves = _halves(found, z, codes, images)
    decoded = vae.p_x_given_z(z)
    pictures = images.pictures(decoded)
    found = {
        "z": z,
        "variance": found.trace,
        "ink": found.mean.sum(1),
        "samples": found.ess,
        "halves": halves,
        "log_q": found.log_q,
        "labels": found.labels,
        "reliable": _reliable(settings, found, halves),
        "greyness": (decoded * (1 - decoded)).sum(1),
        "edge_width": sharpness.edge_width(pictures),
        "slope": sharpness.spectral_slope(pictures),
    }
    return {name: value.numpy(force=True) for name, value in found.items()}


def _halves(
    found: aggregate_posterior.Conditional, z: Tensor, codes: aggregate_posterior.Codes, images: Pixels
) -> Tensor:
    """The relative difference that leaving out half of the training points makes to tr Var_q[x|z]: (M,)."""
    rows = random_half(images)
    half = aggregate_posterior.conditional(z, codes[rows], images.x[rows], per_pixel=False)
    return (half.trace / found.trace - 1).abs()


def random_half(images: Pixels) -> Tensor:
    """Indices of half of the training points, always the same; drawn, since data sets may be in some order."""
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(len(images.x), generator=generator)[: len(images.x) // 2].to(images.x.device)


def _reliable(settings: Any, found: aggregate_posterior.Conditional, halves: Tensor) -> Tensor:
    """Where Var q(x|z) may be quoted: (M,), bool."""
    return (found.ess >= settings.min_samples) & (halves <= settings.max_halves)


@torch.no_grad()
def picture(images: Pixels, vae: VAE, at_prior: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What the post's picture shows of the first seed: `decoded` and `average` (E_q[x|z]) of ROWS x COLUMNS codes,
    `shown`, from the least to the most variance per ink; and for MADE_OF of these, `made_of`, the decoded image,
    average, deviation of each pixel, and the `heaviest` training digits with labels and `weights`.
    """
    order, z = ranked(at_prior, 0), torch.from_numpy(at_prior["z"][0]).to(images.x.device)
    if len(order) < ROWS * COLUMNS:
        raise UserError(
            f"Var q(x|z) can be trusted at {len(order)} of {len(z)} codes, and the picture needs "
            f"{ROWS * COLUMNS}: draw more codes, or lower min_samples"
        )
    shown = order[np.linspace(0, len(order) - 1, ROWS * COLUMNS).round().astype(int)]
    made_of = shown[np.linspace(0, len(shown) - 1, MADE_OF).round().astype(int)]
    codes = encode(vae, images.x)
    z, z_few = z[shown], z[made_of]
    few = aggregate_posterior.conditional(z_few, codes, images.x)
    points, weights = aggregate_posterior.heaviest(z_few, codes, HEAVIEST)
    return {
        "shown": shown,
        "decoded": images.pictures(vae.p_x_given_z(z)),
        "average": images.pictures(aggregate_posterior.conditional(z, codes, images.x, per_pixel=False).mean).float(),
        "made_of": made_of,
        "made_of_decoded": images.pictures(vae.p_x_given_z(z_few)),
        "made_of_average": images.pictures(few.mean).float(),
        "made_of_deviation": images.pictures(few.variance.sqrt()).float(),
        "heaviest": images.pictures(images.x[points]),
        "heaviest_labels": images.labels[points],
        "weights": weights,
    }


@torch.no_grad()
def plane(settings: Any, images: Pixels, vae: VAE) -> dict[str, Any]:
    """A map of the first two dimensions of z, from -3 to 3, the others at 0.

    On a grid of `plane` points a side, row 0 at the top: `plane_variance` per ink, `plane_samples`, `plane_trusted`
    where these suffice, and `plane_labels`; besides, `plane_decoded`, MOSAIC x MOSAIC digits.
    """
    side, codes = settings.plane, encode(vae, images.x)
    found = aggregate_posterior.conditional(
        _grid(settings.code_dim, side, images.x.device), codes, images.x, images.labels, per_pixel=False
    )
    return {
        "plane_variance": (found.trace / found.mean.sum(1)).reshape(side, side),
        "plane_samples": found.ess.reshape(side, side),
        "plane_trusted": (found.ess >= settings.min_samples).reshape(side, side),
        "plane_labels": found.labels.reshape(side, side, -1).float(),
        "plane_decoded": (images.pictures(vae.p_x_given_z(_grid(settings.code_dim, MOSAIC, images.x.device))) * 255)
        .round()
        .to(torch.uint8),
    }


def _grid(code_dim: int, side: int, device: torch.device) -> Tensor:
    """Centres of `side` x `side` cells of the square from -3 to 3, from the top left, as codes (side^2, D)."""
    edge = 3 * (1 - 1 / side)
    across = torch.linspace(-edge, edge, side, device=device)
    down, right = torch.meshgrid(across.flip(0), across, indexing="ij")
    z = torch.zeros(side * side, code_dim, device=device)
    z[:, 0], z[:, 1] = right.flatten(), down.flatten()
    return z


@torch.no_grad()
def error_split(settings: Any, images: Pixels, vae: VAE, seed: int) -> dict[str, np.ndarray]:
    """The terms of equation (3) at M codes z ~ q(z): `error` its left side, `spread` tr Var_q[x|z], `gap`
    |mu(z) - E_q[x|z]|^2; `between`, the variance of E_q[x|z] over these codes.

    Two numbers say how much of the gap is not the decoder's fault. `noise` tr Var_q[x|z] / (samples - 1): by about so
    much the average of a finite list misses the average of all images that there could be (the variance of a list of n
    is too small by the factor 1 - 1/n). `gap_held_out`: |mu(z) -
    E_q[x|z]|^2 with the list made of held-out images, and its `noise_held_out`.
    """
    codes, held_out = encode(vae, images.x), encode(vae, images.held_out)
    z = _aggregate_codes(codes, settings.codes, seed)
    mu = vae.p_x_given_z(z.float()).double()
    found = aggregate_posterior.conditional(z, codes, images.x, per_pixel=False)
    other = aggregate_posterior.conditional(z, held_out, images.held_out, per_pixel=False)
    split = {
        "error": squared_error(mu, z, codes, images.x),
        "spread": found.trace,
        "gap": (mu - found.mean).square().sum(1),
        "noise": _noise(found),
        "gap_held_out": (mu - other.mean).square().sum(1),
        "noise_held_out": _noise(other),
        "between": found.mean.var(0, correction=0).sum(),
    }
    return {name: value.numpy(force=True) for name, value in split.items()}


def _noise(found: aggregate_posterior.Conditional) -> Tensor:
    return found.trace / (found.ess - 1).clamp(min=0.1)  # a list of one image has no variance to tell by


def _aggregate_codes(codes: aggregate_posterior.Codes, count: int, seed: int) -> Tensor:
    """M codes z ~ q(z), by way of random training points."""
    device = codes.mean.device
    generator = torch.Generator(device).manual_seed(seed)
    rows = torch.randint(len(codes), (count,), generator=generator, device=device)
    return likelihoods.sample_gaussian(codes.mean[rows], codes.log_std[rows], generator=generator)


def squared_error(mu: Tensor, z: Tensor, codes: aggregate_posterior.Codes, x: Tensor) -> Tensor:
    """E_q(x|z) |x - mu|^2 for each row of `mu` (M, P), by the weights of all N points: the left side of (3)."""
    x = x.double()
    squares, errors = x.square().sum(1), []
    for mu_rows, z_rows in zip(mu.split(512), z.split(512), strict=True):
        weights = aggregate_posterior.log_weights(z_rows, codes).exp()
        errors.append(weights @ squares - 2 * ((weights @ x) * mu_rows).sum(1) + mu_rows.square().sum(1))
    return torch.cat(errors)


@torch.no_grad()
def frozen_and_swept(settings: Any, images: Pixels, models: Models, seed: int) -> dict[str, Any]:
    """What F4 compares, each with one row a seed.

    Frozen q, over those of M codes z ~ q(z) where the variance may be quoted: `floor` E tr Var_q[x|z] (S,), and
    `frozen_error` (S, decoders), the error E|x - mu(z)|^2 of each decoder by (3). KL weight swept, (S, weights) each:
    `swept_information` I_q(x;z), which stops at log N, and `swept_rate`, the KL on held-out images, in nats;
    `swept_error`, their squared error; `swept_variance`, E tr Var_q[x|z] over the codes where it may be quoted, times
    1 / (1 - 1 / samples) because the lists differ in length; `swept_reliable`, the share of these codes; `swept_width`,
    the mean edge width of the decoded images of all M codes. Every seed and weight is measured with the same draws.
    """
    rows: dict[str, list] = {name: [] for name in ("floor", "frozen_error", *SWEPT)}
    for vaes, decoders in zip(models.vaes, models.decoders, strict=True):
        z, found, good = _at_aggregate_codes(settings, images, vaes[MAIN].model, seed)
        gaps = [
            (torch.sigmoid(trained.model(z.float())).double() - found.mean).square().sum(1)
            for trained in decoders.values()
        ]
        rows["floor"].append(found.trace[good].mean())
        rows["frozen_error"].append(torch.stack([(found.trace + gap)[good].mean() for gap in gaps]))
        swept = [
            _swept(settings, images, vaes[Variant(kl_weight=weight)].model, seed) for weight in settings.kl_weights
        ]
        for name in SWEPT:
            rows[name].append(torch.tensor([of_weight[name] for of_weight in swept]))
    return {name: torch.stack(row) for name, row in rows.items()} | {
        "kl_weights": np.array(settings.kl_weights),
        "frozen_units": np.array(settings.decoders),
    }


SWEPT = ("swept_information", "swept_rate", "swept_error", "swept_variance", "swept_reliable", "swept_width")


def _at_aggregate_codes(
    settings: Any, images: Pixels, vae: VAE, seed: int
) -> tuple[Tensor, aggregate_posterior.Conditional, Tensor]:
    """M codes z ~ q(z), what q(x|z) is there, and where its variance may be quoted."""
    codes = encode(vae, images.x)
    z = _aggregate_codes(codes, settings.codes, seed)
    found = aggregate_posterior.conditional(z, codes, images.x, per_pixel=False)
    return z, found, _reliable(settings, found, _halves(found, z, codes, images))


def _swept(settings: Any, images: Pixels, vae: VAE, seed: int) -> dict[str, float]:
    z, found, good = _at_aggregate_codes(settings, images, vae, seed)
    generator = torch.Generator(images.x.device).manual_seed(seed)
    mean, log_std = vae.q_z_given_x(images.held_out)
    decoded = vae.p_x_given_z(likelihoods.sample_gaussian(mean, log_std, generator=generator))
    widths = sharpness.edge_width(images.pictures(vae.p_x_given_z(z.float())))
    information = aggregate_posterior.mutual_information(
        encode(vae, images.x), points=min(len(images.x), 2000), generator=generator
    )
    return {
        "swept_information": information.nats,
        "swept_rate": likelihoods.gaussian_kl(mean, log_std).mean().item(),
        "swept_error": (decoded - images.held_out).square().sum(1).mean().item(),
        "swept_variance": (found.trace / (1 - 1 / found.ess))[good].mean().item(),
        "swept_reliable": good.double().mean().item(),
        "swept_width": widths.nanmean().item(),
    }
