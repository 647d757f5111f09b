"""What notebook 04 measures on trained PixelVAEs: terms, codes, drawn images and their distances, exactness.

Each function returns arrays by name; `pixelvae.measure` writes them all. Estimates are rows of value, low, high.
Streams of random numbers are separate, so that one measurement does not change another.
"""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from paperlib.nn import likelihoods
from paperlib.nn.pixelcnn_sampler import Sampler, draw_by_full_passes
from paperlib.pixelvae.model import (
    VARIANTS,
    Decoder,
    Images,
    PixelVAE,
    build,
    encode,
    evaluate,
    markov_chain,
    noise_images,
)
from paperlib.runs import train
from paperlib.runs.estimate import rows
from paperlib.runs.provenance import describe_code
from paperlib.runs.run import Run
from paperlib.stats import aggregate_posterior, autocorrelation, features, linear_probe, two_sample

LAGS = (1, 5, 20, 60)  # of the chain's autocorrelation
LATE = (-21, -16, -11, -6, -1)  # states of each chain that stand for it where sets of images are compared


def extractors(run: Run, images: Images) -> dict[str, features.Extractor]:
    """The two kinds of features between which kernel distances are taken: a classifier's, and a random network's."""
    settings, dataset = run.settings, images.dataset
    classifier = features.fit_classifier(
        dataset,
        run.directory / "classifier",
        width=settings.classifier_width,
        steps=settings.classifier_steps,
        batch_size=64,
        seed=run.seed,
        device=run.device,
        provenance=describe_code(),
    ).model
    random = features.RandomNetwork(0, images.shape[0]).to(run.device)
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


def terms(run: Run, images: Images, models: Mapping[str, PixelVAE]) -> dict[str, np.ndarray]:
    """The objective's terms on held-out images, each (variants, n): `bits_per_dim` of the reconstruction term, `kl`
    and `shuffle_gap` in nats an image, nan where no code is learned; all models see the same noise.
    """
    n = run.settings.measured_images
    pictures, labels = images.held_out[:n], images.held_out_labels[:n]
    rows: dict[str, list[np.ndarray]] = {"bits_per_dim": [], "kl": [], "shuffle_gap": []}
    for vae in models.values():
        with run.seeded():
            measured = evaluate(vae, images, pictures, labels)
        for name, row in rows.items():
            row.append(measured[name].numpy(force=True) if name in measured else np.full(len(pictures), np.nan))
    return {name: np.stack(row).astype(np.float32) for name, row in rows.items()}


def codes(run: Run, images: Images, models: Mapping[str, PixelVAE]) -> dict[str, np.ndarray]:
    """How much the encoder tells and how far q(z) is from p(z), a row for each model of `CODED`.

    `information` I_q(x;z) in nats over the training images, with `information_ceiling` log N; `energy`, the energy
    distance of q(z) on held-out images to N(0, I) and, in the last row, of N(0, I) to itself from as many draws;
    `mean_spread` and `deviation`, root mean squares of the means' deviation over images and of std(x).
    """
    n, generator = run.settings.measured_images, run.generator(1)
    found: dict[str, list] = {"information": [], "energy": [], "mean_spread": [], "deviation": []}
    prior = torch.randn(2, min(n, len(images.held_out)), run.settings.code_dim, generator=generator)
    for name in CODED:
        vae = models[name]
        mean, log_std = encode(vae, images, images.train)
        table = aggregate_posterior.Codes(mean, log_std)
        told = aggregate_posterior.mutual_information(
            table, points=min(len(table), 2000), generator=run.generator(2, True)
        )
        z = sampled(vae, images, images.held_out[:n], run.generator(3, True))
        found["information"].append(told.nats)
        found["energy"].append(two_sample.energy_distance(z.cpu(), prior[0]).row)
        found["mean_spread"].append(mean.var(0).mean().sqrt().item())
        found["deviation"].append((2 * log_std).exp().mean().sqrt().item())
    found["energy"].append(two_sample.energy_distance(prior[1], prior[0]).row)
    return {name: np.array(rows) for name, rows in found.items()} | {"information_ceiling": np.array(told.ceiling)}


CODED = tuple(name for name, variant in VARIANTS.items() if variant.encoder in ("conv", "linear"))


@torch.no_grad()
def sampled(vae: PixelVAE, images: Images, pictures: Tensor, generator: torch.Generator) -> Tensor:
    """One z ~ q(z|x) for each of uint8 images `pictures` (N, S, S, C): (N, D)."""
    return likelihoods.sample_gaussian(*encode(vae, images, pictures), generator=generator)


