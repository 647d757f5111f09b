"""What notebook 04 measures on trained PixelVAEs: terms, codes, drawn images and their distances, exactness.

Each function returns arrays by name; Estimates are rows of value, low, high.
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
from paperlib.pixelvae.model import PixelVAE
from paperlib.pixelvae.training import VARIANTS, build, evaluate
from paperlib.runs import train
from paperlib.runs.estimate import rows
from paperlib.runs.provenance import describe_code
from paperlib.stats import aggregate_posterior, autocorrelation, features, linear_probe, two_sample
from paperlib.system.devices import seeded, stream

LAGS = (1, 5, 20, 60)  # of the chain's autocorrelation
LATE = (-21, -16, -11, -6, -1)  # states of each chain that stand for it where sets of images are compared
CODED = tuple(name for name, variant in VARIANTS.items() if variant.encoder in ("conv", "linear"))
PROBES = ("pixels", "components", "random encoder", *CODED)
SETS = (
    "training photographs",
    "held-out photographs",
    "blurred",
    "patches shuffled",
    "none: q(z)",
    "none: prior",
    "none: Gaussian",
    "none: mixture",
    "none: chain",
    "none: chain from data",
    "elbo: q(z)",
    "elbo: prior",
    "elbo: chain",
    "elbo: chain from data",
    "mmd: q(z)",
    "mmd: prior",
)


def extractors(settings: Any, seed: int, images: Images, directory: Path) -> dict[str, features.Extractor]:
    """The two kinds of features between which kernel distances are taken: those of a classifier, trained into
    `directory`, and of a random network.
    """
    dataset = images.dataset
    classifier = features.fit_classifier(
        dataset,
        directory,
        width=settings.classifier_width,
        steps=settings.classifier_steps,
        batch_size=64,
        seed=seed,
        device=images.device,
        provenance=describe_code(),
    ).model
    random = features.RandomNetwork(0, images.shape[0]).to(images.device)
    return {
        "classifier": features.extractor(classifier, dataset.train.images, dataset.levels),
        "random": features.extractor(random, dataset.train.images, dataset.levels),
    }


def histories(trained: Mapping[str, train.Trained]) -> dict[str, np.ndarray]:
    """Of each training `<name>_history`, rows of steps, training and held-out bits/dim of the reconstruction term."""
    return {
        f"{name}_history": np.array(
            [[row["step"], row["bits_per_dim"], row["held_out_bits_per_dim"]] for row in one.history]
        )
        for name, one in trained.items()
    }


def terms(settings: Any, seed: int, images: Images, models: Mapping[str, PixelVAE]) -> dict[str, np.ndarray]:
    """The objective's terms on held-out images, each (variants, n): `bits_per_dim` of the reconstruction term, `kl`
    and `shuffle_gap` in nats per image, nan where no code is learned; all models see the same noise.
    """
    n = settings.measured_images
    pictures, labels = images.held_out[:n], images.held_out_labels[:n]
    parts: dict[str, list[np.ndarray]] = {"bits_per_dim": [], "kl": [], "shuffle_gap": []}
    for vae in models.values():
        with seeded(seed, images.device):
            measured = evaluate(vae, images, pictures, labels)
        for name, part in parts.items():
            part.append(measured[name].numpy(force=True) if name in measured else np.full(len(pictures), np.nan))
    return {name: np.stack(part).astype(np.float32) for name, part in parts.items()}


def codes(settings: Any, seed: int, images: Images, models: Mapping[str, PixelVAE]) -> dict[str, np.ndarray]:
    """How much the encoder tells and how far q(z) is from p(z), a row for each model of `CODED`.

    `information` I_q(x;z) in nats over the training images, with `information_ceiling` log N; `energy`, the energy
    distance of q(z) on held-out images to N(0, I) and, in the last row, of N(0, I) to itself from as many draws;
    `mean_spread` and `std`, root mean squares of the means' std over images and of std(x).
    """
    n, generator = settings.measured_images, stream(seed, 1)
    columns: dict[str, list] = {"information": [], "energy": [], "mean_spread": [], "std": []}
    prior = torch.randn(2, min(n, len(images.held_out)), settings.code_dim, generator=generator)
    for name in CODED:
        vae = models[name]
        mean, log_std = encode(vae, images, images.train)
        table = aggregate_posterior.Codes(mean, log_std)
        told = aggregate_posterior.mutual_information(
            table, points=min(len(table), 2000), generator=stream(seed, 2, images.device)
        )
        z = sampled(vae, images, images.held_out[:n], stream(seed, 3, images.device))
        columns["information"].append(told.nats)
        columns["energy"].append(two_sample.energy_distance(z.cpu(), prior[0]).row)
        columns["mean_spread"].append(mean.var(0).mean().sqrt().item())
        columns["std"].append((2 * log_std).exp().mean().sqrt().item())
    columns["energy"].append(two_sample.energy_distance(prior[1], prior[0]).row)
    return {name: np.array(column) for name, column in columns.items()} | {
        "information_ceiling": np.array(told.ceiling)
    }


@torch.no_grad()
def sampled(vae: PixelVAE, images: Images, pictures: Tensor, generator: torch.Generator) -> Tensor:
    """One z ~ q(z|x) for each of uint8 images `pictures` (N, S, S, C): (N, D)."""
    return likelihoods.sample_gaussian(*encode(vae, images, pictures), generator=generator)


def probes(settings: Any, seed: int, images: Images, models: Mapping[str, PixelVAE]) -> dict[str, np.ndarray]:
    """`probe_right` (probes, n), bool: which held-out images a linear classifier of each of PROBES gets right.

    Codes are samples of q(z|x); of the random encoder, which has no reason to be precise, the means.
    """
    n = settings.measured_images
    parts = images.train, images.held_out[:n]
    pixels = [part.flatten(1).float().cpu() for part in parts]
    with seeded(seed, images.device):
        untrained = build(settings, images)
    inputs = {
        "pixels": pixels,
        "components": _components(*pixels, settings.code_dim),
        "random encoder": [encode(untrained, images, part)[0] for part in parts],
        **{
            name: [sampled(models[name], images, part, stream(seed, 4, images.device)) for part in parts]
            for name in CODED
        },
    }
    labels = [images.labels.cpu(), images.held_out_labels[:n].cpu()]
    right = [
        linear_probe.linear_probe(inputs[name][0].cpu(), labels[0], inputs[name][1].cpu(), labels[1]) for name in PROBES
    ]
    return {"probe_right": np.stack(right)}


def _components(train: Tensor, held_out: Tensor, count: int) -> list[Tensor]:
    """The first principal components of the training images, of both sets."""
    from sklearn.decomposition import PCA

    found = PCA(count, svd_solver="covariance_eigh").fit(train.numpy())
    return [torch.from_numpy(found.transform(part.numpy())) for part in (train, held_out)]


def samples(
    settings: Any,
    seed: int,
    images: Images,
    models: Mapping[str, PixelVAE],
    extractors: Mapping[str, features.Extractor],
) -> dict[str, np.ndarray]:
    """Images drawn in every way, with their kernel distances to photographs and the chains' memory.

    - `kernel_classifier`, `kernel_random` (SETS, 3): squared kernel distance of each of SETS to held-out photographs
      that had no part in making it; `noise_to_data_*` (3,): between the chain's states from noise and from photographs.
      A set is `draws` images; of a chain it is the LATE states of `chains`.
    - `shown_<set>` (40, S, S, C): its first images, of chains the last states.
    - `chain_none`, `chain_elbo` (steps + 1, S, S, C): the first chain, from noise; `many_*` the last states of 36.
    - `similarity_<none or elbo>_<pixels or classifier>` (LAGS, 3): autocorrelation of chains from photographs;
      `decodes_*` (3,): correlation of two decodes of one z; `shown_decodes_<model>` (2, 10, S, S, C).
    """
    draws = settings.draws
    mixed = torch.randperm(len(images.held_out), generator=stream(seed, 12)).to(images.device)
    sources, reference = images.held_out[mixed[:draws]], images.held_out[mixed[draws:]]
    known = torch.randperm(len(images.train), generator=stream(seed, 13))[:draws].to(images.device)
    sets = {
        "training photographs": images.train[known].cpu(),
        "held-out photographs": sources.cpu(),
        "blurred": blurred(sources.cpu()),
        "patches shuffled": patches_shuffled(sources.cpu(), stream(seed, 7)),
    }
    generator, arrays = stream(seed, 5, images.device), {}
    noise = noise_images(images, settings.chains, stream(seed, 6))
    for name in ("none", "elbo", "mmd"):
        vae, decode = models[name], Decoder(models[name], images, min(draws, 250))
        z = sampled(vae, images, sources, generator)
        sets[f"{name}: q(z)"] = decode(z, generator)
        sets[f"{name}: prior"] = decode(torch.randn(z.shape, generator=generator, device=z.device), generator)
        if name == "none":
            for prior, fitted_z in fitted(sampled(vae, images, images.train, generator), draws, seed).items():
                sets[f"none: {prior}"] = decode(fitted_z, generator)
        if name == "mmd":
            continue
        starts = {"from noise": noise, "from data": sources[: settings.chains]}
        from_noise, from_data = (
            markov_chain(vae, images, start, settings.chain_steps, generator, f"{name} {origin}")
            for origin, start in starts.items()
        )
        sets[f"{name}: chain"], sets[f"{name}: chain from data"] = _late(from_noise), _late(from_data)
        first, again = sets[f"{name}: q(z)"], decode(z, generator)
        arrays |= _memory(name, from_data, first, again, extractors["classifier"])
        arrays |= {f"chain_{name}": from_noise[:, 0], f"many_{name}": from_noise[-1, :36]}
        arrays[f"shown_decodes_{name}"] = torch.stack([first[:10], again[:10]])
    unit = {name: len(LATE) if "chain" in name else 1 for name in SETS}
    shown = {f"shown_{name}": sets[name][unit[name] - 1 :: unit[name]][:40] for name in SETS}
    return arrays | _distances(sets, reference, extractors, unit) | shown


def _memory(name: str, chain: Tensor, first: Tensor, again: Tensor, classifier: features.Extractor) -> dict[str, Any]:
    """Autocorrelations of a chain (T, N, S, S, C), and the correlation of two decodes of the same codes."""
    arrays = {}
    for view, look in (("pixels", _pixels), ("classifier", classifier)):
        states = torch.stack([look(state) for state in chain])
        arrays[f"similarity_{name}_{view}"] = np.stack(autocorrelation.autocorrelation(states, LAGS), 1)
        arrays[f"decodes_{name}_{view}"] = autocorrelation.pair_correlation(look(first), look(again)).row
    return arrays


def _distances(
    sets: Mapping[str, Tensor],
    reference: Tensor,
    extractors: Mapping[str, features.Extractor],
    unit: Mapping[str, int],
) -> dict[str, Any]:
    """Kernel distances of all SETS; `unit` says how many images in a row are of one chain."""
    arrays = {}
    for kind, look in extractors.items():
        seen, kept = {name: look(sets[name]) for name in SETS}, look(reference)
        arrays[f"kernel_{kind}"] = rows(
            two_sample.kernel_distance(seen[name], kept, together=(unit[name], 1)) for name in SETS
        )
        ends = seen["none: chain"], seen["none: chain from data"]
        arrays[f"noise_to_data_{kind}"] = two_sample.kernel_distance(*ends, together=(len(LATE), len(LATE))).row
    return arrays


def _late(states: Tensor) -> Tensor:
    """The LATE states of chains (steps + 1, N, S, S, C), those of one chain in a row: (N len(LATE), S, S, C)."""
    return states[list(LATE)].transpose(0, 1).flatten(0, 1)


def _pixels(pictures: Tensor) -> Tensor:
    return pictures.flatten(1).double()


def blurred(pictures: Tensor) -> Tensor:
    """uint8 (N, S, S, C), every pixel the mean of the 3 x 3 around it."""
    x = F.avg_pool2d(pictures.permute(0, 3, 1, 2).double(), 3, stride=1, padding=1, count_include_pad=False)
    return x.round().byte().permute(0, 2, 3, 1).contiguous()


def patches_shuffled(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 (N, S, S, C), each image cut into 4 x 4 squares that are put together in another order."""
    count, side, _, channels = pictures.shape
    patches = pictures.unflatten(1, (4, side // 4)).unflatten(3, (4, side // 4)).permute(0, 1, 3, 2, 4, 5)
    patches = patches.reshape(count, 16, side // 4, side // 4, channels)
    order = torch.rand(count, 16, generator=generator).argsort(1)
    patches = torch.stack([own[rows] for own, rows in zip(patches, order, strict=True)])
    patches = patches.unflatten(1, (4, 4)).permute(0, 1, 3, 2, 4, 5)
    return patches.reshape(pictures.shape)


def fitted(z: Tensor, count: int, seed: int) -> dict[str, Tensor]:
    """Codes from two distributions fitted to q(z), of which `z` (N, D) are samples: a Gaussian, and a mixture of 20."""
    from sklearn.mixture import GaussianMixture

    drawn = {}
    for name, components in (("Gaussian", 1), ("mixture", 20)):
        mixture = GaussianMixture(components, random_state=seed, reg_covar=1e-5, n_init=1)
        points, _ = mixture.fit(z.double().cpu().numpy()).sample(count)
        order = np.random.default_rng(seed).permutation(count)  # they come sorted by component
        drawn[name] = torch.from_numpy(points[order]).float().to(z.device)
    return drawn


def glasses(settings: Any, seed: int, images: Images, label: PixelVAE) -> dict[str, np.ndarray]:
    """The class as a frozen feature (claim G1): what the best factored Gaussian of each class loses on held-out images.

    `gaussian_nats` (n,) -log p of the Gaussian of the image's class, each grey level a bin; `gaussian_mean`,
    `gaussian_sample` (10, S, S, C) of each class; `glasses_sample` (10, 4, S, S, C) draws of the PixelCNN++ given the
    class; `glasses_photograph` (10, S, S, C) training images.
    """
    n, top = settings.measured_images, images.dataset.levels - 1
    x, labels = images.train.double(), images.labels
    means = torch.stack([x[labels == k].mean(0) for k in range(images.classes)])
    # At least 1/12, the variance of a uniform grey level within its bin: some corners of digits never vary.
    stds = torch.stack([x[labels == k].var(0, correction=0) for k in range(images.classes)]).clamp(min=1 / 12).sqrt()
    pictures, own = images.held_out[:n], images.held_out_labels[:n]
    log_p = [
        likelihoods.discretized_gaussian_log_prob(part.double(), means[k], stds[k].log(), levels=top + 1)
        for part, k in zip(pictures.split(512), own.split(512), strict=True)
    ]
    generator = stream(seed, 8, images.device)
    drawn = means + stds * torch.randn(means.shape, generator=generator, device=means.device, dtype=means.dtype)
    codes = torch.eye(images.classes, device=pictures.device).repeat_interleave(4, 0)
    made = Decoder(label, images, len(codes))(codes, generator)
    firsts = torch.stack([images.train[labels == k][0] for k in range(images.classes)])
    return {
        "gaussian_nats": -torch.cat(log_p),
        "gaussian_mean": means.round().clamp(0, top).byte(),
        "gaussian_sample": drawn.round().clamp(0, top).byte(),
        "glasses_sample": made.unflatten(0, (images.classes, 4)),
        "glasses_photograph": firsts,
    }


def exactness(seed: int, images: Images, vae: PixelVAE) -> dict[str, np.ndarray]:
    """Claim P7 on the trained decoder, two codes: `pixels_that_differ` between images of the incremental sampler and of
    one full pass per pixel, in float64; `worst_parameter`, greatest difference of parameters in float32, relative where
    a parameter is above 1.
    """
    x = images.to_float(images.held_out[:2])
    z = sampled(vae, images, images.held_out[:2], stream(seed, 9, images.device))
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):  # TF32 has ten bits, also of float32
        h = vae.h(z)
        expected = vae.decoder(x, h)
    shape = x.shape[0], *x.shape[2:]
    given = Sampler(vae.decoder, *shape).teacher_forced(x, h)
    error = ((given - expected).abs() / expected.abs().clamp(min=1)).max()

    network, h = copy.deepcopy(vae.decoder).double(), h.double()
    channels, mixtures = network.settings.channels, network.settings.mixtures
    generator = stream(seed, 10, images.device)
    noise = likelihoods.mix_logistic_noise(
        shape, mixtures, channels, generator=generator, dtype=torch.float64, device=x.device
    )
    differ = Sampler(network, *shape).draw(h, noise=noise) != draw_by_full_passes(network, noise, h)
    return {"pixels_that_differ": np.array(int(differ.any(1).sum())), "worst_parameter": np.array(error.item())}


@torch.no_grad()
def continue_chain(seed: int, images: Images, vae: PixelVAE) -> np.ndarray:
    """Three more states of the chain from five held-out photographs: uint8 (4, 5, S, S, C)."""
    return markov_chain(vae, images, images.held_out[-5:], 3, stream(seed, 11, images.device)).numpy()
