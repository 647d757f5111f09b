"""Notebook 02: the models against torch.distributions, the measurements against their definitions."""

import dataclasses
import io
import itertools
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence

from paperlib import fuzziness
from paperlib.fuzziness import claims, figures, measurements
from paperlib.fuzziness.experiment import Settings
from paperlib.fuzziness.model import BERNOULLI, MAIN, VAE, Variant, encode, pixels, square
from paperlib.runs import run as runs
from paperlib.runs.run import Run
from paperlib.stats import aggregate_posterior, rank_correlation, sharpness
from paperlib.system import files
from paperlib.system.errors import UserError

QUICK = {"steps": 150, "learning_rate": 5e-3, "hidden": (32,), "code_dims": (1, 2, 4), "decoders": (2, 64)}
QUICK |= {"seeds": 2, "first_seed": 3, "codes": 300, "min_samples": 180.0}
INDEPENDENT = {"rtol": 1e-5}  # of float32 decoders and of the aggregate posterior's own accuracy


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A short run on the embedded digits: run, images and their pixels, models, arrays."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RUNS", "RESULTS"):
            patch.setenv(f"PAPERLIB_{name}", str(tmp_path_factory.mktemp(name)))
        run = fuzziness.start("smoke", 0, "cpu", QUICK)
        images = fuzziness.load_images(run)
        models = fuzziness.fit(run, images)
        arrays = fuzziness.measure(run, images, models)
        x, held_out = pixels(images)
        yield SimpleNamespace(run=run, images=images, x=x, held_out=held_out, models=models, arrays=arrays)


def lists(vae, x, z):
    """q(x|z) the plain way, all at once in float64: mean, trace, effective sample size."""
    weights, x = torch.softmax(aggregate_posterior.log_weights(z, encode(vae, x)), 1), x.double()
    mean = weights @ x
    return mean, weights @ x.square().sum(1) - mean.square().sum(1), 1 / weights.square().sum(1)


def at_aggregate_codes(toy, seed, variant=MAIN):
    """A VAE, the codes z ~ q(z) that its measurements use, and where they may quote the variance of q(x|z)."""
    vae = toy.models.vaes[seed][variant].model
    z = measurements.aggregate_codes(encode(vae, toy.x), toy.run.settings.codes, 3)
    return vae, z, may_be_quoted(toy, vae, z)


def may_be_quoted(toy, vae, z):
    (_, trace, samples), rows = lists(vae, toy.x, z), measurements.random_half(len(toy.x))
    changed = (lists(vae, toy.x[rows], z)[1] / trace - 1).abs()
    return (samples >= toy.run.settings.min_samples) & (changed <= toy.run.settings.max_halves)


@pytest.mark.parametrize(("likelihood", "sigma"), [("gaussian", 0.3), ("gaussian", None), ("bernoulli", None)])
def test_the_terms_of_the_elbo_are_those_of_torch_distributions(likelihood, sigma):
    torch.manual_seed(0)
    vae = VAE(12, Settings(hidden=(8,), sigma=sigma), Variant(likelihood, 3)).double()
    x = torch.rand(5, 12, dtype=torch.float64)
    assert vae.log_sigma.requires_grad == (likelihood == "gaussian" and sigma is None), "learned where it has a part"
    x = x.round() if likelihood == "bernoulli" else x
    torch.manual_seed(1)
    log_p, kl = vae(x)
    mean, log_std = vae.q_z_given_x(x)
    torch.manual_seed(1)
    mu = vae.p_x_given_z(mean + log_std.exp() * torch.randn(5, 3, dtype=torch.float64))
    std = vae.log_sigma.exp() if sigma is None else torch.tensor(sigma, dtype=torch.float64)
    decoder = Independent(Bernoulli(probs=mu) if likelihood == "bernoulli" else Normal(mu, std), 1)
    prior = Independent(Normal(torch.zeros_like(mean), torch.ones_like(mean)), 1)
    torch.testing.assert_close(log_p, decoder.log_prob(x), rtol=1e-6, atol=1e-6)  # sigma is stored in float32
    encoder = Independent(Normal(mean, log_std.exp()), 1)
    torch.testing.assert_close(kl, kl_divergence(encoder, prior), rtol=1e-12, atol=1e-12)


