"""Notebook 03: its measurements against their definitions, its figures from arrays alone, its verdicts both ways."""

import copy
import dataclasses
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from paperlib.data.device_images import Images
from paperlib.nn.likelihoods import gaussian_kl
from paperlib.runs import run as runs
from paperlib.runs.claims import judge
from paperlib.runs.estimate import Estimate
from paperlib.runs.run import load_arrays
from paperlib.sequential import claims, experiment, figures, measurements, model
from paperlib.sequential.claims import CLAIMS
from paperlib.sequential.experiment import Settings
from paperlib.sequential.measurements import KINDS, SETS
from paperlib.stats import sharpness, two_sample
from paperlib.system import files
from paperlib.system.errors import UserError

QUICK = {"train_steps": 60, "one_step_train_steps": 20, "infusion_train_steps": 12, "ablation_train_steps": 12}
QUICK |= {"measured_images": 60, "samples": 44}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run on the embedded photographs: (run, images, models, drawn, arrays)."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RUNS", "RESULTS"):
            patch.setenv(f"PAPERLIB_{name}", str(tmp_path_factory.mktemp(name)))
        run = experiment.start("smoke", 0, "cpu", QUICK)
        images = experiment.load_images(run)
        trained = experiment.fit(run, images)
        arrays = experiment.measure(run, images, trained)
        models = {name: one.model for name, one in trained.items()}
        _, mixture = measurements.priors(run.seed, images, models)
        drawn = measurements.drawings(run.settings, run.seed, images, models, mixture)
        yield SimpleNamespace(run=run, images=images, trained=trained, models=models, drawn=drawn, arrays=arrays)


# Errors


def test_errors_are_of_the_same_codes(finished):
    """The control and the swap start from the images that the chain itself makes, so rows are pairs."""
    images, models, arrays = finished.images, finished.models, finished.arrays
    x = images.to_float(images.held_out[100:160])
    with finished.run.seeded(), torch.no_grad():
        links = model.chain(models["sequential"], x)
    for link in links:
        error = (link.step.image - x).square().mean((1, 2, 3))
        np.testing.assert_allclose(arrays["sequential_error"][:, link.t - 1], error.numpy(), rtol=1e-3)
    again = models["no_latent"].generate(2, links[0].step.image, None)
    error = (again - x).square().mean((1, 2, 3)).detach()
    np.testing.assert_allclose(arrays["no_latent_error"][:, 0], error, rtol=1e-3)
    assert arrays["no_latent_error"].shape == (60, 2) and arrays["one_step_error"].shape == (60, 1)
    expected = (x - images.to_float(images.train).mean(0)).square().mean((1, 2, 3))
    np.testing.assert_allclose(arrays["mean_error"], expected, rtol=0.1)
    assert arrays["sequential_error"][:, -1].mean() < 0.5 * arrays["mean_error"].mean(), "it learns"
    assert arrays["swapped_error"][:, 0].mean() > 1.5 * arrays["sequential_error"][:, 0].mean(), "and z is heard"


def test_what_a_step_adds(finished):
    arrays = finished.arrays
    steps = claims.per_step(arrays)
    error, swapped, control = (arrays[f"{name}_error"].mean(0) for name in ("sequential", "swapped", "no_latent"))
    before = np.append(arrays["mean_error"].mean(), error[:-1])
    for t in range(3):
        assert steps["fall"][t].value == pytest.approx(1 - error[t] / before[t])
        assert steps["lost"][t].value == pytest.approx((swapped[t] - error[t]) / (before[t] - error[t]))
        if t:
            lost = (min(control[t - 1], before[t]) - error[t]) / (before[t] - error[t])
            assert steps["lost_without"][t - 1].value == pytest.approx(lost)
    assert len(steps["lost_without"]) == 2 and steps["kl"][1].value == arrays["sequential_kl"][:, 1].mean()
    table = claims.table(arrays)
    assert list(table.index) == [1, 2, 3]
    assert table.loc[2, "fall (%)"] == pytest.approx(100 * steps["fall"][1].value, abs=1e-3)


