"""The sequential VAE: its terms against torch.distributions and quadrature, its gradients, trainings and samplers."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence
from torch.utils.flop_counter import FlopCounterMode

from paperlib.data import datasets
from paperlib.data.device_images import Images
from paperlib.runs import train
from paperlib.sequential import experiment as sequential_experiment
from paperlib.sequential import model as sequential_model
from paperlib.sequential import training as sequential_training
from paperlib.sequential.model import build, chain, draw, no_latent_links, objective, pixel_codes, random_steps, swap
from paperlib.sequential.networks import Size, StepNetwork

TINY = sequential_experiment.Settings(
    chain_steps=3,
    side=4,
    ladder=(2, 3),
    widths=(16, 16),
    units=16,
    maps=(4,),
    one_step_ladder=(4, 6),
    one_step_widths=(16, 16),
    one_step_units=16,
    one_step_maps=(4,),
    picture_widths=(16, 16),
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
    for link in chain(vae, x):
        sigma = vae.log_sigma(link.t).exp()
        if scale:
            assert sigma.item() == pytest.approx(1 / math.sqrt(32))
        p = Independent(Normal(link.step.image, sigma.double().expand_as(x)), 3)
        torch.testing.assert_close(link.log_p, p.log_prob(x))
        q = Independent(Normal(link.step.mean, link.step.log_std.exp()), 1)
        prior = Independent(Normal(torch.zeros_like(link.step.mean), 1.0), 1)
        torch.testing.assert_close(link.kl, kl_divergence(q, prior))
        assert link.step.z.shape == (5, 5) and link.step.image.shape == x.shape


def test_a_fixed_deviation_weighs_the_squared_error():
    """-log p differs from 16 times the squared error by a constant."""
    vae, x = tiny(reconstruction_scale=16.0), targets()
    found = [-link.log_p - 16 * (x - link.step.image).square().sum((1, 2, 3)) for link in chain(vae, x)]
    torch.testing.assert_close(torch.stack(found), torch.full((3, 5), found[0][0].item(), dtype=torch.float64))


def test_bound_and_kl_to_the_posterior_add_up_to_log_p():
    """Two steps, one code dimension each, on a grid: log p(x) = bound (8) + KL(q(z_1, z_2 | x) || p(z_1, z_2 | x))."""
    one_scale = {"ladder": (1,), "widths": (16,), "maps": (), "one_step_ladder": (1,), "one_step_widths": (16,)}
    one_scale |= {"one_step_maps": (), "side": 16}
    vae = tiny(chain_steps=2, shape=(1, 2, 2), picture_widths=(16,), **one_scale)
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
    vae, x = tiny(), targets()
    network, previous = vae.networks[1], targets(seed=5)
    which, index = vae.place(2)
    assert which == 1
    plain, noisy = network(x, previous, index).image, network(x, previous, index, 0.5).image
    assert not torch.allclose(plain, noisy)
    with torch.no_grad():
        network.generator.last.weight[:, -1], network.generator.last.bias[-1] = 0, 100  # g = 1
    torch.testing.assert_close(network(x, previous, index, 0.5).image, previous)
    with torch.no_grad():
        network.generator.last.bias[-1] = -100  # g = 0
    image = network(x, previous, index).image
    with torch.no_grad():
        network.generator.last.bias[-1] = 0  # g = 1/2
    torch.testing.assert_close(network(x, 0 * previous, index).image * 0 + image, image)
    z = torch.zeros(5, 5, dtype=torch.float64)
    half = network.generator(previous, previous, z, index)
    with torch.no_grad():
        network.generator.last.bias[-1] = -100
    torch.testing.assert_close(half, (previous + network.generator(previous, previous, z, index)) / 2)


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
def test_every_parameter_learns(name, shared):
    vae, x = tiny(name, shared=shared), targets()
    if name == "no_latent":
        links = no_latent_links(vae, x, tiny("sequential", shared=shared))
    else:
        links = chain(vae, x, noise=0.1)
    objective(links, 1.0)[0].backward()
    silent = [key for key, p in vae.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent
    if name == "no_latent":
        assert vae.s.grad[0] == 0, "the control has no first step"


@pytest.mark.parametrize("per_step_loss", [True, False])
def test_gradients_stop_between_steps_with_terms_of_their_own(per_step_loss):
    vae, x = tiny(), targets()
    links = chain(vae, x, per_step_loss=per_step_loss)
    (-links[1].log_p + links[1].kl).sum().backward()
    first = sum(p.grad.abs().sum().item() for p in vae.networks[0].parameters() if p.grad is not None)
    later = sum(p.grad.abs().sum().item() for p in vae.networks[1].parameters() if p.grad is not None)
    assert (first == 0) == per_step_loss and later > 0


def test_without_own_terms_only_the_last_reconstruction_counts():
    links = chain(tiny(), targets(), per_step_loss=False)
    value, terms = objective(links, 0.5, per_step_loss=False)
    kl = sum(link.kl.mean() for link in links)
    torch.testing.assert_close(value, 0.5 * kl - links[-1].log_p.mean())
    torch.testing.assert_close(terms["kl"], kl)


def test_random_steps_are_unbiased():
    """The mean over all that may be drawn is the whole sum, in value and gradient, for the same draws of codes."""
    vae, x = tiny(), targets()

    def value_and_gradient(weights):
        torch.manual_seed(7)
        vae.zero_grad()
        links = [link for link in chain(vae, x, chosen=list(weights), noise=0.1) if link.t in weights]
        value, _ = objective(links, 0.3, weights=weights)
        value.backward()
        return value.detach(), [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in vae.parameters()]

    whole, gradient = value_and_gradient({1: 1.0, 2: 1.0, 3: 1.0})
    for always, count in ((), 2), ((1,), 1):
        drawn = {tuple(random_steps([1, 2, 3], count, always=always).items()) for _ in range(100)}
        assert len(drawn) == (2 if always else 3), "every subset"
        found = [value_and_gradient(dict(weights)) for weights in drawn]
        torch.testing.assert_close(sum(value for value, _ in found) / len(found), whole)
        for k, expected in enumerate(gradient):
            torch.testing.assert_close(sum(one[k] for _, one in found) / len(found), expected)
    torch.manual_seed(0)
    counts = np.zeros(8)
    for _ in range(2000):
        weights = random_steps(range(1, 9), 2, always=[1])
        first, *others = weights
        assert first == 1 and weights[1] == 1 and others == sorted(others) and len(others) == 2
        assert all(weights[t] == 7 / 2 for t in others)
        counts[np.array(others) - 1] += 1
    assert abs(counts[1:] / 2000 - 2 / 7).max() < 0.04
    assert random_steps([1, 2, 3], 0) == random_steps([1, 2, 3], 5, [1]) == {1: 1.0, 2: 1.0, 3: 1.0}


def test_a_chain_ends_at_the_last_chosen_step_and_learns_at_those():
    vae, x = tiny(), targets()
    links = chain(vae, x, chosen=[2])
    assert [link.t for link in links] == [1, 2]
    assert not links[0].step.image.requires_grad and links[1].step.image.requires_grad


# Infusion


def test_infusion_is_the_chain_with_a_subset_of_pixels_as_its_code():
    """Bordes' loss, written out in numpy but for the network, for fixed masks and draws."""
    vae, x = tiny("infusion", infusion_start=0.2, infusion_step=0.3), targets()
    codes = pixel_codes(vae, x, torch.Generator().manual_seed(3))
    with torch.no_grad():
        general, _ = objective(chain(vae, x, codes=codes), 1.0)
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
        links = chain(vae, x, codes=codes)
        again = chain(vae, x, codes=codes)
    assert all(torch.equal(a.log_p, b.log_p) and not a.kl.any() for a, b in zip(links, again, strict=True))