def probes(run: Run, images: Images, models: Mapping[str, PixelVAE]) -> dict[str, np.ndarray]:
    """`probe_right` (probes, n), bool: which held-out images a linear classifier of each of PROBES gets right.

    Codes are samples of q(z|x); of the random encoder, which has no reason to be precise, the means.
    """
    n = run.settings.measured_images
    parts = images.train, images.held_out[:n]
    pixels = [part.flatten(1).float().cpu() for part in parts]
    with run.seeded():
        untrained = build(run, images)
    inputs = {
        "pixels": pixels,
        "components": _components(*pixels, run.settings.code_dim),
        "random encoder": [encode(untrained, images, part)[0] for part in parts],
        **{name: [sampled(models[name], images, part, run.generator(4, True)) for part in parts] for name in CODED},
    }
    labels = [images.labels.cpu(), images.held_out_labels[:n].cpu()]
    right = [
        linear_probe.linear_probe(inputs[name][0].cpu(), labels[0], inputs[name][1].cpu(), labels[1]) for name in PROBES
    ]
    return {"probe_right": np.stack(right)}


PROBES = ("pixels", "components", "random encoder", *CODED)


def _components(train: Tensor, held_out: Tensor, count: int) -> list[Tensor]:
    """The first principal components of the training images, of both sets."""
    from sklearn.decomposition import PCA

    found = PCA(count, svd_solver="covariance_eigh").fit(train.numpy())
    return [torch.from_numpy(found.transform(part.numpy())) for part in (train, held_out)]


