"""The sequential VAE: its terms against torch.distributions and quadrature, its gradients, trainings and samplers."""

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence
from torch.utils.flop_counter import FlopCounterMode

from paperlib.data import datasets
from paperlib.data.device_images import Images
from paperlib.runs import recorded, train
from paperlib.sequential import experiment, model, training
from paperlib.sequential.model import build, chain, draw, no_latent_links, pixel_codes, swap, take_step
from paperlib.sequential.networks import Size, StepNetwork
from paperlib.sequential.prior import FittedPrior, gaussian_gap, moments
from paperlib.system.errors import UserError

TINY = experiment.Settings(
    chain_steps=3,
    side=4,
    ladder=(2, 3),
    widths=(16, 16),
    units=16,
    maps=(4,),
    one_step_widths=(16, 16),
    one_step_units=16,
    one_step_maps=(4,),
    batch_size=4,
    train_steps=4,
    one_step_train_steps=4,
    infusion_train_steps=3,
    ablation_train_steps=3,
    evaluation_images=8,
    measured_images=8,
)


def tiny_images(count=12, side=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randint(256, (count, side, side, 3), generator=generator, dtype=torch.uint8)
    split = datasets.Split(pictures.numpy())
    return Images(datasets.Dataset("tiny", split, split, 256, "noise"), pictures, None, pictures, None)


def tiny(name="sequential", seed=1, shape=(3, 4, 4), **changes):
    """A model in float64 whose weights, gates and outputs are not at their small first values."""
    torch.manual_seed(seed)
    vae = build(dataclasses.replace(TINY, **changes), shape, name)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return vae.double().eval()


def targets(count=5, seed=2, shape=(3, 4, 4)):
    return 2 * torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1


# Terms


@pytest.mark.parametrize("scale", [None, 16.0])
def test_terms_of_each_step_are_those_of_torch_distributions(scale):
    vae, x = tiny(reconstruction_scale=scale), targets()
    for k, prior in enumerate(vae.priors):
        prior.update(*random_codes(seed=k))
    for link in chain(vae, x):
        sigma = vae.log_sigma(link.t).exp()
        if scale:
            assert sigma.item() == pytest.approx(1 / math.sqrt(32))
        p = Independent(Normal(link.step.image, sigma.double().expand_as(x)), 3)
        torch.testing.assert_close(link.log_p, p.log_prob(x))
        q = MultivariateNormal(link.step.mean, torch.diag_embed((2 * link.step.log_std).exp()))
        prior = vae.priors[link.t - 1]
        torch.testing.assert_close(link.kl, kl_divergence(q, MultivariateNormal(prior.mean, prior.covariance())))
        if scale:  # a constant more than 16 times the squared error
            error = 16 * (x - link.step.image).square().sum((1, 2, 3))
            torch.testing.assert_close(
                link.log_p + error, torch.full((5,), -24 * math.log(math.pi / 16)).double(), rtol=1e-6, atol=0
            )
        assert link.step.z.shape == (5, 5) and link.step.image.shape == x.shape


def random_codes(count=50, dims=5, seed=4):
    """Means and log stds of q(z|x), correlated."""
    torch.manual_seed(seed)
    mixing = torch.randn(dims, dims).double()
    return 1 + torch.randn(count, dims).double() @ mixing, 0.3 * torch.randn(count, dims).double() - 1


def test_the_fitted_prior_has_the_moments_of_the_codes():
    """Of equal batches seen so far, and no other Gaussian is nearer to them."""
    mean, log_std = random_codes(80)
    prior = FittedPrior(5)
    for part in zip(mean.chunk(4), log_std.chunk(4), strict=True):
        prior.update(*part)
    z = mean + log_std.exp() * torch.randn(40_000, 80, 5).double()
    torch.testing.assert_close(prior.mean, mean.mean(0))
    torch.testing.assert_close(prior.covariance(), z.flatten(0, 1).T.cov(), rtol=0.02, atol=0.02)
    assert gaussian_gap(mean, log_std, prior).abs() < 1e-10
    least = prior.kl(mean, log_std).mean()
    torch.testing.assert_close(gaussian_gap(mean, log_std), model.likelihoods.gaussian_kl(mean, log_std).mean() - least)
    for other in (1.01 * mean, mean + 0.01):
        near = FittedPrior(5)
        near.update(other, log_std)
        assert near.kl(mean, log_std).mean() > least
    noise = torch.randn(100_000, 5)
    torch.testing.assert_close(prior.sample(noise).T.cov(), prior.covariance().float(), rtol=0.03, atol=0.1)
    part = slice(1, 3)
    whole = MultivariateNormal(prior.mean[part], prior.covariance()[part, part])
    dense = MultivariateNormal(mean[:, part], torch.diag_embed((2 * log_std[:, part]).exp()))
    torch.testing.assert_close(prior.kl(mean, log_std, part), kl_divergence(dense, whole))


def test_moments_run_in_training_alone():
    vae, x = tiny(), targets()
    chain(vae, x)
    assert not any(prior.batches for prior in vae.priors)
    vae.train()
    for link, prior in zip(chain(vae, x), vae.priors, strict=True):
        torch.testing.assert_close((prior.mean, prior.second), moments(link.step.mean, link.step.log_std))


def test_bound_and_kl_to_the_posterior_add_up_to_log_p():
    """Two steps, one code dimension each, on a grid: log p(x) = bound (8) + KL(q(z_1, z_2 | x) || p(z_1, z_2 | x))."""
    one_scale = {"ladder": (1,), "widths": (16,), "maps": (), "one_step_widths": (16,)}
    one_scale |= {"one_step_maps": (), "side": 16}
    vae = tiny(chain_steps=2, shape=(1, 2, 2), **one_scale)
    x, grid = targets(1, shape=(1, 2, 2)), torch.linspace(-7, 7, 141, dtype=torch.float64)[:, None]
    prior, step = Normal(0.0, 1.0), (grid[1] - grid[0]).item()
    with torch.no_grad():
        first, (which, index) = vae.networks[0], vae.place(2)
        mean_1, log_std_1 = first.q_z_given_x(x, None, index)
        after_1 = vae.generate(1, None, grid)
        mean_2, log_std_2 = vae.networks[which].q_z_given_x(x.expand(141, -1, -1, -1), after_1, index)
        log_q = Normal(mean_1, log_std_1.exp()).log_prob(grid) + Normal(mean_2, log_std_2.exp()).log_prob(grid.T)
        after_2 = torch.stack([vae.generate(2, after_1, z.expand(141, 1)) for z in grid], 1)  # (z_1, z_2, ...)
        log_p_x = Normal(after_2, vae.log_sigma(2).exp()).log_prob(x).sum((2, 3, 4))
        log_joint = log_p_x + prior.log_prob(grid) + prior.log_prob(grid.T)
        log_p = torch.logsumexp(log_joint.flatten(), 0) + 2 * math.log(step)
        q = log_q.exp() * step**2
        assert q.sum().item() == pytest.approx(1, abs=1e-6)
        to_posterior = (q * (log_q - log_joint + log_p)).sum()
        kl_1 = kl_divergence(Normal(mean_1, log_std_1.exp()), prior)
        kl_2 = kl_divergence(Normal(mean_2, log_std_2.exp()), prior)
        bound = (q * log_p_x).sum() - kl_1.sum() - (q.sum(1) * kl_2[:, 0]).sum()
    torch.testing.assert_close(bound + to_posterior, log_p, rtol=0, atol=1e-6)
    assert to_posterior > 0.001
    torch.manual_seed(0)
    with torch.no_grad():
        links = chain(vae, x.expand(20_000, -1, -1, -1))
    drawn = links[-1].log_p - links[0].kl - links[1].kl
    assert abs(drawn.mean() - bound) < 4 * drawn.std() / math.sqrt(20_000)


def test_the_gate_blends_what_is_not_noisy():
    vae, x, previous = tiny(), targets(), targets(seed=5)
    network, (_, index) = vae.networks[1], vae.place(2)
    assert not torch.allclose(network(x, previous, index).image, network(x, previous, index, 0.5).image)
    z, last = torch.zeros(5, 5).double(), network.generator.last
    with torch.no_grad():
        last.weight[:, -1], last.bias[-1] = 0, 100  # g = 1
        torch.testing.assert_close(network(x, previous, index, 0.5).image, previous)
        last.bias[-1] = -100  # g = 0
        made = network.generator(previous, previous, z, index)
        last.bias[-1] = 0  # g = 1/2
        torch.testing.assert_close(network.generator(previous, previous, z, index), (previous + made) / 2)


def test_codes_stay_within_their_bounds():
    network = StepNetwork(Size(1, 4, (16,), 16, ()), (3,), 1, False)
    for scale in (1.0, 1e4, -1e4):
        with torch.no_grad():
            network.encoder.heads[0].bias.fill_(scale)
        mean, log_std = network.q_z_given_x(torch.rand(9, 1, 4, 4), None, torch.tensor(0))
        assert mean.abs().max() <= 8 and log_std.min() >= -6 and log_std.max() <= 0


def test_codes_are_heard_from_the_start():
    """At first weights means vary over images about as much as codes, and images with codes."""
    torch.manual_seed(0)
    network = StepNetwork(Size(3, 16, (16, 16, 24, 32), 32, (4, 4, 8)), (2, 3, 3, 4), 1, False)
    mean, log_std = network.q_z_given_x(torch.rand(100, 3, 16, 16) * 2 - 1, None, torch.tensor(0))
    assert 0.2 < mean.std(0).mean() < 3 and 0.2 < log_std.exp().mean() < 0.6
    images = network.generator(None, None, torch.randn(100, 12), torch.tensor(0))
    assert 0.02 < images.std(0).mean() < 0.5, "small, and not deaf"


# Gradients


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", ["sequential", "one_step", "infusion", "no_latent"])
def test_every_parameter_learns_and_gradients_stop_between_steps(name, shared):
    vae, x = tiny(name, shared=shared), targets()
    parent = tiny("sequential", shared=shared)

    def links_of(vae, x):
        return no_latent_links(vae, x, parent) if name == "no_latent" else chain(vae, x)

    for link in links_of(vae, x):
        vae.zero_grad()
        (link.kl - link.log_p).sum().backward()
        moved = {key.split(".")[1] for key, p in vae.named_parameters() if p.grad is not None and "networks" in key}
        assert moved == {str(vae.place(link.t)[0])}, "the step's own network alone"
        assert vae.s.grad.nonzero().flatten().tolist() == [link.t - 1]
    vae.zero_grad()
    sum((link.kl - link.log_p).sum() for link in links_of(vae, x)).backward()
    silent = [key for key, p in vae.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


# Infusion


def test_infusion_is_the_chain_with_a_subset_of_pixels_as_its_code():
    """Bordes' loss, written out in numpy but for the network, for fixed masks and draws."""
    vae, x = tiny("infusion", infusion_start=0.2, infusion_step=0.3), targets()
    codes = pixel_codes(vae, x, torch.Generator().manual_seed(3))
    with torch.no_grad():
        general = -sum(link.log_p.mean() for link in chain(vae, x, codes))
        state, loss = codes.noise[0].numpy(), 0.0
        for t, (which, index) in enumerate([(0, 0), (1, 0), (1, 1)]):
            infused = np.where(codes.masks[t].numpy() == 1, x.numpy(), state)
            previous = torch.from_numpy(infused)
            mean = vae.networks[which].generator(previous, previous, None, torch.tensor(index)).numpy()
            sigma = 0.02 + np.exp(10 * vae.s[t].item())
            log_p = -0.5 * ((x.numpy() - mean) / sigma) ** 2 - np.log(sigma) - 0.5 * np.log(2 * np.pi)
            loss -= log_p.sum((1, 2, 3)).mean()
            if t < 2:
                state = mean + sigma * codes.noise[t + 1].numpy()
    assert general.item() == pytest.approx(loss, rel=1e-12)


def test_masks_grow_and_hold_all_channels_together():
    vae, x = tiny("infusion", infusion_start=0.1, infusion_step=0.6), targets(400)
    codes = pixel_codes(vae, x)
    assert codes.masks.shape == (3, 400, 1, 4, 4) and set(codes.masks.unique().tolist()) == {0.0, 1.0}
    shares = codes.masks.mean((1, 2, 3, 4))
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.7, 1.0]).double(), rtol=0, atol=0.02)
    assert codes.noise[0].abs().max() <= 1 and codes.noise[1].abs().max() > 2
    with torch.no_grad():
        links = chain(vae, x, codes)
        again = chain(vae, x, codes)
    assert all(torch.equal(a.log_p, b.log_p) and not a.kl.any() for a, b in zip(links, again, strict=True))