def test_codes_by_rung_and_what_other_priors_say(finished):
    """Rungs of a diagonal prior add up; the gap is what the KL to N(0, I) has more than that to the best Gaussian."""
    images, vae, arrays = finished.images, finished.models["sequential"], finished.arrays
    known = images.batch(measurements._spread(len(images.train), measurements.CODES))
    with finished.run.seeded():
        codes = measurements._codes(vae, images, known)
    for t, (mean, log_std) in codes.items():
        to_standard = gaussian_kl(mean, log_std).mean().item()
        gaps, to_prior = arrays["prior_gap"][t - 1], vae.kl(t, mean, log_std).mean().item()
        assert gaps[0] - gaps[1] == pytest.approx(to_standard - to_prior, abs=1e-3) and gaps[1] >= 0
    standard, fitted, *mixtures = arrays["prior_log_prob"][:, 0]
    assert max(fitted, *mixtures) > standard
    assert fitted - standard == pytest.approx(arrays["prior_gap"][0] @ [1, -1], rel=0.3), "of other images"
    with torch.no_grad():
        for prior in (wide := copy.deepcopy(vae)).priors:
            prior.mean.zero_(), prior.second.copy_(torch.eye(len(prior.mean)))
    pictures = images.held_out[100:160]
    rungs = measurements.kl_by_rung(wide, images, pictures, finished.run.seed)
    with finished.run.seeded():
        whole = torch.stack([gaussian_kl(*q).mean() for q in measurements._codes(wide, images, pictures).values()])
    torch.testing.assert_close(rungs.sum(1), whole.double(), rtol=1e-5, atol=1e-5)
    assert arrays["kl_by_rung"].shape == (3, 4) and list(claims.codes_table(arrays).index) == [1, 2, 3]


# Samples


def test_sharpness_is_of_the_drawn_images(finished):
    images, arrays, drawn = finished.images, finished.arrays, finished.drawn
    planes = [pictures.permute(0, 3, 1, 2) for pictures in (drawn["sequential"].states[2], images.held_out)]
    power, photographs = (sharpness.power_spectrum(one)[1] for one in planes)
    np.testing.assert_allclose(arrays["power_sequential"][1], power.mean(0))
    logs = [np.log(one.mean(0).numpy() + 1 / 12) for one in (power, photographs)]
    assert arrays["spectral_sequential"][1, 0] == pytest.approx(np.sqrt(np.square(logs[0] - logs[1]).mean()))
    for name, measure in (("edge", sharpness.edge_width), ("slope", sharpness.spectral_slope)):
        assert arrays[f"{name}_sequential"].shape == arrays["spectral_sequential"].shape == (3, 3)
        assert arrays[f"{name}_sequential"][1, 0] == pytest.approx(measure(planes[0]).mean().item())
        assert arrays[f"{name}_photographs"][0] == pytest.approx(measure(planes[1]).mean().item())
    assert np.array_equal(arrays["shown_one_step"], drawn["one_step"].means[:24])


def test_sets_are_compared_with_photographs_that_made_none_of_them(finished, monkeypatch):
    run, images, models, arrays = finished.run, finished.images, finished.models, finished.arrays
    assert arrays["kernel_random"].shape == arrays["kernel_thumbnails"].shape == (len(SETS), 3)
    assert len({arrays[f"shown_{name}"].tobytes() for name in SETS}) == len(SETS), "no set is another's copy"
    rebuilt, references = [], []
    true_rebuilt, true_kernel = model.reconstruct, two_sample.kernel_distance
    monkeypatch.setattr(
        measurements, "reconstruct", lambda vae, images, x: rebuilt.append(x) or true_rebuilt(vae, images, x)
    )
    monkeypatch.setattr(two_sample, "kernel_distance", lambda a, b: references.append(b) or true_kernel(a, b))
    flat = lambda pictures: pictures.flatten(1).double() / 128  # noqa: E731
    monkeypatch.setattr(measurements.features, "extractor", lambda *rest: flat)
    compared = measurements.compared(run.settings, run.seed, images, models, finished.drawn)
    others = [one for k, one in enumerate(references) if SETS[k % len(SETS)] != "reconstructions"]
    assert {len(one) for one in others} == {len(images.held_out)}
    both = torch.cat([references[SETS.index("reconstructions")] * 128, rebuilt[0].flatten(1).double()]).numpy()
    held_out = images.held_out.flatten(1).double().numpy()
    assert np.array_equal(both[np.lexsort(both.T)], held_out[np.lexsort(held_out.T)]), "each photograph on one side"
    kernel = dict(zip(SETS, compared["kernel_random"][:, 0], strict=True))
    assert compared["ratio_random"][0] == pytest.approx(kernel["sequential"] / kernel["one_step"])
    standard = kernel["sequential: N(0, I)"] / kernel["one_step: N(0, I)"]
    assert compared["ratio_standard_random"][0] == pytest.approx(standard)