def test_every_seed_trains_every_model_on_the_pixels_and_more_dimensions_raise_the_kl(toy):
    for vectors, images in ((toy.x, toy.images.train), (toy.held_out, toy.images.held_out)):
        torch.testing.assert_close(square(vectors) * 16, images[..., 0].float())
    dims, models = toy.run.settings.code_dims, toy.models
    variants = {MAIN, BERNOULLI, *(Variant(code_dim=d) for d in dims)}
    assert [set(vaes) for vaes in models.vaes] == [variants] * 2
    assert [list(decoders) for decoders in models.decoders] == [[2, 64]] * 2
    names = {path.name for path in toy.run.directory.iterdir() if path.is_dir()}
    assert set(models.by_name(3)) == names and "gaussian-4d-seed4" in names and "decoder-64-seed3" in names
    assert not torch.equal(*(vaes[MAIN].model.encoder[0].weight for vaes in models.vaes))
    losses = [row["held_out_loss"] for row in models.vaes[0][MAIN].history]
    assert losses[-1] < losses[0] - 5
    kls = [models.vaes[0][Variant(code_dim=d)].history[-1]["held_out_kl"] for d in dims]
    assert kls == sorted(kls) and kls[-1] > 1.2 * kls[0]


def test_errors_and_their_parts_are_what_they_are_called(toy):
    """(3) and its parts for the VAE's decoder, and those for a frozen encoder over codes that may be quoted."""
    for seed in range(2):
        vae, z, reliable = at_aggregate_codes(toy, seed)
        arrays = {name: array[seed] for name, array in toy.arrays.items() if len(array) == 2}
        mu = vae.p_x_given_z(z.float()).detach().double()
        for x, suffix in ((toy.held_out, "_held_out"), (toy.x, "")):
            mean, trace, samples = lists(vae, x, z)
            np.testing.assert_allclose(arrays[f"gap{suffix}"], (mu - mean).square().sum(1), rtol=1e-3)
            np.testing.assert_allclose(arrays[f"noise{suffix}"], trace / (samples - 1).clamp(min=0.1), rtol=1e-4)
        np.testing.assert_allclose(arrays["spread"], trace, **INDEPENDENT)
        np.testing.assert_allclose(arrays["error"], arrays["spread"] + arrays["gap"], rtol=1e-6)
        np.testing.assert_allclose(arrays["between"], mean.var(0, correction=0).sum(), **INDEPENDENT)
        np.testing.assert_allclose(arrays["floor"], trace[reliable].mean(), **INDEPENDENT)
        for error, trained in zip(arrays["frozen_error"], toy.models.decoders[seed].values(), strict=True):
            mu = torch.sigmoid(trained.model(z.float())).detach().double()
            expected = measurements.squared_error(mu, z, encode(vae, toy.x), toy.x)[reliable].mean()
            np.testing.assert_allclose(error, expected, **INDEPENDENT)
        assert arrays["floor"] < arrays["frozen_error"][1] < arrays["frozen_error"][0]
    assert not at_aggregate_codes(toy, 0)[2].all(), "no code was set aside, so the selection is not tested"


def test_the_noise_of_a_list_is_that_of_its_average(toy):
    """Averages over two halves of the images differ by about the noise of both, 1 / samples of the variance each."""
    z = torch.from_numpy(toy.arrays["z"][0])[toy.arrays["reliable"][0]].double()
    generator, apart, noise = torch.Generator().manual_seed(0), 0.0, 0.0
    for _ in range(20):
        rows = torch.randperm(len(toy.x), generator=generator).chunk(2)
        (mean, *first), (other, *second) = (lists(toy.models.main, toy.x[half], z) for half in rows)
        apart += (mean - other).square().sum(1).mean()
        noise += sum((trace / (samples - 1)).mean() for trace, samples in (first, second))
    assert apart / noise == pytest.approx(1, abs=0.2)


def test_the_arrays_at_prior_codes_are_those_of_their_decoder(toy):
    for seed, (prefix, variant) in itertools.product(range(2), [("", MAIN), ("bernoulli_", BERNOULLI)]):
        vae, z = toy.models.vaes[seed][variant].model, torch.from_numpy(toy.arrays["z"][seed])
        mean, trace, _ = lists(vae, toy.x, z)
        expected = {"variance": trace, "ink": mean.sum(1), "reliable": may_be_quoted(toy, vae, z)}
        expected["edge_width"] = sharpness.edge_width(square(vae.p_x_given_z(z)))
        for name, values in expected.items():
            np.testing.assert_allclose(toy.arrays[prefix + name][seed], values, err_msg=name, **INDEPENDENT)
    assert 0 < toy.arrays["reliable"].mean() < 1, "nothing was set aside: the limits are not at work"
    assert len(set(measurements.random_half(len(toy.x)).tolist())) == len(toy.x) // 2