# Depth, swapping, drawing


def test_the_control_goes_on_from_the_images_of_the_trained_chain():
    parent, vae, x = tiny(), tiny("no_latent", seed=4), targets()
    torch.manual_seed(0)
    links = no_latent_links(vae, x, parent)
    torch.manual_seed(0)
    before = chain(parent, x)
    assert [link.t for link in links] == [2, 3]
    for link in links:
        torch.testing.assert_close(link.step.image, vae.generate(link.t, before[link.t - 2].step.image, None))
        assert link.step.z is None and not link.kl.any()
    sum(link.log_p.sum() for link in links).backward()
    assert all(p.grad is None for p in parent.parameters())


def test_swapping_changes_one_code_and_nothing_before():
    vae, x = tiny(), targets()
    torch.manual_seed(0)
    own, swapped = swap(vae, x)
    torch.manual_seed(0)
    links = chain(vae, x)
    for link in links:
        t = link.t
        torch.testing.assert_close(own[t - 1], link.step.image.detach())
        for k in range(5):
            previous = None if t == 1 else own[t - 2, k : k + 1]
            other = links[t - 1].step.z[(k + 1) % 5][None]
            torch.testing.assert_close(swapped[t - 1, k : k + 1], vae.generate(t, previous, other).detach())
    assert (own - swapped).abs().amax((1, 2, 3, 4)).min() > 1e-3


