"""The PixelVAE: its terms against quadrature, torch.distributions and plain loops; its trainings and its chain."""

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
from paperlib.nn import likelihoods, pixelcnn
from paperlib.nn.pixelcnn_sampler import Sampler
from paperlib.pixelvae import experiment as pixelvae_experiment
from paperlib.pixelvae import markov_chain as pixelvae_markov_chain
from paperlib.pixelvae import model as pixelvae_model
from paperlib.pixelvae import training as pixelvae_training
from paperlib.pixelvae.model import PixelVAE
from paperlib.pixelvae.training import OBJECTIVES, VARIANTS, Variant
from paperlib.runs import checkpoints, train
from paperlib.runs.run import Run
from paperlib.system.errors import UserError

TINY = pixelvae_experiment.Settings(
    code_dim=2, encoder_channels=(4,), encoder_units=8, code_channels=3, filters=4, mixtures=2
)


def tiny_images(count=24, channels=1, levels=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 8, 8, channels)
    pictures = torch.randint(levels, shape, generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % 3
    split = datasets.Split(pictures.numpy(), labels.numpy())
    dataset = datasets.Dataset("tiny", split, split, levels, "noise")
    return Images(dataset, pictures, labels, pictures, labels)


def tiny_vae(encoder="conv", channels=1, levels=5, seed=1, **changes):
    torch.manual_seed(seed)
    settings = dataclasses.replace(TINY, **changes)
    vae = PixelVAE(settings, channels, 8, levels, 3, encoder)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return vae.double().eval()


def noiseless(vae):
    """The same with std(x) at its floor, which is next to nothing."""
    vae.min_std = 1e-9
    with torch.no_grad():
        vae.encoder[-1].bias[vae.code_dim :] = -100
    return vae


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERLIB_RUNS", str(tmp_path))
    return Run("t", "smoke", dataclasses.replace(TINY, batch_size=4, pretrain_steps=3, finetune_steps=2), 0, "cpu")


def test_elbo_and_kl_to_the_posterior_add_up_to_log_p():
    """log p(x) = ELBO + KL(q(z|x) || p(z|x)), one code dimension, all by quadrature: signs and constants."""
    vae, images = tiny_vae(code_dim=1), tiny_images(2)
    x = images.to_float(images.train).double()
    z = torch.linspace(-9, 9, 3001, dtype=torch.float64)
    mean, log_std = vae.q_z_given_x(x)
    with torch.no_grad():
        for k in range(2):
            log_p_x_given_z = torch.cat(
                [vae.p_x_given_z(x[k : k + 1].expand(len(p), -1, -1, -1), p[:, None]) for p in z.split(500)]
            )
            log_q = Normal(mean[k], log_std[k].exp()).log_prob(z)
            log_joint = log_p_x_given_z + Normal(0.0, 1.0).log_prob(z)
            step = z[1] - z[0]
            log_p = torch.logsumexp(log_joint, 0) + step.log()
            to_posterior = step * (log_q.exp() * (log_q - (log_joint - log_p))).sum()
            reconstruction = step * (log_q.exp() * log_p_x_given_z).sum()
            regulariser = OBJECTIVES["elbo"](TINY, mean[k : k + 1], log_std[k : k + 1], None)
            elbo = reconstruction - regulariser
            torch.testing.assert_close(elbo + to_posterior, log_p, rtol=0, atol=1e-6)
            assert to_posterior > 0.001


def test_objectives():
    mean, log_std = torch.randn(6, 2), -torch.rand(6, 2)
    z = mean + log_std.exp() * torch.randn(6, 2)
    prior = Independent(Normal(torch.zeros(6, 2), torch.ones(6, 2)), 1)
    kl = kl_divergence(Independent(Normal(mean, log_std.exp()), 1), prior).mean()
    settings = dataclasses.replace(TINY, kl_weight=0.3, mmd_weight=7.0)
    torch.testing.assert_close(OBJECTIVES["elbo"](settings, mean, log_std, z), 0.3 * kl)
    assert OBJECTIVES["none"](settings, mean, log_std, z) == 0
    once = OBJECTIVES["mmd"](dataclasses.replace(TINY, mmd_weight=1.0), mean, log_std, z)
    torch.testing.assert_close(OBJECTIVES["mmd"](settings, mean, log_std, z), 7 * once)
    assert set(OBJECTIVES) == {"elbo", "none", "mmd"} and {v.objective for v in VARIANTS.values()} == set(OBJECTIVES)


@pytest.mark.parametrize("encoder", ["conv", "linear"])
def test_the_deviation_lies_between_its_floor_and_one(encoder):
    vae = tiny_vae(encoder, min_std=0.3)
    for scale in (1.0, 1e4, -1e4):
        with torch.no_grad():
            vae.encoder[-1].bias[2:] = scale
        std = vae.q_z_given_x(torch.rand(50, 1, 8, 8).double())[1].exp()
        assert (std >= 0.3 - 1e-9).all() and (std <= 1 + 1e-9).all()


@pytest.mark.parametrize("encoder", ["conv", "linear", "label", "nothing"])
def test_terms_of_a_batch(encoder):
    learns = encoder in ("conv", "linear")
    vae, images = tiny_vae(encoder, channels=3), tiny_images(channels=3)
    x, labels = images.to_float(images.train).double(), images.labels
    terms = vae(x, labels)
    assert vae.learns_code == learns and (terms.mean is not None) == learns
    if encoder == "label":
        torch.testing.assert_close(terms.z, torch.eye(3).double()[labels])
    h = None if terms.z is None else vae.expand(terms.z.double())
    torch.testing.assert_close(terms.log_p, pixelcnn.log_prob(vae.decoder, x, h))
    assert terms.log_p.shape == (24,)
    if learns:
        spread = ((terms.z - terms.mean) / terms.log_std.exp()).std()
        assert 0.6 < spread < 1.4


@pytest.mark.parametrize("encoder", ["conv", "linear"])
def test_initial_weights_keep_deviations(encoder):
    """Means vary over images, and the map over codes, by about 1; with torch's own weights by a few hundredths."""
    dataset = datasets.load("digits")
    torch.manual_seed(0)
    vae = PixelVAE(pixelvae_experiment.PRESETS["smoke"], 1, 8, 17, 10, encoder)
    mean, log_std = vae.q_z_given_x(datasets.to_float(dataset.train.images[:200], 17))
    assert 0.3 < mean.std(0).median() < 3 and 0.4 < log_std.exp().median() < 0.8
    assert 0.2 < vae.h(mean).std(0).mean() < 3


def test_every_parameter_learns():
    for encoder in ("conv", "linear", "label", "nothing"):
        vae, images = tiny_vae(encoder), tiny_images()
        terms = vae(images.to_float(images.train).double(), images.labels)
        terms.log_p.sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vae.parameters())