# Depth, swapping, drawing


def test_depth_goes_on_from_the_images_of_the_trained_chain():
    parent, vae, x = tiny(), tiny("no_latent", seed=4), targets()
    torch.manual_seed(0)
    links = no_latent_links(vae, x, parent, chosen=[2, 3])
    torch.manual_seed(0)
    before = chain(parent, x)
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


def test_a_drawn_chain_is_the_equation():
    vae, images = tiny().float(), tiny_images()
    drawn = draw(vae, images, 4, torch.Generator().manual_seed(5))
    assert drawn.states.shape == (4, 4, 4, 4, 3) and torch.equal(drawn.states[-1], drawn.means)
    generator = torch.Generator().manual_seed(5)
    noise = torch.rand(4, 3, 4, 4, generator=generator) * 2 - 1
    assert torch.equal(drawn.states[0], images.to_uint8(noise))
    state = None
    for t in (1, 2, 3):
        state = vae.generate(t, state, torch.randn(4, 5, generator=generator)).detach()
        assert torch.equal(drawn.states[t], images.to_uint8(state))
    again = draw(vae, images, 4, torch.Generator().manual_seed(5))
    other = draw(vae, images, 4, torch.Generator().manual_seed(6))
    assert torch.equal(drawn.states, again.states) and not torch.equal(drawn.means, other.means)


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
    monkeypatch.setattr(sequential_model, "BATCH", 3)
    torch.manual_seed(0)
    found = sequential_training.evaluate(vae, images, images.held_out)
    torch.manual_seed(0)
    rows = {"error": [], "log_p": [], "kl": []}
    for part in images.held_out.split([3, 2, 2]):
        x = images.to_float(part)
        links = chain(vae, x)
        for k in range(len(x)):
            rows["error"].append([(link.step.image[k] - x[k]).square().mean().item() for link in links])
            rows["kl"].append([link.kl[k].item() for link in links])
            rows["log_p"].append([link.log_p[k].item() for link in links])
    for name, values in rows.items():
        np.testing.assert_allclose(found[name].numpy(), values, rtol=1e-4, atol=1e-4)


