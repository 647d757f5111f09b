"""What notebook 05 measures beside what notebook 04 does: the ladder of decoders, routes to a code, classes, probes.

Each function returns arrays by name, from models by the names of `training.plan`; estimates are value, low, high.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paperlib.data.device_images import Images
from paperlib.pixelvae.collapse.training import CAUSES, FACTORED, NARROW, ROUTES, decoders, plan, rung, sweep
from paperlib.pixelvae.markov_chain import Decoder, encode, sampled, two_decodes
from paperlib.pixelvae.measurements import SETS, Arrays, Drawn, Models, evaluated
from paperlib.pixelvae.model import PixelVAE, build
from paperlib.pixelvae.training import ABLATION
from paperlib.runs import train
from paperlib.runs.estimate import rows
from paperlib.stats import features, two_sample
from paperlib.stats.autocorrelation import pair_correlation
from paperlib.stats.linear_probe import linear_probe
from paperlib.system.devices import seeded, stream

Trainings = Mapping[str, train.Trained]
PROBED = ("none", "random", "PCA", "elbo")  # features of a linear probe
FEW = 10  # random sets of labels for the probe that gets few
COMPARED = 2000  # codes whose MMD to N(0, I) is measured, at most


# The ladder of decoders


def ladder(settings: Any, images: Images, trained: Trainings, seed: int) -> Arrays:
    """For D decoders, the weakest first, and S seeds, means over held-out images in nats per image, (D, S) each:
    `ladder_kl`; `ladder_bound`, the ELBO; `ladder_own`, log p(x) of the same decoder without a code, trained as long,
    of the factored one `independent_pixels`; `ladder_gain`, E log p(x|z) less that. While training `ladder_history`
    (D, S, E), the held-out KL, at `ladder_steps` (E,). `ladder_filters` (D,), 0 for the factored decoder. `narrow`
    (2,): KL and code gain of a factored decoder with the fewest filters.
    """
    pictures = images.held_out[: settings.measured_images]
    factored = independent_pixels(images.train, pictures, images.dataset.levels).mean()
    table: dict[str, list[list[Any]]] = {key: [] for key in ("kl", "bound", "own", "gain", "history")}
    for decoder in decoders(settings):
        for column in table.values():
            column.append([])
        for k in range(settings.ladder_seeds):
            one = trained[rung(settings, "elbo", decoder, k)]
            log_p, kl = (values.mean() for values in terms(one.model, images, pictures, seed))
            own = factored
            if decoder != FACTORED:
                without = trained[rung(settings, "unconditional", decoder, k)].model
                own = terms(without, images, pictures, seed)[0].mean()
            history = [entry["held_out_kl"] for entry in one.history]
            row = {"kl": kl, "bound": log_p - kl, "own": own, "gain": log_p - own, "history": history}
            for key, value in row.items():
                table[key][-1].append(value)
    log_p, kl = (values.mean() for values in terms(trained[NARROW].model, images, pictures, seed))
    filters = [0 if name == FACTORED else count for name, count in decoders(settings).items()]
    return {f"ladder_{key}": np.array(column) for key, column in table.items()} | {
        "ladder_steps": np.array([entry["step"] for entry in trained["elbo"].history]),
        "ladder_filters": np.array(filters),
        "narrow": np.array([kl, log_p - factored]),
    }


def terms(vae: PixelVAE, images: Images, pictures: Tensor, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """log p(x|z) and KL(q(z|x) || N(0, I)) of held-out `pictures`, nats, (n,) each; the KL is 0 without a code."""
    measured = evaluated(vae, images, pictures, seed)
    log_p = -nats_per_bit(images) * measured["bits_per_dim"].astype(np.float64)
    return log_p, measured.get("kl", np.zeros_like(log_p))


def independent_pixels(train_images: Tensor, pictures: Tensor, levels: int) -> np.ndarray:
    """log p(x) in nats, (n,), of uint8 `pictures` (n, S, S, C) if pixels are independent: p_i(k) = (n_ik + 1) / (N + K)
    with n_ik of the N `train_images` at grey level k of K. No factored p(x) does better but by chance.
    """
    train_images, pictures = train_images.flatten(1).long(), pictures.flatten(1).long()
    counts = torch.stack([(train_images == k).sum(0) for k in range(levels)])  # (K, pixels)
    log_p = torch.log((counts + 1.0).double() / (len(train_images) + levels))
    return log_p.gather(0, pictures).sum(1).numpy(force=True)


def nats_per_bit(images: Images) -> float:
    """Nats per image of one bit per dimension."""
    return math.log(2) * images.held_out[0].numel()


def routes(settings: Any, images: Images, trained: Trainings, seed: int) -> Arrays:
    """Of ROUTES, on held-out images in nats, (R, n): `routes_bound`, the ELBO; `routes_kl`; `routes_gain`, over the
    same decoder without a code, trained as long as the route. `<route>_route` (E, 3) while training: steps, counted
    from where the model started, KL, and the ELBO.
    """
    pictures, scale, planned = images.held_out[: settings.measured_images], nats_per_bit(images), plan(settings, seed)
    arrays: dict[str, Any] = {"routes_bound": [], "routes_kl": [], "routes_gain": []}
    for name in ROUTES:
        begun = planned[name].start
        without = trained["unconditional-continued" if begun else "unconditional"].model
        log_p, kl = terms(trained[name].model, images, pictures, seed)
        row = {"bound": log_p - kl, "kl": kl, "gain": log_p - terms(without, images, pictures, seed)[0]}
        for key, values in row.items():
            arrays[f"routes_{key}"].append(values)
        before = planned[begun].steps if begun else 0
        history = trained[name].history
        kls = np.array([entry["held_out_kl"] for entry in history])
        bounds = -scale * np.array([entry["held_out_bits_per_dim"] for entry in history]) - kls
        arrays[f"{name}_route"] = np.stack([before + np.array([entry["step"] for entry in history]), kls, bounds], 1)
    return arrays | {f"routes_{key}": np.stack(arrays[f"routes_{key}"]) for key in ("bound", "kl", "gain")}


def causes(settings: Any, images: Images, models: Models, seed: int) -> Arrays:
    """`ablation_gain` (n,), nats per image by which "trained-on" leads "without-code". Of CAUSES: `causes_kl`
    and `causes_gain` (C, n), nats per held-out image, the latter over `unconditional`, and `causes_decodes` (C, 3), the
    pixel correlation of two decodes of one code.
    """
    pictures, generator = images.held_out[: settings.measured_images], stream(seed, 21, images.device)
    without, _ = terms(models["unconditional"], images, pictures, seed)
    log_p, kl = zip(*(terms(models[name], images, pictures, seed) for name in CAUSES), strict=True)
    pairs = [two_decodes(models[name], images, images.held_out[: settings.draws], generator) for name in CAUSES]
    decodes = rows(pair_correlation(*(drawn.flatten(1) for drawn in pair)) for pair in pairs)
    on, ablated = (terms(models[name], images, pictures, seed)[0] for name in ABLATION)
    gains = {"ablation_gain": on - ablated, "causes_gain": np.stack(log_p) - without}
    return gains | {"causes_kl": np.stack(kl), "causes_decodes": decodes}


# Classes


def classes(images: Images, drawn: Drawn, classifier: features.Classifier) -> Arrays:
    """What the classifier says: `classes_<model>` (steps + 1, N) of chains from noise, `classes_<model>_data` from
    held-out images; `class_shares` (SETS, 10), the share of each class in each set; `accuracy` on held-out images.
    """
    arrays: Arrays = {}

    def classify(pictures: Tensor) -> np.ndarray:
        return features.predicted(classifier, pictures, images.dataset.levels)

    for name, chains in drawn.chains.items():
        for kind, states in zip(("", "_data"), chains.values(), strict=True):
            arrays[f"classes_{name}{kind}"] = classify(states.flatten(0, 1)).reshape(states.shape[:2]).astype(np.uint8)
    shares = [np.bincount(classify(one), minlength=images.classes) / len(one) for one in drawn.sets.values()]
    order = dict(zip(drawn.sets, shares, strict=True))
    right = classify(images.held_out) == images.held_out_labels.numpy(force=True)
    return arrays | {"class_shares": np.stack([order[name] for name in SETS]), "accuracy": np.array(right.mean())}


# Our own objective and encoder


def priors(settings: Any, images: Images, models: Models, extract: features.Extractor, seed: int) -> Arrays:
    """Of each model of the sweep: `sweep_names`, `sweep_kinds`, `sweep_weights` of the MMD (P,); `sweep_gains` (P, n),
    nats that each held-out image wins over "sweep-unconditional"; `sweep_mmd` (P,), the squared MMD of held-out codes
    to N(0, I). Twice, each time with half of the held-out images and draws of its own, to choose by one and judge by
    the other: `sweep_prior` and `sweep_q_z` (P, 2, 3), squared kernel distances to held-out images that made nothing,
    of `draws` images decoded from N(0, I) and from codes of other held-out images, and their `sweep_ratio`.
    """
    pictures, count = images.held_out[: settings.measured_images], settings.draws
    halves = torch.randperm(len(images.held_out), generator=stream(seed, 17)).to(images.device).chunk(2)
    references = [extract(images.held_out[half[count:]]) for half in halves]
    without, _ = terms(models["sweep-unconditional"], images, pictures, seed)
    table: dict[str, list[Any]] = {key: [] for key in ("gains", "mmd", "prior", "q_z", "ratio")}
    for name in sweep(settings):
        vae, generator = models[name], stream(seed, 18, images.device)
        decode = Decoder(vae, images, min(count, 250))
        twice: dict[str, list[Any]] = {"prior": [], "q_z": [], "ratio": []}
        for half, reference in zip(halves, references, strict=True):
            from_prior = torch.randn((count, vae.code_dim), generator=generator, device=images.device)
            codes = from_prior, sampled(vae, images, images.held_out[half[:count]], generator)
            prior, q_z = (extract(decode(z, generator)) for z in codes)
            twice["prior"].append(two_sample.kernel_distance(prior, reference))
            twice["q_z"].append(two_sample.kernel_distance(q_z, reference))
            twice["ratio"].append(two_sample.kernel_distance_ratio(prior, q_z, reference))
        held_out = sampled(vae, images, images.held_out[:COMPARED], generator)
        table["mmd"].append(two_sample.gaussian_mmd(held_out.double()).item())
        table["gains"].append(terms(vae, images, pictures, seed)[0] - without)
        for key, pair in twice.items():
            table[key].append(rows(pair))
    points = sweep(settings).values()
    return {f"sweep_{key}": np.stack(column) for key, column in table.items()} | {
        "sweep_names": np.array(list(sweep(settings))),
        "sweep_kinds": np.array([point.kind for point in points]),
        "sweep_weights": np.array([point.weight for point in points], dtype=np.float64),
    }


# Linear probes


def probes(settings: Any, images: Images, models: Models, seed: int) -> Arrays:
    """`probe_right` (PROBED, 2, n): how often a linear probe gets each held-out image right, with all labels (0 or 1)
    and on average over FEW random sets of `probe_labels` of them. Features are means of q(z|x), of an untrained encoder
    and as many principal components beside them: each standardised on the training images, then with noise of std
    `probe_noise` added.
    """
    with seeded(seed, images.device):
        untrained = build(settings, images)
    mixed = stream(seed, 19)
    sets = [torch.randperm(len(images.train), generator=mixed)[: settings.probe_labels] for _ in range(FEW)]
    right = []
    for name in PROBED:
        if name == "PCA":
            train_z, test_z = principal_components(images, settings.code_dim)
        else:
            vae = untrained if name == "random" else models[name]
            train_z, test_z = (encode(vae, images, part)[0] for part in (images.train, images.held_out))
        generator = stream(seed, 20, images.device)
        train_z, test_z = noisy(train_z, test_z, settings.probe_noise, generator)
        labels, test_labels = images.labels, images.held_out_labels
        few = [linear_probe(train_z[one], labels[one], test_z, test_labels) for one in sets]
        right.append([linear_probe(train_z, labels, test_z, test_labels), np.mean(few, axis=0)])
    return {"probe_right": np.array(right, dtype=np.float64)}


def principal_components(images: Images, dims: int) -> tuple[Tensor, Tensor]:
    """Training and held-out images on the first `dims` principal axes of the training images: (N, dims), (n, dims)."""
    train_x, test_x = (images.to_float(part).flatten(1).double() for part in (images.train, images.held_out))
    mean = train_x.mean(0)
    _, axes = torch.linalg.eigh((train_x - mean).T @ (train_x - mean))
    axes = axes[:, -dims:].flip(1)
    return (train_x - mean) @ axes, (test_x - mean) @ axes


def noisy(train_z: Tensor, test_z: Tensor, std: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Both in units of the training features' std around their mean, with independent noise of `std` added."""
    mean, scale = train_z.mean(0), train_z.std(0).clamp(min=1e-12)
    scaled = ((z - mean) / scale for z in (train_z, test_z))
    train_z, test_z = (z + std * torch.randn(z.shape, generator=generator, device=z.device) for z in scaled)
    return train_z, test_z
