"""The PixelVAE: its terms against quadrature and plain loops; its trainings and its chain."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
import toy_training
from torch.distributions import Normal
from torch.utils.flop_counter import FlopCounterMode

from paperlib.data import datasets
from paperlib.data.device_images import Images
from paperlib.nn import likelihoods, pixelcnn
from paperlib.nn.pixelcnn_sampler import Sampler
from paperlib.pixelvae import experiment, markov_chain, training
from paperlib.pixelvae.experiment import PRESETS, Settings
from paperlib.pixelvae.model import PixelVAE
from paperlib.pixelvae.training import OBJECTIVES, PRETRAINING, VARIANTS
from paperlib.runs import train
from paperlib.stats.two_sample import gaussian_mmd
from paperlib.system.errors import UserError

TINY = Settings(code_dim=2, encoder_channels=(4,), encoder_units=8, code_channels=(4, 3), filters=4, mixtures=2)
FEW = dataclasses.replace(TINY, batch_size=4, pretrain_steps=3, finetune_steps=2, ablation_steps=1)


def tiny_images(count=24, channels=1):
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(5, (count, 8, 8, channels), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % 3
    split = datasets.Split(pictures.numpy(), labels.numpy())
    return Images(datasets.Dataset("tiny", split, split, 5, "noise"), pictures, labels, pictures, labels)


def tiny_vae(encoder="conv", channels=1, seed=1, **changes):
    torch.manual_seed(seed)
    vae = PixelVAE(dataclasses.replace(TINY, **changes), channels, 8, 5, 3, encoder)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return vae.double().eval()


def fit(folder, **changes):
    return training.fit(dataclasses.replace(FEW, **changes), tiny_images(), folder, 0)


# The model


def test_elbo_and_kl_to_the_posterior_add_up_to_log_p():
    """log p(x) = ELBO + KL(q(z|x) || p(z|x)), one code dimension, all by quadrature: signs and constants."""
    vae, images = tiny_vae(code_dim=1), tiny_images(1)
    x = images.to_float(images.train).double()
    z = torch.linspace(-9, 9, 3001, dtype=torch.float64)
    step = z[1] - z[0]
    with torch.no_grad():
        mean, log_std = vae.q_z_given_x(x)
        log_p_x_given_z = vae.p_x_given_z(x.expand(len(z), -1, -1, -1), z[:, None])
    log_q = Normal(mean[0], log_std[0].exp()).log_prob(z)
    log_joint = log_p_x_given_z + Normal(0.0, 1.0).log_prob(z)
    log_p = torch.logsumexp(log_joint, 0) + step.log()
    to_posterior = step * (log_q.exp() * (log_q - (log_joint - log_p))).sum()
    elbo = step * (log_q.exp() * log_p_x_given_z).sum() - OBJECTIVES["elbo"](TINY, mean, log_std, None)
    torch.testing.assert_close(elbo + to_posterior, log_p, rtol=0, atol=1e-6)
    assert to_posterior > 0.001


@pytest.mark.parametrize("encoder", ["conv", "linear", "label", "nothing"])
def test_terms_of_a_batch_depend_on_every_parameter_and_on_no_unseen_pixel(encoder):
    vae, images = tiny_vae(encoder, channels=3), tiny_images(channels=3)
    x, seen = images.to_float(images.train).double(), torch.arange(24) % 2 == 0
    log_p, mean, log_std, z = vae(x, images.labels, seen.double().view(24, 1, 1, 1))
    assert vae.learns_code == (mean is not None) == (encoder in ("conv", "linear"))
    if encoder == "label":
        assert torch.equal(z, torch.eye(3).double()[images.labels])
    if vae.learns_code:
        assert 0.6 < ((z - mean) / log_std.exp()).std() < 1.4
    h = None if z is None else vae.expand(z)
    all_seen, params = pixelcnn.log_prob(vae.decoder, x, h), vae.decoder(torch.zeros_like(x), h)
    unseen = likelihoods.discretized_mix_logistic_log_prob(x, params, levels=5)
    assert (unseen != all_seen).all()
    torch.testing.assert_close(log_p, torch.where(seen, all_seen, unseen))
    log_p.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vae.parameters())


@pytest.mark.parametrize("encoder", ["conv", "linear"])
def test_std_of_the_code_within_its_limits_and_of_means_and_maps_at_first(encoder):
    """Means vary over images, and the map over codes, by about 1; with torch's own weights by a few hundredths."""
    dataset = datasets.load("digits")
    x = datasets.to_float(dataset.train.images[:200], 17)
    torch.manual_seed(0)
    vae = PixelVAE(PRESETS["smoke"], 1, 8, 17, 10, encoder)
    mean, log_std = vae.q_z_given_x(x)
    assert 0.3 < mean.std(0).median() < 3 and 0.4 < log_std.exp().median() < 0.8
    assert 0.2 < vae.h(mean).std(0).mean() < 3
    for scale, limit in ((1e4, 1.0), (-1e4, vae.min_std)):
        with torch.no_grad():
            vae.encoder[-1].bias[vae.code_dim :] = scale
        torch.testing.assert_close(vae.q_z_given_x(x)[1].exp(), torch.full_like(mean, limit))