# Trainings


def test_steering_finds_the_weight_that_gives_the_rate():
    vae = tiny("one_step").float()
    for _ in range(400):
        sequential_training.update_kl_weight(
            vae, 30 / vae.log_weight.exp(), 10.0, 0.05
        )  # a rate that falls as the weight rises
    assert vae.log_weight.exp().item() == pytest.approx(3, rel=1e-3)
    before = vae.log_weight.item()
    sequential_training.update_kl_weight(vae, torch.tensor(1e9), 10.0, 0.05)
    assert vae.log_weight.item() == pytest.approx(before + 0.05)
    for _ in range(1000):
        sequential_training.update_kl_weight(vae, torch.tensor(0.0), 10.0, 1.0)
    assert vae.log_weight.exp().item() == pytest.approx(1e-3)


def test_what_is_watched_while_a_rate_is_steered_is_no_error_at_another_rate():
    images = tiny_images()
    measured = {"error": torch.ones(2, 1), "log_p": torch.full((2, 1), -48.0), "kl": torch.full((2, 1), 10.0)}
    for rate, dearer in ((10.0, 0.0), (9.6, 0.0), (5.0, 10 * (10 - 5.25)), (20.0, 10 * (19 - 10))):
        found = sequential_training.watched(measured, images, rate)["distortion_at_the_rate"]
        assert found == pytest.approx(1 + dearer / 48)
    assert next(iter(sequential_training.watched(measured, images).items())) == (
        "negative_bound",
        pytest.approx(58 / 48),
    )


