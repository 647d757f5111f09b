"""Notebook 04: its measurements against their definitions, its figures from arrays alone, its verdicts both ways."""

import shutil
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from paperlib.nn import likelihoods
from paperlib.pixelvae import claims, experiment, figures, markov_chain, measurements
from paperlib.pixelvae.claims import CLAIMS
from paperlib.pixelvae.measurements import PROBES, SETS
from paperlib.pixelvae.training import CODED, VARIANTS
from paperlib.runs.estimate import Estimate
from paperlib.stats import aggregate_posterior, intervals, two_sample
from paperlib.stats.linear_probe import linear_probe
from paperlib.system import files
from paperlib.system.errors import UserError

QUICK = {"pretrain_steps": 60, "finetune_steps": 12, "ablation_steps": 12, "classifier_steps": 40, "filters": 8}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run on the embedded digits: (run, images, trained, arrays)."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RUNS", "RESULTS"):
            patch.setenv(f"PAPERLIB_{name}", str(tmp_path_factory.mktemp(name)))
        run = experiment.start("smoke", 0, "cpu", "train", QUICK)
        images = experiment.load_images(run)
        trained = experiment.fit(run, images)
        yield run, images, trained, experiment.measure(run, images, trained)


# Measurements


def test_blurring_is_a_mean_of_neighbours():
    pictures = torch.randint(256, (2, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = torch.empty(pictures.shape, dtype=torch.float64)
    for i, j in np.ndindex(8, 8):
        expected[:, i, j] = pictures[:, max(0, i - 1) : i + 2, max(0, j - 1) : j + 2].double().mean((1, 2))
    assert torch.equal(measurements.blurred(pictures), expected.round().byte())


def test_shuffled_patches_are_the_same_squares_elsewhere():
    pictures = torch.arange(64, dtype=torch.uint8).reshape(1, 8, 8, 1).expand(3, -1, -1, -1)
    shuffled = measurements.patches_shuffled(pictures, torch.Generator().manual_seed(0))
    squares = torch.cat([pictures[:1], shuffled])[..., 0].unfold(1, 2, 2).unfold(2, 2, 2).reshape(4, 16, 4).tolist()
    assert all(sorted(one) == sorted(squares[0]) for one in squares)
    assert len(set(map(str, squares))) == 4, "each image has an order of its own"


def test_fitted_distributions_are_those_of_the_codes():
    z = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0)) * 0.1 + torch.tensor([[3.0, -1.0]])
    z[::2] *= -1  # two clusters
    drawn = measurements.fitted(z, 3000, 0)
    for points in drawn.values():
        torch.testing.assert_close(points.mean(0), z.mean(0), rtol=0, atol=0.25)
        torch.testing.assert_close(points.T.cov(), z.T.cov(), rtol=0.1, atol=0.05)
    distance = {name: two_sample.energy_distance(points, z).value for name, points in drawn.items()}
    assert distance["mixture"] < 0.02 < 0.1 < distance["Gaussian"]
    neighbours = torch.stack([drawn["mixture"][:-1, 0], drawn["mixture"][1:, 0]])
    assert abs(neighbours.corrcoef()[0, 1]) < 0.1, "in the order of its components"


def test_information_spread_and_energy_are_of_the_codes(finished):
    _, images, trained, arrays = finished
    mean, log_std = markov_chain.encode(trained["none"].model, images, images.train)
    codes, row = aggregate_posterior.Codes(mean, log_std), CODED.index("none")
    information = aggregate_posterior.mutual_information(codes, generator=torch.Generator().manual_seed(9)).nats
    assert arrays["information"][row] == pytest.approx(information, abs=0.1)
    assert information > 1
    assert arrays["information_ceiling"] == pytest.approx(np.log(1500))
    assert arrays["mean_spread"][row] == pytest.approx(mean.var(0).mean().sqrt().item(), rel=1e-5)
    assert arrays["std"][row] == pytest.approx((2 * log_std).exp().mean().sqrt().item(), rel=1e-5)
    assert arrays["energy"][-1, 1] < 0.01, "two samples of the prior differ by chance alone"


