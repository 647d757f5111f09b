"""Notebook 02: the models against torch.distributions, the measurements against their definitions."""

import io
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence

from paperlib.fuzziness import claims as fuzziness_claims
from paperlib.fuzziness import experiment as fuzziness_experiment
from paperlib.fuzziness import figures as fuzziness_figures
from paperlib.fuzziness import measurements as fuzziness_measurements
from paperlib.fuzziness import model as fuzziness_model
from paperlib.fuzziness import training as fuzziness_training
from paperlib.fuzziness.experiment import Settings
from paperlib.fuzziness.model import BERNOULLI, MAIN, Variant
from paperlib.runs.run import Run
from paperlib.stats import aggregate_posterior, rank_correlation, sharpness
from paperlib.system import files
from paperlib.system.errors import UserError

QUICK = {"steps": 400, "hidden": (32,), "codes": 300, "min_samples": 120.0, "seeds": 2, "decoders": (2, 64)}
INDEPENDENT = {"rtol": 1e-5}  # of float32 decoders and of aggregate's own accuracy


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run on the embedded digits: (run, images, models, arrays)."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RUNS", "RESULTS"):
            patch.setenv(f"PAPERLIB_{name}", str(tmp_path_factory.mktemp(name)))
        run = fuzziness_experiment.start("smoke", 0, "cpu", "train", QUICK)
        images = fuzziness_experiment.load_images(run)
        models = fuzziness_training.fit(run, images)
        yield run, images, models, fuzziness_experiment.measure(run, images, models)


def small_vae(likelihood="gaussian", sigma=0.3):
    torch.manual_seed(0)
    return fuzziness_model.VAE(12, Settings(code_dim=3, hidden=(8,), sigma=sigma), likelihood).double()


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_the_terms_of_the_elbo_are_those_of_torch_distributions(likelihood):
    vae, x = small_vae(likelihood), torch.rand(5, 12, dtype=torch.float64).round()
    torch.manual_seed(1)
    log_p, kl = vae(x)
    mean, log_std = vae.q_z_given_x(x)
    torch.manual_seed(1)
    mu = vae.p_x_given_z(mean + log_std.exp() * torch.randn(5, 3, dtype=torch.float64))
    deviation = torch.tensor(0.3, dtype=torch.float64)
    decoder = Independent(Bernoulli(probs=mu) if likelihood == "bernoulli" else Normal(mu, deviation), 1)
    prior = Independent(Normal(torch.zeros_like(mean), torch.ones_like(mean)), 1)
    torch.testing.assert_close(log_p, decoder.log_prob(x), rtol=1e-6, atol=1e-6)  # sigma is stored in float32
    encoder = Independent(Normal(mean, log_std.exp()), 1)
    torch.testing.assert_close(kl, kl_divergence(encoder, prior), rtol=1e-12, atol=1e-12)


def test_a_deviation_and_a_weight_of_the_kl_are_the_same_setting():
    """kl_weight sigma^2 decides: with sigma' = sigma sqrt(w), the objective of weight w is w times that of 1."""
    x, weight = torch.rand(6, 12, dtype=torch.float64), 4.0
    gradients = []
    for sigma, kl_weight in ((0.2, weight), (0.2 * math.sqrt(weight), 1.0)):
        vae = small_vae(sigma=sigma)
        torch.manual_seed(1)
        log_p, kl = vae(x)
        (kl_weight * kl - log_p).mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in vae.parameters() if p.requires_grad]))
    torch.testing.assert_close(gradients[0], weight * gradients[1], rtol=1e-5, atol=1e-7)
    assert gradients[0].abs().max() > 0.01


def test_sigma_is_learned_only_where_it_is_not_given():
    assert not small_vae().log_sigma.requires_grad
    assert small_vae(sigma=None).log_sigma.requires_grad
    assert not small_vae("bernoulli", sigma=None).log_sigma.requires_grad, "it would get no gradient"