def test_the_kl_rises_to_its_weight():
    settings = dataclasses.replace(TINY, kl_annealing=0.1)
    assert sequential_training.kl_annealing_factor(settings, 0.0) == 0
    assert sequential_training.kl_annealing_factor(settings, 0.1) == pytest.approx(1 - math.exp(-1))
    assert sequential_training.kl_annealing_factor(dataclasses.replace(TINY, kl_annealing=0.0), 0.0) == 1


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    """With its steered weight, its random steps and its noise."""
    images, true_fit, true_objective, calls = tiny_images(), train.fit, sequential_model.objective, []

    def often(model, loss, batch, count, recipe, *rest, **options):
        return true_fit(
            model, loss, batch, count, dataclasses.replace(recipe, checkpoint_minutes=0.0), *rest, **options
        )

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("stopped")
        return true_objective(*arguments, **options)

    monkeypatch.setattr(train, "fit", often)
    for name, rates in (("sequential", None), ("one_step", (3.0, 3.0))):
        whole = sequential_training.fit_model(TINY, images, name, 4, tmp_path / "whole", 0, rates=rates)
        calls.clear()
        monkeypatch.setattr(sequential_training, "objective", failing)
        with pytest.raises(RuntimeError, match="stopped"):
            sequential_training.fit_model(TINY, images, name, 4, tmp_path, 0, rates=rates)
        monkeypatch.setattr(sequential_training, "objective", true_objective)
        resumed = sequential_training.fit_model(TINY, images, name, 4, tmp_path, 0, rates=rates)
        assert len(resumed.resumed) == 1 and resumed.steps == 4
        for key, value in whole.model.state_dict().items():
            assert torch.equal(value, resumed.model.state_dict()[key]), key
        assert (whole.model.log_weight != 0) == (rates is not None)


def test_all_models_are_trained_and_the_control_is_of_the_trained_chain(tmp_path, monkeypatch):
    images, seen = tiny_images(), []
    true = sequential_training.fit_model

    def noted(settings, images, name, *rest, **options):
        seen.append((name, options))
        return true(settings, images, name, *rest, **options)

    monkeypatch.setattr(sequential_training, "fit_model", noted)
    trained = sequential_training.fit(TINY, images, tmp_path, 0, None)
    assert list(trained) == ["sequential", "one_step", "infusion", "no_latent"] == [name for name, _ in seen]
    chain_trained = trained["sequential"].model
    assert seen[1][1]["rates"] == sequential_training.rates(TINY, images, chain_trained, 0)
    assert min(seen[1][1]["rates"]) > 0
    assert seen[3][1]["parent"] is chain_trained


def test_smaller_images_are_means_over_squares():
    pictures = np.random.default_rng(0).integers(256, size=(5, 8, 8, 3), dtype=np.uint8)
    split = datasets.Split(pictures)
    dataset = sequential_experiment.smaller(datasets.Dataset("d", split, split, 256, "noise"), 4)
    assert dataset.train.images.shape == (5, 4, 4, 3) and "2 x 2" in dataset.source
    for n, i, j, c in itertools.product(range(5), range(4), range(4), range(3)):
        mean = pictures[n, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, c].astype(float).mean()
        assert abs(dataset.held_out.images[n, i, j, c] - mean) <= 0.5
    assert sequential_experiment.smaller(dataset, 4) is dataset
    with pytest.raises(ValueError, match="no squares"):
        sequential_experiment.smaller(dataset, 3)


def test_images_on_disk_are_read_in_the_order_asked_for(tmp_path):
    images = tiny_images()
    np.save(tmp_path / "a.npy", images.train.numpy())
    mapped = dataclasses.replace(images, train=np.load(tmp_path / "a.npy", mmap_mode="r"))
    rows = torch.tensor([7, 0, 3, 3])
    assert torch.equal(mapped.batch(rows), images.batch(rows)) and mapped.shape == images.shape


# Presets


def costs_of_steps(settings, name):
    """FLOPs of one image by (step, whether with gradient), forward and backward; parameters of the model."""
    costs, channels, side = {}, 3, settings.side
    with torch.device("meta"):
        vae = build(settings, (channels, side, side), name)
        x, index = torch.empty(1, channels, side, side), torch.empty((), dtype=torch.long)
    for t, graded in itertools.product(range(2 if name == "no_latent" else 1, vae.steps + 1), (False, True)):
        network, known = vae.networks[vae.place(t)[0]], (min(t, 3), graded)
        if known not in costs:
            with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(graded):
                image = network(x, x if network.sees else None, index).image
                if graded:
                    image.sum().backward()
            costs[known] = counter.get_total_flops()
        costs[t, graded] = costs[known]
    return costs, sum(p.numel() for p in vae.parameters())


