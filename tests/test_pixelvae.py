"""Notebook 04: its measurements against their definitions, its figures from arrays alone, its verdicts both ways."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from scipy.stats import norm

from paperlib.pixelvae import claims as pixelvae_claims
from paperlib.pixelvae import experiment as pixelvae_experiment
from paperlib.pixelvae import figures as pixelvae_figures
from paperlib.pixelvae import markov_chain as pixelvae_markov_chain
from paperlib.pixelvae import measurements as pixelvae_measurements
from paperlib.pixelvae import training as pixelvae_training
from paperlib.pixelvae.claims import CLAIMS
from paperlib.pixelvae.experiment import Settings
from paperlib.pixelvae.measurements import CODED, LAGS, PROBES, SETS
from paperlib.pixelvae.training import VARIANTS
from paperlib.runs.estimate import Estimate
from paperlib.runs.run import load_arrays
from paperlib.stats import aggregate_posterior, autocorrelation, intervals, linear_probe, two_sample
from paperlib.system import files
from paperlib.system.errors import UserError

QUICK = {"pretrain_steps": 60, "finetune_steps": 12, "ablation_steps": 12, "classifier_steps": 40, "filters": 8}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run on the embedded digits: (run, images, trained, arrays)."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RUNS", "RESULTS"):
            patch.setenv(f"PAPERLIB_{name}", str(tmp_path_factory.mktemp(name)))
        run = pixelvae_experiment.start("smoke", 0, "cpu", "train", QUICK)
        images = pixelvae_experiment.load_images(run)
        trained = pixelvae_training.fit(run, images)
        yield run, images, trained, pixelvae_experiment.measure(run, images, trained)


# Pictures and codes


def test_blurring_is_a_mean_of_neighbours():
    pictures = torch.randint(256, (2, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = pixelvae_measurements.blurred(pictures)
    for n, i, j, c in [(0, 0, 0, 0), (1, 3, 4, 2), (0, 7, 2, 1), (1, 7, 7, 0)]:
        around = pictures[n, max(0, i - 1) : i + 2, max(0, j - 1) : j + 2, c].double()
        assert abs(found[n, i, j, c].item() - around.mean().item()) <= 0.5 + 1e-9
    assert found.shape == pictures.shape and found.dtype == torch.uint8


def test_shuffled_patches_are_the_same_squares_elsewhere():
    pictures = torch.arange(3 * 8 * 8 * 1).reshape(3, 8, 8, 1).remainder(251).to(torch.uint8)
    found = pixelvae_measurements.patches_shuffled(pictures, torch.Generator().manual_seed(0))

    def squares(picture):
        return [tuple(picture[i : i + 2, j : j + 2].flatten().tolist()) for i in range(0, 8, 2) for j in range(0, 8, 2)]

    orders = set()
    for before, after in zip(pictures, found, strict=True):
        assert sorted(squares(before)) == sorted(squares(after)) and squares(before) != squares(after)
        orders.add(tuple(squares(before).index(square) for square in squares(after)))
    assert len(orders) == 3, "each image has an order of its own"


def test_fitted_distributions_are_those_of_the_codes(finished):
    run, *_ = finished
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4000, 2, generator=generator) * 0.1 + torch.tensor([[3.0, -1.0]])
    z[::2] *= -1  # two clusters
    drawn = pixelvae_measurements.fitted(z, 3000, 0)
    for points in drawn.values():
        torch.testing.assert_close(points.mean(0), z.mean(0), rtol=0, atol=0.25)
        torch.testing.assert_close(points.T.cov(), z.T.cov(), rtol=0.1, atol=0.05)
    distance = {law: two_sample.energy_distance(points, z).value for law, points in drawn.items()}
    assert distance["mixture"] < 0.02 < 0.1 < distance["Gaussian"]
    halves = drawn["mixture"][:1500].mean(0) - drawn["mixture"][1500:].mean(0)
    assert halves.abs().max() < 0.4, "in the order of its components"


def test_codes_tell_what_they_tell(finished):
    _run, images, trained, arrays = finished
    vae = trained["none"].model
    mean, log_std = pixelvae_markov_chain.encode(vae, images, images.train)
    told = aggregate_posterior.mutual_information(
        aggregate_posterior.Codes(mean, log_std), generator=torch.Generator().manual_seed(9)
    )
    row = CODED.index("none")
    assert abs(arrays["information"][row] - told.nats) < 0.1 and 1 < told.nats < told.ceiling + 1e-9
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
    own = linear_probe.linear_probe(
        (train - train.mean(0)) @ axes[: run.settings.code_dim].T,
        images.labels,
        (held_out - train.mean(0)) @ axes[: run.settings.code_dim].T,
        images.held_out_labels,
    )
    assert (own == right["components"]).mean() > 0.99


def test_terms_are_held_out_and_equal_for_equal_models(finished):
    run, images, trained, arrays = finished
    models = {name: trained["none"].model for name in ("none", "elbo")}
    found = pixelvae_measurements.terms(run.settings, run.seed, images, models)
    assert all(np.array_equal(row[0], row[1]) for row in found.values())
    k = list(VARIANTS).index("none")
    assert np.array_equal(found["shuffle_gap"][0], arrays["shuffle_gap"][k])
    for name, row in zip(VARIANTS, arrays["kl"], strict=True):
        assert np.isnan(row).all() == (name in ("unconditional", "label"))


# The glasses and exactness


def test_the_best_gaussian_of_each_class_by_scipy(finished):
    _run, images, _trained, arrays = finished
    x, labels = images.train.numpy().astype(float), images.labels.numpy()
    for n in (0, 57, 296):
        own = x[labels == int(images.held_out_labels[n])]
        mean, std = own.mean(0), np.maximum(own.std(0), np.sqrt(1 / 12))
        grey = images.held_out[n].numpy().astype(float)
        low = np.where(grey == 0, -np.inf, grey - 0.5)
        high = np.where(grey == 16, np.inf, grey + 0.5)
        mass = norm.cdf(high, mean, std) - norm.cdf(low, mean, std)
        right = norm.sf(low, mean, std) - norm.sf(high, mean, std)
        mass = np.where(grey < mean, mass, right)  # each loses its digits on the other side
        assert arrays["gaussian_nats"][n] == pytest.approx(-np.log(mass).sum(), rel=1e-6)
    assert arrays["glasses_sample"].shape == (10, 4, 8, 8, 1)
    for k, photograph in enumerate(arrays["glasses_photograph"]):
        assert (x[labels == k] == photograph).all((1, 2, 3)).any()


def test_exactness_notices_a_sampler_that_is_not_exact(finished, monkeypatch):
    run, images, trained, arrays = finished
    assert arrays["pixels_that_differ"] == 0 and 0 < arrays["worst_parameter"] < 1e-5
    true_draw = pixelvae_measurements.Sampler.draw

    def off(self, h=None, **options):
        x = true_draw(self, h, **options)
        x[0, 0, 3, 4] += 2 / 16
        return x

    monkeypatch.setattr(pixelvae_measurements.Sampler, "draw", off)
    true_given = pixelvae_measurements.Sampler.teacher_forced
    monkeypatch.setattr(
        pixelvae_measurements.Sampler, "teacher_forced", lambda self, x, h: true_given(self, x, h) * 1.001
    )
    found = pixelvae_measurements.exactness(run.seed, images, trained["none"].model)
    assert found["pixels_that_differ"] == 1 and found["worst_parameter"] > 1e-5


# The chain and the sets


def test_what_is_drawn(finished):
    run, _images, _, arrays = finished
    steps = run.settings.chain_steps
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


def test_reference_photographs_made_nothing(finished, monkeypatch):
    """The held-out images that codes come from are not those that kernel distances are taken to."""
    run, images, trained, _ = finished
    seen, code_dim = {}, run.settings.code_dim

    def sampled(vae, images, pictures, generator):
        seen.setdefault(len(pictures), pictures)
        return torch.zeros(len(pictures), code_dim)

    def standing(vae, images, start, steps, *rest):
        noise = torch.randint(17, (steps, *start.shape), dtype=torch.uint8)
        return torch.cat([start[None], noise])

    fits = {law: torch.zeros(run.settings.chains, code_dim) for law in ("Gaussian", "mixture")}
    monkeypatch.setattr(pixelvae_measurements, "sampled", sampled)
    monkeypatch.setattr(pixelvae_measurements, "markov_chain", standing)
    monkeypatch.setattr(pixelvae_measurements, "fitted", lambda *rest: fits)
    references, starts, pairs = [], [], []
    true = two_sample.kernel_distance
    true_memory, true_pair = autocorrelation.autocorrelation, autocorrelation.pair_correlation

    def kernel_distance(a, b, together):
        references.append((a, b, together))
        return true(a, b, together=together)

    monkeypatch.setattr(two_sample, "kernel_distance", kernel_distance)
    monkeypatch.setattr(autocorrelation, "autocorrelation", lambda s, lags: starts.append(s) or true_memory(s, lags))
    monkeypatch.setattr(autocorrelation, "pair_correlation", lambda a, b: pairs.append((a, b)) or true_pair(a, b))
    describe = {kind: lambda pictures: pictures.flatten(1).double() for kind in ("classifier", "random")}
    found = pixelvae_measurements.samples(run.settings, run.seed, images, {name: trained[name].model for name in VARIANTS}, describe)
    sources, reference = seen[run.settings.draws].flatten(1).double(), references[0][1]
    assert len(reference) + len(sources) == len(images.held_out)
    assert torch.cdist(sources, reference).min() > 0
    chains = run.settings.chains
    starts = [states for states in starts if len(states) > 2]  # the others are of pair_correlation
    assert len(starts) == 4
    for states in starts:
        assert torch.equal(states[0], sources[:chains]), "memory is that of chains from photographs"
    shown = [
        torch.from_numpy(np.asarray(found[f"shown_decodes_{name}"])).flatten(2).double() for name in ("none", "elbo")
    ]
    for k, (a, b) in enumerate(pairs):
        assert torch.equal(a[:10], shown[k // 2][0]) and torch.equal(b[:10], shown[k // 2][1])
        assert len(a) == run.settings.draws and not torch.equal(a, b)
    pooled = references[SETS.index("none: chain from data")]
    assert pooled[2] == (5, 1) and len(pooled[0]) == 5 * chains
    assert torch.equal(pooled[0][::5], starts[0][-21]) and torch.equal(pooled[0][4::5], starts[0][-1])
    assert references[len(SETS)][2] == (5, 5)


def test_walking_on(finished):
    run, images, trained, _ = finished
    states = pixelvae_experiment.continue_chain(run, images, trained)
    assert states.shape == (4, 5, 8, 8, 1) and np.array_equal(states[0], images.held_out[-5:].numpy())
    assert np.array_equal(states, pixelvae_experiment.continue_chain(run, images, trained))


# Verdicts


def test_every_claim_is_judged_by_what_is_measured(finished):
    _, _, _, arrays = finished
    measured = pixelvae_claims.quantities(arrays)
    assert set(measured) == set(CLAIMS)
    for key, claim in CLAIMS.items():
        assert claim.criterion(**measured[key]) in (True, False)


GOOD = {
    "P1": {"kl": 0.4, "shuffle_gap": 0.05, "kl_scratch": 0.1, "shuffle_gap_scratch": 0.0},
    "P2": {"shuffle_gap": 6.0},
    "P3": {"prior": 3.0, "chain": 1.1, "q_z": 1.0, "noise_to_data": 0.05},
    "P4": {"neighbours": 0.2, "similarity": 0.6, "after_60_steps": 0.05, "similarity_elbo": 0.01},
    "P5": {"above_random": 0.04, "above_components": 0.05},
    "P6": {
        "shuffle_gap": 3.1,
        "shuffle_gap_none": 6.0,
        "prior": 1.1,
        "q_z": 1.0,
        "energy": 0.01,
        "energy_none": 1.0,
    },
    "P7": {"pixels_that_differ": 0.0, "worst_parameter": 1e-6},
    "D1": {"shuffle_gap": 3.1, "shuffle_gap_conv": 6.0, "probe_gain": -0.02},
    "G1": {"nats_lost": 2000.0, "gain_by_class": 10.0},
}
BAD = [
    ("P1", "kl", 0.6), ("P1", "shuffle_gap", 0.2), ("P1", "kl_scratch", 0.6), ("P1", "shuffle_gap_scratch", 0.2),
    ("P2", "shuffle_gap", 4.0),
    ("P3", "prior", 1.15), ("P3", "chain", 1.4), ("P3", "q_z", 0.5), ("P3", "noise_to_data", 0.2),
    ("P4", "neighbours", 0.04), ("P4", "similarity", 0.4), ("P4", "after_60_steps", 0.15),
    ("P4", "similarity_elbo", 0.1),
    ("P5", "above_random", 0.02), ("P5", "above_components", 0.02),
    ("P6", "shuffle_gap", 2.0), ("P6", "prior", 1.3), ("P6", "energy", 0.2),
    ("P7", "pixels_that_differ", 1.0), ("P7", "worst_parameter", 1e-4),
    ("D1", "shuffle_gap", 2.0), ("D1", "probe_gain", -0.05),
    ("G1", "nats_lost", 900.0), ("G1", "gain_by_class", 500.0),
]  # fmt: skip


def around(values):
    return {name: Estimate(value, value - 0.1 * abs(value), value + 0.1 * abs(value)) for name, value in values.items()}


@pytest.mark.parametrize("key", GOOD)
def test_a_criterion_accepts_what_its_words_accept(key):
    assert CLAIMS[key].criterion(**around(GOOD[key]))


@pytest.mark.parametrize(("key", "name", "value"), BAD)
def test_a_criterion_refuses_what_its_words_refuse(key, name, value):
    assert not CLAIMS[key].criterion(**around(GOOD[key] | {name: value}))


@pytest.mark.parametrize(
    ("key", "name", "quantity"),
    [
        ("P2", "shuffle_gap", Estimate(6.0, -0.1, 12.1)),
        ("P3", "prior", Estimate(3.0, 1.15, 4.85)),
        ("P4", "neighbours", Estimate(0.2, 0.04, 0.36)),
        ("P5", "above_random", Estimate(0.04, -0.01, 0.09)),
        ("P5", "above_components", Estimate(0.04, -0.01, 0.09)),
        ("G1", "nats_lost", Estimate(2000.0, 900.0, 3100.0)),
    ],
)
def test_a_criterion_asks_for_the_interval_too(key, name, quantity):
    assert not CLAIMS[key].criterion(**around(GOOD[key]) | {name: quantity})


def test_each_quantity_is_what_its_name_says():
    """Arrays in which every entry is a number of its own."""
    names, at = list(VARIANTS), {name: k for k, name in enumerate(VARIANTS)}
    rows = np.arange(len(names), dtype=float)[:, None] + np.array([-0.01, 0.0, 0.01])
    kernel = np.arange(len(SETS))[:, None] + np.array([0.0, -0.1, 0.1])
    energy = 50.0 + np.arange(len(CODED) + 1)[:, None] + np.array([0.0, -0.1, 0.1])
    right = np.arange(100) < 5 * np.arange(1, len(PROBES) + 1)[:, None]
    memory = {
        f"similarity_{model}_{view}": base + np.array([0.4, 0.3, 0.2, 0.1])[:, None] + np.array([0.0, -0.01, 0.01])
        for model, view, base in [("none", "pixels", 0.0), ("elbo", "pixels", 1.0)]
    }
    arrays = {
        "chain_none": np.zeros((2, 8, 8, 1)),
        "bits_per_dim": 1 + rows / 100,
        "kl": 10 + rows,
        "shuffle_gap": 20 + rows,
        "gaussian_nats": np.array([100.0, 101.0, 102.0]),
        "kernel_classifier": kernel,
        "noise_to_data_classifier": np.array([0.5, 0.4, 0.6]),
        "energy": energy,
        "probe_right": right,
        "decodes_none_pixels": np.array([0.5, 0.4, 0.6]),
        "pixels_that_differ": np.array(3),
        "worst_parameter": np.array(0.25),
        **memory,
    }
    found = {
        key: {name: quantity.value for name, quantity in measured.items()}
        for key, measured in pixelvae_claims.quantities(arrays).items()
    }
    bits = {name: 1 + k / 100 for name, k in at.items()}
    in_nats, set_at, coded_at = 64 * np.log(2), SETS.index, CODED.index
    assert found["P1"] == pytest.approx(
        {
            "kl": 10 + at["elbo"],
            "shuffle_gap": 20 + at["elbo"],
            "kl_scratch": 10 + at["elbo-scratch"],
            "shuffle_gap_scratch": 20 + at["elbo-scratch"],
            "negative_elbo": bits["elbo"] + (10 + at["elbo"]) / in_nats,
            "unconditional": bits["unconditional"],
        }
    )
    gaps = {"shuffle_gap": 20 + at["none"], "shuffle_gap_scratch": 20 + at["none-scratch"], "kl": 10 + at["none"]}
    assert found["P2"] == pytest.approx(gaps)
    sets = {
        "prior": "none: prior",
        "chain": "none: chain",
        "q_z": "none: q(z)",
        "fitted_gaussian": "none: Gaussian",
        "fitted_mixture": "none: mixture",
        "held_out_photographs": "held-out photographs",
    }
    assert found["P3"] == {name: set_at(value) for name, value in sets.items()} | {"noise_to_data": 0.5}
    assert found["P4"] == pytest.approx(
        {
            "neighbours": 0.4,
            "two_decodes": 0.5,
            "similarity": 0.8,
            "after_60_steps": 0.1,
            "similarity_elbo": 2.8,
        }
    )
    share = {name: 0.05 * (k + 1) for k, name in enumerate(PROBES)}
    assert found["P5"] == pytest.approx(
        {
            "above_random": share["none"] - share["random encoder"],
            "above_components": share["none"] - share["components"],
            **{name: share[name] for name in ("none", "elbo", "mmd", "pixels")},
        }
    )
    assert found["P6"] == pytest.approx(
        {
            "shuffle_gap": 20 + at["mmd"],
            "shuffle_gap_none": 20 + at["none"],
            "prior": set_at("mmd: prior"),
            "q_z": set_at("mmd: q(z)"),
            "energy": 50 + coded_at("mmd"),
            "energy_none": 50 + coded_at("none"),
        }
    )
    assert found["P7"] == {"pixels_that_differ": 3, "worst_parameter": 0.25}
    gaps = {"shuffle_gap": 20 + at["linear"], "shuffle_gap_conv": 20 + at["none"]}
    assert found["D1"] == pytest.approx(gaps | {"probe_gain": share["linear"] - share["none"]})
    assert found["G1"] == pytest.approx(
        {
            "nats_lost": 101 - in_nats * bits["label"],
            "gain_by_class": in_nats * (bits["unconditional"] - bits["label"]),
            "gaussian": 101 / in_nats,
            "pixelcnn": bits["label"],
        }
    )


def test_a_ratio_of_estimates():
    generator = np.random.default_rng(0)
    a, b = generator.normal(2.0, 0.05, 100_000), generator.normal(5.0, 0.1, 100_000)
    found = intervals.ratio(
        Estimate(2.0, 2.0 - 1.96 * 0.05, 2.0 + 1.96 * 0.05),
        Estimate(5.0, 5.0 - 1.96 * 0.1, 5.0 + 1.96 * 0.1),
    )
    assert found.value == 0.4
    assert found.high - found.value == pytest.approx(1.96 * (a / b).std(), rel=0.02)
    assert found.value - found.low == pytest.approx(found.high - found.value)


def test_table_adds_the_kl_in_bits(finished):
    _, _, _, arrays = finished
    table = pixelvae_claims.table(arrays)
    row = table.loc["elbo"]
    assert row["bound"] == pytest.approx(row["reconstruction"] + row["KL"] / (64 * np.log(2)), abs=0.002)
    assert table.loc["unconditional", "bound"] == table.loc["unconditional", "reconstruction"]
    assert np.isnan(table.loc["label", "bound"]) and list(table.index) == list(VARIANTS)


def test_verdicts_and_recorded_weights_that_draw(finished, monkeypatch):
    """What a finished run leaves is enough to load the model without training, and it draws the same images."""
    run, images, trained, arrays = finished
    verdicts = pixelvae_experiment.conclude(run, arrays, trained, images)
    assert set(verdicts) == set(CLAIMS)
    assert verdicts.decided() == {key: "holds" if key == "P7" else "not claimed" for key in CLAIMS}
    target = files.results_root() / "smoke" / pixelvae_experiment.NOTEBOOK
    target.mkdir(parents=True)
    for name in ("arrays.npz", "run.json", "metrics.json", "weights.safetensors"):
        shutil.copy(run.directory / name, target / name)
    again = pixelvae_experiment.start("smoke", 0, "cpu", "recorded", QUICK)
    loaded = pixelvae_training.fit(again, images)
    assert list(loaded) == ["none"] and loaded["none"].steps == 0
    recorded = pixelvae_experiment.measure(again, images, loaded)
    assert all(
        np.array_equal(recorded[name], arrays[name], equal_nan=True)
        for name in arrays
        if arrays[name].dtype.kind == "f"
    )
    states, own = (pixelvae_experiment.continue_chain(run, images, models) for models in (loaded, trained))
    assert (states[1] == own[1]).mean() > 0.8, "half precision moves few pixels"
    assert set(pixelvae_experiment.conclude(again, recorded, loaded, images)) == set(CLAIMS)


def test_figures_are_drawn_from_the_arrays_alone(finished, tmp_path):
    run, _images, _, _ = finished
    arrays = load_arrays(run.directory)
    names = ("chain", "training", "ways_to_draw", "regularised", "distances", "memory", "many", "probe", "glasses")
    for name in names:
        figure = getattr(pixelvae_figures, name)(arrays)
        figure.savefig(tmp_path / f"{name}.png")
    changed = dict(arrays) | {"chain_none": 16 - arrays["chain_none"]}
    for name, copy in (("same", arrays), ("changed", changed)):
        pixelvae_figures.chain(copy).savefig(tmp_path / f"chain-{name}.png")
    same = (tmp_path / "chain-same.png").read_bytes() == (tmp_path / "chain.png").read_bytes()
    assert same and (tmp_path / "chain-changed.png").read_bytes() != (tmp_path / "chain.png").read_bytes()


# Settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_std": 1.0}, "min_std"),
        ({"pretrain_steps": -1}, "pretrain_steps"),
        ({"finetune_steps": 0}, "finetune_steps"),
        ({"chains": 10}, "chains"),
        ({"chain_steps": 30}, "chain_steps"),
        ({"betas": (0.9,)}, "betas"),
        ({"mmd_weight": float("nan")}, "mmd_weight"),
    ],
)
def test_settings_out_of_range_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Settings(), **changes)


def test_unknown_data_sets_are_refused():
    with pytest.raises(UserError, match="digits, cifar10"):
        pixelvae_experiment.start("smoke", 0, "cpu", "train", {"dataset": "mnist"})