def test_everything_is_trained_from_every_seed(finished):
    run, _, models, _ = finished
    variants = {MAIN, BERNOULLI, *(Variant(kl_weight=weight) for weight in run.settings.kl_weights)}
    assert [set(of_seed) for of_seed in models.vaes] == [variants] * 2
    assert [list(of_seed) for of_seed in models.decoders] == [[2, 64]] * 2
    weights = [of_seed[MAIN].model.encoder[0].weight for of_seed in models.vaes]
    assert not torch.equal(*weights)


def test_training_raises_the_held_out_elbo_and_a_larger_kl_weight_lowers_the_kl(finished):
    run, _, models, _ = finished
    losses = [row["held_out_loss"] for row in models.vaes[0][MAIN].history]
    assert losses[-1] < losses[0] - 5
    kls = [models.vaes[0][Variant(kl_weight=weight)].history[-1]["held_out_kl"] for weight in run.settings.kl_weights]
    assert kls == sorted(kls, reverse=True)
    assert kls[0] > 1.2 * kls[-1]


def test_the_decoders_error_splits_into_variance_and_gap(finished):
    """Equation (3); the left side is computed from the weights of all points, apart from the aggregate's moments."""
    arrays = finished[-1]
    np.testing.assert_allclose(arrays["error"], arrays["spread"] + arrays["gap"], rtol=1e-6)
    assert (arrays["gap"] > 0).all()


def lists(models, images, z, seed, variant=MAIN, held_out=False):
    """q(x|z) the plain way, all at once in float64: weights (M, N), mean, trace, effective sample size."""
    x = (images.held_out if held_out else images.x).double()
    codes = fuzziness_model.encode(models.vaes[seed][variant].model, x.float())
    weights = torch.softmax(aggregate_posterior.log_weights(z, codes), 1)
    mean = weights @ x
    return weights, mean, weights @ x.square().sum(1) - mean.square().sum(1), 1 / weights.square().sum(1)


def test_the_parts_of_the_gap_are_what_they_are_called(finished):
    run, images, models, arrays = finished
    for seed in range(2):
        vae = models.vaes[seed][MAIN].model
        z = fuzziness_measurements._aggregate_codes(fuzziness_model.encode(vae, images.x), run.settings.codes, run.seed)
        mu = vae.p_x_given_z(z.float()).detach().double()
        _, mean, trace, samples = lists(models, images, z, seed)
        np.testing.assert_allclose(arrays["between"][seed], mean.var(0, correction=0).sum(), **INDEPENDENT)
        np.testing.assert_allclose(arrays["gap"][seed], (mu - mean).square().sum(1), rtol=1e-3)
        np.testing.assert_allclose(arrays["noise"][seed], trace / (samples - 1).clamp(min=0.1), **INDEPENDENT)
        _, mean, trace, samples = lists(models, images, z, seed, held_out=True)
        np.testing.assert_allclose(arrays["gap_held_out"][seed], (mu - mean).square().sum(1), rtol=1e-3)
        np.testing.assert_allclose(arrays["noise_held_out"][seed], trace / (samples - 1).clamp(min=0.1), rtol=1e-4)


def test_the_bernoulli_arrays_are_those_of_the_bernoulli_decoder(finished):
    _, images, models, arrays = finished
    for seed in range(2):
        z = torch.from_numpy(arrays["z"][seed])
        _, _, trace, _ = lists(models, images, z, seed, BERNOULLI)
        np.testing.assert_allclose(arrays["bernoulli_variance"][seed], trace, **INDEPENDENT)
        widths = sharpness.edge_width(images.pictures(models.vaes[seed][BERNOULLI].model.p_x_given_z(z)))
        np.testing.assert_allclose(arrays["bernoulli_edge_width"][seed], widths)