def test_codes_are_ranked_by_variance_per_ink_and_only_where_it_can_be_trusted(toy):
    for seed in range(2):
        order, ratio = claims.ranked(toy.arrays, seed), toy.arrays["variance"][seed] / toy.arrays["ink"][seed]
        assert (np.diff(ratio[order]) >= 0).all()
        assert set(order) == set(np.flatnonzero(toy.arrays["reliable"][seed]))
        tenth = len(order) // 10
        np.testing.assert_array_equal(claims.ends(toy.arrays, seed), (order[:tenth], order[-tenth:]))


def test_what_the_figures_draw_is_what_the_arrays_say(toy):
    """The map has its corners where the axes say."""
    arrays, order = toy.arrays, claims.ranked(toy.arrays, 0)
    assert (arrays["made_of"][0], arrays["made_of"][-1]) == (order[0], order[-1])
    left, right = claims.ends(arrays, 0)
    assert set(arrays["sharp"]) <= set(left) and arrays["sharp"][0] == order[0]
    mixed, per_ink = arrays["mixed"], arrays["variance"][0] / arrays["ink"][0]
    assert set(mixed) <= set(right) and (np.diff(per_ink[mixed]) >= 0).all()
    least = arrays["labels"][0][:, [4, 5, 9]].min(1)
    assert set(least[mixed]) == set(np.sort(least[right])[-len(mixed) :])
    for name in ("sharp", "mixed", "made_of"):
        z = torch.from_numpy(arrays["z"][0][arrays[name]])
        np.testing.assert_array_equal(arrays[f"{name}_decoded"], square(toy.models.main.p_x_given_z(z).detach()))
    z = torch.from_numpy(arrays["z"][0][arrays["made_of"]])
    np.testing.assert_allclose(arrays["made_of_average"], square(lists(toy.models.main, toy.x, z)[0]), atol=2e-6)
    for name in ("fuzziness", "made_of", "error_split", "plane", "sharpness", "better_q"):
        assert getattr(figures, name)(arrays).axes
    nowhere = arrays | {"reliable": np.zeros_like(arrays["reliable"])}
    with pytest.raises(UserError, match=r"Var q.x.z. can be trusted at 0 of 300 codes"):
        measurements.picture(toy.models.main, toy.x, toy.images.labels, nowhere)
    edge = 3 * (1 - 1 / toy.run.settings.plane)
    for place, z in {(0, 0): (-edge, edge), (0, -1): (edge, edge), (-1, 0): (-edge, -edge)}.items():
        mean, trace, samples = lists(toy.models.main, toy.x, torch.tensor([z]))
        corner = [arrays[f"plane_{name}"][place] for name in ("samples", "variance")]
        assert corner == pytest.approx([samples.item(), (trace / mean.sum()).item()], rel=1e-4)


def test_correlations_hold_the_controls_fixed(toy):
    arrays, partial = dict(toy.arrays), rank_correlation.partial_rank_correlation
    good = arrays["reliable"][1]
    ink, log_q, variance, width = (arrays[name][1][good] for name in ("ink", "log_q", "variance", "edge_width"))
    expected = partial(variance, width, [ink, log_q])
    assert claims.correlations(arrays, "edge_width")[1] == expected
    assert abs(expected - spearmanr(variance, width).statistic) > 1e-3
    best = arrays["labels"][1][good].argmax(1)
    classes = [best == label for label in np.unique(best)]
    within = claims.correlations(arrays, "edge_width", within_classes=True)[1]
    assert within == pytest.approx(partial(variance, width, [ink, log_q, *classes]))
    assert np.isnan(claims.correlations(arrays | {"reliable": 0 * arrays["reliable"] > 0}, "edge_width")).all()