# Objectives and evaluation


def test_objectives():
    mean, log_std, z = torch.randn(6, 2), -torch.rand(6, 2), torch.randn(6, 2)
    settings = dataclasses.replace(TINY, kl_weight=0.3, mmd_weight=7.0)
    added = {name: objective(settings, mean, log_std, z) for name, objective in OBJECTIVES.items()}
    kl = likelihoods.gaussian_kl(mean, log_std).mean()
    torch.testing.assert_close(added, {"elbo": 0.3 * kl, "none": torch.tensor(0.0), "mmd": 7 * gaussian_mmd(z)})


def test_evaluation_against_a_plain_loop(monkeypatch):
    vae, images = tiny_vae(min_std=1e-9), tiny_images()
    x = images.to_float(images.held_out).double()
    with torch.no_grad():
        vae.encoder[-1].bias[vae.code_dim :] = -100  # next to no noise
        codes, log_std = vae.q_z_given_x(x)
        own, other = (
            torch.cat([vae.p_x_given_z(x[i : i + 1], codes[[(i + k) % 24]]) for i in range(24)]) for k in (0, 1)
        )
    monkeypatch.setattr(training, "BATCH", 7)
    measured = training.evaluate(vae.float(), images, images.held_out, images.held_out_labels)
    assert (own - other).abs().max() > 0.1
    kl = likelihoods.gaussian_kl(codes, log_std)
    expected = {"bits_per_dim": -own / (64 * math.log(2)), "kl": kl, "shuffle_gap": own - other}
    torch.testing.assert_close(measured, expected, rtol=1e-3, atol=1e-3)
    for encoder in ("label", "nothing"):
        measured = training.evaluate(tiny_vae(encoder).float(), images, images.held_out, images.held_out_labels)
        assert set(measured) == {"bits_per_dim"}


# Trainings


def test_only_the_first_half_of_pretraining_hides_pixels(tmp_path, monkeypatch):
    hidden, true = [], PixelVAE.forward

    def forward(self, x, labels, seen):
        hidden.append(1 - seen.mean().item())
        return true(self, x, labels, seen)

    monkeypatch.setattr(PixelVAE, "forward", forward)
    fit(tmp_path, pretrain_steps=8, input_dropout=1.0, batch_size=24)
    assert hidden[:4] == pytest.approx([1, 0.75, 0.5, 0.25], abs=0.35) and hidden[0] == 1
    assert hidden[4:] == [0] * (4 + 6 * FEW.finetune_steps + 2 * FEW.ablation_steps)


def test_what_each_training_starts_from(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERLIB_RUNS", str(tmp_path))
    images, trained = tiny_images(), fit(tmp_path / "all")
    assert list(trained) == [PRETRAINING, *VARIANTS]
    none, linear, scratch = (
        markov_chain.encode(trained[name].model, images, images.train)[1].exp()
        for name in ("none", "linear", "none-scratch")
    )
    assert max(none.max(), linear.max()) < 0.35 < 0.5 < scratch.median(), "std(x)"
    for name in ("none", "elbo-scratch"):
        alone = training.fit_variant(FEW, images, name, VARIANTS[name], 2, tmp_path / "alone", 0).model.state_dict()
        same = all(torch.equal(v, alone[k]) for k, v in trained[name].model.state_dict().items())
        assert same == name.endswith("scratch")
    slow = {"start_from": f"all/{PRETRAINING}", "pretrain_steps": 1, "learning_rate": 1e-9}
    again = fit(tmp_path / "slowly", **slow)
    for name in (PRETRAINING, "mmd"):
        weights, expected = (dict(one.model.state_dict()) for one in (again[name], trained[PRETRAINING]))
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="no checkpoint"):
        fit(tmp_path / "third", **slow | {"start_from": "elsewhere"})


def test_without_pretraining_nothing_is_trained_twice(tmp_path):
    trained = fit(tmp_path, pretrain_steps=0)
    assert list(trained) == list(VARIANTS) and trained["none-scratch"] is trained["none"]
    assert not (tmp_path / "elbo-scratch").exists()


