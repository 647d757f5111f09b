"""Notebook 04: its measurements against their definitions, its figures from arrays alone, its verdicts both ways."""

import shutil
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from paperlib.nn import likelihoods
from paperlib.pixelvae import claims, experiment, figures, glasses, markov_chain, measurements
from paperlib.pixelvae.claims import CLAIMS
from paperlib.pixelvae.glasses import FEATURES
from paperlib.pixelvae.measurements import CODED, LAGS, MEASURED, SETS
from paperlib.pixelvae.training import ABLATION, VARIANTS, sweep
from paperlib.runs import run as runs
from paperlib.runs.estimate import Estimate
from paperlib.stats import two_sample
from paperlib.system import files
from paperlib.system.errors import UserError

QUICK = {
    "train_steps": 60,
    "elbo_steps": 12,
    "ablation_steps": 6,
    "sweep_steps": 6,
    "classifier_steps": 40,
    "filters": 8,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run on the embedded digits: (run, images, trained, arrays)."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RUNS", "RESULTS"):
            patch.setenv(f"PAPERLIB_{name}", str(tmp_path_factory.mktemp(name)))
        run = experiment.start("smoke", 0, "cpu", QUICK)
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


def test_the_rate_is_the_least_kl_to_a_gaussian_prior():
    """Against the KL to N(m, C) by torch.distributions, code by code; and any other Gaussian costs more."""
    generator = torch.Generator().manual_seed(0)
    mean = (
        torch.randn(200, 3, generator=generator, dtype=torch.float64) @ torch.randn(3, 3, generator=generator).double()
    )
    log_std = -torch.rand(200, 3, generator=generator, dtype=torch.float64)

    def kl(location, covariance):
        q = torch.distributions.MultivariateNormal(mean, torch.diag_embed((2 * log_std).exp()))
        p = torch.distributions.MultivariateNormal(location, covariance)
        return torch.distributions.kl_divergence(q, p).mean().item()

    second = (mean.T @ mean + torch.diag((2 * log_std).exp().sum(0))) / 200
    location = mean.mean(0)
    best = second - torch.outer(location, location)
    assert measurements.rate(mean, log_std) == pytest.approx(kl(location, best), rel=1e-9)
    others = kl(location + 0.1, best), kl(location, 1.1 * best), kl(location, best + 0.1 * torch.eye(3))
    assert min(others) > measurements.rate(mean, log_std)


def test_codes_are_described(finished):
    _, images, trained, arrays = finished
    for k, name in enumerate(CODED):
        mean, log_std = markov_chain.encode(trained[name].model, images, images.train)
        assert arrays["rate"][k] == pytest.approx(measurements.rate(mean, log_std), rel=1e-5)
        assert arrays["mean_spread"][k] == pytest.approx(mean.var(0).mean().sqrt().item(), rel=1e-5)
        assert arrays["std"][k] == pytest.approx((2 * log_std).exp().mean().sqrt().item(), rel=1e-5)


def test_terms_are_held_out_and_equal_for_equal_models(finished):
    run, images, trained, arrays = finished
    terms = measurements.terms(run.settings, images, dict.fromkeys(MEASURED, trained["none"].model), run.seed)
    assert all(np.array_equal(row[0], row[1]) for row in terms.values())
    assert np.array_equal(terms["bits_per_dim"][0], arrays["bits_per_dim"][MEASURED.index("none")])
    for name, row in zip(MEASURED, arrays["kl"], strict=True):
        assert np.isnan(row).all() == (name in ("unconditional", "without-code"))


