"""Notebook 05: its estimators against their definitions, the plan of its trainings, its criteria."""

import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from paperlib.data import datasets, device_images
from paperlib.nn.likelihoods import gaussian_kl
from paperlib.pixelvae import measurements as shared
from paperlib.pixelvae.collapse import claims, experiment, measurements, training
from paperlib.pixelvae.measurements import SETS, WARM_UP, Drawn
from paperlib.pixelvae.model import PixelVAE
from paperlib.runs.claims import judge
from paperlib.runs.estimate import Estimate
from paperlib.stats import features
from paperlib.stats.intervals import mean_interval
from paperlib.system.devices import seeded

TINY = experiment.Settings(
    filters=8, ladder_filters=(4,), train_steps=3, elbo_steps=2, ablation_steps=2, sweep_steps=2, sweep_dims=(2,),
    mmd_weights=(100.0,), batch_size=8, evaluations=3, evaluation_images=20, measured_images=30, draws=40,
    probe_labels=100,
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Images and all trainings of TINY."""
    images = device_images.load(datasets.load("digits"), "cpu")
    return images, training.fit(TINY, images, tmp_path_factory.mktemp("runs"), 0)


def _slowly(vae, images):
    """log p(x|z) and the KL of each measured image, (n,), with the noise that `evaluate` has."""
    x = images.to_float(images.held_out[: TINY.measured_images])
    with torch.no_grad(), seeded(0, "cpu"):
        mean, log_std, z = vae.code(x)
        log_p = torch.cat([vae.p_x_given_z(x[k : k + 1], None if z is None else z[k : k + 1]) for k in range(len(x))])
    return log_p.double().numpy(), None if z is None else gaussian_kl(mean, log_std).double().numpy()


def test_the_ladder_is_of_means_over_held_out_images(trained):
    images, models = trained
    arrays = measurements.ladder(TINY, images, models, 0)
    assert arrays["ladder_filters"].tolist() == [0, 4, 8]
    assert arrays["ladder_history"].shape == (3, 2, len(arrays["ladder_steps"]))
    pictures = images.held_out[: TINY.measured_images]
    for d, name in enumerate(("factored", "4", "8")):
        for k in range(TINY.ladder_seeds):
            log_p, kl = _slowly(models[training.rung(TINY, "elbo", name, k)].model, images)
            if name == "factored":
                own = measurements.independent_pixels(images.train, pictures, 17)
            else:
                own, _ = _slowly(models[training.rung(TINY, "unconditional", name, k)].model, images)
            expected = {"kl": kl, "bound": log_p - kl, "own": own, "gain": log_p - own}
            for key, values in expected.items():
                assert arrays[f"ladder_{key}"][d, k] == pytest.approx(values.mean(), rel=1e-4), (name, key)


def test_routes_are_counted_from_where_a_model_started(trained):
    images, models = trained
    arrays = measurements.routes(TINY, images, models, 0)
    for row, name in enumerate(training.ROUTES):
        log_p, kl = _slowly(models[name].model, images)
        assert arrays["routes_bound"][row] == pytest.approx(log_p - kl, rel=1e-4)
        assert arrays["routes_kl"][row] == pytest.approx(kl, rel=1e-4, abs=1e-4)
        without, _ = _slowly(
            models["unconditional" if name in ("elbo", "free-bits") else "unconditional-continued"].model, images
        )
        assert arrays["routes_gain"][row] == pytest.approx(log_p - without, abs=0.05)
        last = 5 if name in ("continued", "pretrained") else 3
        assert arrays[f"{name}_route"][-1, 0] == last
    before, after = (models[name].model.encoder[-1].weight for name in ("elbo", "continued"))
    assert not torch.equal(before, after)


def test_causes_are_gains_over_the_unconditional_decoder(trained):
    images, models = trained
    arrays = measurements.causes(TINY, images, {name: one.model for name, one in models.items()}, 0)
    without, _ = _slowly(models["unconditional"].model, images)
    for row, name in enumerate(training.CAUSES):
        log_p, kl = _slowly(models[name].model, images)
        assert arrays["causes_gain"][row] == pytest.approx(log_p - without, abs=0.05)
        assert arrays["causes_kl"][row] == pytest.approx(kl, rel=1e-4, abs=1e-4)
    assert arrays["causes_decodes"].shape == (4, 3)
    on, ablated = (_slowly(models[name].model, images)[0] for name in ("trained-on", "without-code"))
    assert arrays["ablation_gain"] == pytest.approx(on - ablated, abs=0.05)
    table = claims.causes_table(arrays)
    assert table["KL in the objective"].tolist() == ["no", "no", "yes", "yes"]


def test_a_code_without_influence_has_a_prior_as_good_as_any(trained):
    """Where the decoder cannot see z, draws from N(0, I) and from q(z) differ by chance alone."""
    images, models = trained
    models = {name: one.model for name, one in models.items()}
    network = features.RandomNetwork(0, 1)
    extract = features.extractor(network, images.dataset.train.images, 17)
    blind = PixelVAE(TINY, 1, 8, 17)
    with torch.no_grad():
        for parameter in blind.expand.parameters():
            parameter.zero_()
    arrays = measurements.priors(TINY, images, models | {"code-8-0.2": blind}, extract, 0)
    assert arrays["sweep_names"].tolist() == list(training.sweep(TINY))
    assert arrays["sweep_kinds"].tolist() == ["code", "code", "code", "mmd", "linear", "linear"]
    assert arrays["sweep_weights"].tolist() == [0, 0, 0, 100, 0, 0]
    for _, low, high in arrays["sweep_ratio"][0]:
        assert low < 1 < high
    assert not np.array_equal(*arrays["sweep_ratio"][0]), "one half chooses, the other judges"
    log_p, _ = _slowly(models["mmd-100"], images)
    without, _ = _slowly(models["sweep-unconditional"], images)
    row = arrays["sweep_names"].tolist().index("mmd-100")
    assert arrays["sweep_gains"][row] == pytest.approx(log_p - without, abs=0.05)


def test_classes_are_the_classifiers(monkeypatch):
    """A classifier that reads the class from the first pixel gives the classes that were written there."""
    monkeypatch.setattr(features, "predicted", lambda network, pictures, levels: pictures[:, 0, 0, 0].long().numpy())
    images = device_images.load(datasets.load("digits"), "cpu")
    written = torch.randint(10, (7, 5), generator=torch.Generator().manual_seed(0))
    states = torch.zeros(7, 5, 8, 8, 1, dtype=torch.uint8)
    states[:, :, 0, 0, 0] = written
    sets = {name: states[k % 7] for k, name in enumerate(reversed(SETS))}
    drawn = Drawn(sets, {"none": {"chain": states, "chain from data": states.flip(0)}}, {}, states[0], states[0])
    arrays = measurements.classes(images, drawn, None)
    assert np.array_equal(arrays["classes_none"], written)
    assert np.array_equal(arrays["classes_none_data"], written.flip(0))
    for k, name in enumerate(SETS):
        counts = np.bincount(sets[name][:, 0, 0, 0], minlength=10)
        assert np.array_equal(arrays["class_shares"][k], counts / 5), name
    right = images.held_out[:, 0, 0, 0] == images.held_out_labels
    assert arrays["accuracy"] == pytest.approx(right.double().mean())


def test_probes_compare_equal_features_with_equal_noise(trained, monkeypatch):
    images, models = trained
    seen = []

    def probe(z, labels, test_z, test_labels):
        seen.append((z, labels, test_z))
        return np.zeros(len(test_labels), dtype=bool)

    monkeypatch.setattr(measurements, "linear_probe", probe)
    arrays = measurements.probes(TINY, images, {name: one.model for name, one in models.items()}, 0)
    assert arrays["probe_right"].shape == (len(measurements.PROBED), 2, len(images.held_out))
    means = shared.encode(models["none"].model, images, images.train)[0]
    scaled = (means - means.mean(0)) / means.std(0)
    noise = seen[measurements.FEW][0] - scaled
    assert noise.std().item() == pytest.approx(TINY.probe_noise, rel=0.05)
    every = measurements.FEW + 1  # the sets of few labels, then all
    for k in range(0, len(seen), every):
        *sets, whole = seen[k : k + every]
        assert len({float(few[0][0, 0]) for few in sets}) > 1, "random sets"
        for few in sets:
            assert len(few[0]) == TINY.probe_labels and torch.equal(whole[2], few[2])
            place = int((whole[0] == few[0][0]).all(1).nonzero()[0])
            assert whole[1][place] == few[1][0], "features and labels belong together"


def test_principal_components_are_scikit_learns():
    images = device_images.load(datasets.load("digits"), "cpu")
    train, test = measurements.principal_components(images, 5)
    x, held_out = (images.to_float(part).flatten(1).double().numpy() for part in (images.train, images.held_out))
    pca = PCA(5, svd_solver="full").fit(x)
    for ours, theirs in ((train, pca.transform(x)), (test, pca.transform(held_out))):
        np.testing.assert_allclose(np.abs(ours.numpy()), np.abs(theirs), atol=1e-8)


def test_independent_pixels_is_a_distribution_of_counts():
    train = torch.randint(3, (20, 2, 2, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    every = torch.cartesian_prod(*[torch.arange(3, dtype=torch.uint8)] * 4).reshape(81, 2, 2, 1)
    log_p = measurements.independent_pixels(train, every, 3)
    assert np.exp(log_p).sum() == pytest.approx(1, abs=1e-12)
    for n in (0, 40, 77):
        slow = sum(
            math.log((sum(int(x[i, j]) == int(every[n, i, j]) for x in train) + 1) / 23)
            for i in range(2)
            for j in range(2)
        )
        assert log_p[n] == pytest.approx(slow, abs=1e-12)


def test_a_factored_decoder_sees_no_pixel_and_a_linear_encoder_is_affine():
    torch.manual_seed(0)
    vae = PixelVAE(experiment.Settings(), 1, 8, 17, linear=True, factored=True).double()
    x, y = torch.rand(2, 3, 1, 8, 8, dtype=torch.float64) * 2 - 1
    z = torch.randn(3, 8, dtype=torch.float64)
    x = (x * 8).round() / 8
    changed = x.clone()
    changed[:, :, 0, 0] = -1  # an early pixel moves no later one's parameters: only its own term
    params = vae.decoder(0 * x, vae.h(z))
    torch.testing.assert_close(vae.decoder(0 * changed, vae.h(z)), params, rtol=0, atol=0)
    torch.testing.assert_close(vae.p_x_given_z(x, z), vae.p_x_given_z(x, z, seen=0.0), rtol=0, atol=0)
    means = [vae.q_z_given_x(one)[0] for one in (x, y, (x + y) / 2)]
    torch.testing.assert_close((means[0] + means[1]) / 2, means[2])


def test_classes_of_chains_are_counted_as_by_hand():
    chains = np.zeros((WARM_UP + 6, 3), dtype=np.uint8)
    chains[WARM_UP:] = np.array([[1, 1, 1, 2, 2, 3], [4, 4, 4, 4, 4, 4], [0, 1, 0, 1, 0, 1]]).T
    assert claims.keeps(chains).value == pytest.approx((3 / 5 + 1 + 0) / 3)
    assert claims.keeps(chains, 2).value == pytest.approx((1 / 4 + 1 + 1) / 3)
    assert [share.value for share in claims.class_shares(chains)[:5]] == pytest.approx(np.array([3, 6, 2, 1, 6]) / 18)
    assert claims.visited(chains).value == pytest.approx((3 + 1 + 2) / 3)
    expected = mean_interval(np.array([3 / 5, 1, 0]))
    assert claims.keeps(chains).row == pytest.approx(expected.row)


def test_noise_is_equal_for_all_scales():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(5000, 2, generator=generator) * torch.tensor([1e-3, 50.0]) + 7
    train, test = measurements.noisy(z, z, 0.5, generator)
    torch.testing.assert_close(train.var(0), torch.full((2,), 1.25), rtol=0.05, atol=0)
    assert not torch.equal(train, test)


def test_every_training_starts_from_an_earlier_one():
    for settings in experiment.PRESETS.values():
        seen = set()
        for name, one in training.plan(settings, 0).items():
            assert not one.start or one.start in seen
            seen.add(name)
        assert {*experiment.KEPT, f"code-{settings.code_dim}-{settings.min_std:g}"} <= seen
        assert next(iter(training.sweep(settings).values())).settings.code_dim == settings.code_dim


def test_runs_of_other_seeds_share_no_training():
    seeds = [{one.seed for one in training.plan(TINY, seed).values()} for seed in range(3)]
    assert not set.intersection(*seeds[:2]) and not set.intersection(*seeds[1:])


def test_mnist24_is_the_middle_of_mnist_in_the_upper_bits(monkeypatch):
    images = np.random.default_rng(0).integers(256, size=(5, 28, 28, 1), dtype=np.uint8)
    whole = datasets.Split(images, np.arange(5))  # labels that number the images
    monkeypatch.setattr(datasets, "_read_prepared", lambda name: datasets.Dataset(name, whole, whole, 256, ""))
    middle = datasets.load("mnist24")
    assert middle.train.images.shape == (5, 24, 24, 1) and middle.levels == 16
    assert middle.train.images[3, 0, 5, 0] == images[3, 2, 7, 0] // 16
    assert sorted(middle.held_out.labels) == [0, 1, 2, 3, 4] != list(middle.held_out.labels), "in random order"
    for one, label in zip(middle.held_out.images, middle.held_out.labels, strict=True):
        assert np.array_equal(one, images[label, 2:26, 2:26] // 16)


def test_each_quantity_is_what_its_name_says():
    """Arrays in which every entry is a number of its own, and the decoders are not in the order of their likelihood."""
    near, halves, n = np.array([0.0, -0.1, 0.1]), np.array([0, 100]), np.array([-0.01, 0.0, 0.01])
    seeds = np.array([-0.1, 0.0, 0.1])
    steps = np.linspace(100, 1200, 12)
    flat, rising = np.full(12, 5.0), np.linspace(0, 5, 12)
    arrays = {
        "ladder_own": np.array([1.0, 5.0, 3.0])[:, None] + seeds,
        "ladder_kl": np.array([20.0, 1.0, 7.0])[:, None] + seeds,
        "ladder_gain": np.array([30.0, 2.0, 8.0])[:, None] + seeds,
        "ladder_bound": np.array([40.0, 6.5, 9.0])[:, None] + seeds,
        "ladder_history": np.stack([[flat] * 3, [rising] * 3, [flat] * 3]),
        "ladder_steps": steps,
        "narrow": np.array([19.0, 29.0]),
        "routes_kl": np.arange(4.0)[:, None] ** 2 + n,
        "routes_bound": 50 + np.arange(4.0)[:, None] ** 3 + n,
        "routes_gain": 70 + np.arange(4.0)[:, None] + n,
        **{f"{name}_route": np.stack([steps, kl, kl], 1) for name, kl in (("pretrained", flat), ("continued", rising))},
        "ablation_gain": 10 + n,
        "causes_gain": np.array([11.0, 12.0, 13.0, 14.0])[:, None] + n,
        "causes_decodes": 0.1 * np.arange(1, 5)[:, None] + near,
        "kernel_classifier": np.arange(len(SETS))[:, None] + near,
        "prior_minus_chain_classifier": 0.25 + near,
        "noise_to_data_classifier": 0.5 + near,
        "classes_none": np.tile(np.arange(60)[:, None] // 30, (1, 3)),
        "classes_elbo": np.tile(np.arange(60)[:, None] % 2, (1, 3)),
        "classes_none_data": np.tile(np.arange(60)[:, None] % 10, (1, 3)),
        "accuracy": np.array(0.9),
        "probe_right": (np.array([0.9, 0.5, 0.6, 0.7])[:, None] - np.array([0, 0.2]))[..., None] + n,
        "sweep_gains": np.array([20.0, 1.0, 15.0, 12.0, 3.0, 8.0])[:, None] + n,
        "sweep_kinds": np.array(["code", "code", "mmd", "mmd", "mmd", "linear"]),
        "sweep_weights": np.array([0, 0, 1.0, 2.0, 3.0, 0]),
        "sweep_mmd": np.arange(6) / 10,
        # The best on the half that chooses is 2, but for 3, which has lost the gain; on the other half 1 is.
        "sweep_ratio": np.array([[9, 9], [9, 9], [4, 104], [3, 203], [1, 301], [9.0, 9]])[..., None] + near,
        "sweep_q_z": (np.arange(6.0)[:, None] + halves)[..., None] + near,
    }  # fmt: skip
    kernel, late = SETS.index, np.arange(60)[WARM_UP:] // 30
    shares = [np.mean(late == label) for label in range(2)]
    expected = {
        "P1": {"kl": 1, "kl_factored": 20, "kl_factored_narrow": 19, "code_gain": 2, "code_gain_factored": 30,
               "bound_above_own": 1.5, "fall_of_kl": -19, "fall_of_gain": -28, "greatest_rise": -6, "unsettled": 1},
        "P1b": {"kl_pretrained": 4, "kl_scratch": 1, "more_than_twice": 2, "bound_won": 7, "unsettled": 1,
                "code_gain_pretrained": 72, "code_gain_scratch": 71, "kl_free_bits": 9, "code_gain_free_bits": 73,
                "bound_won_free_bits": 27},
        "P2m": {"code_gain": 10, "two_decodes": 0.1, "over_unconditional_none": 11,
                "over_unconditional_none_visible": 12, "over_unconditional_elbo_hidden": 13,
                "over_unconditional_elbo": 14},
        "P3m": {"code_gain": 10, "prior": kernel("none: prior"), "chain": kernel("none: chain"),
                "prior_minus_chain": 0.25, "noise_to_data": 0.5, "fitted_gaussian": kernel("none: Gaussian"),
                "fitted_mixture": kernel("none: mixture"), "held_out": kernel("held-out photographs")},
        "P4m": {"code_gain": 10, "keeps": 53 / 54, "keeps_20": np.mean(late[20:] == late[:-20]), "keeps_elbo": 0,
                "chance": sum(share**2 for share in shares), "keeps_from_data": 0, "lasts": 54, "lasts_elbo": 1,
                "visited_by_a_chain": 2, "rarest_class": 0, "rarest_class_from_data": 5 / 55, "accuracy": 0.9},
        "P5": {"code_gain": 10, "none": 0.9, "random": 0.5, "PCA": 0.6, "elbo": 0.7, "above_random": 0.4,
               "above_PCA": 0.3, "above_elbo": 0.2, "above_random_few": 0.4, "above_PCA_few": 0.3,
               "above_elbo_few": 0.2},
        "P6": {"gain_without": 20, "share_of_gain": 0.6, "prior_ratio": 203, "q_z": 103, "prior_ratio_none": 9,
               "weight": 2, "mmd": 0.3, "mmd_none": 0},
        "D1": {"gain_convolutional": 20, "share_of_gain": 0.4},
    }  # fmt: skip
    found = claims.quantities(arrays)
    assert list(found) == list(claims.CLAIMS) == list(expected)
    for key, one in found.items():
        assert {name: quantity.value for name, quantity in one.items()} == pytest.approx(expected[key]), key


# Each claim's quantities where it holds, and for each of them a value with which it fails, or is not tested.
PREMISES = {"unsettled", "kl_scratch", "q_z", "gain_without", "gain_convolutional"}
USED = {"code_gain": (20, 0)}
DECIDED = {
    "P1": {"kl": (1, 3), "kl_factored": (20, 9), "fall_of_kl": (-19, 0), "fall_of_gain": (-9, 0),
           "greatest_rise": (-1, 1), "unsettled": (0, 1)},
    "P1b": {"kl_pretrained": (9, 3), "kl_scratch": (1, 5), "more_than_twice": (7, 0), "bound_won": (0.5, 2),
            "unsettled": (0, 1)},
    "P2m": {"code_gain": (20, 10), "two_decodes": (0.6, 0.4)},
    "P3m": USED | {"prior": (9, 4), "prior_minus_chain": (1, 0), "noise_to_data": (0.5, 1)},
    "P4m": USED | {"keeps": (0.6, 0.3), "keeps_elbo": (0.3, 0.6), "keeps_20": (0.34, 0.5), "chance": (0.1, 0),
                   "rarest_class": (0.03, 0.01)},
    "P5": USED | {f"above_{name}{few}": (0.1, 0) for name in ("random", "PCA", "elbo") for few in ("", "_few")},
    "P6": {"share_of_gain": (0.6, 0.5), "prior_ratio": (1.2, 1.5), "gain_without": (20, 0), "q_z": (1, 0)},
    "D1": {"share_of_gain": (0.6, 0.5), "gain_convolutional": (20, 0)},
}  # fmt: skip


def at(value):
    return Estimate(value, value - 0.01, value + 0.01)


@pytest.mark.parametrize("key", claims.CLAIMS)
def test_criteria_can_fail(key):
    good = {name: at(good) for name, (good, _) in DECIDED[key].items()}
    assert judge("cpu", claims.CLAIMS[key], good)
    for name, (_, bad) in DECIDED[key].items():
        premise = name in PREMISES or (name == "code_gain" and key != "P2m")
        assert judge("cpu", claims.CLAIMS[key], good | {name: at(bad)}) is (None if premise else False), name


def test_a_frozen_chain_and_a_ruined_bound_decide_nothing_in_our_favour():
    good = {key: {name: at(good) for name, (good, _) in DECIDED[key].items()} for key in ("P4m", "P1b")}
    frozen = {"keeps": Estimate(1, 1, 1), "keeps_20": Estimate(1, 1, 1)}
    assert judge("cpu", claims.CLAIMS["P4m"], good["P4m"] | frozen) is False
    assert judge("cpu", claims.CLAIMS["P1b"], good["P1b"] | {"bound_won": at(-60)}) is False