@pytest.mark.parametrize("fitted", [True, False])
def test_a_drawn_chain_is_the_equation(fitted):
    vae, images = tiny().float(), tiny_images()
    for k, prior in enumerate(vae.priors):
        prior.update(*random_codes(seed=k))
    drawn = draw(vae, images, 4, torch.Generator().manual_seed(5), fitted=fitted)
    assert drawn.states.shape == (4, 4, 4, 4, 3) and torch.equal(drawn.states[-1], drawn.means)
    generator = torch.Generator().manual_seed(5)
    noise = torch.rand(4, 3, 4, 4, generator=generator) * 2 - 1
    assert torch.equal(drawn.states[0], images.to_uint8(noise))
    state = None
    for t in (1, 2, 3):
        z = torch.randn(4, 5, generator=generator)
        z = vae.priors[t - 1].sample(z) if fitted else z
        if t == 1:
            given = draw(vae, images, 4, torch.Generator().manual_seed(5), fitted=fitted, first=z)
        state = vae.generate(t, state, z).detach()
        assert torch.equal(drawn.states[t], images.to_uint8(state))
    assert torch.equal(given.states[1], drawn.states[1])
    other = draw(vae, images, 4, torch.Generator().manual_seed(6), fitted=fitted)
    assert not torch.equal(drawn.means, other.means)