def test_probes_are_of_what_their_names_say(finished):
    run, images, _, arrays = finished
    right = dict(zip(PROBES, arrays["probe_right"], strict=True))
    assert right["pixels"].mean() > max(0.9, right["components"].mean()) and right["components"].mean() > 0.5
    train, held_out = (part.flatten(1).double() for part in (images.train, images.held_out))
    train, held_out = train - train.mean(0), held_out - train.mean(0)
    axes = torch.linalg.svd(train, full_matrices=False).Vh[: run.settings.code_dim].T
    own = linear_probe(train @ axes, images.labels, held_out @ axes, images.held_out_labels)
    assert (own == right["components"]).mean() > 0.99


def test_terms_are_held_out_and_equal_for_equal_models(finished):
    run, images, trained, arrays = finished
    models = {name: trained["none"].model for name in ("none", "elbo")}
    terms = measurements.terms(run.settings, images, models, run.seed)
    assert all(np.array_equal(row[0], row[1]) for row in terms.values())
    assert np.array_equal(terms["shuffle_gap"][0], arrays["shuffle_gap"][list(VARIANTS).index("none")])
    for name, row in zip(VARIANTS, arrays["kl"], strict=True):
        assert np.isnan(row).all() == (name in ("unconditional", "label"))


def test_glasses_compare_the_best_gaussian_of_the_class(finished):
    _, images, _, arrays = finished
    x, labels = images.train.double(), images.labels
    for n in (0, 57, 296):
        own, image = x[labels == images.held_out_labels[n]], images.held_out[[n]].double()
        log_std = own.var(0, correction=0).clamp(min=1 / 12).log() / 2
        log_p = likelihoods.discretized_gaussian_log_prob(image, own.mean(0), log_std, levels=17)
        assert arrays["gaussian_nats"][n] == pytest.approx(-log_p.item(), rel=1e-6)
    assert arrays["glasses_sample"].shape == (10, 4, 8, 8, 1)
    for k, photograph in enumerate(torch.from_numpy(arrays["glasses_photograph"])):
        assert (x[labels == k] == photograph).flatten(1).all(1).any()


def test_exactness_notices_a_sampler_that_is_not_exact(finished, monkeypatch):
    _, images, trained, arrays = finished
    assert arrays["pixels_that_differ"] == 0 and 0 < arrays["worst_parameter"] < 1e-5
    full, given, off = measurements.draw_by_full_passes, measurements.Sampler.teacher_forced, torch.zeros(2, 1, 8, 8)
    off[0, 0, 3, 4] = 1 / 8
    monkeypatch.setattr(measurements, "draw_by_full_passes", lambda *arguments: full(*arguments) + off)
    monkeypatch.setattr(measurements.Sampler, "teacher_forced", lambda *arguments: given(*arguments) * 1.001)
    wrong = measurements.exactness(images, trained["none"].model, 0)
    assert wrong["pixels_that_differ"] == 1 and wrong["worst_parameter"] > 1e-5


def test_sets_and_chains_are_all_different(finished):
    *_, arrays = finished
    for model in ("none", "elbo"):
        assert arrays[f"chain_{model}"].shape == (61, 8, 8, 1) and arrays[f"many_{model}"].shape == (36, 8, 8, 1)
        assert np.array_equal(arrays[f"many_{model}"][0], arrays[f"chain_{model}"][-1])
    assert np.array_equal(arrays["chain_none"][0], arrays["chain_elbo"][0]), "both start from the same noise"
    assert np.bincount(arrays["chain_none"][0].ravel(), minlength=17).max() < 16, "which uses every level"
    assert not np.array_equal(arrays["chain_none"][1], arrays["chain_elbo"][1])
    shown = [arrays[f"shown_{name}"] for name in SETS]
    assert all(one.shape == (40, 8, 8, 1) and one.dtype == np.uint8 and one.max() <= 16 for one in shown)
    assert len({one.tobytes() for one in shown}) == len(SETS), "no set is another's copy"
    kernel = dict(zip(SETS, arrays["kernel_random"][:, 0], strict=True))
    photographs = kernel["training photographs"], kernel["held-out photographs"]
    assert max(photographs) < min(kernel["blurred"], kernel["patches shuffled"])
    assert (arrays["shown_decodes_none"][0] == arrays["shown_none: q(z)"][:10]).all()


