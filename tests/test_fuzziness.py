"""Notebook 02: the model against torch.distributions, the measurements against their definitions."""

import math
import shutil

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from paperlib import aggregate, fuzziness, paths
from paperlib.errors import UserError

QUICK = {"steps": 150, "hidden": (32,), "codes": 300, "min_samples": 150.0}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run on the embedded digits: (run, images, trained, arrays)."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RUNS", "RESULTS"):
            patch.setenv(f"PAPERLIB_{name}", str(tmp_path_factory.mktemp(name)))
        run = fuzziness.start("smoke", 0, "cpu", "train", QUICK)
        images = fuzziness.load_images(run)
        trained = fuzziness.fit(run, images)
        yield run, images, trained, fuzziness.measure(run, trained.model, images)


def small_vae(**options):
    torch.manual_seed(0)
    return fuzziness.VAE(**({"pixels": 12, "code_dim": 3, "hidden": (8,), "sigma": 0.3} | options)).double()


def test_the_terms_of_the_elbo_are_those_of_torch_distributions():
    vae, x = small_vae(), torch.rand(5, 12, dtype=torch.float64)
    torch.manual_seed(1)
    log_p, kl = vae(x)
    mean, log_std = vae.q_z_given_x(x)
    torch.manual_seed(1)
    z = mean + log_std.exp() * torch.randn(5, 3, dtype=torch.float64)
    decoder = Independent(Normal(vae.p_x_given_z(z), torch.tensor(0.3, dtype=torch.float64)), 1)
    encoder = Independent(Normal(mean, log_std.exp()), 1)
    prior = Independent(Normal(torch.zeros_like(mean), torch.ones_like(mean)), 1)
    torch.testing.assert_close(log_p, decoder.log_prob(x), rtol=1e-6, atol=1e-6)  # sigma is stored in float32
    torch.testing.assert_close(kl, kl_divergence(encoder, prior), rtol=1e-12, atol=1e-12)


def test_a_deviation_and_a_weight_of_the_kl_are_the_same_setting():
    """kl_weight / sigma^-2 decides: with sigma' = sigma sqrt(w), the objective of weight w is w times that of 1."""
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


def test_training_raises_the_held_out_elbo(finished):
    _, _, trained, _ = finished
    losses = [row["held_out_loss"] for row in trained.history]
    assert losses[-1] < losses[0] - 5


def test_the_decoders_error_splits_into_variance_and_gap(finished):
    """Equation (3); the left side is computed from the weights of all points, apart from the aggregate's moments."""
    _, _, _, arrays = finished
    np.testing.assert_allclose(arrays["error"], arrays["spread"] + arrays["gap"], rtol=1e-6)
    assert (arrays["gap"] > 0).all()


def test_the_left_side_of_the_split_is_a_sum_over_the_list(finished):
    """The same error, point by point and slowly."""
    run, images, trained, _ = finished
    codes = fuzziness.encode(trained.model, images)
    z = torch.randn(3, run.settings.code_dim, dtype=torch.float64)
    mu = trained.model.p_x_given_z(z.float()).detach().double()
    fast = fuzziness._squared_error(mu, z, codes, images.x)
    for k in range(3):
        log_q = [float(Normal(m, s.exp()).log_prob(z[k]).sum()) for m, s in zip(codes.mean, codes.log_std, strict=True)]
        weights = np.exp(np.array(log_q) - max(log_q))
        distances = ((images.x.double() - mu[k]) ** 2).sum(1).numpy()
        assert fast[k].item() == pytest.approx((weights * distances).sum() / weights.sum(), rel=1e-10)


def test_codes_are_ranked_by_variance_per_ink_and_only_where_it_can_be_trusted(finished):
    run, _, _, arrays = finished
    order, ratio = arrays["order"], arrays["variance"] / arrays["ink"]
    assert (np.diff(ratio[order]) >= 0).all()
    assert set(order) == set(np.flatnonzero(arrays["reliable"]))
    assert (arrays["samples"][order] >= run.settings.min_samples).all()
    assert (arrays["halves"][order] <= run.settings.max_halves).all()
    assert arrays["reliable"].mean() < 1, "nothing was set aside: the limits are not at work"
    left, right = fuzziness.ends(arrays)
    assert ratio[left].max() <= ratio[right].min()


def test_what_the_figures_draw_is_what_the_arrays_say(finished):
    _, images, trained, arrays = finished
    z = torch.from_numpy(arrays["z"][arrays["shown"]])
    decoded = trained.model.p_x_given_z(z).detach().numpy().reshape(arrays["decoded"].shape)
    np.testing.assert_array_equal(arrays["decoded"], decoded)
    codes = fuzziness.encode(trained.model, images)
    average = torch.softmax(aggregate.log_weights(z, codes), 1) @ images.x.double()
    np.testing.assert_allclose(arrays["average"].reshape(len(z), -1), average, atol=2e-6)
    for plot in (fuzziness.plot_fuzziness, fuzziness.plot_made_of, fuzziness.plot_identity, fuzziness.plot_plane):
        assert plot(arrays).axes


def test_the_entropy_of_label_mixtures():
    mixtures = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    np.testing.assert_allclose(fuzziness.label_entropy(mixtures), [0, math.log(2), math.log(3)], atol=1e-12)


def test_a_finished_training_is_used_again_and_recorded_weights_serve_without_one(finished):
    run, images, trained, arrays = finished
    again = fuzziness.fit(run, images)
    assert (again.steps, again.seconds) == (trained.steps, trained.seconds)
    verdicts = fuzziness.conclude(run, arrays, trained, images)
    assert verdicts.decided() == dict.fromkeys(fuzziness.CLAIMS, "not claimed")
    target = paths.results_root() / "smoke" / run.notebook
    target.mkdir(parents=True)
    shutil.copy(run.directory / "weights.safetensors", target)
    recorded = fuzziness.start("smoke", 0, "cpu", "recorded", QUICK)
    vae = fuzziness.fit(recorded, images).model
    z = torch.from_numpy(arrays["z"])
    difference = (vae.p_x_given_z(z) - trained.model.p_x_given_z(z)).abs().max()
    assert 0 < difference < 0.01, "half precision, and another load than training's own"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"dataset": "minst"}, "unknown data set 'minst': choose from digits, mnist"),
        ({"hidden": ()}, "hidden is"),
        ({"sigma": -1.0}, "sigma is -1.0"),
        ({"kl_weight": -1.0}, "kl_weight is -1.0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        fuzziness.start("smoke", 0, "cpu", "train", overrides)


def test_too_few_codes_to_trust_is_said(finished, monkeypatch, tmp_path):
    monkeypatch.setenv("PAPERLIB_RUNS", str(tmp_path))
    _, images, trained, _ = finished
    strict = fuzziness.start("smoke", 0, "cpu", "train", {**QUICK, "min_samples": 1501.0})
    with pytest.raises(UserError, match=r"Var q.x.z. can be trusted at 0 of 300 codes"):
        fuzziness.measure(strict, trained.model, images)
