"""What notebook 04 measures on trained PixelVAEs: terms, codes, drawn images and their distances, exactness.

Each function returns arrays by name, from models by the names of `VARIANTS`; estimates are rows of value, low, high.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from paperlib.data.device_images import Images
from paperlib.nn import likelihoods
from paperlib.nn.pixelcnn_sampler import Sampler, draw_by_full_passes
from paperlib.pixelvae.markov_chain import Decoder, encode, markov_chain, noise_images
from paperlib.pixelvae.model import PixelVAE, build
from paperlib.pixelvae.training import CODED, evaluate
from paperlib.runs import train
from paperlib.runs.estimate import rows
from paperlib.runs.provenance import describe_code
from paperlib.stats import aggregate_posterior, features, two_sample
from paperlib.stats.autocorrelation import autocorrelation, pair_correlation
from paperlib.stats.linear_probe import linear_probe
from paperlib.system.devices import seeded, stream

Models = Mapping[str, PixelVAE]
Arrays = dict[str, np.ndarray]
Extractors = Mapping[str, features.Extractor]

LAGS = (1, 5, 20, 60)  # of the chain's autocorrelation
LATE = (-21, -16, -11, -6, -1)  # states of each chain that stand for it where sets of images are compared
CHAINED = ("none", "elbo")  # models whose chains are run
PROBES = ("pixels", "components", "random encoder", *CODED)
SETS = (
    "training photographs", "held-out photographs", "blurred", "patches shuffled",
    "none: q(z)", "none: prior", "none: Gaussian", "none: mixture", "none: chain", "none: chain from data",
    "elbo: q(z)", "elbo: prior", "elbo: chain", "elbo: chain from data",
    "mmd: q(z)", "mmd: prior",
)  # fmt: skip
# Of the jackknife: the late states of one chain stand in a row and are one group.
GROUP_SIZE = {name: len(LATE) if "chain" in name else 1 for name in SETS}


# Terms and codes


def histories(trained: Mapping[str, train.Trained]) -> Arrays:
    """Of each training `<name>_history`, rows of steps, training and held-out bits/dim of the reconstruction term."""
    keys = "step", "bits_per_dim", "held_out_bits_per_dim"
    return {f"{name}_history": np.array([[r[key] for key in keys] for r in t.history]) for name, t in trained.items()}


def terms(settings: Any, images: Images, models: Models, seed: int) -> Arrays:
    """What `evaluate` says of held-out images, (models, n) each; nan where no code is learned. Same noise for all."""
    n = settings.measured_images
    pictures, labels = images.held_out[:n], images.held_out_labels[:n]
    table: dict[str, list[np.ndarray]] = {"bits_per_dim": [], "kl": [], "shuffle_gap": []}
    for vae in models.values():
        with seeded(seed, images.device):
            measured = evaluate(vae, images, pictures, labels)
        for name, row in table.items():
            row.append(measured[name].numpy(force=True) if name in measured else np.full(len(pictures), np.nan))
    return {name: np.stack(row).astype(np.float32) for name, row in table.items()}


def codes(settings: Any, images: Images, models: Models, seed: int) -> Arrays:
    """For each of `CODED`: `information` I_q(x;z) in nats over training images, at most `information_ceiling`, log N;
    `energy`, the energy distance of q(z) on held-out images to N(0, I), with a last row for N(0, I) to itself from as
    many draws; `mean_spread` and `std`, root mean squares of the means' std over images and of std(x).
    """
    n, device = settings.measured_images, images.device
    table: dict[str, list] = {"information": [], "energy": [], "mean_spread": [], "std": []}
    prior = torch.randn(2, min(n, len(images.held_out)), settings.code_dim, generator=stream(seed, 1))
    for name in CODED:
        mean, log_std = encode(models[name], images, images.train)
        information = aggregate_posterior.mutual_information(
            aggregate_posterior.Codes(mean, log_std), points=min(len(mean), 2000), generator=stream(seed, 2, device)
        )
        z = sampled(models[name], images, images.held_out[:n], stream(seed, 3, device))
        table["information"].append(information.nats)
        table["energy"].append(two_sample.energy_distance(z.cpu(), prior[0]).row)
        table["mean_spread"].append(mean.var(0).mean().sqrt().item())
        table["std"].append((2 * log_std).exp().mean().sqrt().item())
    table["energy"].append(two_sample.energy_distance(prior[1], prior[0]).row)
    arrays = {name: np.array(column) for name, column in table.items()}
    return arrays | {"information_ceiling": np.array(information.ceiling)}


@torch.no_grad()
def sampled(vae: PixelVAE, images: Images, pictures: Tensor, generator: torch.Generator) -> Tensor:
    """One z ~ q(z|x) for each of uint8 images `pictures` (N, S, S, C): (N, D)."""
    return likelihoods.sample_gaussian(*encode(vae, images, pictures), generator=generator)


def probes(settings: Any, images: Images, models: Models, seed: int) -> Arrays:
    """`probe_right` (PROBES, n), bool: which held-out images a linear classifier of each of PROBES gets right.

    Codes are samples of q(z|x); of the random encoder, which has no reason to be precise, the means.
    """
    from sklearn.decomposition import PCA

    n, device = settings.measured_images, images.device
    parts = images.train, images.held_out[:n]
    pixels = [part.flatten(1).float().cpu() for part in parts]
    pca = PCA(settings.code_dim, svd_solver="covariance_eigh").fit(pixels[0].numpy())
    with seeded(seed, device):
        untrained = build(settings, images)
    inputs = {
        "pixels": pixels,
        "components": [torch.from_numpy(pca.transform(part.numpy())) for part in pixels],
        "random encoder": [encode(untrained, images, part)[0] for part in parts],
    }
    for name in CODED:
        inputs[name] = [sampled(models[name], images, part, stream(seed, 4, device)) for part in parts]
    labels = [images.labels.cpu(), images.held_out_labels[:n].cpu()]
    right = [linear_probe(inputs[name][0].cpu(), labels[0], inputs[name][1].cpu(), labels[1]) for name in PROBES]
    return {"probe_right": np.stack(right)}


# Sets of images


def extractors(settings: Any, images: Images, directory: Path, seed: int) -> Extractors:
    """Features for kernel distances: a random network's, and a classifier's, trained into a folder of `directory`."""
    dataset, device = images.dataset, images.device
    size = {"width": settings.classifier_width, "steps": settings.classifier_steps, "batch_size": 64}
    options = {"seed": seed, "device": device, "provenance": describe_code()}
    classifier = features.fit_classifier(dataset, directory / "classifier", **size, **options).model
    networks = {"classifier": classifier, "random": features.RandomNetwork(0, images.shape[0]).to(device)}
    return {kind: features.extractor(one, dataset.train.images, dataset.levels) for kind, one in networks.items()}


def samples(settings: Any, images: Images, models: Models, extract: Extractors, seed: int) -> dict[str, Any]:
    """Images drawn in every way, `draws` of each of SETS, of a chain the LATE states of `chains`.

    `shown_<set>` (40, S, S, C), the first images, of chains the last states; and the arrays of `_distances`, and of
    `_chain_arrays` for each model of CHAINED.
    """
    mixed = torch.randperm(len(images.held_out), generator=stream(seed, 12)).to(images.device)
    sources, reference = images.held_out[mixed[: settings.draws]], images.held_out[mixed[settings.draws :]]
    generator = stream(seed, 5, images.device)
    noise = noise_images(images, settings.chains, stream(seed, 6))
    drawn, arrays = _photographs(images, sources, seed), {}
    for name in ("none", "elbo", "mmd"):
        vae = models[name]
        z = sampled(vae, images, sources, generator)
        decode = Decoder(vae, images, min(settings.draws, 250))
        drawn[f"{name}: q(z)"] = decode(z, generator)
        drawn[f"{name}: prior"] = decode(torch.randn(z.shape, generator=generator, device=z.device), generator)
        if name == "none":
            for kind, fitted_z in fitted(sampled(vae, images, images.train, generator), settings.draws, seed).items():
                drawn[f"none: {kind}"] = decode(fitted_z, generator)
        if name in CHAINED:
            steps, begins = settings.chain_steps, sources[: settings.chains]
            from_noise = markov_chain(vae, images, noise, steps, generator, f"{name} from noise")
            from_data = markov_chain(vae, images, begins, steps, generator, f"{name} from data")
            for kind, states in (("chain", from_noise), ("chain from data", from_data)):
                drawn[f"{name}: {kind}"] = states[list(LATE)].transpose(0, 1).flatten(0, 1)  # chain by chain
            pair = drawn[f"{name}: q(z)"], decode(z, generator)
            arrays |= _chain_arrays(name, from_noise, from_data, pair, extract["classifier"])
    shown = {f"shown_{name}": drawn[name][GROUP_SIZE[name] - 1 :: GROUP_SIZE[name]][:40] for name in SETS}
    return arrays | _distances(drawn, reference, extract) | shown


def _photographs(images: Images, sources: Tensor, seed: int) -> dict[str, Tensor]:
    """The sets that no model made: as many training photographs as `sources`, these, and these damaged; on the CPU."""
    known = torch.randperm(len(images.train), generator=stream(seed, 13))[: len(sources)]
    sources = sources.cpu()
    return {
        "training photographs": images.train[known.to(images.device)].cpu(),
        "held-out photographs": sources,
        "blurred": blurred(sources),
        "patches shuffled": patches_shuffled(sources, stream(seed, 7)),
    }


def _chain_arrays(
    name: str, from_noise: Tensor, from_data: Tensor, pair: tuple[Tensor, Tensor], classifier: features.Extractor
) -> dict[str, Any]:
    """`chain_<model>` (steps + 1, S, S, C), the first chain from noise; `many_<model>` (36, S, S, C), last states;
    `similarity_<model>_<pixels or classifier>` (LAGS, 3), autocorrelation of chains from photographs; of a `pair` of
    decodes of the same codes, `decodes_<...>` (3,), their correlation, and `shown_decodes_<model>` (2, 10, S, S, C).
    """
    arrays: dict[str, Any] = {
        f"chain_{name}": from_noise[:, 0],
        f"many_{name}": from_noise[-1, :36],
        f"shown_decodes_{name}": torch.stack([pictures[:10] for pictures in pair]),
    }
    for view, extract in (("pixels", lambda pictures: pictures.flatten(1).double()), ("classifier", classifier)):
        states = torch.stack([extract(state) for state in from_data])
        arrays[f"similarity_{name}_{view}"] = np.stack(autocorrelation(states, LAGS), 1)
        arrays[f"decodes_{name}_{view}"] = pair_correlation(*(extract(pictures) for pictures in pair)).row
    return arrays


def _distances(drawn: Mapping[str, Tensor], reference: Tensor, extract: Extractors) -> dict[str, Any]:
    """`kernel_<kind>` (SETS, 3): squared kernel distance of each of SETS to `reference`, held-out photographs that had
    no part in making it; `noise_to_data_<kind>` (3,): between the chain's states from noise and from photographs.
    """
    arrays: dict[str, Any] = {}
    for kind, features_of in extract.items():
        points, kept = {name: features_of(drawn[name]) for name in SETS}, features_of(reference)
        to_kept = (two_sample.kernel_distance(points[name], kept, together=(GROUP_SIZE[name], 1)) for name in SETS)
        arrays[f"kernel_{kind}"] = rows(to_kept)
        ends = points["none: chain"], points["none: chain from data"]
        arrays[f"noise_to_data_{kind}"] = two_sample.kernel_distance(*ends, together=(len(LATE), len(LATE))).row
    return arrays


def blurred(pictures: Tensor) -> Tensor:
    """uint8 (N, S, S, C), every pixel the mean of the 3 x 3 around it."""
    x = F.avg_pool2d(pictures.permute(0, 3, 1, 2).double(), 3, stride=1, padding=1, count_include_pad=False)
    return x.round().byte().permute(0, 2, 3, 1).contiguous()


def patches_shuffled(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 (N, S, S, C), each image cut into 4 x 4 squares that are put together in another order."""
    count, side, _, channels = pictures.shape
    squares = pictures.reshape(count, 4, side // 4, 4, side // 4, channels).transpose(2, 3).flatten(1, 2)
    order = torch.rand(count, 16, generator=generator).argsort(1)
    squares = squares[torch.arange(count)[:, None], order]
    return squares.unflatten(1, (4, 4)).transpose(2, 3).reshape(pictures.shape)


def fitted(z: Tensor, count: int, seed: int) -> dict[str, Tensor]:
    """Codes (count, D) from two distributions fitted to samples `z` (N, D) of q(z): a Gaussian, and a mixture of 20."""
    from sklearn.mixture import GaussianMixture

    drawn = {}
    for name, components in (("Gaussian", 1), ("mixture", 20)):
        mixture = GaussianMixture(components, random_state=seed, reg_covar=1e-5, n_init=1)
        points, _ = mixture.fit(z.double().cpu().numpy()).sample(count)
        order = np.random.default_rng(seed).permutation(count)  # they come sorted by component
        drawn[name] = torch.from_numpy(points[order]).float().to(z.device)
    return drawn


# The class as a code, and exactness


def glasses(settings: Any, images: Images, label: PixelVAE, seed: int) -> dict[str, Any]:
    """G1: `gaussian_nats` (n,), -log p of held-out images under the Gaussian of their class, each grey level a bin; of
    each class `gaussian_mean`, `gaussian_sample` and `glasses_photograph`, a training image, (10, S, S, C), and
    `glasses_sample` (10, 4, S, S, C), draws of the PixelCNN++.
    """
    n, top = settings.measured_images, images.dataset.levels - 1
    classes = [images.train[images.labels == k] for k in range(images.classes)]
    means = torch.stack([x.double().mean(0) for x in classes])
    # At least 1/12, the variance of a uniform grey level within its bin: some corners of digits never vary.
    stds = torch.stack([x.double().var(0, correction=0) for x in classes]).clamp(min=1 / 12).sqrt()
    log_p = [
        likelihoods.discretized_gaussian_log_prob(part.double(), means[k], stds[k].log(), levels=top + 1)
        for part, k in zip(images.held_out[:n].split(512), images.held_out_labels[:n].split(512), strict=True)
    ]
    generator = stream(seed, 8, images.device)
    drawn = means + stds * torch.randn(means.shape, generator=generator, device=means.device, dtype=means.dtype)
    z = torch.eye(len(classes), device=images.device).repeat_interleave(4, 0)
    made = Decoder(label, images, len(z))(z, generator)
    return {
        "gaussian_nats": -torch.cat(log_p),
        "gaussian_mean": means.round().clamp(0, top).byte(),
        "gaussian_sample": drawn.round().clamp(0, top).byte(),
        "glasses_sample": made.unflatten(0, (-1, 4)),
        "glasses_photograph": torch.stack([x[0] for x in classes]),
    }


def exactness(images: Images, vae: PixelVAE, seed: int) -> Arrays:
    """P7 for two codes: `pixels_that_differ` between images of the incremental sampler and of full passes, in float64;
    `worst_parameter`, greatest difference of parameters in float32, relative where one is above 1.
    """
    device, x = images.device, images.to_float(images.held_out[:2])
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):  # TF32 has ten bits, also of float32
        h = vae.h(sampled(vae, images, images.held_out[:2], stream(seed, 9, device)))
        expected = vae.decoder(x, h)
    shape = x.shape[0], *x.shape[2:]
    given = Sampler(vae.decoder, *shape).teacher_forced(x, h)
    error = ((given - expected).abs() / expected.abs().clamp(min=1)).max()

    network, h = copy.deepcopy(vae.decoder).double(), h.double()
    sizes, options = network.settings, {"generator": stream(seed, 10, device), "dtype": torch.float64, "device": device}
    noise = likelihoods.mix_logistic_noise(shape, sizes.mixtures, sizes.channels, **options)
    differ = Sampler(network, *shape).draw(h, noise=noise) != draw_by_full_passes(network, noise, h)
    return {"pixels_that_differ": np.array(int(differ.any(1).sum())), "worst_parameter": np.array(error.item())}
