"""What notebooks 04 and 05 measure on PixelVAEs: terms, codes, drawn images and their distances, chains, the sweep.

Each function returns arrays by name, from models by the names of `training.fit`; estimates are value, low, high.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from paperlib.data.device_images import Images
from paperlib.pixelvae.markov_chain import Decoder, encode, markov_chain, noise_images, sampled, two_decodes
from paperlib.pixelvae.model import PixelVAE
from paperlib.pixelvae.training import ABLATION, VARIANTS, evaluate
from paperlib.runs import train
from paperlib.runs.estimate import rows
from paperlib.runs.provenance import describe_code
from paperlib.stats import features, intervals, two_sample
from paperlib.stats.autocorrelation import autocorrelation, integrated_time, pair_correlation
from paperlib.system.devices import seeded, stream

Models = Mapping[str, PixelVAE]
Arrays = dict[str, np.ndarray]
Extractors = Mapping[str, features.Extractor]

LAGS = (1, 2, 5, 10, 20)  # of the chain's correlation
WARM_UP = 5  # states of a chain from noise that do not count in it
LATE = (-21, -16, -11, -6, -1)  # states of each chain that stand for it where sets of images are compared
MEASURED = (*VARIANTS, *ABLATION)  # models of which terms are measured
CODED = tuple(name for name, variant in VARIANTS.items() if variant.coded)
SETS = (
    "training photographs", "held-out photographs", "blurred", "patches shuffled", "unconditional",
    "none: q(z)", "none: prior", "none: Gaussian", "none: mixture", "none: chain", "none: chain from data",
    "elbo: q(z)", "elbo: prior", "elbo: chain", "elbo: chain from data",
)  # fmt: skip
# Of the jackknife: the late states of one chain stand in a row and are one group.
GROUP_SIZE = {name: len(LATE) if "chain" in name else 1 for name in SETS}


# Terms and codes


def histories(trained: Mapping[str, train.Trained]) -> Arrays:
    """Of each of VARIANTS `<name>_history`: rows of steps, training and held-out bits/dim of the reconstruction term,
    and the correlation of two decodes, nan where it is not watched."""
    keys = "step", "bits_per_dim", "held_out_bits_per_dim", "held_out_two_decodes"
    return {
        f"{name}_history": np.array([[row.get(key, math.nan) for key in keys] for row in trained[name].history])
        for name in VARIANTS
    }


def terms(settings: Any, images: Images, models: Models, seed: int) -> Arrays:
    """What `evaluate` says of held-out images, (MEASURED, n) each; nan where there is no code. Same noise for all."""
    pictures = images.held_out[: settings.measured_images]
    table: dict[str, list[np.ndarray]] = {"bits_per_dim": [], "kl": []}
    for name in MEASURED:
        measured = evaluated(models[name], images, pictures, seed)
        for term, row in table.items():
            row.append(measured.get(term, np.full(len(pictures), np.nan)))
    return {name: np.stack(row).astype(np.float32) for name, row in table.items()}


def evaluated(vae: PixelVAE, images: Images, pictures: Tensor, seed: int) -> Arrays:
    """`evaluate` with the noise of `seed`."""
    with seeded(seed, images.device):
        return {name: values.numpy(force=True) for name, values in evaluate(vae, images, pictures).items()}


def codes(images: Images, models: Models) -> Arrays:
    """For each of CODED, over training images: `rate`, see there; `mean_spread` and `std`, root mean squares of the
    means' std over images and of std(x).
    """
    table: dict[str, list[float]] = {"rate": [], "mean_spread": [], "std": []}
    for name in CODED:
        mean, log_std = encode(models[name], images, images.train)
        table["rate"].append(rate(mean, log_std))
        table["mean_spread"].append(mean.var(0).mean().sqrt().item())
        table["std"].append((2 * log_std).exp().mean().sqrt().item())
    return {name: np.array(column) for name, column in table.items()}


def rate(mean: Tensor, log_std: Tensor) -> float:
    """E KL(q(z|x) || N(m, C)) in nats over q(z|x) with means and log stds (N, D), m and C the moments of q(z).

    This is the least that a Gaussian prior makes the code cost, and no less than I_q(x;z). Under the moments the
    quadratic terms average to D, so that it is (log det C - E log det diag std(x)^2) / 2.
    """
    mean, log_std = mean.double(), log_std.double()
    covariance = mean.T.cov(correction=0) + torch.diag((2 * log_std).exp().mean(0))
    return 0.5 * (torch.logdet(covariance) - 2 * log_std.sum(1).mean()).item()


# Sets of images


def fit_classifier(settings: Any, images: Images, directory: Path, seed: int) -> features.Classifier:
    """Train the classifier whose features kernel distances use, into the folder `classifier` of `directory`."""
    size = {"width": settings.classifier_width, "steps": settings.classifier_steps, "batch_size": 64}
    options = {"seed": seed, "device": images.device, "provenance": describe_code()}
    return features.fit_classifier(images.dataset, directory / "classifier", **size, **options).model


def extractors(images: Images, classifier: features.Classifier) -> Extractors:
    """Features for kernel distances by kind: those of the classifier, and of a network with random weights."""
    networks = {"classifier": classifier, "random": features.RandomNetwork(0, images.shape[0]).to(images.device)}
    photographs, levels = images.dataset.train.images, images.dataset.levels
    return {kind: features.extractor(one, photographs, levels) for kind, one in networks.items()}


class Drawn(NamedTuple):
    """What `draw` drew, uint8 on the CPU: each of SETS (n, S, S, C), of chains the LATE states, chain by chain; by
    model and kind of chain all `chains` (steps + 1, N, S, S, C); by model `pairs` of decodes of one code of each of
    `sources`, held-out images; and the others, the `reference`, which had no part in making any.
    """

    sets: dict[str, Tensor]
    chains: dict[str, dict[str, Tensor]]
    pairs: dict[str, tuple[Tensor, Tensor]]
    sources: Tensor
    reference: Tensor


def draw(settings: Any, images: Images, models: Models, seed: int) -> Drawn:
    """Images drawn in every way, `draws` of each of SETS, of a chain the LATE states of `chains`."""
    mixed = torch.randperm(len(images.held_out), generator=stream(seed, 12)).to(images.device)
    sources, reference = images.held_out[mixed[: settings.draws]], images.held_out[mixed[settings.draws :]]
    generator = stream(seed, 5, images.device)
    noise = noise_images(images, settings.chains, stream(seed, 6))
    sets, chains, pairs = _photographs(images, sources, seed), {}, {}
    batch = min(settings.draws, 250)
    no_codes = torch.empty(settings.draws, 0, device=images.device)
    sets["unconditional"] = Decoder(models["unconditional"], images, batch)(no_codes, generator)
    for name in CODED:
        vae = models[name]
        pairs[name] = two_decodes(vae, images, sources, generator)
        decode, codes_ = Decoder(vae, images, batch), (settings.draws, settings.code_dim)
        sets[f"{name}: q(z)"] = pairs[name][0]
        sets[f"{name}: prior"] = decode(torch.randn(codes_, generator=generator, device=images.device), generator)
        if name == "none":
            for kind, z in fitted(sampled(vae, images, images.train, generator), settings.draws, seed).items():
                sets[f"none: {kind}"] = decode(z, generator)
        begins = torch.cat([noise, sources[: settings.chains].cpu()])
        states = markov_chain(vae, images, begins, settings.chain_steps, generator, f"{name}: chains")
        chains[name] = dict(zip(("chain", "chain from data"), states.split(settings.chains, 1), strict=True))
        for kind, states in chains[name].items():
            sets[f"{name}: {kind}"] = states[list(LATE)].transpose(0, 1).flatten(0, 1)  # chain by chain
    return Drawn(sets, chains, pairs, sources, reference)


def samples(images: Images, drawn: Drawn, extract: Extractors) -> dict[str, Any]:
    """`shown_<set>` (40, S, S, C), the first images, of chains the last states; and the arrays of `_distances`, and of
    `_chain_arrays` for each of CODED.
    """
    arrays = {f"shown_{name}": drawn.sets[name][GROUP_SIZE[name] - 1 :: GROUP_SIZE[name]][:40] for name in SETS}
    for name in CODED:
        chains = drawn.chains[name].values()
        arrays |= _chain_arrays(name, images, *chains, drawn.sources, drawn.pairs[name], extract["classifier"])
    return arrays | _distances(drawn.sets, drawn.reference, extract)


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
    name: str,
    images: Images,
    from_noise: Tensor,
    from_data: Tensor,
    sources: Tensor,
    pair: tuple[Tensor, Tensor],
    classifier: features.Extractor,
) -> dict[str, Any]:
    """`chain_<model>` (steps + 1, S, S, C), the first chain from noise; `from_data_<model>` (16, 8, S, S, C), the first
    states of chains from photographs; `correlation_<model>` (LAGS, 3) of chains from noise, see `chain_correlation`,
    and `correlation_<model>_classifier`, the autocorrelation of the classifier's features. Of a `pair` of decodes of
    one code of each of `sources`: `decodes_<model>` (3,), their correlation of pixels, `decodes_<model>_classifier`,
    and `shown_decodes_<model>` (3, 12, S, S, C), the photograph first.
    """
    late = torch.stack([classifier(state) for state in from_noise[WARM_UP:]])
    return {
        f"chain_{name}": from_noise[:, 0],
        f"from_data_{name}": from_data[:16, :8],
        f"correlation_{name}": chain_correlation(images, from_noise[WARM_UP:]),
        f"correlation_{name}_classifier": np.stack(autocorrelation(late, LAGS), 1),
        f"decodes_{name}": pair_correlation(*(pictures.flatten(1) for pictures in pair)).row,
        f"decodes_{name}_classifier": pair_correlation(*(classifier(pictures) for pictures in pair)).row,
        f"shown_decodes_{name}": torch.stack([pictures[:12] for pictures in (sources.cpu(), *pair)]),
    }


def chain_correlation(images: Images, states: Tensor, lags: tuple[int, ...] = LAGS) -> np.ndarray:
    """Correlation of pixels of states so many steps apart, the mean training image taken off, (lags, 3): of chains,
    uint8 (T, N, S, S, C). What can be measured on a single chain, such as that of the authors' picture.
    """
    mean = images.train.double().mean(0).flatten().cpu()
    return np.stack(autocorrelation(states.flatten(2), lags, mean), 1)


def _distances(drawn: Mapping[str, Tensor], reference: Tensor, extract: Extractors) -> dict[str, Any]:
    """`kernel_<kind>` (SETS, 3): squared kernel distance of each of SETS to `reference`, held-out photographs that had
    no part in making it; `prior_minus_chain_<kind>` (3,), the difference of two of these under `none`;
    `noise_to_data_<kind>` (3,): between the chain's states from noise and from photographs.
    """
    arrays: dict[str, Any] = {}
    for kind, features_of in extract.items():
        points, kept = {name: features_of(drawn[name]) for name in SETS}, features_of(reference)
        to_kept = (two_sample.kernel_distance(points[name], kept, together=(GROUP_SIZE[name], 1)) for name in SETS)
        arrays[f"kernel_{kind}"] = rows(to_kept)
        prior, chain, from_data = (points[f"none: {name}"] for name in ("prior", "chain", "chain from data"))
        apart = two_sample.kernel_distance_difference(prior, chain, kept, together=(1, len(LATE)))
        arrays[f"prior_minus_chain_{kind}"] = apart.row
        ends = two_sample.kernel_distance(chain, from_data, together=(len(LATE), len(LATE)))
        arrays[f"noise_to_data_{kind}"] = ends.row
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


# The sweep of the code's capacity


def capacity(
    settings: Any, images: Images, swept: Models, unconditional: PixelVAE, extract: Extractors, seed: int
) -> dict[str, Any]:
    """Of each of the models `swept`, in their order: `sweep_dims` and `sweep_stds` (P,); `sweep_rate` (P,), see `rate`;
    `sweep_gain` (P, 3), nats per held-out image won over `unconditional`; `sweep_decodes` (P, 3), the correlation
    of two decodes of one code; of `sweep_chains` chains from photographs `sweep_correlation` (P, LAGS, 3),
    `sweep_time` (P,), the integrated autocorrelation time in steps, `sweep_drift` (P, 3), the squared kernel distance
    of late states to other photographs on the classifier's features; `sweep_states` (P, SHOWN, S, S, C), one chain.
    """
    pictures, count = images.held_out[: settings.measured_images], settings.sweep_chains
    mixed = torch.randperm(len(images.held_out), generator=stream(seed, 15)).to(images.device)
    sources, others = images.held_out[mixed[:count]], images.held_out[mixed[count:]]
    without = evaluated(unconditional, images, pictures, seed)["bits_per_dim"]
    table: dict[str, list] = {}
    for name, vae in swept.items():
        generator = stream(seed, 16, images.device)
        won = without - evaluated(vae, images, pictures, seed)["bits_per_dim"]
        pair = two_decodes(vae, images, sources, generator)
        states = markov_chain(vae, images, sources, settings.chain_steps, generator, name)
        every = chain_correlation(images, states, tuple(range(1, settings.chain_steps // 2 + 1)))
        late = states[list(LATE)].transpose(0, 1).flatten(0, 1)
        points = (extract["classifier"](each) for each in (late, others))
        row = {
            "dims": vae.code_dim,
            "stds": vae.min_std,
            "rate": rate(*encode(vae, images, images.train)),
            "gain": intervals.mean_interval(won * math.log(2) * pictures[0].numel()).row,
            "decodes": pair_correlation(*(drawn.flatten(1) for drawn in pair)).row,
            "correlation": every[[lag - 1 for lag in LAGS]],
            "time": integrated_time(every[:, 0]),
            "drift": two_sample.kernel_distance(*points, together=(len(LATE), 1)).row,
            "states": states[list(SHOWN), 0],
        }
        for key, value in row.items():
            table.setdefault(f"sweep_{key}", []).append(np.asarray(value))
    return {key: np.stack(column) for key, column in table.items()}


SHOWN = (0, 1, 2, 3, 5, 10, 15, 20, 30, 40, 50, 60)  # states of a chain of the sweep