def test_which_images_are_compared(finished, monkeypatch):
    """The reference made nothing, pairs are two decodes, late states stand for chains (codes 0, chains noise)."""
    run, images, trained, _ = finished
    settings = run.settings
    zeros = torch.zeros(settings.draws, settings.code_dim)

    def moving(vae, images, start, steps, *rest):
        return torch.cat([start[None], torch.randint(17, (steps, *start.shape), dtype=torch.uint8)])

    def spy(module, name, function=None):
        spied = Mock(wraps=function or getattr(module, name))
        monkeypatch.setattr(module, name, spied)
        return spied.call_args_list

    monkeypatch.setattr(measurements, "markov_chain", moving)
    monkeypatch.setattr(measurements, "fitted", lambda *rest: {"Gaussian": zeros, "mixture": zeros})
    encoded = spy(measurements, "sampled", lambda vae, images, pictures, generator: zeros[:1].expand(len(pictures), -1))
    chains, pairs = spy(measurements, "autocorrelation"), spy(measurements, "pair_correlation")
    distances = spy(two_sample, "kernel_distance")
    extract = {kind: lambda pictures: pictures.flatten(1).double() for kind in ("classifier", "random")}
    models = {name: trained[name].model for name in VARIANTS}
    arrays = measurements.samples(settings, images, models, extract, 0)

    sources, reference = encoded[0].args[2].flatten(1).double(), distances[0].args[1]
    assert len(sources) == settings.draws and len(sources) + len(reference) == len(images.held_out)
    assert torch.cdist(sources, reference).min() > 0
    assert len(chains) == 4, "memory is that of chains from photographs"
    assert all(torch.equal(call.args[0][0], sources[: settings.chains]) for call in chains)

    for k, (a, b) in enumerate(call.args for call in pairs):
        shown = arrays[f"shown_decodes_{('none', 'elbo')[k // 2]}"].flatten(2).double()
        assert torch.equal(a[:10], shown[0]) and torch.equal(b[:10], shown[1])
        assert len(a) == settings.draws and not torch.equal(a, b)
    late, states = distances[SETS.index("none: chain from data")], chains[0].args[0]
    points = late.args[0]
    assert late.kwargs["together"] == (5, 1) and len(points) == 5 * settings.chains
    assert torch.equal(points[::5], states[-21]) and torch.equal(points[4::5], states[-1])
    assert distances[len(SETS)].kwargs["together"] == (5, 5)


# Verdicts

# A value that passes, where it matters one that fails in its place, and one at which the low end of its interval fails.
JUDGED = {
    "P1": {"kl": (0.4, 0.6), "shuffle_gap": (0.05, 0.2), "kl_scratch": (0.1, 0.6), "shuffle_gap_scratch": (0.0, 0.2)},
    "P2": {"shuffle_gap": (6.0, 4.0, -0.1)},
    "P3": {"prior": (3.0, 1.15, 1.15), "chain": (1.1, 1.4), "q_z": (1.0, 0.5), "noise_to_data": (0.05, 0.2)},
    "P4": {"neighbours": (0.2, 0.04, 0.04), "similarity": (0.6, 0.4), "after_60_steps": (0.05, 0.15),
           "similarity_elbo": (0.01, 0.1)},
    "P5": {"above_random": (0.04, 0.02, -0.01), "above_components": (0.05, 0.02, -0.01)},
    "P6": {"shuffle_gap": (3.1, 2.0), "shuffle_gap_none": (6.0,), "prior": (1.1, 1.3), "q_z": (1.0,),
           "energy": (0.01, 0.2), "energy_none": (1.0,)},
    "P7": {"pixels_that_differ": (0.0, 1.0), "worst_parameter": (1e-6, 1e-4)},
    "D1": {"shuffle_gap": (3.1, 2.0), "shuffle_gap_conv": (6.0,), "probe_gain": (-0.02, -0.05)},
    "G1": {"nats_lost": (2000.0, 900.0, 900.0), "gain_by_class": (10.0, 500.0)},
}  # fmt: skip