def test_the_swept_numbers_are_those_of_their_models(toy):
    for k, dims in enumerate(toy.run.settings.code_dims):
        vae, z, reliable = at_aggregate_codes(toy, 1, Variant(code_dim=dims))
        swept = {name: toy.arrays[name][1, k] for name in measurements.SWEPT}
        mean, log_std = vae.q_z_given_x(toy.held_out)
        draws = [mean + log_std.exp() * torch.randn_like(mean) for _ in range(20)]
        errors = [(vae.p_x_given_z(draw) - toy.held_out).square().sum(1).mean().item() for draw in draws]
        assert swept["swept_error"] == pytest.approx(np.mean(errors), abs=5 * np.std(errors))
        assert np.std(errors) < 0.05 * np.mean(errors)
        information = aggregate_posterior.mutual_information(encode(vae, toy.x)).nats
        assert swept["swept_information"] == pytest.approx(information, abs=0.1)
        _, trace, samples = lists(vae, toy.x, z)
        exact = {
            "swept_rate": (0.5 * (mean**2 + torch.exp(2 * log_std) - 1 - 2 * log_std)).sum(1).mean(),
            "swept_width": sharpness.edge_width(square(vae.p_x_given_z(z.float()))).nanmean(),
            "swept_reliable": reliable.double().mean(),
            "swept_variance": (trace / (1 - 1 / samples))[reliable].mean(),
        }
        for name, value in exact.items():
            assert swept[name] == pytest.approx(value.item(), rel=1e-4, nan_ok=True), name


def test_verdicts_follow_the_arrays(toy):
    """Each claim can fail: arrays that contradict it are judged so."""
    run, arrays, random = toy.run, toy.arrays, np.random.default_rng(0)
    cpu = Run(run.notebook, "cpu", run.settings, 0, "cpu", True)
    variance, floor, spread = arrays["variance"], arrays["floor"][:, None], arrays["spread"]
    gap = 0.01 * arrays["between"][:, None] * np.ones_like(spread)
    pure = np.broadcast_to(np.eye(10)[0], arrays["labels"].shape)
    mixed = pure.copy()
    for seed in range(2):
        mixed[seed][claims.ends(arrays, seed)[1]] = 0.1
    rising, fuzzy = np.arange(6.0).reshape(2, 3), variance * (1 + 0.01 * random.random(variance.shape))
    noisy = fuzzy + 2 * variance.std() * random.normal(size=variance.shape)
    good = arrays | {"gap": gap, "error": spread + gap, "edge_width": fuzzy, "labels": mixed}
    good |= {"frozen_error": floor * [[1.5, 1.01]], "code_dims": rising[0]}
    good |= {"swept_error": -rising, "swept_width": -rising}
    contradictions = [
        ("F1", {"gap": gap * 20, "error": spread + gap * 20}),
        ("F1", {"error": spread + gap * 1.1}),
        ("F2", {"edge_width": -fuzzy, "slope": fuzzy}),
        ("F2", {"edge_width": np.stack([fuzzy[0], noisy[1]]), "slope": fuzzy}),
        ("F3", {"labels": pure}),
        ("F3", {"labels": np.full_like(mixed, 0.1)}),
        ("F3", {"labels": np.stack([mixed[0], pure[1]])}),
        ("F3", {"edge_width": fuzzy + 10 * fuzzy.max()}),
        ("F4", {"swept_error": rising}),
        ("F4", {"swept_width": np.array([[2.0, 1.0, 0.0], [2.0, 0.0, 1.0]])}),
        ("F4", {"swept_width": np.array([[2.0, np.nan, 0.0], [2.0, 1.0, 0.0]])}),
        ("F4", {"frozen_error": floor * [[1.5, 1.06]]}),
    ]
    for key, changed in [(None, {}), *contradictions]:
        decided = fuzziness.conclude(cpu, good | changed, toy.models, toy.images).decided()
        assert decided == {claim: "fails" if claim == key else "holds" for claim in claims.CLAIMS}


def test_with_one_seed_the_interval_of_a_correlation_is_over_its_codes(toy):
    one = {name: toy.arrays[name][:1] for name in ("reliable", "variance", "ink", "log_q", "edge_width")}
    both, alone = (claims._correlation(arrays, "edge_width") for arrays in (toy.arrays, one))
    value = claims.correlations(one, "edge_width")[0]
    count = int((one["reliable"] & np.isfinite(one["edge_width"])).sum())
    assert (alone.low, alone.high) == rank_correlation.correlation_interval(value, count, 2)
    assert alone.value == value and both.low < both.value < both.high


def test_a_mixture_of_4_9_and_5_has_all_three():
    evenly, lacking = np.zeros(10), np.eye(10)[4] / 2 + np.eye(10)[9] / 2
    evenly[[4, 9, 5]] = 1 / 3
    np.testing.assert_allclose(claims.mixtures(np.stack([evenly, lacking])), [1 / 3, 0])


def test_the_entropy_of_label_mixtures():
    mixtures = np.array([[1, 0, 0], [1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3]])
    np.testing.assert_allclose(claims.label_entropy(mixtures), np.log([1, 2, 3]), atol=1e-12)


