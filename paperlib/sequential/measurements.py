"""What notebook 03 measures: errors step by step, spectra of samples, their distances, the nearest photographs.

Each function returns arrays by name. Estimates are rows of value, low, high. Drawn images are rounded to
grey levels before anything is measured, as photographs are.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from paperlib.data.device_images import Images
from paperlib.nn.likelihoods import sample_gaussian
from paperlib.runs import train
from paperlib.runs.estimate import Estimate, rows
from paperlib.sequential.model import (
    Drawn,
    PixelCodes,
    SequentialVAE,
    batches,
    chain,
    draw,
    pixel_codes,
    reconstruct,
    swap,
    swap_errors,
)
from paperlib.sequential.prior import gaussian_gap
from paperlib.sequential.training import evaluate
from paperlib.stats import features, two_sample
from paperlib.stats.intervals import mean_interval
from paperlib.stats.sharpness import edge_width, power_spectrum, spectral_slope
from paperlib.system.devices import seeded, stream

ROWS = 10  # of the pictures
CODES = 4_000  # training images at most, on whose codes priors are compared
MIXTURES = (10, 50)  # components of the mixtures beside the fitted Gaussian
# A model's name alone stands for draws of codes from its fitted priors.
SETS = (
    "training photographs", "reconstructions", "sequential", "sequential: mixture", "sequential: N(0, I)",
    "sequential: step 1", "one_step", "one_step: N(0, I)", "infusion",
)  # fmt: skip
KINDS = ("random", "thumbnails")  # of features


def histories(trained: Mapping[str, train.Trained]) -> dict[str, np.ndarray]:
    """Of each training `<name>_history`: rows of step, loss in nats per image, the held-out number watched, and KL."""
    arrays = {}
    for name, one in trained.items():
        keys = list(one.history[0])
        first = next(key for key in keys if key.startswith("held_out_"))
        rows = [[row["step"], row["loss"], row[first], row["held_out_kl"]] for row in one.history]
        arrays[f"{name}_history"] = np.array(rows)
    return arrays


def terms(settings: Any, seed: int, images: Images, models: Mapping[str, SequentialVAE]) -> dict[str, np.ndarray]:
    """On held-out images that no training watched: `<model>_error`, squared error per dimension, `_kl` and `_log_p` in
    nats, each (n, T).

    Of the chain also `swapped_error` (n, T), with the code of one step taken from another image; `no_latent_error`
    (n, T - 1), of the control that makes the steps 2 .. T without codes; `mean_error` (n,), of the mean of the training
    images, which knows no code at all; and `training_error` (n, T), on as many training images. All but the last see
    the same noise, so rows are pairs. `sigma_<model>` (T,); `kl_by_rung` (T, rungs) in nats;
    `kl_weight_one_step`, to which its kl_controller_gain came.
    """
    first = settings.evaluation_images
    pictures = images.held_out[first : first + settings.measured_images]
    arrays: dict[str, Any] = {}
    for name in ("sequential", "one_step", "infusion"):
        with seeded(seed, images.device):
            measured = evaluate(models[name], images, pictures)
        arrays |= {f"{name}_{term}": values for term, values in measured.items()}
        steps = range(1, models[name].steps + 1)
        arrays[f"sigma_{name}"] = np.array([models[name].log_sigma(t).exp().item() for t in steps])
    with seeded(seed, images.device):
        arrays["sequential_error"], arrays["swapped_error"] = swap_errors(models["sequential"], images, pictures)
    with seeded(seed, images.device):
        arrays["no_latent_error"] = evaluate(models["no_latent"], images, pictures, models["sequential"])["error"]
        seen = images.batch(_rows(seed, len(images.train), len(pictures), 14))
        arrays["training_error"] = evaluate(models["sequential"], images, seen)["error"]
    arrays["kl_by_rung"] = kl_by_rung(models["sequential"], images, pictures, seed)
    arrays["kl_weight_one_step"] = models["one_step"].log_weight.exp().item()
    few = images.batch(_spread(len(images.train), 2000))
    mean = images.to_float(few).mean(0, keepdim=True)
    x = torch.cat(list(batches(images, pictures)))
    arrays["mean_error"] = (x - mean).square().flatten(1).mean(1).double()
    return arrays


@torch.no_grad()
def kl_by_rung(vae: SequentialVAE, images: Images, pictures: Tensor, seed: int) -> Tensor:
    """Mean KL of each step and rung, finest first, (T, rungs) in nats, of uint8 `pictures`.

    Of each rung to its own part of the prior.
    """
    with seeded(seed, images.device):
        codes = _codes(vae, images, pictures)
    rungs = range(len(vae.ladder))
    return torch.stack([torch.stack([vae.kl(t, *q, rung).mean().double() for rung in rungs]) for t, q in codes.items()])


def _spread(count: int, most: int) -> Tensor:
    """Rows at even distances, `most` at most."""
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).round().long()


@torch.no_grad()
def priors(seed: int, images: Images, models: Mapping[str, SequentialVAE]) -> tuple[dict[str, Any], Any]:
    """What other priors would say of the codes: arrays, and the largest mixture, fitted to z_1 of `sequential`.

    `prior_gap` (T, 2) and `prior_gap_one_step` (1, 2): KL(N(m, C) || p) in nats, m and C the moments of q(z_t) over
    training images, p first N(0, I), then the model's own prior. `prior_log_prob` (2 + MIXTURES, 3): E log p(z_1) in
    nats of held-out images under N(0, I), the fitted Gaussian, and Gaussian mixtures.
    """
    from sklearn.mixture import GaussianMixture

    known, arrays = images.batch(_spread(len(images.train), CODES)), {}
    with seeded(seed, images.device):
        for name, suffix in (("sequential", ""), ("one_step", "_one_step")):
            codes, fitted = _codes(models[name], images, known), models[name].priors
            gaps = [[gaussian_gap(*q), gaussian_gap(*q, fitted[t - 1])] for t, q in codes.items()]
            arrays[f"prior_gap{suffix}"] = torch.tensor(gaps)
        vae = models["sequential"]
        seen, unseen = (
            sample_gaussian(*_codes(vae, images, part)[1]).double().cpu() for part in (known, images.held_out)
        )
    fitted = MultivariateNormal(vae.priors[0].mean.cpu(), vae.priors[0].covariance().cpu())
    standard = MultivariateNormal(torch.zeros_like(fitted.mean), torch.eye(len(fitted.mean)).double())
    log_probs = [standard.log_prob(unseen), fitted.log_prob(unseen)]
    for components in MIXTURES:
        mixture = GaussianMixture(min(components, len(seen) // 50), reg_covar=1e-3, random_state=seed).fit(seen.numpy())
        log_probs.append(mixture.score_samples(unseen.numpy()))
    return arrays | {"prior_log_prob": rows(mean_interval(one) for one in log_probs)}, mixture


def _codes(vae: SequentialVAE, images: Images, pictures: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """By step, means and log stds (N, D) of q(z_t|.), of uint8 `pictures`."""
    steps: dict[int, list[tuple[Tensor, Tensor]]] = {t: [] for t in range(1, vae.steps + 1)}
    for x in batches(images, pictures):
        for link in chain(vae, x):
            steps[link.t].append((link.step.mean, link.step.log_std))
    return {t: tuple(torch.cat(part) for part in zip(*parts, strict=True)) for t, parts in steps.items()}


def drawings(
    settings: Any, seed: int, images: Images, models: Mapping[str, SequentialVAE], mixture: Any
) -> dict[str, Drawn]:
    """`samples` images of each model, all from streams of their own, by the names of `SETS`."""

    def drawn(name: str, number: int, **prior: Any) -> Drawn:
        return draw(models[name], images, settings.samples, stream(seed, number, images.device), **prior)

    # From the components in turn as they come, so rows are put into random order.
    z = torch.from_numpy(mixture.sample(settings.samples)[0]).float()[
        _rows(seed, settings.samples, settings.samples, 16)
    ]
    return {
        "sequential": drawn("sequential", 1),
        "one_step": drawn("one_step", 2),
        "infusion": drawn("infusion", 3),
        "sequential: N(0, I)": drawn("sequential", 17, fitted=False),
        "one_step: N(0, I)": drawn("one_step", 18, fitted=False),
        "sequential: mixture": drawn("sequential", 19, first=z.to(images.device)),
    }


def sharpness_along_the_chain(
    settings: Any, seed: int, images: Images, drawn: Mapping[str, Drawn]
) -> dict[str, np.ndarray]:
    """Claim S2. `frequencies` (K,) in cycles per pixel; mean power in squared grey levels `power_sequential` (T, K),
    `power_one_step`, `power_infusion`, `power_photographs` (held out) and `power_training` (K,).

    Of each of these sets but for the power, (T, 3) for `sequential` and (3,) else: `edge_<set>`, mean edge width in
    pixels; `slope_<set>` of log power; `spectral_<set>`, distance of log power to the held-out photographs'.
    `spectral_noise_first`, `spectral_noise_one_step` (3,): of x(1) and of `one_step` with the white noise that brings
    them nearest, the control for what mere grain can do.
    """
    frequencies, photographs = power_spectrum(_planes(_mixed(seed, images)))
    steps = list(drawn["sequential"].states[1:])
    sets = {name: drawn[name].means for name in ("one_step", "infusion")}
    sets["training"] = images.batch(_rows(seed, len(images.train), settings.samples, 11))
    arrays: dict[str, Any] = {"frequencies": frequencies, "power_photographs": photographs.mean(0)}
    arrays |= {f"{name}_photographs": row for name, row in _sharpness(images.held_out).items()}
    measured = [_sharpness(state, photographs) for state in steps]
    arrays |= {f"{name}_sequential": np.stack([one[name] for one in measured]) for name in measured[0]}
    for name, pictures in sets.items():
        arrays |= {f"{key}_{name}": row for key, row in _sharpness(pictures, photographs).items()}
    for name, pictures in (("first", steps[0]), ("one_step", sets["one_step"])):
        # White noise has the same power at every frequency.
        power = power_spectrum(_planes(pictures))[1]
        noisy = [_spectral(power + level, photographs) for level in [0, *np.geomspace(1e-3, 1e3, 61)]]
        arrays[f"spectral_noise_{name}"] = np.array(min(noisy, key=lambda one: one.value).row)
    return arrays


def _sharpness(pictures: Tensor, photographs: Tensor | None = None) -> dict[str, np.ndarray]:
    """Of uint8 `pictures`: `edge`, `slope` (3,); given the power of `photographs`, `power` (K,) and `spectral` (3,)."""
    planes = _planes(pictures)
    measured = {"edge": edge_width(planes), "slope": spectral_slope(planes)}
    of_each = {name: np.array(mean_interval(values).row) for name, values in measured.items()}
    if photographs is None:
        return of_each
    power = power_spectrum(planes)[1]
    return of_each | {"power": power.mean(0).numpy(), "spectral": np.array(_spectral(power, photographs).row)}


def _rows(seed: int, count: int, most: int, number: int) -> Tensor:
    return torch.randperm(count, generator=stream(seed, number))[:most]


def _mixed(seed: int, images: Images) -> Tensor:
    """The held-out photographs in random order, as intervals take groups of neighbours, which may be alike."""
    return images.held_out[_rows(seed, len(images.held_out), len(images.held_out), 12).to(images.device)]


def _planes(pictures: Tensor) -> Tensor:
    return pictures.cpu().permute(0, 3, 1, 2)


def _spectral(power: Tensor, photographs: Tensor) -> Estimate:
    return two_sample.spectral_distance(power, photographs, least=1 / 12)  # the variance of rounding


def compared(
    settings: Any, seed: int, images: Images, models: Mapping[str, SequentialVAE], drawn: Mapping[str, Drawn]
) -> dict[str, np.ndarray]:
    """Claim S4. `kernel_<kind>` (SETS, 3): squared kernel distance to held-out photographs, on features of a random
    network and on thumbnails; `ratio_<kind>` (3,), that of `sequential` over that of `one_step`, and
    `ratio_standard_<kind>` the same for draws from N(0, I); `shown_<set>` (24, S, S, C). All held-out photographs are
    the reference; for reconstructions one half, and the other half is reconstructed.
    """
    mixed = _mixed(seed, images)
    reference, sources = mixed.chunk(2)
    with seeded(seed, images.device):
        rebuilt = reconstruct(models["sequential"], images, sources)[-1]
    pictures = {name: one.means for name, one in drawn.items()} | {
        "training photographs": images.batch(_rows(seed, len(images.train), settings.samples, 13)).cpu(),
        "reconstructions": rebuilt,
        "sequential: step 1": drawn["sequential"].states[1],
    }
    scale = images.batch(_spread(len(images.train), 10_000))
    networks = {"random": features.RandomNetwork(0, images.shape[0]), "thumbnails": features.Thumbnails()}
    arrays: dict[str, Any] = {f"shown_{name}": pictures[name][:24] for name in SETS}
    for kind in KINDS:
        look = features.extractor(networks[kind].to(images.device), scale, images.dataset.levels)
        seen, kept, half = {name: look(pictures[name]) for name in SETS}, look(mixed), look(reference)
        arrays[f"kernel_{kind}"] = rows(
            two_sample.kernel_distance(seen[name], half if name == "reconstructions" else kept) for name in SETS
        )
        for ratio, prior in ((f"ratio_{kind}", ""), (f"ratio_standard_{kind}", ": N(0, I)")):
            a, b = (seen[name + prior] for name in ("sequential", "one_step"))
            arrays[ratio] = np.array(two_sample.kernel_distance_ratio(a, b, kept).row)
    return arrays


def nearest(settings: Any, images: Images, drawn: Mapping[str, Drawn]) -> dict[str, np.ndarray]:
    """How near samples come to training photographs: `nearest_<view>_<set>` (n,), the root mean squared difference, in
    units of the range -1 .. 1, to the nearest; `<view>` is pixels or thumbnails of 8 x 8 means, `<set>` sequential,
    one_step, infusion or held_out, which nobody has copied. `neighbours_<view>` (10, S, S, C): those of the first
    samples of `sequential`, `near` (10, S, S, C). Of a large training set some 10,000 images, evenly spaced, are
    searched, and their mirror images, as both were seen in training, but not shifted ones.
    """
    among = images.batch(_spread(len(images.train), 10_000))
    among = torch.cat([among, among.flip(2)])
    sets = {name: drawn[name].means for name in ("sequential", "one_step", "infusion")} | {"held_out": images.held_out}
    arrays: dict[str, Any] = {"near": drawn["sequential"].means[:ROWS]}
    for view in ("pixels", "thumbnails"):
        targets = _viewed(images, among, view)
        for name, pictures in sets.items():
            apart, rows = _to_nearest(_viewed(images, pictures[: settings.samples], view), targets)
            arrays[f"nearest_{view}_{name}"] = apart
            if name == "sequential":
                arrays[f"neighbours_{view}"] = among[rows[:ROWS]]
    return arrays


def _viewed(images: Images, pictures: Tensor, view: str) -> Tensor:
    look = features.Thumbnails() if view == "thumbnails" else torch.nn.Flatten()
    return torch.cat([look(x) for x in batches(images, pictures)])


def _to_nearest(points: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Root mean squared difference (n,) to the nearest of `among`, and its row."""
    nearest = [torch.cdist(part, among, compute_mode="use_mm_for_euclid_dist").min(1) for part in points.split(500)]
    rows = torch.cat([one.indices for one in nearest])
    return (points - among[rows]).square().mean(1).sqrt(), rows