@pytest.mark.parametrize("key", CLAIMS)
def test_a_criterion_is_its_words(key):
    def around(value, low=None):
        return Estimate(value, value - 0.1 * abs(value) if low is None else low, value + 0.1 * abs(value))

    criterion, good = CLAIMS[key].criterion, {name: around(values[0]) for name, values in JUDGED[key].items()}
    assert criterion(**good)
    for name, (value, *others) in JUDGED[key].items():
        for wrong in [around(bad) for bad in others[:1]] + [around(value, low) for low in others[1:]]:
            assert not criterion(**good | {name: wrong}), name


def test_each_quantity_is_what_its_name_says():
    """Arrays in which every entry is a number of its own."""
    at = {name: k for k, name in enumerate(VARIANTS)}
    terms = np.arange(len(at), dtype=float)[:, None] + np.array([-0.01, 0.0, 0.01])
    near = np.array([0.0, -0.1, 0.1])
    memory = np.array([0.4, 0.3, 0.2, 0.1])[:, None] + near / 10
    arrays = {
        "chain_none": np.zeros((2, 8, 8, 1)),
        "bits_per_dim": 1 + terms / 100,
        "kl": 10 + terms,
        "shuffle_gap": 20 + terms,
        "gaussian_nats": np.array([100.0, 101.0, 102.0]),
        "kernel_classifier": np.arange(len(SETS))[:, None] + near,
        "noise_to_data_classifier": 0.5 + near,
        "energy": 50.0 + np.arange(len(CODED) + 1)[:, None] + near,
        "probe_right": np.arange(100) < 5 * np.arange(1, len(PROBES) + 1)[:, None],
        "decodes_none_pixels": 0.5 + near,
        "similarity_none_pixels": memory,
        "similarity_elbo_pixels": 1 + memory,
        "pixels_that_differ": np.array(3),
        "worst_parameter": np.array(0.25),
    }
    in_nats, kernel, energy = 64 * np.log(2), SETS.index, {name: 50 + k for k, name in enumerate(CODED)}
    bits, kl, gap = ({name: base + k * step for name, k in at.items()} for base, step in ((1, 0.01), (10, 1), (20, 1)))
    share = {name: 0.05 * (k + 1) for k, name in enumerate(PROBES)}
    expected = {
        "P1": {"kl": kl["elbo"], "shuffle_gap": gap["elbo"], "kl_scratch": kl["elbo-scratch"],
               "shuffle_gap_scratch": gap["elbo-scratch"], "negative_elbo": bits["elbo"] + kl["elbo"] / in_nats,
               "unconditional": bits["unconditional"]},
        "P2": {"shuffle_gap": gap["none"], "shuffle_gap_scratch": gap["none-scratch"], "kl": kl["none"]},
        "P3": {"prior": kernel("none: prior"), "chain": kernel("none: chain"), "q_z": kernel("none: q(z)"),
               "noise_to_data": 0.5, "fitted_gaussian": kernel("none: Gaussian"),
               "fitted_mixture": kernel("none: mixture"), "held_out_photographs": kernel("held-out photographs")},
        "P4": {"neighbours": 0.4, "two_decodes": 0.5, "similarity": 0.8, "after_60_steps": 0.1, "similarity_elbo": 2.8},
        "P5": {"above_random": share["none"] - share["random encoder"],
               "above_components": share["none"] - share["components"],
               **{name: share[name] for name in ("none", "elbo", "mmd", "pixels")}},
        "P6": {"shuffle_gap": gap["mmd"], "shuffle_gap_none": gap["none"], "prior": kernel("mmd: prior"),
               "q_z": kernel("mmd: q(z)"), "energy": energy["mmd"], "energy_none": energy["none"]},
        "P7": {"pixels_that_differ": 3, "worst_parameter": 0.25},
        "D1": {"shuffle_gap": gap["linear"], "shuffle_gap_conv": gap["none"],
               "probe_gain": share["linear"] - share["none"]},
        "G1": {"nats_lost": 101 - in_nats * bits["label"], "gaussian": 101 / in_nats, "pixelcnn": bits["label"],
               "gain_by_class": in_nats * (bits["unconditional"] - bits["label"])},
    }  # fmt: skip
    assert list(claims.quantities(arrays)) == list(CLAIMS)
    for key, one in claims.quantities(arrays).items():
        assert {name: quantity.value for name, quantity in one.items()} == pytest.approx(expected[key]), key