def test_evaluation_against_a_plain_loop():
    vae, images = noiseless(tiny_vae()), tiny_images()
    x = images.to_float(images.held_out).double()
    patched = [images.to_float(images.held_out[i : i + 1]).double() for i in range(24)]
    with torch.no_grad():
        codes = [vae.q_z_given_x(one)[0] for one in patched]
        own = torch.cat([vae.p_x_given_z(x[i : i + 1], codes[i]) for i in range(24)])
        other = torch.cat([vae.p_x_given_z(x[i : i + 1], codes[(i + 1) % 24]) for i in range(24)])
    before, pixelvae_model.BATCH = pixelvae_model.BATCH, 7
    try:
        measured = pixelvae_training.evaluate(vae.float(), images, images.held_out, images.held_out_labels)
    finally:
        pixelvae_model.BATCH = before
    torch.testing.assert_close(measured["shuffle_gap"], own - other, rtol=1e-3, atol=1e-3)
    assert (own - other).abs().max() > 0.1
    torch.testing.assert_close(measured["bits_per_dim"], -own / (64 * math.log(2)), rtol=1e-4, atol=1e-5)


def test_the_shuffle_gap_is_zero_where_the_decoder_is_deaf():
    vae, images = tiny_vae(), tiny_images()
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if "condition" in name:
                parameter.zero_()
    measured = pixelvae_training.evaluate(vae.float(), images, images.held_out, images.held_out_labels)
    assert (measured["shuffle_gap"] == 0).all() and measured["kl"].min() > 0


def test_models_without_a_learned_code_have_no_gap_and_no_kl():
    images = tiny_images()
    for encoder in ("label", "nothing"):
        vae = tiny_vae(encoder).float()
        measured = pixelvae_training.evaluate(vae, images, images.held_out, images.held_out_labels)
        assert set(measured) == {"bits_per_dim"}


def test_unseen_pixels_are_scored_but_not_read():
    vae, images = tiny_vae(), tiny_images(4)
    x, labels = images.to_float(images.train).double(), images.labels
    read = []
    vae.decoder.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    torch.manual_seed(0)
    all_seen = vae(x, labels).log_p
    seen = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64).view(4, 1, 1, 1)
    torch.manual_seed(0)
    terms = vae(x, labels, seen)
    assert torch.equal(read[1], x * seen)
    torch.testing.assert_close(terms.log_p[::2], all_seen[::2])
    assert (terms.log_p[1::2] != all_seen[1::2]).all()
    params = vae.decoder(torch.zeros_like(x), vae.h(terms.z))
    expected = likelihoods.discretized_mix_logistic_log_prob(x, params, levels=5)
    torch.testing.assert_close(terms.log_p[1::2], expected[1::2])