def test_the_chain_is_measured_as_a_single_one_can_be(finished):
    """The loop over all chains, with the mean training image taken off."""
    _, images, *_ = finished
    generator, mean = torch.Generator().manual_seed(0), images.train.double().mean(0)
    states = torch.randint(17, (40, 6, 8, 8, 1), generator=generator).cumsum(0).remainder(17).byte()
    x = (states.double() - mean).flatten(2)
    for lag, (value, low, high) in zip(LAGS, measurements.chain_correlation(images, states), strict=True):
        shared = own = 0.0
        for n in range(6):
            for t in range(40 - lag):
                one, two = x[t, n], x[t + lag, n]
                shared, own = shared + one @ two, own + (one @ one + two @ two) / 2
        assert value == pytest.approx((shared / own).item(), abs=1e-9)
        assert low < value < high


def test_the_sweep_is_of_every_code(finished):
    run, images, trained, arrays = finished
    points = list(zip(arrays["sweep_dims"], arrays["sweep_stds"], strict=True))
    assert points == [(2, 0.2), (8, 0.2), (8, 0.5)] == list(sweep(run.settings).values())
    for k, name in enumerate(sweep(run.settings)):
        model, control = trained[name].model, trained["sweep-without-code"].model
        mean, log_std = markov_chain.encode(model, images, images.train)
        assert arrays["sweep_rate"][k] == pytest.approx(measurements.rate(mean, log_std), rel=1e-5)
        with torch.no_grad():
            x = images.to_float(images.held_out)
            nats = [-vae(x).log_p.mean().item() for vae in (control, model)]
        assert arrays["sweep_gain"][k, 0] == pytest.approx(nats[0] - nats[1], abs=1.0)
    assert arrays["sweep_states"].shape == (3, len(measurements.SHOWN), 8, 8, 1)
    first = {state.tobytes() for state in arrays["sweep_states"][:, 0]}
    assert len(first) == 1 and first < {picture.tobytes() for picture in images.held_out.numpy()}, "one photograph"
    assert (arrays["sweep_time"] >= 1).all() and (arrays["sweep_correlation"][..., 0] < 1).all()


def test_glasses_compare_the_gaussian_of_the_group(finished):
    _, images, _, arrays = finished
    x, labels = images.train.double(), images.labels
    brightness = x.flatten(1).mean(1).numpy()
    limits = np.quantile(brightness, np.linspace(0.1, 0.9, 9))
    groups = torch.from_numpy(np.searchsorted(limits, brightness))
    for n in (0, 57, 296):
        image = images.held_out[[n]].double()
        tenth = np.searchsorted(limits, image.mean().item())
        for row, own in enumerate((x[labels == images.held_out_labels[n]], x[groups == tenth])):
            log_std = own.var(0, correction=0).clamp(min=1 / 12).log() / 2
            log_p = likelihoods.discretized_gaussian_log_prob(image, own.mean(0), log_std, levels=17)
            assert arrays["gaussian_nats"][row, n] == pytest.approx(-log_p.item(), rel=1e-6)
    assert FEATURES == ("class", "brightness", "upper half")
    bits = arrays["bits_per_dim"][MEASURED.index("unconditional")]
    np.testing.assert_allclose(arrays["pixelcnn_nats"][0], bits * 64 * np.log(2), rtol=1e-4)
    for k, photograph in enumerate(torch.from_numpy(arrays["glasses_photograph"])):
        same = (images.held_out == photograph).flatten(1).all(1)
        assert same.any() and (images.held_out_labels[same] == k).all()
    drawn = [arrays["glasses_half_mean"], arrays["glasses_half_draw"], *arrays["glasses_half_pixelcnn"]]
    assert all(np.array_equal(one[:, :4], arrays["glasses_photograph"][:, :4]) for one in drawn)
    assert len({one.tobytes() for one in drawn}) == 4


def test_the_likelihood_of_lower_halves_is_the_sum_over_their_pixels(finished):
    """log p(b|t) = log p(x) - log p(t); p(t) by the network on the upper half alone."""
    _, images, trained, arrays = finished
    vae, x = trained["unconditional"].model, images.to_float(images.held_out[:20])[:, :, :4]
    with torch.no_grad():
        upper = likelihoods.discretized_mix_logistic_log_prob(x, vae.decoder(x), levels=17).double().numpy()
    lower = arrays["pixelcnn_nats"][0, :20] + upper
    np.testing.assert_allclose(arrays["pixelcnn_nats"][2, :20], lower, rtol=1e-4, atol=1e-2)