def test_a_ratio_of_estimates():
    rng = np.random.default_rng(0)
    half = 1.96 * (rng.normal(2.0, 0.05, 100_000) / rng.normal(5.0, 0.1, 100_000)).std()
    quotient = intervals.ratio(*(Estimate(m, m - 1.96 * s, m + 1.96 * s) for m, s in ((2.0, 0.05), (5.0, 0.1))))
    assert quotient.row == pytest.approx((0.4, 0.4 - half, 0.4 + half), abs=0.02 * half)


def test_table_adds_the_kl_in_bits(finished):
    *_, arrays = finished
    table = claims.table(arrays)
    bound = table["reconstruction"] + table["KL"] / (64 * np.log(2))
    assert table.loc["elbo", "bound"] == pytest.approx(bound["elbo"], abs=0.002)
    assert table.loc["unconditional", "bound"] == table.loc["unconditional", "reconstruction"]
    assert np.isnan(table.loc["label", "bound"]) and list(table.index) == list(VARIANTS)


def test_verdicts_and_recorded_weights_that_draw(finished):
    """What a finished run leaves is enough to load the model without training, and it draws the same images."""
    run, images, trained, arrays = finished
    verdicts = experiment.conclude(run, arrays, trained, images)
    assert verdicts.decided() == {key: "holds" if key == "P7" else "not claimed" for key in CLAIMS}
    target = files.results_root() / "smoke" / experiment.NOTEBOOK
    target.mkdir(parents=True)
    for name in ("arrays.npz", "run.json", "metrics.json", "weights.safetensors"):
        shutil.copy(run.directory / name, target / name)
    again = experiment.start("smoke", 0, "cpu", "recorded", QUICK)
    loaded = experiment.fit(again, images)
    assert list(loaded) == ["none"] and loaded["none"].steps == 0
    recorded = experiment.measure(again, images, loaded)
    assert recorded.keys() == arrays.keys()
    assert all(recorded[name].tobytes() == value.tobytes() for name, value in arrays.items())
    states, own, again_own = (experiment.continue_chain(run, images, models) for models in (loaded, trained, trained))
    assert own.shape == (4, 5, 8, 8, 1) and np.array_equal(own, again_own)
    assert np.array_equal(own[0], images.held_out[-5:].numpy())
    assert (states[1] == own[1]).mean() > 0.8, "half precision moves few pixels"
    assert set(experiment.conclude(again, recorded, loaded, images)) == set(CLAIMS)


def test_figures_are_drawn_from_the_arrays_alone(finished, tmp_path):
    *_, arrays = finished
    for name in ("training", "ways_to_draw", "regularised", "distances", "memory", "many", "probe", "glasses"):
        getattr(figures, name)(arrays).savefig(tmp_path / f"{name}.png")

    def drawn(content):
        figures.chain(content).savefig(tmp_path / "chain.png")
        return (tmp_path / "chain.png").read_bytes()

    assert drawn(arrays) == drawn(dict(arrays)) != drawn(arrays | {"chain_none": 16 - arrays["chain_none"]})


WRONG = {"min_std": 1.0, "pretrain_steps": -1, "finetune_steps": 0, "chains": 10, "chain_steps": 30, "betas": (0.9,)}
WRONG |= {"mmd_weight": float("nan"), "schedule": "step", "draws": 30, "dataset": "mnist"}


@pytest.mark.parametrize(("name", "value"), WRONG.items())
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(UserError, match="digits, cifar10" if name == "dataset" else name):
        experiment.start("smoke", 0, "cpu", "train", {name: value})