@pytest.mark.parametrize(("name", "variant"), [("pretraining", Variant()), ("none", Variant())])
def test_only_the_first_half_of_the_trunk_hides_pixels(run, monkeypatch, name, variant):
    images, hidden = tiny_images(), []
    true = PixelVAE.forward

    def forward(self, x, labels, seen=None):
        hidden.append(1 - seen.mean().item())
        return true(self, x, labels, seen)

    monkeypatch.setattr(PixelVAE, "forward", forward)
    settings = dataclasses.replace(run.settings, input_dropout=1.0, batch_size=24)
    pixelvae_training.fit_variant(dataclasses.replace(run, settings=settings), images, name, variant, 8)
    rates = [1, 0.75, 0.5, 0.25, 0, 0, 0, 0] if name == "pretraining" else [0] * 8
    assert hidden == pytest.approx(rates, abs=0.35) and hidden[4:] == [0] * 4
    assert (hidden[0] == 1) == (name == "pretraining")


# Trainings


def test_branches_start_from_the_trunk_and_scratch_does_not(run):
    images = tiny_images()
    trained = pixelvae_training.fit(run, images)
    assert list(trained) == ["pretraining", *VARIANTS]
    alone = dataclasses.replace(run, seed=0, preset="alone")
    deviation = {
        name: pixelvae_markov_chain.encode(trained[name].model, images, images.train)[1].exp()
        for name in ("none", "linear", "none-scratch")
    }
    assert (
        deviation["none"].max() < 0.35 and deviation["linear"].max() < 0.35 < 0.5 < deviation["none-scratch"].median()
    )
    for name in ("none", "elbo", "mmd", "none-scratch", "elbo-scratch"):
        without_trunk = pixelvae_training.fit_variant(alone, images, name, VARIANTS[name], 2).model.state_dict()
        same = all(torch.equal(v, without_trunk[k]) for k, v in trained[name].model.state_dict().items())
        assert same == name.endswith("scratch")
    parent = trained["pretraining"].model.state_dict()
    again = dataclasses.replace(run, preset="again", settings=dataclasses.replace(run.settings, learning_rate=1e-9))
    branch = pixelvae_training.fit_variant(again, images, "mmd", VARIANTS["mmd"], 2, parent).model.state_dict()
    for key, value in parent.items():
        torch.testing.assert_close(branch[key], value, rtol=0, atol=1e-5)


def test_inherit_takes_what_fits():
    parent, child = tiny_vae(seed=1), tiny_vae("label", seed=2)
    new = pixelvae_training.load_matching_weights(child, parent.state_dict())
    own, theirs = child.state_dict(), parent.state_dict()
    assert new == ["expand.0.weight"], "only the layer that reads the code differs in shape"
    assert all(torch.equal(own[k], theirs[k]) for k in own if k not in new)
    assert set(pixelvae_training.load_matching_weights(tiny_vae("linear", seed=3), theirs)) == {
        "encoder.1.weight",
        "encoder.1.bias",
    }


def test_without_a_trunk_nothing_is_trained_twice(run):
    settings = dataclasses.replace(run.settings, pretrain_steps=0, ablation_steps=1)
    trained = pixelvae_training.fit(dataclasses.replace(run, settings=settings), tiny_images())
    assert list(trained) == list(VARIANTS) and trained["none-scratch"] is trained["none"]
    assert not (run.directory / "elbo-scratch").exists()


def test_a_trunk_starts_from_another_runs_weights(run, tmp_path):
    images = tiny_images()
    first = pixelvae_training.fit_variant(run, images, "pretraining", Variant(), 3)
    held = train.load_weights(run.directory / "pretraining")
    assert all(torch.equal(held[k], v) for k, v in first.model.state_dict().items())
    where = str((run.directory / "pretraining").relative_to(tmp_path))
    settings = dataclasses.replace(run.settings, start_from=where, pretrain_steps=1, learning_rate=1e-9)
    again = dataclasses.replace(run, settings=settings)
    trained = pixelvae_training.fit(again, images)["pretraining"]
    for key, value in trained.model.state_dict().items():
        torch.testing.assert_close(value, held[key], rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="no checkpoint"):
        pixelvae_training.fit(
            dataclasses.replace(run, settings=dataclasses.replace(settings, start_from="elsewhere")), images
        )