def test_the_noise_of_a_list_is_that_of_its_average(finished):
    """Averages over two halves of the training points differ by the noise of both, 1 / samples of the variance each."""
    _, images, models, arrays = finished
    z = torch.from_numpy(arrays["z"][0])[arrays["reliable"][0]]
    one = torch.zeros(len(images.x), dtype=torch.bool)
    one[fuzziness_measurements.random_half(images)] = True
    halves = []
    for rows in (one, ~one):
        x = images.x[rows]
        halves.append(aggregate_posterior.conditional(z, fuzziness_model.encode(models.main, x), x))
    apart = (halves[0].mean - halves[1].mean).square().sum(1).mean()
    noise = sum((half.trace / (half.ess - 1)).mean() for half in halves)
    assert 0.8 < apart / noise < 1.25
    assert (arrays["noise_held_out"].mean(1) > arrays["noise"].mean(1)).all(), "fewer held-out images, shorter lists"


def test_the_left_side_of_the_split_is_a_sum_over_the_list(finished):
    """The same error, point by point and slowly."""
    run, images, models, _ = finished
    codes = fuzziness_model.encode(models.main, images.x)
    z = torch.randn(3, run.settings.code_dim, dtype=torch.float64)
    mu = models.main.p_x_given_z(z.float()).detach().double()
    fast = fuzziness_measurements.squared_error(mu, z, codes, images.x)
    for k in range(3):
        log_q = [float(Normal(m, s.exp()).log_prob(z[k]).sum()) for m, s in zip(codes.mean, codes.log_std, strict=True)]
        weights = np.exp(np.array(log_q) - max(log_q))
        distances = ((images.x.double() - mu[k]) ** 2).sum(1).numpy()
        assert fast[k].item() == pytest.approx((weights * distances).sum() / weights.sum(), rel=1e-10)


def test_codes_are_ranked_by_variance_per_ink_and_only_where_it_can_be_trusted(finished):
    run, images, models, arrays = finished
    for seed in range(2):
        order, ratio = fuzziness_claims.ranked(arrays, seed), arrays["variance"][seed] / arrays["ink"][seed]
        assert (np.diff(ratio[order]) >= 0).all()
        assert set(order) == set(np.flatnonzero(arrays["reliable"][seed]))
        assert (arrays["samples"][seed][order] >= run.settings.min_samples).all()
        assert (arrays["halves"][seed][order] <= run.settings.max_halves).all()
        assert arrays["reliable"][seed].mean() < 1, "nothing was set aside: the limits are not at work"
        left, right = fuzziness_claims.ends(arrays, seed)
        assert len(left) == len(right) == len(order) // 10
        assert ratio[left].max() <= ratio[right].min()
    rows = fuzziness_measurements.random_half(images)
    assert len(set(rows.tolist())) == len(images.x) // 2
    codes = fuzziness_model.encode(models.main, images.x)[rows]
    z = torch.from_numpy(arrays["z"][0][:5])
    half = aggregate_posterior.conditional(z, codes, images.x[rows]).variance.sum(1).numpy()
    np.testing.assert_allclose(arrays["halves"][0][:5], abs(half / arrays["variance"][0][:5] - 1), atol=1e-5)


def test_what_the_figures_draw_is_what_the_arrays_say(finished):
    _, images, models, arrays = finished
    places = np.flatnonzero(np.isin(fuzziness_claims.ranked(arrays, 0), arrays["shown"]))
    assert (places[0], places[-1]) == (0, len(fuzziness_claims.ranked(arrays, 0)) - 1)
    z = torch.from_numpy(arrays["z"][0][arrays["shown"]])
    decoded = models.main.p_x_given_z(z).detach().numpy().reshape(arrays["decoded"].shape)
    np.testing.assert_array_equal(arrays["decoded"], decoded)
    codes = fuzziness_model.encode(models.main, images.x)
    average = torch.softmax(aggregate_posterior.log_weights(z, codes), 1) @ images.x.double()
    np.testing.assert_allclose(arrays["average"].reshape(len(z), -1), average, atol=2e-6)
    for name in ("fuzziness", "made_of", "error_split", "plane", "sharpness", "better_q"):
        assert getattr(fuzziness_figures, name)(arrays).axes