def test_the_regression_is_least_squares():
    generator = torch.Generator().manual_seed(0)
    train = torch.randint(0, 200, (6000, 4, 2, 1), generator=generator)
    train[:, 2:] = (train[:, 2:] + 3 * train[:, :2].flip(1)) // 4
    predicted, std = glasses._regression(train.byte(), train[:50, :2].byte())
    t, b = (part.flatten(1).numpy() for part in (train[:, :2], train[:, 2:]))
    design = np.concatenate([t, np.ones((6000, 1))], 1)
    weights, *_ = np.linalg.lstsq(design, b, rcond=None)
    np.testing.assert_allclose(predicted.flatten(1), design[:50] @ weights, atol=0.1)
    np.testing.assert_allclose(std.flatten(), (b - design @ weights).std(0), rtol=1e-3)


def test_sets_and_chains_are_all_different(finished):
    *_, arrays = finished
    for model in CODED:
        assert arrays[f"chain_{model}"].shape == (61, 8, 8, 1)
        assert arrays[f"from_data_{model}"].shape == (16, 8, 8, 8, 1)
        assert np.array_equal(arrays[f"shown_decodes_{model}"][0], arrays["shown_held-out photographs"][:12])
        assert np.array_equal(arrays[f"shown_decodes_{model}"][1], arrays[f"shown_{model}: q(z)"][:12])
        assert np.array_equal(arrays[f"from_data_{model}"][0], arrays["shown_held-out photographs"][:8])
    assert np.array_equal(arrays["chain_none"][0], arrays["chain_elbo"][0]), "both start from the same noise"
    assert np.bincount(arrays["chain_none"][0].ravel(), minlength=17).max() < 16, "which uses every level"
    assert not np.array_equal(arrays["chain_none"][1], arrays["chain_elbo"][1])
    shown = [arrays[f"shown_{name}"] for name in SETS]
    assert all(one.shape == (40, 8, 8, 1) and one.dtype == np.uint8 and one.max() <= 16 for one in shown)
    assert len({one.tobytes() for one in shown}) == len(SETS), "no set is another's copy"
    kernel = dict(zip(SETS, arrays["kernel_random"][:, 0], strict=True))
    photographs = kernel["training photographs"], kernel["held-out photographs"]
    assert max(photographs) < min(kernel["blurred"], kernel["patches shuffled"])
    for kind in ("classifier", "random"):
        values = dict(zip(SETS, arrays[f"kernel_{kind}"][:, 0], strict=True))
        apart = values["none: prior"] - values["none: chain"]
        assert arrays[f"prior_minus_chain_{kind}"][0] == pytest.approx(apart, rel=1e-9)


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

    monkeypatch.setattr(measurements, "fitted", lambda *rest: {"Gaussian": zeros, "mixture": zeros})
    made, twice = spy(measurements, "markov_chain", moving), spy(measurements, "two_decodes")
    chains, pairs = spy(measurements, "chain_correlation"), spy(measurements, "pair_correlation")
    distances = spy(two_sample, "kernel_distance")
    extract = {kind: lambda pictures: pictures.flatten(1).double() for kind in ("classifier", "random")}
    models = {name: trained[name].model for name in VARIANTS}
    arrays = measurements.samples(images, measurements.draw(settings, images, models, 0), extract)

    sources, reference = twice[0].args[2].flatten(1).double(), distances[0].args[1]
    assert len(sources) == settings.draws and len(sources) + len(reference) == len(images.held_out)
    assert torch.cdist(sources, reference).min() > 0
    from_noise, from_data = made[0].args[2].flatten(1).double().split(settings.chains)
    assert torch.equal(from_data, sources[: settings.chains]) and torch.cdist(from_noise, sources).min() > 0
    assert [len(call.args[1]) for call in chains] == [56, 56], "of chains from noise, but for the first states"
    for k, (a, b) in enumerate(call.args for call in pairs):
        assert len(a) == settings.draws and not torch.equal(a, b)
        if k % 2 == 0:  # of pixels, not of features
            _, first, second = arrays[f"shown_decodes_{CODED[k // 2]}"].reshape(3, 12, -1)
            assert np.array_equal(a[:12], first) and np.array_equal(b[:12], second)
    late, first = distances[SETS.index("none: chain")], chains[0].args[1].flatten(2).double()
    points = late.args[0]
    assert late.kwargs["together"] == (5, 1) and len(points) == 5 * settings.chains
    assert torch.equal(points[::5], first[-21]) and torch.equal(points[4::5], first[-1])
    assert distances[len(SETS)].kwargs["together"] == (5, 5)