def test_nearest_training_images_by_hand(finished):
    images, arrays = finished.images, finished.arrays
    x = images.to_float(torch.from_numpy(arrays["near"])).flatten(1)
    both = torch.cat([images.train, images.train.flip(2)])
    apart = (x[:, None] - images.to_float(both).flatten(1)).square().mean(2).sqrt()
    np.testing.assert_allclose(arrays["nearest_pixels_sequential"][:10], apart.min(1).values, rtol=1e-3)
    assert np.array_equal(arrays["neighbours_pixels"], both[apart.argmin(1)])
    assert arrays["nearest_thumbnails_held_out"].shape == (44,) and (arrays["nearest_pixels_held_out"] > 0).any()
    copies = finished.drawn | {"one_step": model.Drawn(finished.drawn["one_step"].states, images.train[:44])}
    nearest = measurements.nearest(finished.run.settings, images, copies)
    assert nearest["nearest_pixels_one_step"].abs().max() < 1e-3, "a copy is noticed"


def test_pictures(finished):
    arrays = finished.arrays
    assert arrays["chain"].shape == arrays["chain_standard"].shape == (4, 10, 16, 16, 3)
    assert arrays["chain"][0].std() > 65, "the first column is noise, uniform over grey levels"
    assert not np.array_equal(arrays["rebuilt"], arrays["swapped"])
    again = measurements.pictures(finished.run.seed, finished.images, finished.models)
    assert all(np.array_equal(again[name], arrays[name]) for name in again)


def test_exactness_notices_another_loss(finished, monkeypatch):
    general, plain = finished.arrays["infusion_losses"]
    assert abs(general - plain) <= 1e-12 * abs(plain)
    true = measurements.plain_infusion_loss
    other = lambda vae, x, codes: true(vae, x, codes._replace(masks=1 - codes.masks))  # noqa: E731
    monkeypatch.setattr(measurements, "plain_infusion_loss", other)
    losses = measurements.exactness(finished.run.seed, finished.images, finished.models["infusion"])
    general, plain = losses["infusion_losses"]
    assert abs(general - plain) > 1e-6 * abs(plain)


# Verdicts


def test_every_claim_is_judged_by_what_is_measured(finished):
    arrays = finished.arrays
    measured, steps = claims.quantities(arrays), claims.per_step(arrays)
    assert set(measured) == set(CLAIMS)
    for key, claim in CLAIMS.items():
        assert claim.criterion(**measured[key]) in (True, False)
    assert measured["S2"]["trend"].value in (-1, -0.5, 0.5, 1)
    assert measured["S2"]["edge_last"].value == arrays["edge_sequential"][-1, 0]
    assert measured["S2"]["rate"].value == pytest.approx(arrays["sequential_kl"].sum(1).mean())
    assert measured["S1"]["least_fall"].value == min(one.value for one in steps["fall"])
    least = min(one.low for one in steps["lost"])
    assert measured["S1"]["least_lost"].low == least, "of all steps, not of the one with the least value"


RATES = {"rate": 100.0, "rate_of_one_step": 105.0}
SHARPER = {"first": 1.0, "last": 0.5, "one_step": 0.8, "trend": -0.9}
GOOD = {
    "S1": {"least_fall": 0.02, "least_kl": 2.0, "least_lost": 0.6, "least_lost_without": 0.6},
    "S2": SHARPER | {f"edge_{name}": value for name, value in SHARPER.items()} | RATES,
    "S3": {"residual": 1e-14},
    "S4": {"ratio_random": 0.7, "ratio_thumbnails": 0.75, "one_step": 0.5, "one_step_thumbnails": 0.1} | RATES,
}
BAD = [
    ("S1", "least_fall", 0.005), ("S1", "least_kl", 0.9), ("S1", "least_lost", 0.4), ("S1", "least_lost_without", 0.4),
    *[("S2", f"{kind}{name}", value) for kind in ("", "edge_")
      for name, value in (("first", 0.55), ("last", 0.75), ("one_step", 0.55), ("trend", -0.7))],
    ("S2", "rate_of_one_step", 80.0), ("S3", "residual", 1e-9),
    ("S4", "ratio_random", 0.85), ("S4", "ratio_thumbnails", 0.85), ("S4", "rate_of_one_step", 120.0),
    ("S4", "one_step", -0.5), ("S4", "one_step_thumbnails", 0.0),
]  # fmt: skip


def around(values, by=0.1):
    return {name: Estimate(value, value - by * abs(value), value + by * abs(value)) for name, value in values.items()}