def test_the_map_has_its_corners_where_the_axes_say(finished):
    run, images, models, arrays = finished
    side = run.settings.plane
    edge = 3 * (1 - 1 / side)
    corners = {(0, 0): (-edge, edge), (0, -1): (edge, edge), (-1, 0): (-edge, -edge)}
    for place, z in corners.items():
        found = aggregate_posterior.conditional(
            torch.tensor([z]), fuzziness_model.encode(models.main, images.x), images.x
        )
        assert arrays["plane_samples"][place] == pytest.approx(found.ess.item(), rel=1e-5)
        assert arrays["plane_variance"][place] == pytest.approx((found.trace / found.mean.sum()).item(), rel=1e-4)


def test_correlations_hold_the_controls_fixed(finished):
    arrays = dict(finished[-1])
    good = arrays["reliable"][1]
    ink, log_q, variance = (arrays[name][1][good] for name in ("ink", "log_q", "variance"))
    expected = rank_correlation.partial_rank_correlation(variance, arrays["edge_width"][1][good], [ink, log_q])
    assert fuzziness_claims.correlations(arrays, "edge_width")[1] == expected
    assert abs(expected - spearmanr(variance, arrays["edge_width"][1][good]).statistic) > 1e-3
    assert np.isnan(fuzziness_claims.correlations(arrays | {"reliable": 0 * arrays["reliable"] > 0}, "edge_width")).all()
    within = fuzziness_claims.correlations(arrays, "edge_width", within_classes=True)[1]
    best = arrays["labels"][1][good].argmax(1)
    classes = [best == label for label in range(10) if label != best.min()]
    controls = [ink, log_q, *(flag for flag in classes if flag.any())]
    assert within == pytest.approx(
        rank_correlation.partial_rank_correlation(variance, arrays["edge_width"][1][good], controls)
    )
    arrays["edge_width"] = arrays["ink"] + 0.5 * np.random.default_rng(0).random(arrays["ink"].shape)
    assert abs(fuzziness_claims.correlations(arrays, "edge_width")[1]) < 0.2, "a fuzziness that is ink, with noise"


def test_a_frozen_encoder_sets_a_floor_that_larger_decoders_come_closer_to(finished):
    """The errors by the list itself, not by (3), over the codes where the variance may be quoted."""
    run, images, models, arrays = finished
    selected = []
    for seed in range(2):
        codes = fuzziness_model.encode(models.vaes[seed][MAIN].model, images.x)
        z = fuzziness_measurements._aggregate_codes(codes, run.settings.codes, run.seed)
        _, _, trace, samples = lists(models, images, z, seed)
        rows = fuzziness_measurements.random_half(images)
        half = aggregate_posterior.conditional(z, codes[rows], images.x[rows]).trace
        good = (samples >= run.settings.min_samples) & ((half / trace - 1).abs() <= run.settings.max_halves)
        assert good.any()
        np.testing.assert_allclose(arrays["floor"][seed], trace[good].mean(), **INDEPENDENT)
        for k, units in enumerate(run.settings.decoders):
            mu = torch.sigmoid(models.decoders[seed][units].model(z.float())).detach().double()
            errors = fuzziness_measurements.squared_error(mu, z, codes, images.x)
            np.testing.assert_allclose(arrays["frozen_error"][seed, k], errors[good].mean(), **INDEPENDENT)
        selected.append(bool(good.all()))
        assert arrays["floor"][seed] < arrays["frozen_error"][seed, 1] < arrays["frozen_error"][seed, 0]
    assert not all(selected), "no code was set aside, so the selection is not tested"