def samples(
    run: Run,
    images: Images,
    models: Mapping[str, PixelVAE],
    describe: Mapping[str, features.Extractor],
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
    chains, draws, steps = run.settings.chains, run.settings.draws, run.settings.chain_steps
    mixed = torch.randperm(len(images.held_out), generator=run.generator(12)).to(run.device)
    sources, reference = images.held_out[mixed[:draws]], images.held_out[mixed[draws:]]
    generator = run.generator(5, True)
    noise = noise_images(images, chains, run.generator(6))
    known = torch.randperm(len(images.train), generator=run.generator(13))[:draws].to(run.device)

    drawn = {
        "training photographs": images.train[known].cpu(),
        "held-out photographs": sources.cpu(),
        "blurred": blurred(sources.cpu()),
        "patches shuffled": patches_shuffled(sources.cpu(), run.generator(7)),
    }
    found: dict[str, Any] = {}
    for name in ("none", "elbo", "mmd"):
        vae = models[name]
        z = sampled(vae, images, sources, generator)
        decode = Decoder(vae, images, min(draws, 250))
        drawn[f"{name}: q(z)"] = decode(z, generator)
        drawn[f"{name}: prior"] = decode(torch.randn(z.shape, generator=generator, device=z.device), generator)
        if name == "none":
            for law, fitted_z in fitted(run, sampled(vae, images, images.train, generator), draws).items():
                drawn[f"none: {law}"] = decode(fitted_z, generator)
        if name == "mmd":
            continue
        from_noise = markov_chain(vae, images, noise, steps, generator, f"{name} from noise")
        from_data = markov_chain(vae, images, sources[:chains], steps, generator, f"{name} from data")
        drawn[f"{name}: chain"], drawn[f"{name}: chain from data"] = (
            _late(states) for states in (from_noise, from_data)
        )
        again = decode(z, generator)
        for view, look in (("pixels", _pixels), ("classifier", describe["classifier"])):
            states = torch.stack([look(state) for state in from_data])
            found[f"similarity_{name}_{view}"] = np.stack(autocorrelation.autocorrelation(states, LAGS), 1)
            pair = look(drawn[f"{name}: q(z)"]), look(again)
            found[f"decodes_{name}_{view}"] = autocorrelation.pair_correlation(*pair).row
        found[f"chain_{name}"] = from_noise[:, 0]
        found[f"many_{name}"] = from_noise[-1, :36]
        found[f"shown_decodes_{name}"] = torch.stack([drawn[f"{name}: q(z)"][:10], again[:10]])

    unit = {name: len(LATE) if "chain" in name else 1 for name in SETS}
    for kind, look in describe.items():
        seen, kept = {name: look(drawn[name]) for name in SETS}, look(reference)
        found[f"kernel_{kind}"] = rows(
            two_sample.kernel_distance(seen[name], kept, together=(unit[name], 1)) for name in SETS
        )
        ends = seen["none: chain"], seen["none: chain from data"]
        found[f"noise_to_data_{kind}"] = two_sample.kernel_distance(*ends, together=(len(LATE), len(LATE))).row
    return found | {f"shown_{name}": drawn[name][unit[name] - 1 :: unit[name]][:40] for name in SETS}


def _late(states: Tensor) -> Tensor:
    """The LATE states of chains (steps + 1, N, S, S, C), those of one chain in a row: (N len(LATE), S, S, C)."""
    return states[list(LATE)].transpose(0, 1).flatten(0, 1)


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


def fitted(run: Run, z: Tensor, count: int) -> dict[str, Tensor]:
    """Codes from two laws fitted to q(z), of which `z` (N, D) are samples: a Gaussian, and a mixture of 20."""
    from sklearn.mixture import GaussianMixture

    drawn = {}
    for law, components in (("Gaussian", 1), ("mixture", 20)):
        mixture = GaussianMixture(components, random_state=run.seed, reg_covar=1e-5, n_init=1)
        points, _ = mixture.fit(z.double().cpu().numpy()).sample(count)
        order = np.random.default_rng(run.seed).permutation(count)  # they come sorted by component
        drawn[law] = torch.from_numpy(points[order]).float().to(z.device)
    return drawn


def glasses(run: Run, images: Images, label: PixelVAE) -> dict[str, np.ndarray]:
    """The class as a frozen feature (claim G1): what the best factored Gaussian of each class loses on held-out images.

    `gaussian_nats` (n,) -log p of the Gaussian of the image's class, each grey level a bin; `gaussian_mean`,
    `gaussian_sample` (10, S, S, C) of each class; `glasses_sample` (10, 4, S, S, C) draws of the PixelCNN++ given the
    class; `glasses_photograph` (10, S, S, C) training images.
    """
    n, top = run.settings.measured_images, images.dataset.levels - 1
    x, labels = images.train.double(), images.labels
    means = torch.stack([x[labels == k].mean(0) for k in range(images.classes)])
    # At least 1/12, the variance of a uniform grey level within its bin: some corners of digits never vary.
    stds = torch.stack([x[labels == k].var(0, correction=0) for k in range(images.classes)]).clamp(min=1 / 12).sqrt()
    pictures, own = images.held_out[:n], images.held_out_labels[:n]
    log_p = [
        likelihoods.discretized_gaussian_log_prob(part.double(), means[k], stds[k].log(), levels=top + 1)
        for part, k in zip(pictures.split(512), own.split(512), strict=True)
    ]
    generator = run.generator(8, True)
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


def exactness(run: Run, images: Images, vae: PixelVAE) -> dict[str, np.ndarray]:
    """Claim P7 on the trained decoder, two codes: `pixels_that_differ` between images of the incremental sampler and of
    one full pass per pixel, in float64; `worst_parameter`, greatest difference of parameters in float32, relative where
    a parameter is above 1.
    """
    x = images.to_float(images.held_out[:2])
    z = sampled(vae, images, images.held_out[:2], run.generator(9, True))
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):  # TF32 has ten bits, also of float32
        h = vae.h(z)
        expected = vae.decoder(x, h)
    shape = x.shape[0], *x.shape[2:]
    given = Sampler(vae.decoder, *shape).teacher_forced(x, h)
    error = ((given - expected).abs() / expected.abs().clamp(min=1)).max()

    network, h = copy.deepcopy(vae.decoder).double(), h.double()
    channels, mixtures = network.settings.channels, network.settings.mixtures
    generator = run.generator(10, True)
    noise = likelihoods.mix_logistic_noise(
        shape, mixtures, channels, generator=generator, dtype=torch.float64, device=x.device
    )
    differ = Sampler(network, *shape).draw(h, noise=noise) != draw_by_full_passes(network, noise, h)
    return {"pixels_that_differ": np.array(int(differ.any(1).sum())), "worst_parameter": np.array(error.item())}


@torch.no_grad()
def continue_chain(
    run: Run, images: Images, trained: Mapping[str, train.Trained], steps: int = 3, chains: int = 5
) -> np.ndarray:
    """A few more states of the chain of `none` from held-out photographs: uint8 (steps + 1, chains, S, S, C)."""
    generator = run.generator(11, True)
    return markov_chain(trained["none"].model, images, images.held_out[-chains:], steps, generator).numpy()