# Verdicts

# A value that passes, where it matters one that fails in its place, and one at which the low end of its interval fails.
JUDGED = {
    "P2": {"code_gain": (40.0, 20.0, -0.1), "two_decodes": (0.6, 0.4)},
    "P3": {"prior_minus_chain": (0.5, -0.5, -0.01), "chain": (1.1,), "noise_to_data": (0.05, 0.2)},
    "P4": {"neighbours": (0.7, 0.55), "neighbours_elbo": (0.3, 0.45), "lag_20": (0.3, 0.4)},
    "G1": {"class": (2000.0, 900.0, 900.0), "brightness": (2000.0, 900.0, 900.0), "upper_half": (2000.0, 900.0, 900.0)},
}


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
    at = {name: k for k, name in enumerate(MEASURED)}
    terms = np.arange(len(at), dtype=float)[:, None] + np.array([-0.01, 0.0, 0.01])
    near = np.array([0.0, -0.1, 0.1])
    memory = np.linspace(0.5, 0.1, len(LAGS))[:, None] + near / 10
    arrays = {
        "chain_none": np.zeros((2, 8, 8, 1)),
        "bits_per_dim": 1 + terms / 100,
        "kl": 10 + terms,
        "rate": np.array([7.0, 8.0]),
        "gaussian_nats": np.array([[100.0, 102.0]] * 3) + np.arange(3)[:, None],
        "pixelcnn_nats": np.array([[50.0, 51.0]] * 3) - 10 * np.arange(3)[:, None],
        "kernel_classifier": np.arange(len(SETS))[:, None] + near,
        "prior_minus_chain_classifier": 0.25 + near,
        "noise_to_data_classifier": 0.5 + near,
        "decodes_none": 0.5 + near,
        "correlation_none": memory,
        "correlation_elbo": 1 + memory,
    }
    in_nats, kernel = 64 * np.log(2), SETS.index
    bits, kl = ({name: base + k * step for name, k in at.items()} for base, step in ((1, 0.01), (10, 1)))
    expected = {
        "P2": {"code_gain": in_nats * (bits["without-code"] - bits["trained-on"]), "two_decodes": 0.5, "rate": 7.0,
               "over_unconditional": in_nats * (bits["unconditional"] - bits["none"]), "kl_elbo": kl["elbo"],
               "over_unconditional_elbo": in_nats * (bits["unconditional"] - bits["elbo"]),
               "unconditional": bits["unconditional"]},
        "P3": {"prior": kernel("none: prior"), "chain": kernel("none: chain"), "prior_minus_chain": 0.25,
               "noise_to_data": 0.5, "q_z": kernel("none: q(z)"), "fitted_gaussian": kernel("none: Gaussian"),
               "fitted_mixture": kernel("none: mixture"), "unconditional": kernel("unconditional"),
               "held_out_photographs": kernel("held-out photographs")},
        "P4": {"neighbours": 0.5, "lag_5": 0.3, "lag_20": 0.1, "neighbours_elbo": 1.5},
        "G1": {"class": 50.5, "brightness": 61.5, "upper_half": 72.5},
    }  # fmt: skip
    assert list(claims.quantities(arrays)) == list(CLAIMS)
    for key, one in claims.quantities(arrays).items():
        assert {name: quantity.value for name, quantity in one.items()} == pytest.approx(expected[key]), key