def test_the_swept_numbers_are_those_of_their_models(finished):
    run, images, models, arrays = finished
    for k, weight in enumerate(run.settings.kl_weights):
        vae = models.vaes[1][Variant(kl_weight=weight)].model
        mean, log_std = vae.q_z_given_x(images.held_out)
        kl = (0.5 * (mean**2 + torch.exp(2 * log_std) - 1 - 2 * log_std)).sum(1).mean()
        assert arrays["swept_rate"][1, k] == pytest.approx(kl.item(), rel=1e-4)
        information = aggregate_posterior.mutual_information(fuzziness_model.encode(vae, images.x), samples=3)
        assert arrays["swept_information"][1, k] == pytest.approx(information.nats, abs=0.1)
        draws = [mean + log_std.exp() * torch.randn_like(mean) for _ in range(20)]
        errors = [(vae.p_x_given_z(z) - images.held_out).square().sum(1).mean().item() for z in draws]
        assert arrays["swept_error"][1, k] == pytest.approx(np.mean(errors), abs=5 * np.std(errors))
        assert np.std(errors) < 0.05 * np.mean(errors)
        z = fuzziness_measurements._aggregate_codes(fuzziness_model.encode(vae, images.x), run.settings.codes, run.seed)
        widths = sharpness.edge_width(images.pictures(vae.p_x_given_z(z.float())))
        assert arrays["swept_width"][1, k] == pytest.approx(widths.nanmean().item(), rel=1e-6)
        _, _, trace, samples = lists(models, images, z, 1, Variant(kl_weight=weight))
        _, found, good = fuzziness_measurements._at_aggregate_codes(run.settings, images, vae, run.seed)
        np.testing.assert_allclose(found.trace, trace, **INDEPENDENT)
        assert arrays["swept_reliable"][1, k] == pytest.approx(good.double().mean().item())
        expected = (trace / (1 - 1 / samples))[good].mean().item()
        assert arrays["swept_variance"][1, k] == pytest.approx(expected, rel=1e-5, nan_ok=True)


def test_verdicts_follow_the_arrays(finished):
    """Each claim can fail: arrays that contradict it are judged so."""
    run, images, models, arrays = finished
    cpu = Run(run.notebook, "cpu", run.settings, 0, "cpu", "recorded")
    good = dict(arrays)
    good["gap"] = 0.01 * arrays["between"][:, None] * np.ones_like(arrays["gap"])
    good["error"] = arrays["spread"] + good["gap"]
    good["edge_width"] = arrays["variance"] * (1 + 0.01 * np.random.default_rng(0).random(arrays["variance"].shape))
    mixture = np.where(np.arange(10) < 1, 1.0, 0.0)
    good["labels"] = np.broadcast_to(mixture, arrays["labels"].shape).copy()
    for seed in range(2):
        good["labels"][seed][fuzziness_claims.ends(arrays, seed)[1]] = 0.1
    good["frozen_error"] = arrays["floor"][:, None] * np.array([[1.5, 1.01]])
    good["swept_error"] = good["swept_width"] = np.arange(6.0).reshape(2, 3)
    assert set(fuzziness_experiment.conclude(cpu, good, models, images).decided().values()) == {"holds"}
    middle = {**good, "labels": np.full_like(good["labels"], 0.1)}
    noisy = good["edge_width"] + 2 * arrays["variance"].std() * np.random.default_rng(1).normal(size=(2, 300))
    one_seed = np.stack([good["edge_width"][0], noisy[1]])
    spoilt = [
        ("F1", {"gap": good["gap"] * 20, "error": arrays["spread"] + good["gap"] * 20}),
        ("F1", {"error": arrays["spread"] + good["gap"] * 1.1}),
        ("F2", {"edge_width": -good["edge_width"], "slope": good["edge_width"]}),
        ("F2", {"edge_width": one_seed, "slope": good["edge_width"]}),
        ("F3", {"labels": np.broadcast_to(mixture, arrays["labels"].shape)}),
        ("F3", {"labels": middle["labels"]}),
        ("F4", {"swept_error": good["swept_error"][:, ::-1]}),
        ("F4", {"swept_width": np.array([[0.0, 1.0, 2.0], [0.0, 2.0, 1.0]])}),
        ("F4", {"swept_width": np.array([[0.0, np.nan, 2.0], [0.0, 1.0, 2.0]])}),
        ("F4", {"frozen_error": arrays["floor"][:, None] * np.array([[1.5, 1.06]])}),
    ]
    for claim, changed in spoilt:
        decided = fuzziness_experiment.conclude(cpu, good | changed, models, images).decided()
        assert decided == dict.fromkeys("F1 F2 F3 F4".split(), "holds") | {claim: "fails"}