def pictures(seed: int, images: Images, models: Mapping[str, SequentialVAE]) -> dict[str, np.ndarray]:
    """For the figures, ten rows each: `chain` (T + 1, 10, S, S, C), noise and x(1) .. x(T) of samples; the same with
    all codes from N(0, I), `chain_standard`; `chain_infusion` of infusion's draws, with `chain_infusion_means` (10, S,
    S, C); `targets` (10, S, S, C), held-out photographs, `rebuilt` and `swapped` (T, 10, S, S, C), with their codes and
    with each step's code of the photograph below.
    """
    targets = images.held_out[_spread(len(images.held_out), ROWS)]
    drawn = draw(models["sequential"], images, ROWS, stream(seed, 5, images.device))
    standard = draw(models["sequential"], images, ROWS, stream(seed, 5, images.device), fitted=False)
    infused = draw(models["infusion"], images, ROWS, stream(seed, 6, images.device))
    with seeded(seed, images.device):
        rebuilt, swapped = swap(models["sequential"], images.to_float(targets))
    return {
        "chain": drawn.states,
        "chain_standard": standard.states,
        "chain_infusion": infused.states,
        "chain_infusion_means": infused.means,
        "targets": targets,
        "rebuilt": torch.stack([images.to_uint8(one) for one in rebuilt]),
        "swapped": torch.stack([images.to_uint8(one) for one in swapped]),
    }