def test_infusion_draws_its_transitions():
    vae, images = tiny("infusion").float(), tiny_images()
    drawn = draw(vae, images, 4, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    state = torch.rand(4, 3, 4, 4, generator=generator) * 2 - 1
    for t in (1, 2, 3):
        mean = vae.generate(t, state, None).detach()
        state = mean + vae.log_sigma(t).exp().detach() * torch.randn(mean.shape, generator=generator)
        assert torch.equal(drawn.states[t], images.to_uint8(state))
    assert torch.equal(drawn.means, images.to_uint8(mean)) and not torch.equal(drawn.means, drawn.states[-1])


def test_evaluation_against_a_plain_loop(monkeypatch):
    vae, images = tiny().float(), tiny_images(7)
    monkeypatch.setattr(model, "BATCH", 3)
    torch.manual_seed(0)
    measured = training.evaluate(vae, images, images.held_out)
    torch.manual_seed(0)
    rows = []
    for part in images.held_out.split([3, 2, 2]):
        x = images.to_float(part)
        links = chain(vae, x)
        for k in range(len(x)):
            rows.append([[(link.step.image[k] - x[k]).square().mean(), link.log_p[k], link.kl[k]] for link in links])
    for which, name in enumerate(("error", "log_p", "kl")):
        np.testing.assert_allclose(measured[name], torch.tensor(rows)[..., which], rtol=1e-4, atol=1e-4)


# Trainings


def test_the_kl_controller_finds_the_weight_that_gives_the_rate():
    vae = tiny("one_step").float()
    for _ in range(400):  # a rate that falls as the weight rises
        training.update_kl_weight(vae, 30 / vae.log_weight.exp(), 10.0, 0.05)
    assert vae.log_weight.exp().item() == pytest.approx(3, rel=1e-3)
    before = vae.log_weight.item()
    training.update_kl_weight(vae, torch.tensor(1e9), 10.0, 0.05)
    assert vae.log_weight.item() == pytest.approx(before + 0.05)
    for _ in range(1000):
        training.update_kl_weight(vae, torch.tensor(0.0), 10.0, 1.0)
    assert vae.log_weight.exp().item() == pytest.approx(1e-3)


def test_what_is_watched_beside_a_target_rate_is_no_error_at_another_rate():
    images = tiny_images()
    measured = {"error": torch.ones(2, 1), "log_p": torch.full((2, 1), -48.0), "kl": torch.full((2, 1), 10.0)}
    for rate, penalty in ((10.0, 0.0), (9.6, 0.0), (5.0, 10 * (10 - 5.25)), (20.0, 10 * (19 - 10))):
        watched = training.watched(measured, images, rate)
        assert watched["distortion_at_the_rate"] == pytest.approx(1 + penalty / 48)
    assert training.watched(measured, images)["negative_bound"] == pytest.approx(58 / 48)


def test_the_kl_rises_to_its_weight():
    settings = dataclasses.replace(TINY, kl_annealing=0.1)
    factors = [training.kl_annealing_factor(settings, fraction) for fraction in (0.0, 0.1)]
    assert factors == pytest.approx([0, 1 - math.exp(-1)])
    assert training.kl_annealing_factor(dataclasses.replace(TINY, kl_annealing=0.0), 0.0) == 1


@pytest.mark.parametrize("name", ["sequential", "one_step", "infusion", "no_latent"])
def test_an_update_follows_each_step_of_the_chain(name, monkeypatch):
    """The losses of a batch's updates, and what they hand on, are those of the chain with the same draws."""
    images, parent = tiny_images(), tiny().float() if name == "no_latent" else None
    settings = dataclasses.replace(TINY, input_noise=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(train, "fit", lambda *arguments, **options: arguments)
        vae, loss, batch, _, recipe, _ = training.fit_model(settings, images, name, 4, Path(), 0, parent=parent)
    assert recipe.updates == {"sequential": 3, "one_step": 1, "infusion": 3, "no_latent": 2}[name]
    torch.manual_seed(3)
    following, losses = [batch(torch.arange(4))], []
    after = torch.get_rng_state()
    codes, x = following[0].codes, following[0].x
    vae.eval()
    for update in range(recipe.updates):
        value, _, *following = loss(vae, *following, train.Progress(4, 1.0, update))
        losses.append(value.item())
    torch.set_rng_state(after)
    links = no_latent_links(vae, x, parent) if parent else chain(vae, x, codes)
    assert losses == pytest.approx(
        [(link.kl - link.log_p).mean().item() for link in links], rel=0.1 if parent else 1e-4
    )


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    """With its KL controller's weight, its prior and its noise."""
    images, true_fit, true_step, calls = tiny_images(), train.fit, take_step, []

    def often(model, loss, batch, count, recipe, *rest, **options):
        return true_fit(
            model, loss, batch, count, dataclasses.replace(recipe, checkpoint_minutes=0.0), *rest, **options
        )

    def failing(vae, t, *arguments, **options):
        calls.append(t)
        if calls.count(1) == 3 and t == vae.steps:
            raise RuntimeError("stopped")
        return true_step(vae, t, *arguments, **options)

    monkeypatch.setattr(train, "fit", often)
    for name, rates in (("sequential", None), ("one_step", (3.0, 3.0))):
        whole = training.fit_model(TINY, images, name, 4, tmp_path / "whole", 0, rates=rates)
        calls.clear()
        monkeypatch.setattr(training, "take_step", failing)
        with pytest.raises(RuntimeError, match="stopped"):
            training.fit_model(TINY, images, name, 4, tmp_path / "parts", 0, rates=rates)
        monkeypatch.setattr(training, "take_step", true_step)
        resumed = training.fit_model(TINY, images, name, 4, tmp_path / "parts", 0, rates=rates)
        assert len(resumed.resumed) == 1 and resumed.steps == 4
        for key, value in whole.model.state_dict().items():
            assert torch.equal(value, resumed.model.state_dict()[key]), key
        assert (whole.model.log_weight != 0) == (rates is not None)
        assert all(prior.batches == 4 for prior in whole.model.priors)


def test_a_lost_training_starts_from_the_weights_that_were_secured(tmp_path):
    images = tiny_images()
    first = training.fit_model(TINY, images, "sequential", 3, tmp_path / "lost", 0)
    recorded.save_unfinished(tmp_path / "lost" / "sequential", tmp_path / "half.safetensors")
    settings = dataclasses.replace(TINY, start_from=str(tmp_path / "half.safetensors"), learning_rate=1e-9)
    again = training.fit_model(settings, images, "sequential", 1, tmp_path, 1)
    weights, expected = (dict(one.model.named_parameters()) for one in (again, first))
    torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-4)
    assert again.provenance["start_from"] == settings.start_from
    with pytest.raises(UserError, match="cannot be read"):
        training.fit_model(dataclasses.replace(TINY, start_from="nix"), images, "sequential", 1, tmp_path / "new", 0)


def test_all_models_are_trained_and_the_control_is_of_the_trained_chain(tmp_path, monkeypatch):
    images, seen, true = tiny_images(), [], training.fit_model

    def noted(settings, images, name, *rest, **options):
        seen.append((name, options))
        return true(settings, images, name, *rest, **options)

    monkeypatch.setattr(training, "fit_model", noted)
    trained = training.fit(TINY, images, tmp_path, 0)
    assert list(trained) == list(experiment.MODELS) == [name for name, _ in seen]
    parent = trained["sequential"].model
    assert seen[1][1]["rates"] == training.rates(TINY, images, parent, 0) and min(seen[1][1]["rates"]) > 0
    assert seen[3][1]["parent"] is parent


def test_smaller_images_are_means_over_squares():
    pictures = np.random.default_rng(0).integers(256, size=(5, 8, 8, 3), dtype=np.uint8)
    split = datasets.Split(pictures)
    dataset = experiment.smaller(datasets.Dataset("d", split, split, 256, "noise"), 4)
    assert dataset.train.images.shape == (5, 4, 4, 3) and "2 x 2" in dataset.source
    for n, i, j, c in itertools.product(range(5), range(4), range(4), range(3)):
        mean = pictures[n, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, c].astype(float).mean()
        assert abs(dataset.held_out.images[n, i, j, c] - mean) <= 0.5
    assert experiment.smaller(dataset, 4) is dataset
    with pytest.raises(ValueError, match="no squares"):
        experiment.smaller(dataset, 3)


def test_images_on_disk_are_read_in_the_order_asked_for(tmp_path):
    images = tiny_images()
    np.save(tmp_path / "a.npy", images.train.numpy())
    mapped = dataclasses.replace(images, train=np.load(tmp_path / "a.npy", mmap_mode="r"))
    rows = torch.tensor([7, 0, 3, 3])
    assert torch.equal(mapped.batch(rows), images.batch(rows)) and mapped.shape == images.shape


# Presets


def arithmetic(settings, name):
    """FLOPs of one image in training, forward and backward through all steps; parameters."""
    shape = (3, settings.side, settings.side)
    with torch.device("meta"):
        vae, x = build(settings, shape, name), torch.empty(1, *shape)
        parent = build(settings, shape, "sequential") if name == "no_latent" else None
    steps = range(2 if parent else 1, vae.steps + 1)
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        for t in steps:
            if parent:
                with torch.no_grad():
                    parent(x, x, *parent.place(t - 1))
            vae(x, x, *vae.place(t)).image.sum().backward()
    return counter.get_total_flops(), sum(p.numel() for p in vae.parameters())


@pytest.mark.parametrize(("preset", "most"), [("cpu", math.inf), ("gpu", 9e6), ("paper", math.inf)])
def test_the_one_step_baseline_is_matched_in_arithmetic(preset, most):
    settings = experiment.PRESETS[preset]
    (flops, parameters), (one_step, of_one_step) = (arithmetic(settings, name) for name in ("sequential", "one_step"))
    assert abs(one_step / flops - 1) < 0.1 and settings.train_steps == settings.one_step_train_steps
    assert parameters <= most and of_one_step <= most


def test_cost_of_the_presets():
    """cpu: a night at 290 GFLOP/s, which two cores with bfloat16 reach. gpu: half an hour at 8 % of 790 TFLOP/s.
    paper: the authors' 190 million parameters.
    """
    for preset, speed, most in (("cpu", 290e9, 8 * 3600), ("gpu", 0.08 * 790e12, 1800)):
        settings = experiment.PRESETS[preset]
        steps = (settings.train_steps, settings.one_step_train_steps)
        steps += (settings.infusion_train_steps, settings.ablation_train_steps)
        plan = dict(zip(experiment.MODELS, steps, strict=True))
        flops = sum(count * settings.batch_size * arithmetic(settings, name)[0] for name, count in plan.items())
        assert 0.5 * most < flops / speed < most, f"{preset}: {flops / speed:.0f} seconds"
    assert arithmetic(experiment.PRESETS["paper"], "sequential")[1] == pytest.approx(190e6, rel=0.15)


@pytest.mark.slow
def test_the_gpu_preset_takes_a_few_steps(tmp_path, monkeypatch):
    """The networks, precision and objectives of `gpu`, at 16 pixels, uncompiled."""
    monkeypatch.setenv("PAPERLIB_RUNS", str(tmp_path))
    few = {"dataset": "photos", "side": 16, "batch_size": 4, "compile": False, "evaluation_images": 8}
    few |= {name: 2 for name in ("train_steps", "one_step_train_steps", "infusion_train_steps", "ablation_train_steps")}
    run = experiment.start("gpu", 0, "cpu", {**few, "measured_images": 8})
    trained = experiment.fit(run, experiment.load_images(run))
    assert all(math.isfinite(one.history[-1]["loss"]) for one in trained.values())


def test_the_one_step_baseline_has_the_codes_of_all_steps():
    for steps in (2, 5):
        chained, one_step = tiny(chain_steps=steps), tiny("one_step", chain_steps=steps)
        assert one_step.steps == 1 and sum(one_step.ladder) == steps * sum(chained.ladder)