def test_the_entropy_of_label_mixtures():
    mixtures = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    np.testing.assert_allclose(fuzziness_claims.label_entropy(mixtures), [0, math.log(2), math.log(3)], atol=1e-12)


def test_a_finished_training_is_used_again_and_recorded_weights_serve_without_one(finished):
    run, images, models, arrays = finished
    again = fuzziness_training.fit(run, images)
    assert again.vaes[1][BERNOULLI].seconds == models.vaes[1][BERNOULLI].seconds
    verdicts = fuzziness_experiment.conclude(run, arrays, models, images)
    assert verdicts.decided() == dict.fromkeys(fuzziness_claims.CLAIMS, "not claimed")
    target = files.results_root() / "smoke" / run.notebook
    target.mkdir(parents=True)
    recorded = fuzziness_experiment.start("smoke", 0, "cpu", "recorded", QUICK)
    with pytest.raises(UserError, match="nothing is recorded"):
        fuzziness_experiment.measure(recorded, images, models)
    for name in ("weights.safetensors", "arrays.npz", "run.json"):
        shutil.copy(run.directory / name, target)
    with pytest.raises(UserError, match="other settings or seed 0"):
        fuzziness_experiment.measure(fuzziness_experiment.start("smoke", 7, "cpu", "recorded", QUICK), images, models)
    loaded = fuzziness_training.fit(recorded, images)
    again = fuzziness_experiment.measure(recorded, images, loaded)
    assert set(again) == set(arrays)
    np.testing.assert_array_equal(again["variance"], arrays["variance"])
    z = torch.from_numpy(arrays["z"][0])
    difference = (loaded.main.p_x_given_z(z) - models.main.p_x_given_z(z)).abs().max()
    assert 0 < difference < 0.01, "half precision, and another load than training's own"
    assert fuzziness_experiment.conclude(recorded, again, loaded, images).decided() == verdicts.decided()


def test_the_explorer_draws_what_the_sliders_say(finished):
    _, images, models, _ = finished
    explorer = fuzziness_experiment.explore(images, models)
    before = explorer.picture.value
    explorer.sliders[0].value = 1.5
    assert explorer.picture.value != before
    assert "effective sample size" in explorer.text.value
    sheet = np.asarray(Image.open(io.BytesIO(explorer.picture.value)))
    step = fuzziness_explorer_step(images)
    assert sheet.shape == (step, step * (3 + 8))
    mu = models.main.p_x_given_z(torch.tensor([[1.5, 0.0]])).detach().numpy().reshape(images.shape)
    drawn = sheet[4:-4:4, 4 : step - 4 : 4] / 255
    np.testing.assert_allclose(drawn, mu, atol=0.5 / 255 + 1e-6)


def fuzziness_explorer_step(images):
    return 4 * (images.shape[0] + 2)  # each image has a border of one pixel and is magnified four times


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"dataset": "minst"}, "unknown data set 'minst': choose from digits, mnist"),
        ({"hidden": ()}, "hidden is"),
        ({"sigma": -1.0}, "sigma is -1.0"),
        ({"kl_weights": (-1.0, 1.0)}, "kl_weights is"),
        ({"kl_weights": (1.0,)}, "kl_weights is"),
        ({"decoders": (400, 4)}, "decoders is"),
        ({"decoders": (4, 4)}, "decoders is"),
        ({"learning_rate": math.inf}, "learning_rate is inf"),
        ({"code_dim": 1}, "code_dim is 1"),
        ({"codes": 50}, "codes is 50, but the picture needs 70"),
    ],
)
def test_settings_that_mean_nothing_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        fuzziness_experiment.start("smoke", 0, "cpu", "train", overrides)


def test_too_few_codes_to_trust_is_said(finished):
    _, images, models, arrays = finished
    nowhere = dict(arrays) | {"reliable": np.zeros_like(arrays["reliable"])}
    with pytest.raises(UserError, match=r"Var q.x.z. can be trusted at 0 of 300 codes"):
        fuzziness_measurements.picture(images, models.main, nowhere)