@pytest.mark.parametrize("changes", [{}, {"ema": 0.5}, {"patience": 1, "evaluate_every": 1}])
def test_weights_to_start_from_are_those_that_training_returns(tmp_path, changes):
    """The best with patience, else the average, else the last."""
    model = torch.nn.Linear(2, 1)
    recipe = train.Recipe(6, 2, 0.1, **changes)
    values = iter([3.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    trained = train.fit(
        model,
        lambda m, x, p: (m(x).square().mean(), {}),
        lambda rows: torch.ones(2, 2),
        4,
        recipe,
        tmp_path,
        seed=0,
        device="cpu",
        evaluate=lambda m: {"watched": next(values)},
    )
    weights = train.load_weights(tmp_path)
    assert all(torch.equal(weights[k], v) for k, v in trained.model.state_dict().items())
    last = checkpoints.read(tmp_path)["model"]
    assert torch.equal(weights["weight"], last["weight"]) == (not changes)


# The chain


def test_the_chain_is_encode_draw_decode_again_and_again():
    images = tiny_images(3)
    vae = noiseless(tiny_vae()).float()
    states = pixelvae_markov_chain.markov_chain(vae, images, images.train, 3, torch.Generator().manual_seed(5))
    assert states.shape == (4, 3, 8, 8, 1) and torch.equal(states[0], images.train)
    generator, sampler = torch.Generator().manual_seed(5), Sampler(vae.decoder, 3, 8, 8)
    for before, after in itertools.pairwise(states):
        mean, log_std = vae.q_z_given_x(images.to_float(before))
        z = mean + log_std.exp() * torch.randn(3, 2, generator=generator)
        with torch.no_grad():
            x = sampler.draw(vae.h(z), generator=generator)
        assert torch.equal(images.to_float(after), x)
    again = pixelvae_markov_chain.markov_chain(vae, images, images.train, 3, torch.Generator().manual_seed(5))
    other = pixelvae_markov_chain.markov_chain(vae, images, images.train, 3, torch.Generator().manual_seed(6))
    assert torch.equal(states, again) and not torch.equal(states, other)


def test_a_decoder_takes_any_number_of_codes():
    images, vae = tiny_images(), tiny_vae().float()
    z = torch.randn(7, 2)
    drawn = pixelvae_markov_chain.Decoder(vae, images, 3)(z, torch.Generator().manual_seed(0))
    assert drawn.shape == (7, 8, 8, 1) and drawn.dtype == torch.uint8 and int(drawn.max()) <= 4
    few = pixelvae_markov_chain.Decoder(vae, images, 3)(z[:3], torch.Generator().manual_seed(0))
    assert torch.equal(drawn[:3], few)


def test_noise_images_use_every_level_alike():
    images = tiny_images(levels=5)
    noise = pixelvae_markov_chain.noise_images(images, 200, torch.Generator().manual_seed(0))
    counts = np.bincount(noise.flatten().numpy(), minlength=5)
    assert len(counts) == 5 and (abs(counts / counts.sum() - 0.2) < 0.02).all()


# Presets


def flops_per_image(preset):
    """Of one training step, forward and backward, on CIFAR-10's images, and parameters."""
    torch.manual_seed(0)
    vae = PixelVAE(pixelvae_experiment.PRESETS[preset], 3, 32, 256, 10, "conv")
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    with FlopCounterMode(display=False) as counter:
        vae(x, torch.zeros(2, dtype=torch.long)).log_p.mean().backward()
    return counter.get_total_flops() / 2, sum(p.numel() for p in vae.parameters())


def test_cost_of_the_presets():
    """DESIGN's plan for one H200, at 20 % of its 790 TFLOP/s: `none` 9 minutes, trunk included, `elbo` 6, `mmd` 3."""
    cpu, _ = flops_per_image("cpu")
    gpu, parameters = flops_per_image("gpu")
    assert 0.9e9 < cpu < 1.4e9
    assert 18e9 < gpu < 22e9
    assert parameters < 9e6
    settings = pixelvae_experiment.PRESETS["gpu"]

    def minutes(steps):
        return steps * settings.batch_size * gpu / (0.2 * 790e12) / 60

    assert 6 < minutes(settings.pretrain_steps + settings.finetune_steps) < 11
    assert minutes(settings.pretrain_steps + 6 * settings.finetune_steps + 2 * settings.ablation_steps) < 22


@pytest.mark.slow
def test_the_gpu_preset_takes_a_few_steps(tmp_path, monkeypatch):
    """The networks, precision and objectives of `gpu`, at digits' size, uncompiled."""
    monkeypatch.setenv("PAPERLIB_RUNS", str(tmp_path))
    few = {"dataset": "digits", "pretrain_steps": 2, "finetune_steps": 2, "ablation_steps": 1, "batch_size": 4}
    run = pixelvae_experiment.start("gpu", 0, "cpu", "train", {**few, "compile": False, "evaluation_images": 8})
    trained = pixelvae_training.fit(run, pixelvae_experiment.load_images(run))
    assert all(math.isfinite(one.history[-1]["loss"]) for one in trained.values())
    assert trained["pretraining"].steps == 2 and len(trained) == 9