def draw_more(seed: int, images: Images, vae: SequentialVAE) -> np.ndarray:
    """Samples that no figure shows: noise and x(1) .. x(T), uint8 (T + 1, 5, S, S, C)."""
    return draw(vae, images, 5, stream(seed, 8, images.device)).states.numpy()


@torch.no_grad()
def exactness(seed: int, images: Images, infusion: SequentialVAE) -> dict[str, np.ndarray]:
    """Claim S3: `infusion_losses` (2,) in nats per image, in float64, for one set of masks and draws: through the chain
    whose code is a subset of pixels, and by `plain_infusion_loss`.
    """
    vae = copy.deepcopy(infusion).double()
    x = images.to_float(images.held_out[:8]).double()
    codes = pixel_codes(vae, x, stream(seed, 7, images.device))
    general = -sum(link.log_p.mean() for link in chain(vae, x, codes))
    return {"infusion_losses": np.array([general.item(), plain_infusion_loss(vae, x, codes).item()])}


def plain_infusion_loss(vae: SequentialVAE, x: Tensor, codes: PixelCodes) -> Tensor:
    """Equations (9), (4), (10) of `model` written out, without the code that trains: mean over the batch."""
    loss, state = x.new_zeros(()), codes.noise[0]
    for t in range(vae.steps):
        infused = torch.where(codes.masks[t] == 1, x, state)
        separate = len(vae.networks) == vae.steps
        which, index = (t, 0) if separate or t == 0 else (1, t - 1)
        mean = vae.networks[which].generator(infused, infused, None, torch.tensor(index, device=x.device))
        sigma = vae.log_sigma(t + 1).exp()
        squares = ((x - mean) ** 2).sum((1, 2, 3)) / (2 * sigma**2)
        loss = loss + (squares + math.prod(vae.shape) * torch.log(sigma * math.sqrt(2 * math.pi))).mean()
        if t + 1 < vae.steps:
            state = mean + sigma * codes.noise[t + 1]
    return loss
