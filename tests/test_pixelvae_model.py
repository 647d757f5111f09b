"""The PixelVAE: its terms against quadrature and plain loops; its trainings and its chain."""

import dataclasses
import itertools
import math
from types import SimpleNamespace

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
from paperlib.pixelvae.training import ABLATION, OBJECTIVES, VARIANTS
from paperlib.runs import recorded, train
from paperlib.stats import two_sample
from paperlib.system.errors import UserError

TINY = Settings(code_dim=2, encoder_channels=(4,), encoder_units=8, code_channels=(4, 3), filters=4, mixtures=2)
FEW = dataclasses.replace(
    TINY, batch_size=4, train_steps=4, elbo_steps=2, ablation_steps=2, sweep_dims=(1, 2), sweep_steps=2, evaluations=1
)


def tiny_images(count=24, channels=1):
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(5, (count, 8, 8, channels), generator=generator, dtype=torch.uint8)
    split = datasets.Split(pictures.numpy())
    return Images(datasets.Dataset("tiny", split, split, 5, "noise"), pictures, None, pictures, None)


def tiny_vae(coded=True, channels=1, seed=1, **changes):
    torch.manual_seed(seed)
    vae = PixelVAE(dataclasses.replace(TINY, **changes), channels, 8, 5, coded)
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


@pytest.mark.parametrize("coded", [True, False])
def test_terms_of_a_batch_depend_on_every_parameter_and_on_no_unseen_pixel(coded):
    vae, images = tiny_vae(coded, channels=3), tiny_images(channels=3)
    x, seen = images.to_float(images.train).double(), torch.arange(24) % 2 == 0
    log_p, mean, log_std, z = vae(x, seen.double().view(24, 1, 1, 1))
    assert (mean is not None) == coded
    if coded:
        assert 0.6 < ((z - mean) / log_std.exp()).std() < 1.4
    h = vae.expand(z) if coded else None
    all_seen, params = pixelcnn.log_prob(vae.decoder, x, h), vae.decoder(torch.zeros_like(x), h)
    unseen = likelihoods.discretized_mix_logistic_log_prob(x, params, levels=5)
    assert (unseen != all_seen).all()
    torch.testing.assert_close(log_p, torch.where(seen, all_seen, unseen))
    log_p.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vae.parameters())


def test_std_of_the_code_within_its_limits_and_of_means_and_maps_at_first():
    """Means vary over images, and the map over codes, by about 1; with torch's own weights by a few hundredths."""
    dataset = datasets.load("digits")
    x = datasets.to_float(dataset.train.images[:200], 17)
    torch.manual_seed(0)
    vae = PixelVAE(PRESETS["smoke"], 1, 8, 17)
    mean, log_std = vae.q_z_given_x(x)
    assert 0.3 < mean.std(0).median() < 3 and 0.4 < log_std.exp().median() < 0.8
    assert 0.2 < vae.h(mean).std(0).mean() < 3
    for scale, limit in ((1e4, 1.0), (-1e4, vae.min_std)):
        with torch.no_grad():
            vae.encoder[-1].bias[vae.code_dim :] = scale
        torch.testing.assert_close(vae.q_z_given_x(x)[1].exp(), torch.full_like(mean, limit))


def test_the_mixture_parameters_are_not_in_half_precision():
    vae, x = tiny_vae(channels=3).float(), tiny_images(channels=3).train
    x = datasets.to_float(x, 5)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        params = vae.decoder(x, vae.h(vae.code(x)[2]))
    assert params.dtype == torch.float32 and not torch.equal(params, params.bfloat16().float())


# Objectives and evaluation


def test_objectives():
    mean, log_std, z = torch.randn(6, 2), -torch.rand(6, 2), torch.randn(6, 2)
    settings = SimpleNamespace(kl_weight=0.3, free_bits=100.0, mmd_weight=7.0)
    added = {name: objective(settings, mean, log_std, z) for name, objective in OBJECTIVES.items()}
    kl = likelihoods.gaussian_kl(mean, log_std).mean()
    expected = {"elbo": 0.3 * kl, "none": torch.tensor(0.0), "free-bits": torch.tensor(100.0)}
    torch.testing.assert_close(added, expected | {"mmd": 7 * two_sample.gaussian_mmd(z)})
    settings.free_bits = 0.01
    torch.testing.assert_close(OBJECTIVES["free-bits"](settings, mean, log_std, z), kl)


def test_evaluation_against_a_plain_loop(monkeypatch):
    vae, images = tiny_vae(min_std=1e-9), tiny_images()
    x = images.to_float(images.held_out).double()
    with torch.no_grad():
        vae.encoder[-1].bias[vae.code_dim :] = -100  # next to no noise
        codes, log_std = vae.q_z_given_x(x)
        own = torch.cat([vae.p_x_given_z(x[i : i + 1], codes[[i]]) for i in range(24)])
    monkeypatch.setattr(training, "BATCH", 7)
    measured = training.evaluate(vae.float(), images, images.held_out)
    expected = {"bits_per_dim": -own / (64 * math.log(2)), "kl": likelihoods.gaussian_kl(codes, log_std)}
    torch.testing.assert_close(measured, expected, rtol=1e-3, atol=1e-3)
    assert set(training.evaluate(tiny_vae(coded=False).float(), images, images.held_out)) == {"bits_per_dim"}