def test_tables(finished):
    *_, arrays = finished
    table = claims.table(arrays)
    for bound, cost in (("bound, N(0, I)", "KL"), ("bound, fitted Gaussian", "rate")):
        expected = table["reconstruction"] + table[cost] / (64 * np.log(2))
        np.testing.assert_allclose(table[bound], expected, atol=0.002)
    assert list(table.index) == [*VARIANTS, *ABLATION]
    for models, control in ((VARIANTS, "unconditional"), (ABLATION, "without-code")):
        gain = (table.loc[control, "reconstruction"] - table.loc[list(models), "reconstruction"]) * 64 * np.log(2)
        np.testing.assert_allclose(table.loc[list(models), "over control"], gain, atol=0.1)
    swept = claims.sweep_table(arrays)
    assert len(swept) == 3 and swept["rate"].tolist() == arrays["sweep_rate"].round(1).tolist()


def test_verdicts_and_recorded_weights_that_draw(finished):
    """What a finished run leaves is enough to load the model without training, and it draws the same images."""
    run, images, trained, arrays = finished
    verdicts = experiment.conclude(run, arrays, trained, images)
    assert verdicts.decided() == dict.fromkeys(CLAIMS, "not tested")
    target = files.results_root() / "smoke" / experiment.NOTEBOOK
    target.mkdir(parents=True)
    for name in ("arrays.npz", "run.json", "metrics.json", "weights.safetensors"):
        shutil.copy(run.directory / name, target / name)
    again = runs.start(run.notebook, run.preset, run.settings, 0, "cpu", recorded=True)
    blank = experiment.load_images(again)
    assert blank.shape == images.shape and len(blank.train) == 0
    loaded = experiment.fit(again, blank)
    assert list(loaded) == list(VARIANTS) and loaded["none"].steps == 0
    recorded = experiment.measure(again, blank, loaded)
    assert recorded.keys() == arrays.keys()
    assert all(recorded[name].tobytes() == value.tobytes() for name, value in arrays.items())
    states, own, again_own = (
        experiment.continue_chain(run, blank, models, arrays) for models in (loaded, trained, trained)
    )
    assert own.shape == (4, 5, 8, 8, 1) and np.array_equal(own, again_own)
    assert np.array_equal(own[0], arrays["from_data_none"][0, :5])
    assert (states[1] == own[1]).mean() > 0.8, "half precision moves few pixels"
    assert set(experiment.conclude(again, recorded, loaded, blank)) == set(CLAIMS)


def test_figures_are_drawn_from_the_arrays_alone(finished, tmp_path):
    *_, arrays = finished
    for name in (
        "chains_from_data",
        "decodes",
        "training",
        "ways_to_draw",
        "distances",
        "memory",
        "capacity",
        "glasses",
    ):
        getattr(figures, name)(arrays).savefig(tmp_path / f"{name}.png")

    def drawn(content):
        figures.chain(content).savefig(tmp_path / "chain.png")
        return (tmp_path / "chain.png").read_bytes()

    assert drawn(arrays) == drawn(dict(arrays)) != drawn(arrays | {"chain_none": 16 - arrays["chain_none"]})


WRONG = {"min_std": 1.0, "train_steps": -1, "elbo_steps": 0, "chains": 10, "chain_steps": 30, "betas": (0.9,)}
WRONG |= {
    "kl_weight": float("nan"),
    "sweep_chains": 50,
    "sweep_stds": (1.5,),
    "schedule": "step",
    "draws": 30,
    "dataset": "mnist",
}


@pytest.mark.parametrize(("name", "value"), WRONG.items())
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(UserError, match="digits, cifar10" if name == "dataset" else name):
        experiment.start("smoke", 0, "cpu", {name: value})
