"""Notebook 04: its measurements against their definitions, its figures from arrays alone, its verdicts both ways."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from scipy.stats import norm

from paperlib import pixelvae
from paperlib.pixelvae import figures, markov_chain, measurements
from paperlib.pixelvae.claims import CLAIMS, quantities
from paperlib.pixelvae.experiment import NOTEBOOK, Settings
from paperlib.pixelvae.measurements import LAGS, PROBES, SETS
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
        run = pixelvae.start("smoke", 0, "cpu", "train", QUICK)
        images = pixelvae.load_images(run)
        trained = pixelvae.fit(run, images)
        yield run, images, trained, pixelvae.measure(run, images, trained)


@pytest.fixture(scope="module")
def arrays(finished):
    return finished[3]


# Pictures and codes


def test_blurring_is_a_mean_of_neighbours():
    pictures = torch.randint(256, (2, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    blurred = measurements.blurred(pictures)
    for n, i, j, c in [(0, 0, 0, 0), (1, 3, 4, 2), (0, 7, 2, 1), (1, 7, 7, 0)]:
        around = pictures[n, max(0, i - 1) : i + 2, max(0, j - 1) : j + 2, c].double()
        assert abs(blurred[n, i, j, c].item() - around.mean().item()) <= 0.5 + 1e-9
    assert blurred.shape == pictures.shape and blurred.dtype == torch.uint8


def test_shuffled_patches_are_the_same_squares_elsewhere():
    pictures = torch.arange(3 * 8 * 8 * 1).reshape(3, 8, 8, 1).remainder(251).to(torch.uint8)
    shuffled = measurements.patches_shuffled(pictures, torch.Generator().manual_seed(0))

    def squares(picture):
        return [tuple(picture[i : i + 2, j : j + 2].flatten().tolist()) for i in range(0, 8, 2) for j in range(0, 8, 2)]

    orders = set()
    for before, after in zip(pictures, shuffled, strict=True):
        assert sorted(squares(before)) == sorted(squares(after)) and squares(before) != squares(after)
        orders.add(tuple(squares(before).index(square) for square in squares(after)))
    assert len(orders) == 3, "each image has an order of its own"


def test_fitted_distributions_are_those_of_the_codes():
    z = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0)) * 0.1 + torch.tensor([[3.0, -1.0]])
    z[::2] *= -1  # two clusters
    drawn = measurements.fitted(z, 3000, 0)
    for points in drawn.values():
        torch.testing.assert_close(points.mean(0), z.mean(0), rtol=0, atol=0.25)
        torch.testing.assert_close(points.T.cov(), z.T.cov(), rtol=0.1, atol=0.05)
    distance = {name: two_sample.energy_distance(points, z).value for name, points in drawn.items()}
    assert distance["mixture"] < 0.02 < 0.1 < distance["Gaussian"]
    halves = drawn["mixture"][:1500].mean(0) - drawn["mixture"][1500:].mean(0)
    assert halves.abs().max() < 0.4, "in the order of its components"


def test_information_spread_and_energy_are_of_the_codes(finished):
    _, images, trained, arrays = finished
    mean, log_std = markov_chain.encode(trained["none"].model, images, images.train)
    information = aggregate_posterior.mutual_information(
        aggregate_posterior.Codes(mean, log_std), generator=torch.Generator().manual_seed(9)
    )
    row = CODED.index("none")
    assert abs(arrays["information"][row] - information.nats) < 0.1
    assert 1 < information.nats < information.ceiling + 1e-9
    assert arrays["information_ceiling"] == pytest.approx(np.log(1500))
    assert arrays["mean_spread"][row] == pytest.approx(mean.var(0).mean().sqrt().item(), rel=1e-5)
    assert 0.2 <= arrays["std"][row] <= 1
    assert arrays["energy"][-1, 1] < 0.01, "two samples of the prior differ by chance alone"
    assert arrays["energy"].shape == (len(CODED) + 1, 3)


def test_probes_are_of_what_their_names_say(finished):
    run, images, _, arrays = finished
    right = dict(zip(PROBES, arrays["probe_right"], strict=True))
    assert right["pixels"].mean() > 0.9 and right["pixels"].mean() > right["components"].mean() > 0.5
    assert right["none"].shape == (297,)
    train, held_out = (part.flatten(1).double() for part in (images.train, images.held_out))
    _, _, axes = torch.linalg.svd(train - train.mean(0), full_matrices=False)
    own = linear_probe(
        *((train - train.mean(0)) @ axes[: run.settings.code_dim].T, images.labels),
        *((held_out - train.mean(0)) @ axes[: run.settings.code_dim].T, images.held_out_labels),
    )
    assert (own == right["components"]).mean() > 0.99


def test_terms_are_held_out_and_equal_for_equal_models(finished):
    run, images, trained, arrays = finished
    models = {name: trained["none"].model for name in ("none", "elbo")}
    terms = measurements.terms(run.settings, images, models, run.seed)
    assert all(np.array_equal(row[0], row[1]) for row in terms.values())
    assert np.array_equal(terms["shuffle_gap"][0], arrays["shuffle_gap"][list(VARIANTS).index("none")])
    for name, row in zip(VARIANTS, arrays["kl"], strict=True):
        assert np.isnan(row).all() == (name in ("unconditional", "label"))


# The glasses and exactness


def test_the_best_gaussian_of_each_class_by_scipy(finished):
    _, images, _, arrays = finished
    x, labels = images.train.numpy().astype(float), images.labels.numpy()
    for n in (0, 57, 296):
        own = x[labels == int(images.held_out_labels[n])]
        mean, std = own.mean(0), np.maximum(own.std(0), np.sqrt(1 / 12))
        grey = images.held_out[n].numpy().astype(float)
        low = np.where(grey == 0, -np.inf, grey - 0.5)
        high = np.where(grey == 16, np.inf, grey + 0.5)
        left = norm.cdf(high, mean, std) - norm.cdf(low, mean, std)
        right = norm.sf(low, mean, std) - norm.sf(high, mean, std)
        mass = np.where(grey < mean, left, right)  # each loses its digits on the other side
        assert arrays["gaussian_nats"][n] == pytest.approx(-np.log(mass).sum(), rel=1e-6)
    assert arrays["glasses_sample"].shape == (10, 4, 8, 8, 1)
    for k, photograph in enumerate(arrays["glasses_photograph"]):
        assert (x[labels == k] == photograph).all((1, 2, 3)).any()


def test_exactness_notices_a_sampler_that_is_not_exact(finished, monkeypatch):
    _, images, trained, arrays = finished
    assert arrays["pixels_that_differ"] == 0 and 0 < arrays["worst_parameter"] < 1e-5
    true_draw, true_given = measurements.Sampler.draw, measurements.Sampler.teacher_forced

    def off(self, h=None, **options):
        x = true_draw(self, h, **options)
        x[0, 0, 3, 4] += 2 / 16
        return x

    monkeypatch.setattr(measurements.Sampler, "draw", off)
    monkeypatch.setattr(measurements.Sampler, "teacher_forced", lambda self, x, h: true_given(self, x, h) * 1.001)
    wrong = measurements.exactness(images, trained["none"].model, 0)
    assert wrong["pixels_that_differ"] == 1 and wrong["worst_parameter"] > 1e-5


# The chain and the sets


def test_sets_and_chains_are_all_different(finished, arrays):
    steps = finished[0].settings.chain_steps
    for model in ("none", "elbo"):
        assert arrays[f"chain_{model}"].shape == (steps + 1, 8, 8, 1)
        assert arrays[f"many_{model}"].shape == (36, 8, 8, 1)
        assert np.array_equal(arrays[f"many_{model}"][0], arrays[f"chain_{model}"][-1])
        assert arrays[f"similarity_{model}_pixels"].shape == (len(LAGS), 3)
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


@pytest.fixture
def traced(finished, monkeypatch):
    """`samples` with chains of noise and codes 0: (settings, what it returns, arguments of each function by name)."""
    run, images, trained, _ = finished
    settings, called = run.settings, {}

    def trace(module, name, true):
        def noted(*values, **options):
            called.setdefault(name, []).append((*values, *options.values()))
            return true(*values, **options)

        monkeypatch.setattr(module, name, noted)

    def moving(vae, images, start, steps, *rest):
        return torch.cat([start[None], torch.randint(17, (steps, *start.shape), dtype=torch.uint8)])

    zeros = torch.zeros(settings.draws, settings.code_dim)
    monkeypatch.setattr(measurements, "markov_chain", moving)
    monkeypatch.setattr(measurements, "fitted", lambda *rest: {"Gaussian": zeros, "mixture": zeros})
    trace(measurements, "sampled", lambda vae, images, pictures, generator: zeros[:1].expand(len(pictures), -1))
    trace(measurements, "autocorrelation", measurements.autocorrelation)
    trace(measurements, "pair_correlation", measurements.pair_correlation)
    trace(two_sample, "kernel_distance", two_sample.kernel_distance)
    extract = {kind: lambda pictures: pictures.flatten(1).double() for kind in ("classifier", "random")}
    models = {name: trained[name].model for name in VARIANTS}
    return settings, measurements.samples(settings, images, models, extract, 0), called


def test_reference_photographs_made_nothing(finished, traced):
    """The held-out images that codes and chains come from are not those that kernel distances are taken to."""
    settings, _, called = traced
    sources = called["sampled"][0][2].flatten(1).double()
    reference = called["kernel_distance"][0][1]
    assert len(sources) == settings.draws and len(sources) + len(reference) == len(finished[1].held_out)
    assert torch.cdist(sources, reference).min() > 0
    assert len(called["autocorrelation"]) == 4
    for states, _lags in called["autocorrelation"]:
        assert torch.equal(states[0], sources[: settings.chains]), "memory is that of chains from photographs"


def test_pairs_are_two_decodes_and_late_states_stand_for_chains(traced):
    settings, arrays, called = traced
    for k, (a, b) in enumerate(called["pair_correlation"]):
        shown = arrays[f"shown_decodes_{('none', 'elbo')[k // 2]}"].flatten(2).double()
        assert torch.equal(a[:10], shown[0]) and torch.equal(b[:10], shown[1])
        assert len(a) == settings.draws and not torch.equal(a, b)
    points, _, together = called["kernel_distance"][SETS.index("none: chain from data")]
    states = called["autocorrelation"][0][0]
    assert together == (5, 1) and len(points) == 5 * settings.chains
    assert torch.equal(points[::5], states[-21]) and torch.equal(points[4::5], states[-1])
    assert called["kernel_distance"][len(SETS)][2] == (5, 5)


# Verdicts


GOOD = {
    "P1": {"kl": 0.4, "shuffle_gap": 0.05, "kl_scratch": 0.1, "shuffle_gap_scratch": 0.0},
    "P2": {"shuffle_gap": 6.0},
    "P3": {"prior": 3.0, "chain": 1.1, "q_z": 1.0, "noise_to_data": 0.05},
    "P4": {"neighbours": 0.2, "similarity": 0.6, "after_60_steps": 0.05, "similarity_elbo": 0.01},
    "P5": {"above_random": 0.04, "above_components": 0.05},
    "P6": {"shuffle_gap": 3.1, "shuffle_gap_none": 6.0, "prior": 1.1, "q_z": 1.0, "energy": 0.01, "energy_none": 1.0},
    "P7": {"pixels_that_differ": 0.0, "worst_parameter": 1e-6},
    "D1": {"shuffle_gap": 3.1, "shuffle_gap_conv": 6.0, "probe_gain": -0.02},
    "G1": {"nats_lost": 2000.0, "gain_by_class": 10.0},
}
BAD = {  # any one of these instead
    "P1": {"kl": 0.6, "shuffle_gap": 0.2, "kl_scratch": 0.6, "shuffle_gap_scratch": 0.2},
    "P2": {"shuffle_gap": 4.0},
    "P3": {"prior": 1.15, "chain": 1.4, "q_z": 0.5, "noise_to_data": 0.2},
    "P4": {"neighbours": 0.04, "similarity": 0.4, "after_60_steps": 0.15, "similarity_elbo": 0.1},
    "P5": {"above_random": 0.02, "above_components": 0.02},
    "P6": {"shuffle_gap": 2.0, "prior": 1.3, "energy": 0.2},
    "P7": {"pixels_that_differ": 1.0, "worst_parameter": 1e-4},
    "D1": {"shuffle_gap": 2.0, "probe_gain": -0.05},
    "G1": {"nats_lost": 900.0, "gain_by_class": 500.0},
}
TOO_LOW = {  # good values whose intervals reach down to these
    "P2": {"shuffle_gap": -0.1},
    "P3": {"prior": 1.15},
    "P4": {"neighbours": 0.04},
    "P5": {"above_random": -0.01, "above_components": -0.01},
    "G1": {"nats_lost": 900.0},
}


def around(values):
    return {name: Estimate(value, value - 0.1 * abs(value), value + 0.1 * abs(value)) for name, value in values.items()}


@pytest.mark.parametrize("key", CLAIMS)
def test_a_criterion_is_its_words(key):
    criterion, good = CLAIMS[key].criterion, around(GOOD[key])
    assert criterion(**good)
    for name, bad in around(BAD[key]).items():
        assert not criterion(**good | {name: bad}), name
    for name, low in TOO_LOW.get(key, {}).items():
        assert not criterion(**good | {name: dataclasses.replace(good[name], low=low)}), name


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
    in_nats, kernel, coded = 64 * np.log(2), SETS.index, CODED.index
    bits = {name: 1 + k / 100 for name, k in at.items()}
    kl, gap = ({name: base + k for name, k in at.items()} for base in (10, 20))
    share = {name: 0.05 * (k + 1) for k, name in enumerate(PROBES)}
    expected = {
        "P1": {"kl": kl["elbo"], "shuffle_gap": gap["elbo"],
               "kl_scratch": kl["elbo-scratch"], "shuffle_gap_scratch": gap["elbo-scratch"],
               "negative_elbo": bits["elbo"] + kl["elbo"] / in_nats, "unconditional": bits["unconditional"]},
        "P2": {"shuffle_gap": gap["none"], "shuffle_gap_scratch": gap["none-scratch"], "kl": kl["none"]},
        "P3": {"prior": kernel("none: prior"), "chain": kernel("none: chain"), "q_z": kernel("none: q(z)"),
               "noise_to_data": 0.5, "fitted_gaussian": kernel("none: Gaussian"),
               "fitted_mixture": kernel("none: mixture"), "held_out_photographs": kernel("held-out photographs")},
        "P4": {"neighbours": 0.4, "two_decodes": 0.5, "similarity": 0.8, "after_60_steps": 0.1, "similarity_elbo": 2.8},
        "P5": {"above_random": share["none"] - share["random encoder"],
               "above_components": share["none"] - share["components"],
               **{name: share[name] for name in ("none", "elbo", "mmd", "pixels")}},
        "P6": {"shuffle_gap": gap["mmd"], "shuffle_gap_none": gap["none"], "prior": kernel("mmd: prior"),
               "q_z": kernel("mmd: q(z)"), "energy": 50 + coded("mmd"), "energy_none": 50 + coded("none")},
        "P7": {"pixels_that_differ": 3, "worst_parameter": 0.25},
        "D1": {"shuffle_gap": gap["linear"], "shuffle_gap_conv": gap["none"],
               "probe_gain": share["linear"] - share["none"]},
        "G1": {"nats_lost": 101 - in_nats * bits["label"],
               "gain_by_class": in_nats * (bits["unconditional"] - bits["label"]),
               "gaussian": 101 / in_nats, "pixelcnn": bits["label"]},
    }  # fmt: skip
    measured = quantities(arrays)
    assert list(measured) == list(CLAIMS)
    for key, one in measured.items():
        assert {name: quantity.value for name, quantity in one.items()} == pytest.approx(expected[key]), key


def test_a_ratio_of_estimates():
    generator = np.random.default_rng(0)
    a, b = generator.normal(2.0, 0.05, 100_000), generator.normal(5.0, 0.1, 100_000)
    quotient = intervals.ratio(*(Estimate(m, m - 1.96 * s, m + 1.96 * s) for m, s in ((2.0, 0.05), (5.0, 0.1))))
    assert quotient.value == 0.4
    assert quotient.high - quotient.value == pytest.approx(1.96 * (a / b).std(), rel=0.02)
    assert quotient.value - quotient.low == pytest.approx(quotient.high - quotient.value)


def test_table_adds_the_kl_in_bits(arrays):
    table = pixelvae.table(arrays)
    row = table.loc["elbo"]
    assert row["bound"] == pytest.approx(row["reconstruction"] + row["KL"] / (64 * np.log(2)), abs=0.002)
    assert table.loc["unconditional", "bound"] == table.loc["unconditional", "reconstruction"]
    assert np.isnan(table.loc["label", "bound"]) and list(table.index) == list(VARIANTS)


def test_verdicts_and_recorded_weights_that_draw(finished):
    """What a finished run leaves is enough to load the model without training, and it draws the same images."""
    run, images, trained, arrays = finished
    verdicts = pixelvae.conclude(run, arrays, trained, images)
    assert verdicts.decided() == {key: "holds" if key == "P7" else "not claimed" for key in CLAIMS}
    target = files.results_root() / "smoke" / NOTEBOOK
    target.mkdir(parents=True)
    for name in ("arrays.npz", "run.json", "metrics.json", "weights.safetensors"):
        shutil.copy(run.directory / name, target / name)
    again = pixelvae.start("smoke", 0, "cpu", "recorded", QUICK)
    loaded = pixelvae.fit(again, images)
    assert list(loaded) == ["none"] and loaded["none"].steps == 0
    recorded = pixelvae.measure(again, images, loaded)
    assert recorded.keys() == arrays.keys()
    assert all(recorded[name].tobytes() == value.tobytes() for name, value in arrays.items())
    states, own, again_own = (pixelvae.continue_chain(run, images, models) for models in (loaded, trained, trained))
    assert own.shape == (4, 5, 8, 8, 1) and np.array_equal(own[0], images.held_out[-5:].numpy())
    assert np.array_equal(own, again_own) and (states[1] == own[1]).mean() > 0.8, "half precision moves few pixels"
    assert set(pixelvae.conclude(again, recorded, loaded, images)) == set(CLAIMS)


def test_figures_are_drawn_from_the_arrays_alone(arrays, tmp_path):
    for name in ("training", "ways_to_draw", "regularised", "distances", "memory", "many", "probe", "glasses"):
        getattr(figures, name)(arrays).savefig(tmp_path / f"{name}.png")

    def drawn(content):
        figures.chain(content).savefig(tmp_path / "chain.png")
        return (tmp_path / "chain.png").read_bytes()

    assert drawn(arrays) == drawn(dict(arrays)) != drawn(arrays | {"chain_none": 16 - arrays["chain_none"]})


# Settings


@pytest.mark.parametrize(
    ("name", "value"),
    {
        "min_std": 1.0,
        "pretrain_steps": -1,
        "finetune_steps": 0,
        "chains": 10,
        "chain_steps": 30,
        "betas": (0.9,),
        "mmd_weight": float("nan"),
    }.items(),
)
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(Settings(), **{name: value})


def test_unknown_data_sets_are_refused():
    with pytest.raises(UserError, match="digits, cifar10"):
        pixelvae.start("smoke", 0, "cpu", "train", {"dataset": "mnist"})