# Trainings


def test_only_the_first_half_of_an_autoencoder_hides_pixels(tmp_path, monkeypatch):
    hidden, true = [], PixelVAE.forward

    def forward(self, x, *seen):
        if self.training:
            hidden.append(1 - seen[0].mean().item())
        return true(self, x, *seen)

    monkeypatch.setattr(PixelVAE, "forward", forward)
    fit(tmp_path, train_steps=8, batch_size=24, sweep_dims=(1,), sweep_stds=())
    none, others, ablation, swept = hidden[:8], hidden[8:18], hidden[18:22], hidden[22:]
    assert none[:4] == pytest.approx([1, 0.75, 0.5, 0.25], abs=0.35) and none[0] == 1
    assert none[4:] + others + ablation == [0] * (4 + 10 + 4)
    assert swept == [1, 0] * 2, "the sweep and its control go through the schedule once more"


def test_what_each_training_starts_from(tmp_path):
    images, settings = tiny_images(), dataclasses.replace(FEW, learning_rate=1e-9)
    trained = training.fit(settings, images, tmp_path / "all", 0)
    sweep = ["sweep-1-0.2", "sweep-2-0.2", "sweep-2-0.5", "sweep-without-code"]
    assert list(trained) == [*VARIANTS, *ABLATION, *sweep]
    stds = {name: markov_chain.encode(trained[name].model, images, images.train)[1].exp() for name in ("none", "elbo")}
    assert stds["none"].max() < 0.35 < 0.5 < stds["elbo"].median(), "std(x)"
    weights = {name: dict(one.model.state_dict()) for name, one in trained.items()}
    same = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(weights["sweep-2-0.5"], weights["none"], **same)
    assert trained["sweep-2-0.5"].model.min_std == 0.5
    torch.testing.assert_close(weights["trained-on"], weights["none"], **same)
    for name in ("without-code", "sweep-without-code"):
        assert trained[name].model.code_dim == 0
        for key, value in weights[name].items():
            torch.testing.assert_close(value, weights["none"][key], **same)
    new = {"encoder.7.weight", "encoder.7.bias", "expand.0.weight"}
    for key, value in weights["sweep-1-0.2"].items():
        assert (key in new) == (value.shape != weights["none"][key].shape), key
        if key not in new:
            torch.testing.assert_close(value, weights["none"][key], **same)


def test_a_lost_training_starts_from_the_weights_that_were_secured(tmp_path):
    images, variant = tiny_images(), VARIANTS["none"]
    first = training.fit_variant(FEW, images, "none", variant, 4, tmp_path / "lost", 0)
    recorded.save_unfinished(tmp_path / "lost" / "none", tmp_path / "half.safetensors")
    settings = dataclasses.replace(FEW, start_from=str(tmp_path / "half.safetensors"), learning_rate=1e-9)
    again, other = (training.fit_variant(settings, images, name, variant, 1, tmp_path, 1) for name in ("none", "new"))
    weights, expected = (dict(one.model.state_dict()) for one in (again, first))
    torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-4)
    assert again.provenance["start_from"] == settings.start_from and not other.provenance["start_from"]
    assert (other.model.encoder[0].weight - weights["encoder.0.weight"]).abs().max() > 0.01
    with pytest.raises(UserError, match="cannot be read"):
        training.fit_variant(dataclasses.replace(FEW, start_from="nix"), images, "none", variant, 1, tmp_path / "x", 0)


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
    """All trainings of `gpu` on one H200, at 20 % of its 790 TFLOP/s, within half an hour."""
    flops, parameters = {}, {}
    for preset in ("cpu", "gpu"):  # a training step on images of CIFAR-10, forward and backward
        vae = PixelVAE(PRESETS[preset], 3, 32, 256)
        with FlopCounterMode(display=False) as counter:
            vae(torch.rand(2, 3, 32, 32) * 2 - 1).log_p.mean().backward()
        flops[preset], parameters[preset] = counter.get_total_flops() / 2, sum(p.numel() for p in vae.parameters())
    assert 1.5e9 < flops["cpu"] < 2.5e9 and 18e9 < flops["gpu"] < 22e9 and parameters["gpu"] < 9e6
    settings = PRESETS["gpu"]
    swept = len(training.sweep(settings)) + 1
    steps = 2 * settings.train_steps + settings.elbo_steps + swept * settings.sweep_steps
    assert steps * settings.batch_size * flops["gpu"] / (0.2 * 790e12) / 60 < 30


@pytest.mark.slow
def test_the_gpu_preset_takes_a_few_steps(tmp_path, monkeypatch):
    """The networks, precision and objectives of `gpu`, at digits' size, uncompiled."""
    monkeypatch.setenv("PAPERLIB_RUNS", str(tmp_path))
    few = {"dataset": "digits", "train_steps": 2, "elbo_steps": 2, "sweep_steps": 1, "batch_size": 4}
    run = experiment.start("gpu", 0, "cpu", {**few, "compile": False, "evaluation_images": 8})
    trained = experiment.fit(run, experiment.load_images(run))
    assert all(math.isfinite(one.history[-1]["loss"]) for one in trained.values())
    assert trained["none"].steps == 2 and len(trained) == 10
