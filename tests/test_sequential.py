"""Notebook 03: its measurements against their definitions, its figures from arrays alone, its verdicts both ways."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from paperlib.runs.estimate import Estimate
from paperlib.runs.run import load_arrays
from paperlib.sequential import claims as sequential_claims
from paperlib.sequential import experiment as sequential_experiment
from paperlib.sequential import figures as sequential_figures
from paperlib.sequential import measurements as sequential_measurements
from paperlib.sequential import model as sequential_model
from paperlib.sequential.claims import CLAIMS
from paperlib.sequential.experiment import Settings
from paperlib.sequential.measurements import KINDS, SETS
from paperlib.stats import sharpness, two_sample
from paperlib.system import files
from paperlib.system.errors import UserError

QUICK = {
    "train_steps": 80,
    "one_step_train_steps": 20,
    "infusion_train_steps": 16,
    "ablation_train_steps": 20,
    "picture_train_steps": 3,
}
QUICK |= {"picture_side": 32, "measured_images": 60, "samples": 44}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run on the embedded photographs: (run, images, trained, arrays)."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RUNS", "RESULTS"):
            patch.setenv(f"PAPERLIB_{name}", str(tmp_path_factory.mktemp(name)))
        run = sequential_experiment.start("smoke", 0, "cpu", "train", QUICK)
        images = sequential_experiment.load_images(run)
        trained = sequential_experiment.fit(run, images)
        yield run, images, trained, sequential_experiment.measure(run, images, trained)


# Errors


def test_errors_are_of_the_same_codes(finished):
    """The control and the swap start from the images that the chain itself makes, so rows are pairs."""
    run, images, trained, arrays = finished
    vae, x = trained["sequential"].model, images.to_float(images.held_out[100:160])
    with run.seeded(), torch.no_grad():
        links = sequential_model.chain(vae, x)
    for link in links:
        error = (link.step.image - x).square().mean((1, 2, 3))
        np.testing.assert_allclose(arrays["sequential_error"][:, link.t - 1], error.numpy(), rtol=1e-3)
    depth = trained["no_latent"].model
    again = depth.generate(2, links[0].step.image, None)
    np.testing.assert_allclose(
        arrays["no_latent_error"][:, 0], (again - x).square().mean((1, 2, 3)).detach(), rtol=1e-3
    )
    assert arrays["no_latent_error"].shape == (60, 2) and arrays["one_step_error"].shape == (60, 1)
    mean = images.to_float(images.train).mean(0)
    expected = (x - mean).square().mean((1, 2, 3))
    np.testing.assert_allclose(arrays["mean_error"], expected, rtol=0.1)
    assert arrays["sequential_error"][:, -1].mean() < 0.5 * arrays["mean_error"].mean(), "it learns"
    assert arrays["swapped_error"][:, 0].mean() > 1.5 * arrays["sequential_error"][:, 0].mean(), "and z is heard"


def test_what_a_step_adds(finished):
    *_, arrays = finished
    found = sequential_claims.per_step(arrays)
    error, swapped, depth = (arrays[f"{name}_error"].mean(0) for name in ("sequential", "swapped", "no_latent"))
    before = np.append(arrays["mean_error"].mean(), error[:-1])
    for t in range(3):
        assert found["fall"][t].value == pytest.approx(1 - error[t] / before[t])
        assert found["lost"][t].value == pytest.approx((swapped[t] - error[t]) / (before[t] - error[t]))
        if t:
            lost = (min(depth[t - 1], before[t]) - error[t]) / (before[t] - error[t])
            assert found["lost_without"][t - 1].value == pytest.approx(lost)
    assert len(found["lost_without"]) == 2 and found["kl"][1].value == arrays["sequential_kl"][:, 1].mean()
    table = sequential_claims.table(arrays)
    assert list(table.index) == [1, 2, 3] and table.loc[2, "fall (%)"] == pytest.approx(
        100 * found["fall"][1].value, abs=1e-3
    )


# Samples


def test_spectra_are_of_the_drawn_images(finished):
    run, images, trained, arrays = finished
    models = {name: one.model for name, one in trained.items()}
    drawn = sequential_measurements.drawings(run.settings, run.seed, images, models)
    power = sharpness.power_spectrum(drawn["sequential"].states[2].permute(0, 3, 1, 2))[1]
    photographs = sharpness.power_spectrum(images.held_out.permute(0, 3, 1, 2))[1]
    np.testing.assert_allclose(arrays["power_sequential"][1], power.mean(0))
    logs = [np.log(one.mean(0).numpy() + 1 / 12) for one in (power, photographs)]
    assert arrays["spectral_sequential"][1, 0] == pytest.approx(np.sqrt(np.square(logs[0] - logs[1]).mean()))
    assert arrays["spectral_sequential"].shape == (3, 3) and arrays["frequencies"].shape == (8,)
    assert np.array_equal(arrays["shown_one_step"], drawn["one_step"].means[:24])


def test_sets_are_compared_with_photographs_that_made_none_of_them(finished, monkeypatch):
    run, images, trained, arrays = finished
    assert arrays["kernel_random"].shape == arrays["kernel_thumbnails"].shape == (len(SETS), 3)
    assert len({arrays[f"shown_{name}"].tobytes() for name in SETS}) == len(SETS), "no set is another's copy"
    rebuilt, references = [], []
    true_rebuilt, true_kernel = sequential_model.reconstruct, two_sample.kernel_distance
    monkeypatch.setattr(
        sequential_measurements, "reconstruct", lambda vae, images, x: rebuilt.append(x) or true_rebuilt(vae, images, x)
    )
    monkeypatch.setattr(two_sample, "kernel_distance", lambda a, b: references.append(b) or true_kernel(a, b))
    monkeypatch.setattr(
        sequential_measurements.features, "extractor", lambda *rest: lambda pictures: pictures.flatten(1).double() / 128
    )
    models = {name: one.model for name, one in trained.items()}
    drawn = sequential_measurements.drawings(run.settings, run.seed, images, models)
    found = sequential_measurements.compared(run.settings, run.seed, images, models, drawn)
    assert {len(one) for k, one in enumerate(references) if SETS[k % len(SETS)] != "reconstructions"} == {
        len(images.held_out)
    }
    reference, sources = references[SETS.index("reconstructions")] * 128, rebuilt[0].flatten(1).double()
    assert len(reference) + len(sources) == len(images.held_out)
    both = torch.cat([reference, sources]).numpy()
    held_out = images.held_out.flatten(1).double().numpy()
    assert np.array_equal(both[np.lexsort(both.T)], held_out[np.lexsort(held_out.T)]), "each photograph on one side"
    kernel = dict(zip(SETS, found["kernel_random"][:, 0], strict=True))
    assert found["ratio_random"][0] == pytest.approx(kernel["sequential"] / kernel["one_step"])


def test_nearest_training_images_by_hand(finished):
    run, images, trained, arrays = finished
    x = images.to_float(torch.from_numpy(arrays["near"])).flatten(1)
    both = torch.cat([images.train, images.train.flip(2)])
    train = images.to_float(both).flatten(1)
    apart = (x[:, None] - train).square().mean(2).sqrt()
    np.testing.assert_allclose(arrays["nearest_pixels_sequential"][:10], apart.min(1).values, rtol=1e-3)
    assert np.array_equal(arrays["neighbours_pixels"], both[apart.argmin(1)])
    assert arrays["nearest_thumbnails_held_out"].shape == (44,) and (arrays["nearest_pixels_held_out"] > 0).any()
    models = {name: one.model for name, one in trained.items()}
    copies = sequential_measurements.drawings(run.settings, run.seed, images, models)
    copies["one_step"] = sequential_model.Drawn(copies["one_step"].states, images.train[:44])
    found = sequential_measurements.nearest(run.settings, images, copies)
    assert found["nearest_pixels_one_step"].abs().max() < 1e-3, "a copy is found"


def test_pictures(finished):
    run, images, trained, arrays = finished
    assert arrays["chain"].shape == (4, 10, 16, 16, 3) and arrays["chain_more"].shape == (4, 10, 32, 32, 3)
    assert arrays["chain"][0].std() > 65, "the first column is noise, uniform over grey levels"
    assert not np.array_equal(arrays["rebuilt"], arrays["swapped"])
    again = sequential_measurements.pictures(run.seed, images, {name: one.model for name, one in trained.items()})
    assert np.array_equal(again["chain"], arrays["chain"]) and np.array_equal(again["swapped"], arrays["swapped"])


def test_exactness_notices_another_loss(finished, monkeypatch):
    run, images, trained, arrays = finished
    general, plain = arrays["infusion_losses"]
    assert abs(general - plain) <= 1e-12 * abs(plain)
    true = sequential_measurements.plain_infusion_loss
    monkeypatch.setattr(
        sequential_measurements,
        "plain_infusion_loss",
        lambda vae, x, codes: true(vae, x, codes._replace(masks=1 - codes.masks)),
    )
    general, plain = sequential_measurements.exactness(run.seed, images, trained["infusion"].model)["infusion_losses"]
    assert abs(general - plain) > 1e-6 * abs(plain)


# Verdicts


def test_every_claim_is_judged_by_what_is_measured(finished):
    *_, arrays = finished
    measured = sequential_claims.quantities(arrays)
    assert set(measured) == set(CLAIMS)
    for key, claim in CLAIMS.items():
        assert claim.criterion(**measured[key]) in (True, False)
    assert measured["S2"]["trend"].value in (-1, -0.5, 0.5, 1)
    assert measured["S2"]["rate"].value == pytest.approx(arrays["sequential_kl"].sum(1).mean())
    falls = [one.value for one in sequential_claims.per_step(arrays)["fall"]]
    assert measured["S1"]["least_fall"].value == min(falls)
    low = [one.low for one in sequential_claims.per_step(arrays)["lost"]]
    assert measured["S1"]["least_lost"].low == min(low), "of all steps, not of the one with the least value"


RATES = {"rate": 100.0, "rate_of_one_step": 105.0}
GOOD = {
    "S1": {"least_fall": 0.02, "least_kl": 2.0, "least_lost": 0.6, "least_lost_without": 0.6},
    "S2": {"first": 1.0, "last": 0.5, "one_step": 0.8, "noisy_first": 0.7, "noisy_one_step": 0.7, "trend": -0.9}
    | RATES,
    "S3": {"residual": 1e-14},
    "S4": {"ratio_random": 0.7, "ratio_thumbnails": 1.05} | RATES,
}
BAD = [
    ("S1", "least_fall", 0.005), ("S1", "least_kl", 0.9), ("S1", "least_lost", 0.4), ("S1", "least_lost_without", 0.4),
    ("S2", "first", 0.55), ("S2", "last", 0.75), ("S2", "one_step", 0.55), ("S2", "trend", -0.7),
    ("S2", "noisy_first", 0.5), ("S2", "noisy_one_step", 0.5), ("S2", "rate_of_one_step", 80.0),
    ("S3", "residual", 1e-9),
    ("S4", "ratio_random", 0.85), ("S4", "ratio_thumbnails", 1.3), ("S4", "rate_of_one_step", 120.0),
]  # fmt: skip


def around(values, by=0.1):
    return {name: Estimate(value, value - by * abs(value), value + by * abs(value)) for name, value in values.items()}


@pytest.mark.parametrize("key", GOOD)
def test_a_criterion_accepts_what_its_words_accept(key):
    assert CLAIMS[key].criterion(**around(GOOD[key]))


@pytest.mark.parametrize(("key", "name", "value"), BAD)
def test_a_criterion_refuses_what_its_words_refuse(key, name, value):
    assert not CLAIMS[key].criterion(**around(GOOD[key] | {name: value}))


@pytest.mark.parametrize("key", ["S1", "S2", "S4"])
def test_a_criterion_refuses_intervals_that_reach_too_far(key):
    assert not CLAIMS[key].criterion(**around(GOOD[key], by=1.2))


def test_verdicts_and_recorded_weights_that_draw(finished):
    """What a finished run leaves is enough to load the model without training, and it draws nearly the same images."""
    run, images, trained, arrays = finished
    verdicts = sequential_experiment.conclude(run, arrays, trained, images)
    assert verdicts.decided() == {key: "holds" if key == "S3" else "not claimed" for key in CLAIMS}
    target = files.results_root() / "smoke" / sequential_experiment.NOTEBOOK
    target.mkdir(parents=True)
    for name in ("arrays.npz", "run.json", "metrics.json", "weights.safetensors"):
        shutil.copy(run.directory / name, target / name)
    again = sequential_experiment.start("smoke", 0, "cpu", "recorded", QUICK)
    loaded = sequential_experiment.fit(again, images)
    assert list(loaded) == ["sequential"] and loaded["sequential"].steps == 0
    recorded = sequential_experiment.measure(again, images, loaded)
    assert all(np.array_equal(recorded[name], arrays[name], equal_nan=True) for name in arrays)
    states, own = (
        sequential_model.draw(models["sequential"].model, images, 5, torch.Generator().manual_seed(0)).means.int()
        for models in (loaded, trained)
    )
    assert ((states - own).abs() <= 2).float().mean() > 0.95, "half precision moves few pixels by much"
    assert set(sequential_experiment.conclude(again, recorded, loaded, images)) == set(CLAIMS)


def test_figures_are_drawn_from_the_arrays_alone(finished, tmp_path):
    run, *_ = finished
    arrays = load_arrays(run.directory)
    names = (
        "samples",
        "reconstructions",
        "swapped",
        "models",
        "infusion",
        "spectra",
        "nearest",
        "distances",
        "training",
    )
    for name in names:
        getattr(sequential_figures, name)(arrays).savefig(tmp_path / f"{name}.png")
    more = sequential_figures.more_samples(arrays)
    more.savefig(tmp_path / "more.png")
    sequential_figures.more_samples(dict(arrays) | {"chain_more": arrays["chain"]}).savefig(tmp_path / "again.png")
    drawn = {name: (tmp_path / f"{name}.png").read_bytes() for name in ("samples", "more", "again")}
    assert drawn["samples"] == drawn["again"] != drawn["more"]


def test_bits_per_dimension_of_levels(finished):
    *_, arrays = finished
    model = sequential_claims.summary(arrays)["models"]["sequential"]
    nats = -(arrays["sequential_log_p"][:, -1] - arrays["sequential_kl"].sum(1)).mean() / 768
    assert model["bits_per_dim_of_levels"] == pytest.approx((nats + np.log(127.5)) / np.log(2))
    assert set(sequential_claims.summary(arrays)["kernel_distance"]) == set(KINDS)


# Settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chain_steps": 1}, "chain_steps"),
        ({"ladder": (2, 3)}, "ladder"),
        ({"kl_weight": 0.0}, "kl_weight"),
        ({"samples": 10}, "samples"),
        ({"reconstruction_scale": -1.0}, "reconstruction_scale"),
        ({"train_steps": 0}, "train_steps"),
    ],
)
def test_settings_out_of_range_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Settings(), **changes)


def test_unknown_data_sets_are_refused():
    with pytest.raises(UserError, match="photos, lsun_bedroom, own_images"):
        sequential_experiment.start("smoke", 0, "cpu", "train", {"dataset": "mnist"})