def test_a_finished_training_is_used_again_and_recorded_weights_serve_without_one(toy):
    run, images, arrays = toy.run, toy.images, toy.arrays
    assert fuzziness.fit(run, images).vaes[1][BERNOULLI].seconds == toy.models.vaes[1][BERNOULLI].seconds
    verdicts = fuzziness.conclude(run, arrays, toy.models, images)
    assert verdicts.decided() == dict.fromkeys(claims.CLAIMS, "not tested")
    target = files.make_folder(files.results_root() / "smoke" / run.notebook)
    for name in ("weights.safetensors", "arrays.npz", "run.json"):
        shutil.copy(run.directory / name, target)
    recorded = runs.start(run.notebook, run.preset, run.settings, 0, "cpu", recorded=True)
    images = fuzziness.load_images(recorded)
    loaded = fuzziness.fit(recorded, images)
    again = fuzziness.measure(recorded, images, loaded)
    assert set(again) == set(arrays)
    np.testing.assert_array_equal(again["variance"], arrays["variance"])
    z = torch.from_numpy(arrays["z"][0])
    difference = (loaded.main.p_x_given_z(z) - toy.models.main.p_x_given_z(z)).abs().max()
    assert 0 < difference < 0.01, "half precision, and another load than training's own"
    assert fuzziness.conclude(recorded, again, loaded, images).decided() == verdicts.decided()


def test_the_explorer_draws_what_the_sliders_say(toy):
    explorer = fuzziness.explore(toy.run, toy.images, toy.models, toy.arrays)
    explorer.sliders[0].value = 1.5
    assert "effective sample size" in explorer.text.value
    sheet = np.asarray(Image.open(io.BytesIO(explorer.picture.value)))
    step = 4 * (8 + 2)  # each image has a border of one pixel and is magnified four times
    assert sheet.shape == (step, step * (3 + 8))
    mu = square(toy.models.main.p_x_given_z(torch.tensor([[1.5, 0.0]])).detach())[0]
    np.testing.assert_allclose(sheet[4:-4:4, 4 : step - 4 : 4] / 255, mu, atol=0.5 / 255 + 1e-6)


def test_the_walk_says_what_each_code_stands_for(toy):
    arrays, vae = {name[5:]: array for name, array in toy.arrays.items() if name.startswith("walk_")}, toy.models.main
    z = torch.from_numpy(arrays["z"])
    steps = (z - z.roll(1, 0)).square().sum(1)
    torch.testing.assert_close(steps, steps[:1].expand(len(steps)))  # closed, in equal steps
    weights = torch.softmax(aggregate_posterior.log_weights(z, encode(vae, toy.x)), 1)
    average = square(weights @ toy.x.double())
    np.testing.assert_allclose(arrays["average"] / 255, average, atol=0.5 / 255 + 1e-6)
    np.testing.assert_allclose(arrays["weights"][:, 0], weights.max(1).values, rtol=1e-5)
    heaviest = square(toy.x[weights.argmax(1)])
    np.testing.assert_allclose(arrays["heaviest"][:, 0] / 255, heaviest, atol=0.5 / 255 + 1e-6)
    decoded = square(vae.p_x_given_z(z).detach())
    np.testing.assert_allclose(arrays["decoded"] / 255, decoded, atol=0.5 / 255 + 1e-6)


def test_the_walk_is_an_animation_and_of_a_recorded_run_a_slider(toy):
    frames = figures.walk(toy.arrays)
    shown = fuzziness.save_animation(toy.run, frames, "walk")
    assert Image.open(io.BytesIO(shown.data)).n_frames == len(frames) == len(toy.arrays["walk_z"])
    recorded = dataclasses.replace(toy.run, recorded=True)
    walk = fuzziness.explore(recorded, None, None, toy.arrays)
    first = walk.picture.value
    walk.slider.value = 5
    assert walk.picture.value != first
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(walk.picture.value))), np.asarray(frames[5]))


def test_settings_that_mean_nothing_are_refused():
    refused = {"dataset": "minst", "hidden": (), "code_dims": (2,), "decoders": (4, 4), "codes": 149}
    told = {"dataset": "unknown data set 'minst': choose from digits, mnist", "codes": "codes is 149, but .* needs 150"}
    for name, value in refused.items():
        with pytest.raises(UserError, match=told.get(name, f"{name} is")):
            fuzziness.start("smoke", 0, "cpu", {name: value})
