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
from paperlib.pixelvae.collapse.training import FACTORED, ROUTES, decoders, plan, rung, sweep
from paperlib.pixelvae.markov_chain import Decoder, encode, sampled
from paperlib.pixelvae.measurements import SETS, Arrays, Drawn, Models, evaluated
from paperlib.pixelvae.model import build
from paperlib.runs import train
from paperlib.runs.estimate import rows
from paperlib.stats import features, two_sample
from paperlib.stats.linear_probe import linear_probe
from paperlib.system.devices import stream

PROBED = ("none", "random", "PCA", "elbo")  # features of a linear probe


# The ladder of decoders


def ladder(settings: Any, images: Images, trained: Mapping[str, train.Trained], seed: int) -> Arrays:
    """For D decoders, the weakest first, and S seeds, means over held-out images in nats per image, (D, S) each:
    `ladder_kl`; `ladder_bound`, the ELBO; `ladder_own`, log p(x) of the same decoder without a code, trained as long,
    of the factored one `independent_pixels`; `ladder_gain`, E log p(x|z) less that. While training `ladder_history`
    (D, S, E), the held-out KL, at `ladder_steps` (E,). `ladder_filters` (D,), 0 for the factored decoder.
    """
    pictures, scale = images.held_out[: settings.measured_images], nats_per_bit(images)
    table: dict[str, list[list[Any]]] = {key: [] for key in ("kl", "bound", "own", "gain", "history")}
    for decoder in decoders(settings):
        for column in table.values():
            column.append([])
        for k in range(settings.ladder_seeds):
            one = trained[rung(settings, "elbo", decoder, k)]
            terms = evaluated(one.model, images, pictures, seed)
            reconstruction, kl = -scale * terms["bits_per_dim"].mean(), terms["kl"].mean()
            if decoder == FACTORED:
                own = independent_pixels(images.train, pictures, images.dataset.levels).mean()
            else:
                without = trained[rung(settings, "unconditional", decoder, k)].model
                own = -scale * evaluated(without, images, pictures, seed)["bits_per_dim"].mean()
            row = {"kl": kl, "bound": reconstruction - kl, "own": own, "gain": reconstruction - own}
            row["history"] = [entry["held_out_kl"] for entry in one.history]
            for key, value in row.items():
                table[key][-1].append(value)
    filters = [0 if name == FACTORED else count for name, count in decoders(settings).items()]
    steps = [entry["step"] for entry in trained["elbo"].history]
    return {f"ladder_{key}": np.array(column) for key, column in table.items()} | {
        "ladder_steps": np.array(steps),
        "ladder_filters": np.array(filters),
    }


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


def routes(settings: Any, images: Images, trained: Mapping[str, train.Trained], seed: int) -> Arrays:
    """Of ROUTES, on held-out images in nats, (R, n): `routes_bound`, the ELBO, and `routes_kl`; `<route>_route` (E, 3)
    while training: steps, counted from where the model started, KL, and the ELBO.
    """
    pictures, scale, planned = images.held_out[: settings.measured_images], nats_per_bit(images), plan(settings, seed)
    arrays: dict[str, Any] = {"routes_bound": [], "routes_kl": []}
    for name in ROUTES:
        terms = evaluated(trained[name].model, images, pictures, seed)
        arrays["routes_bound"].append(-scale * terms["bits_per_dim"] - terms["kl"])
        arrays["routes_kl"].append(terms["kl"])
        before = planned[planned[name].start].steps if planned[name].start else 0
        arrays[f"{name}_route"] = np.array(
            [
                [
                    before + row["step"],
                    row["held_out_kl"],
                    -scale * row["held_out_bits_per_dim"] - row["held_out_kl"],
                ]
                for row in trained[name].history
            ]
        )
    return arrays | {key: np.stack(arrays[key]) for key in ("routes_bound", "routes_kl")}


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
    """Of each model of the sweep: `sweep_names` (P,); `sweep_gains` (P, n), nats that each held-out image wins over
    "sweep-unconditional"; the squared kernel distances to held-out images that made nothing, `sweep_prior` and
    `sweep_q_z` (P, 3), of `draws` decoded from N(0, I) and from codes of other held-out images; and the ratio of these
    two, `sweep_prior_ratio` (P, 3).
    """
    pictures, count = images.held_out[: settings.measured_images], settings.draws
    mixed = torch.randperm(len(images.held_out), generator=stream(seed, 17)).to(images.device)
    sources, reference = images.held_out[mixed[:count]], extract(images.held_out[mixed[count:]])
    without = evaluated(models["sweep-unconditional"], images, pictures, seed)["bits_per_dim"]
    table: dict[str, list[Any]] = {"gains": [], "prior": [], "q_z": [], "prior_ratio": []}
    for name in sweep(settings):
        vae, generator = models[name], stream(seed, 18, images.device)
        decode = Decoder(vae, images, min(count, 250))
        from_prior = torch.randn((count, vae.code_dim), generator=generator, device=images.device)
        codes = from_prior, sampled(vae, images, sources, generator)
        prior, q_z = (extract(decode(z, generator)) for z in codes)
        table["gains"].append(nats_per_bit(images) * (without - evaluated(vae, images, pictures, seed)["bits_per_dim"]))
        table["prior"].append(two_sample.kernel_distance(prior, reference))
        table["q_z"].append(two_sample.kernel_distance(q_z, reference))
        table["prior_ratio"].append(two_sample.kernel_distance_ratio(prior, q_z, reference))
    gains = np.stack(table.pop("gains")).astype(np.float32)
    arrays = {f"sweep_{key}": rows(column) for key, column in table.items()}
    return arrays | {"sweep_gains": gains, "sweep_names": np.array(list(sweep(settings)))}


# Linear probes


def probes(settings: Any, images: Images, models: Models, seed: int) -> Arrays:
    """`probe_right` (PROBED, 2, n): which held-out images a linear probe gets right, with all labels and with
    `probe_labels` of them. Features are means of q(z|x), of an untrained encoder and as many principal components
    beside them: each standardised on the training images, then with noise of std `probe_noise` added.
    """
    torch.manual_seed(seed)
    untrained = build(settings, images)
    few = torch.randperm(len(images.train), generator=stream(seed, 19))[: settings.probe_labels].to(images.device)
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
        whole = linear_probe(train_z, labels, test_z, test_labels)
        right.append([whole, linear_probe(train_z[few], labels[few], test_z, test_labels)])
    return {"probe_right": np.array(right)}


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