@pytest.mark.parametrize("key", GOOD)
def test_a_criterion_decides_as_its_words_say(key):
    assert judge("cpu", CLAIMS[key], around(GOOD[key]))
    for _, name, value in (bad for bad in BAD if bad[0] == key):
        expected = None if name == "rate_of_one_step" else False  # rates are the premise
        assert judge("cpu", CLAIMS[key], around(GOOD[key] | {name: value})) is expected, name
    if key != "S3":
        assert not CLAIMS[key].criterion(**around(GOOD[key], by=1.2)), "intervals reach too far"


def test_verdicts_and_recorded_weights_that_draw(finished):
    """What a finished run leaves is enough to load the models without training, and they draw nearly the same."""
    run, images, arrays = finished.run, finished.images, finished.arrays
    verdicts = experiment.conclude(run, arrays, finished.trained, images)
    assert verdicts.decided() == {key: "holds" if key == "S3" else "not tested" for key in CLAIMS}
    target = files.results_root() / "smoke" / experiment.NOTEBOOK
    target.mkdir(parents=True)
    for name in ("arrays.npz", "run.json", "metrics.json", "weights.safetensors"):
        shutil.copy(run.directory / name, target / name)
    again = runs.start(run.notebook, run.preset, run.settings, 0, "cpu", recorded=True)
    blank = experiment.load_images(again)
    assert blank.shape == images.shape and len(blank.train) == 0
    loaded = experiment.fit(again, blank)
    assert tuple(loaded) == experiment.KEPT and loaded["sequential"].steps == 0
    recorded = experiment.measure(again, blank, loaded)
    assert all(np.array_equal(recorded[name], arrays[name], equal_nan=True) for name in arrays)
    states, own = (
        model.draw(models["sequential"], blank, 5, torch.Generator().manual_seed(0)).means.int()
        for models in ({name: one.model for name, one in loaded.items()}, finished.models)
    )
    assert ((states - own).abs() <= 2).float().mean() > 0.95, "half precision moves few pixels by much"
    assert set(experiment.conclude(again, recorded, loaded, blank)) == set(CLAIMS)


def test_figures_are_drawn_from_the_arrays_alone(finished, tmp_path):
    arrays = load_arrays(finished.run.directory)
    names = ("samples", "samples_from_standard", "reconstructions", "swapped", "models", "infusion", "sharpness")
    for name in (*names, "nearest", "distances", "training"):
        getattr(figures, name)(arrays).savefig(tmp_path / f"{name}.png")
    drawn = {(tmp_path / f"{name}.png").read_bytes() for name in names}
    assert len(drawn) == len(names)


def test_bits_per_dimension_of_levels(finished):
    arrays, summary = finished.arrays, claims.summary(finished.arrays)
    nats = -(arrays["sequential_log_p"][:, -1] - arrays["sequential_kl"].sum(1)).mean() / 768
    bits = summary["models"]["sequential"]["bits_per_dim_of_levels"]
    assert bits == pytest.approx((nats + np.log(127.5)) / np.log(2))
    assert set(summary["kernel_distance"]) == set(KINDS)


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
        experiment.start("smoke", 0, "cpu", {"dataset": "mnist"})


def test_intervals_take_held_out_photographs_in_random_order():
    """In the order of names, from dark to light, groups of neighbours would differ far more than by chance."""
    grey = torch.arange(200, dtype=torch.uint8)[:, None, None, None].expand(200, 4, 4, 3)
    images = Images(None, grey, None, grey, None)
    mixed = measurements._mixed(0, images)[:, 0, 0, 0].double()
    assert torch.equal(mixed.sort().values, grey[:, 0, 0, 0].double())
    assert mixed.reshape(20, 10).mean(1).std() < 1.5 * mixed.std() / 10**0.5


def test_the_interval_of_swaps_counts_that_neighbours_share_a_code():
    """Of sums of neighbours the mean has twice the variance that independent values would give it."""
    noise = np.random.default_rng(0).normal(size=8000)
    ones = np.ones((8000, 1))
    swapped = 2 + (noise + np.roll(noise, -1))[:, None]
    rest = {"sequential_kl": ones, "no_latent_error": ones[:, :0]}
    (lost,) = claims.per_step(
        {"mean_error": 2 * ones[:, 0], "sequential_error": ones, "swapped_error": swapped} | rest
    )["lost"]
    assert lost.high - lost.value == pytest.approx(1.96 * 2 / 8000**0.5, rel=0.1)