def arithmetic(settings, name):
    """FLOPs of one training image and update, forward and backward, averaged over the random steps; parameters."""
    costs, parameters = costs_of_steps(settings, name)
    steps = sorted({t for t, _ in costs})
    first = [t for t in steps if t == 1]
    others = [t for t in steps if t != 1]
    count = min(settings.steps_per_batch or len(others), len(others))
    parent = costs_of_steps(settings, "sequential")[0] if name == "no_latent" else {}
    totals = []
    for chosen in ([*first, *some] for some in itertools.combinations(others, count)):
        if name == "no_latent":
            totals.append(sum(parent[t, False] for t in range(1, max(chosen))) + sum(costs[t, True] for t in chosen))
        else:
            totals.append(sum(costs[t, t in chosen] for t in range(1, max(chosen) + 1)))
    return sum(totals) / len(totals), parameters


@pytest.mark.parametrize(("preset", "most"), [("cpu", math.inf), ("gpu", 9e6), ("paper", math.inf)])
def test_single_is_matched_in_arithmetic(preset, most):
    settings = sequential_experiment.PRESETS[preset]
    (flops, parameters), (single, of_one_step) = (arithmetic(settings, name) for name in ("sequential", "one_step"))
    updates = settings.train_steps / settings.one_step_train_steps if preset != "gpu" else flops and single / flops
    assert abs(single / flops / updates - 1) < 0.1, "over a whole training"
    assert parameters <= most and of_one_step <= most
    assert sum(settings.one_step_ladder) == 8 * sum(settings.ladder)


def test_cost_of_the_presets():
    """cpu: 60 GFLOP/s, which is half of two slow cores' matrix rate, all within 120 minutes.
    gpu: DESIGN's 13, 4 and 3 minutes, at 12 % of an H200's 790 TFLOP/s. paper: the authors' 190 million and 30 GFLOP.
    """
    for preset, speed in (("cpu", 60e9), ("gpu", 0.12 * 790e12)):
        settings, minutes = sequential_experiment.PRESETS[preset], {}
        plan = {
            "sequential": settings.train_steps,
            "one_step": settings.one_step_train_steps,
            "infusion": settings.infusion_train_steps,
            "no_latent": settings.ablation_train_steps,
            "picture": settings.picture_train_steps,
        }
        if not settings.picture_side:
            del plan["picture"]
        for name, updates in plan.items():
            sized = dataclasses.replace(settings, side=settings.picture_side) if name == "picture" else settings
            minutes[name] = updates * settings.batch_size * arithmetic(sized, name)[0] / speed / 60
        if preset == "cpu":
            assert sum(minutes.values()) < 110, minutes
        else:
            assert 10 < minutes["sequential"] < 13 and minutes["one_step"] < 4 and minutes["infusion"] < 3
    flops, parameters = arithmetic(sequential_experiment.PRESETS["paper"], "sequential")
    assert parameters == pytest.approx(190e6, rel=0.15) and flops == pytest.approx(30e9, rel=0.15)


@pytest.mark.slow
def test_the_gpu_preset_takes_a_few_steps(tmp_path, monkeypatch):
    """The networks, precision and objectives of `gpu`, at 16 pixels, uncompiled."""
    monkeypatch.setenv("PAPERLIB_RUNS", str(tmp_path))
    few = {"dataset": "photos", "side": 16, "batch_size": 4, "compile": False, "evaluation_images": 8}
    few |= {name: 2 for name in ("train_steps", "one_step_train_steps", "infusion_train_steps", "ablation_train_steps")}
    run = sequential_experiment.start("gpu", 0, "cpu", "train", {**few, "measured_images": 8})
    trained = sequential_experiment.fit(run, sequential_experiment.load_images(run))
    assert all(math.isfinite(one.history[-1]["loss"]) for one in trained.values())