@pytest.mark.parametrize(
    ("encoder", "new"), [("label", {"expand.0.weight"}), ("linear", {"encoder.1.weight", "encoder.1.bias"})]
)
def test_matching_weights_are_all_but_the_encoder_or_the_layer_that_reads_the_code(encoder, new):
    vae, theirs = tiny_vae(encoder, seed=2), tiny_vae(seed=1).state_dict()
    before = {k: v.clone() for k, v in vae.state_dict().items()}
    training.load_matching_weights(vae, theirs)
    for key, value in vae.state_dict().items():
        assert torch.equal(value, before[key] if key in new else theirs[key]), key


@pytest.mark.parametrize("changes", [{"ema": 0.0}, {}, {"ema": 0.0, "patience": 1}])
def test_weights_to_start_from_are_those_that_training_returns(tmp_path, changes):
    """The best with patience, otherwise the average, otherwise the last."""
    values = iter([3.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    recipe = dataclasses.replace(toy_training.BASE, **changes)
    trained = toy_training.run(tmp_path, recipe, evaluate=lambda model: {"error": next(values)})
    weights, last = train.load_weights(tmp_path), toy_training.load(tmp_path)["model"]
    assert all(torch.equal(weights[k], v) for k, v in trained.model.state_dict().items())
    assert torch.equal(weights["0.weight"], last["0.weight"]) == (changes == {"ema": 0.0})


# The chain


def test_the_chain_encodes_draws_and_decodes():
    images, vae = tiny_images(3), tiny_vae().float()
    states = markov_chain.markov_chain(vae, images, images.train, 3, torch.Generator().manual_seed(5))
    generator, sampler = torch.Generator().manual_seed(5), Sampler(vae.decoder, 3, 8, 8)
    assert states.shape == (4, 3, 8, 8, 1) and torch.equal(states[0], images.train)
    for before, after in itertools.pairwise(states):
        with torch.no_grad():
            mean, log_std = vae.q_z_given_x(images.to_float(before))
            z = mean + log_std.exp() * torch.randn(3, 2, generator=generator)
            x = sampler.draw(vae.h(z), generator=generator)
        assert torch.equal(images.to_float(after), x)


def test_a_decoder_takes_any_number_of_codes():
    images, vae, z = tiny_images(), tiny_vae().float(), torch.randn(7, 2)
    drawn, few = (markov_chain.Decoder(vae, images, 3)(codes, torch.Generator().manual_seed(0)) for codes in (z, z[:3]))
    assert drawn.shape == (7, 8, 8, 1) and drawn.dtype == torch.uint8 and int(drawn.max()) <= 4
    assert torch.equal(drawn[:3], few)


def test_noise_images_use_every_level_alike():
    noise = markov_chain.noise_images(tiny_images(), 200, torch.Generator().manual_seed(0))
    share = np.bincount(noise.flatten().numpy(), minlength=5) / noise.numel()
    assert share == pytest.approx([0.2] * 5, abs=0.02)


# Presets


def test_cost_of_the_presets():
    """All trainings of `gpu` on one H200, at 20 % of its 790 TFLOP/s, within 22 minutes."""
    flops, parameters = {}, {}
    for preset in ("cpu", "gpu"):  # a training step on images of CIFAR-10, forward and backward
        vae = PixelVAE(PRESETS[preset], 3, 32, 256, 10, "conv")
        with FlopCounterMode(display=False) as counter:
            vae(torch.rand(2, 3, 32, 32) * 2 - 1, torch.zeros(2, dtype=torch.long)).log_p.mean().backward()
        flops[preset], parameters[preset] = counter.get_total_flops() / 2, sum(p.numel() for p in vae.parameters())
    assert 0.9e9 < flops["cpu"] < 1.4e9 and 18e9 < flops["gpu"] < 22e9 and parameters["gpu"] < 9e6
    settings = PRESETS["gpu"]
    steps = settings.pretrain_steps + 6 * settings.finetune_steps + 2 * settings.ablation_steps
    assert steps * settings.batch_size * flops["gpu"] / (0.2 * 790e12) / 60 < 22


@pytest.mark.slow
def test_the_gpu_preset_takes_a_few_steps(tmp_path, monkeypatch):
    """The networks, precision and objectives of `gpu`, at digits' size, uncompiled."""
    monkeypatch.setenv("PAPERLIB_RUNS", str(tmp_path))
    few = {"dataset": "digits", "pretrain_steps": 2, "finetune_steps": 2, "ablation_steps": 1, "batch_size": 4}
    run = experiment.start("gpu", 0, "cpu", "train", {**few, "compile": False, "evaluation_images": 8})
    trained = experiment.fit(run, experiment.load_images(run))
    assert all(math.isfinite(one.history[-1]["loss"]) for one in trained.values())
    assert trained[PRETRAINING].steps == 2 and len(trained) == 9
