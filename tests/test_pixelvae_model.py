"""The PixelVAE: its terms against quadrature, torch.distributions and plain loops; its trainings and its chain."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence
from torch.utils.flop_counter import FlopCounterMode

from paperlib import pixelvae
from paperlib.data import datasets
from paperlib.data.device_images import Images
from paperlib.nn import likelihoods, pixelcnn
from paperlib.nn.pixelcnn_sampler import Sampler
from paperlib.pixelvae import markov_chain, training
from paperlib.pixelvae.experiment import PRESETS, Settings
from paperlib.pixelvae.model import PixelVAE
from paperlib.pixelvae.training import OBJECTIVES, PRETRAINING, VARIANTS, Variant
from paperlib.runs import checkpoints, train
from paperlib.system.errors import UserError

TINY = Settings(code_dim=2, encoder_channels=(4,), encoder_units=8, code_channels=3, filters=4, mixtures=2)
FEW = dataclasses.replace(TINY, batch_size=4, pretrain_steps=3, finetune_steps=2, ablation_steps=1)
LEARNING = pytest.mark.parametrize("encoder", ["conv", "linear"])


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


def noiseless(vae):
    """The same with std(x) at its least, which is next to nothing."""
    vae.min_std = 1e-9
    with torch.no_grad():
        vae.encoder[-1].bias[vae.code_dim :] = -100
    return vae


def fit_variant(folder, name, variant, steps, pretrained=None, **changes):
    settings = dataclasses.replace(FEW, **changes)
    return training.fit_variant(settings, tiny_images(), name, variant, steps, folder, 0, pretrained)


def fit(folder, **changes):
    return training.fit(dataclasses.replace(FEW, **changes), tiny_images(), folder, 0)


def assert_close(state, other):
    assert state.keys() == other.keys()
    for key, value in state.items():
        torch.testing.assert_close(value, other[key], rtol=0, atol=1e-5)


# The model


def test_elbo_and_kl_to_the_posterior_add_up_to_log_p():
    """log p(x) = ELBO + KL(q(z|x) || p(z|x)), one code dimension, all by quadrature: signs and constants."""
    vae, images = tiny_vae(code_dim=1), tiny_images(2)
    x = images.to_float(images.train).double()
    z = torch.linspace(-9, 9, 3001, dtype=torch.float64)
    step = z[1] - z[0]
    with torch.no_grad():
        mean, log_std = vae.q_z_given_x(x)
        for k in range(2):
            log_p_x_given_z = torch.cat(
                [vae.p_x_given_z(x[k : k + 1].expand(len(p), -1, -1, -1), p[:, None]) for p in z.split(500)]
            )
            log_q = Normal(mean[k], log_std[k].exp()).log_prob(z)
            log_joint = log_p_x_given_z + Normal(0.0, 1.0).log_prob(z)
            log_p = torch.logsumexp(log_joint, 0) + step.log()
            to_posterior = step * (log_q.exp() * (log_q - (log_joint - log_p))).sum()
            reconstruction = step * (log_q.exp() * log_p_x_given_z).sum()
            elbo = reconstruction - OBJECTIVES["elbo"](TINY, mean[k : k + 1], log_std[k : k + 1], None)
            torch.testing.assert_close(elbo + to_posterior, log_p, rtol=0, atol=1e-6)
            assert to_posterior > 0.001


@LEARNING
def test_std_lies_between_its_least_value_and_one(encoder):
    vae = tiny_vae(encoder, min_std=0.3)
    for scale in (1.0, 1e4, -1e4):
        with torch.no_grad():
            vae.encoder[-1].bias[2:] = scale
        std = vae.q_z_given_x(torch.rand(50, 1, 8, 8).double())[1].exp()
        assert (std >= 0.3 - 1e-9).all() and (std <= 1 + 1e-9).all()


@pytest.mark.parametrize("encoder", ["conv", "linear", "label", "nothing"])
def test_terms_of_a_batch_depend_on_every_parameter(encoder):
    learns = encoder in ("conv", "linear")
    vae, images = tiny_vae(encoder, channels=3), tiny_images(channels=3)
    x, labels = images.to_float(images.train).double(), images.labels
    terms = vae(x, labels)
    assert terms.log_p.shape == (24,)
    assert vae.learns_code == learns and (terms.mean is not None) == learns
    if encoder == "label":
        torch.testing.assert_close(terms.z, torch.eye(3).double()[labels])
    h = None if terms.z is None else vae.expand(terms.z)
    torch.testing.assert_close(terms.log_p, pixelcnn.log_prob(vae.decoder, x, h))
    if learns:
        assert 0.6 < ((terms.z - terms.mean) / terms.log_std.exp()).std() < 1.4
    terms.log_p.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vae.parameters())


@LEARNING
def test_initial_weights_keep_std(encoder):
    """Means vary over images, and the map over codes, by about 1; with torch's own weights by a few hundredths."""
    dataset = datasets.load("digits")
    torch.manual_seed(0)
    vae = PixelVAE(PRESETS["smoke"], 1, 8, 17, 10, encoder)
    mean, log_std = vae.q_z_given_x(datasets.to_float(dataset.train.images[:200], 17))
    assert 0.3 < mean.std(0).median() < 3 and 0.4 < log_std.exp().median() < 0.8
    assert 0.2 < vae.h(mean).std(0).mean() < 3


def test_unseen_pixels_are_scored_but_not_read():
    vae, images = tiny_vae(), tiny_images(4)
    x, labels = images.to_float(images.train).double(), images.labels
    torch.manual_seed(0)
    all_seen = vae(x, labels).log_p
    seen = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64).view(4, 1, 1, 1)
    torch.manual_seed(0)
    terms = vae(x, labels, seen)
    torch.testing.assert_close(terms.log_p[::2], all_seen[::2])
    params = vae.decoder(torch.zeros_like(x), vae.h(terms.z))
    expected = likelihoods.discretized_mix_logistic_log_prob(x, params, levels=5)
    torch.testing.assert_close(terms.log_p[1::2], expected[1::2])
    assert (expected != all_seen).all()


# Objectives and evaluation


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


def test_evaluation_against_a_plain_loop(monkeypatch):
    vae, images = noiseless(tiny_vae()), tiny_images()
    x = images.to_float(images.held_out).double()
    with torch.no_grad():
        codes = [vae.q_z_given_x(x[i : i + 1])[0] for i in range(24)]
        own = torch.cat([vae.p_x_given_z(x[i : i + 1], codes[i]) for i in range(24)])
        other = torch.cat([vae.p_x_given_z(x[i : i + 1], codes[(i + 1) % 24]) for i in range(24)])
    monkeypatch.setattr(training, "BATCH", 7)
    measured = training.evaluate(vae.float(), images, images.held_out, images.held_out_labels)
    torch.testing.assert_close(measured["shuffle_gap"], own - other, rtol=1e-3, atol=1e-3)
    assert (own - other).abs().max() > 0.1
    torch.testing.assert_close(measured["bits_per_dim"], -own / (64 * math.log(2)), rtol=1e-4, atol=1e-5)


def test_a_code_that_is_not_read_has_no_gap_and_one_that_is_not_learned_no_kl():
    vae, images = tiny_vae(), tiny_images()
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if "condition" in name:
                parameter.zero_()
    measured = training.evaluate(vae.float(), images, images.held_out, images.held_out_labels)
    assert (measured["shuffle_gap"] == 0).all() and measured["kl"].min() > 0
    for encoder in ("label", "nothing"):
        vae = tiny_vae(encoder).float()
        measured = training.evaluate(vae, images, images.held_out, images.held_out_labels)
        assert set(measured) == {"bits_per_dim"}


# Trainings


@pytest.mark.parametrize(
    ("name", "rates"), [(PRETRAINING, [1, 0.75, 0.5, 0.25, 0, 0, 0, 0]), ("none", [0, 0, 0, 0, 0, 0, 0, 0])]
)
def test_only_the_first_half_of_pretraining_hides_pixels(tmp_path, monkeypatch, name, rates):
    hidden, true = [], PixelVAE.forward

    def forward(self, x, labels, seen):
        hidden.append(1 - seen.mean().item())
        return true(self, x, labels, seen)

    monkeypatch.setattr(PixelVAE, "forward", forward)
    fit_variant(tmp_path, name, Variant(), 8, input_dropout=1.0, batch_size=24)
    assert hidden == pytest.approx(rates, abs=0.35)
    assert hidden[0] == rates[0] and hidden[4:] == rates[4:]


def test_fine_tuning_starts_from_pretraining_and_scratch_does_not(tmp_path):
    images, trained = tiny_images(), fit(tmp_path / "all")
    assert list(trained) == [PRETRAINING, *VARIANTS]
    std = {
        name: markov_chain.encode(trained[name].model, images, images.train)[1].exp()
        for name in ("none", "linear", "none-scratch")
    }
    assert std["none"].max() < 0.35 and std["linear"].max() < 0.35 < 0.5 < std["none-scratch"].median()
    for name in ("none", "elbo-scratch"):
        alone = fit_variant(tmp_path / "alone", name, VARIANTS[name], 2).model.state_dict()
        same = all(torch.equal(v, alone[k]) for k, v in trained[name].model.state_dict().items())
        assert same == name.endswith("scratch")
    pretrained = trained[PRETRAINING].model.state_dict()
    tuned = fit_variant(tmp_path / "slowly", "mmd", VARIANTS["mmd"], 2, pretrained, learning_rate=1e-9)
    assert_close(tuned.model.state_dict(), pretrained)


@pytest.mark.parametrize(
    ("encoder", "new"), [("label", {"expand.0.weight"}), ("linear", {"encoder.1.weight", "encoder.1.bias"})]
)
def test_matching_weights_are_all_but_the_encoder_or_the_layer_that_reads_the_code(encoder, new):
    vae, theirs = tiny_vae(encoder, seed=2), tiny_vae(seed=1).state_dict()
    before = {k: v.clone() for k, v in vae.state_dict().items()}
    training.load_matching_weights(vae, theirs)
    for key, value in vae.state_dict().items():
        assert torch.equal(value, before[key] if key in new else theirs[key]), key


def test_without_pretraining_nothing_is_trained_twice(tmp_path):
    trained = fit(tmp_path, pretrain_steps=0)
    assert list(trained) == list(VARIANTS) and trained["none-scratch"] is trained["none"]
    assert not (tmp_path / "elbo-scratch").exists()


def test_pretraining_starts_from_another_runs_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERLIB_RUNS", str(tmp_path))
    first = fit_variant(tmp_path / "first", PRETRAINING, Variant(), 3).model.state_dict()
    options = {"pretrain_steps": 1, "learning_rate": 1e-9}
    trained = fit(tmp_path / "second", start_from=f"first/{PRETRAINING}", **options)
    assert_close(trained[PRETRAINING].model.state_dict(), first)
    with pytest.raises(UserError, match="no checkpoint"):
        fit(tmp_path / "third", start_from="elsewhere", **options)


@pytest.mark.parametrize("changes", [{}, {"ema": 0.5}, {"patience": 1, "evaluate_every": 1}])
def test_weights_to_start_from_are_those_that_training_returns(tmp_path, changes):
    """The best with patience, otherwise the average, otherwise the last."""
    values = iter([3.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    trained = train.fit(
        torch.nn.Linear(2, 1),
        lambda m, x, p: (m(x).square().mean(), {}),
        lambda rows: torch.ones(2, 2),
        4,
        train.Recipe(6, 2, 0.1, **changes),
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


def test_the_chain_encodes_draws_and_decodes():
    images, vae = tiny_images(3), noiseless(tiny_vae()).float()

    def states(seed):
        return markov_chain.markov_chain(vae, images, images.train, 3, torch.Generator().manual_seed(seed))

    generator, sampler = torch.Generator().manual_seed(5), Sampler(vae.decoder, 3, 8, 8)
    assert states(5).shape == (4, 3, 8, 8, 1) and torch.equal(states(5)[0], images.train)
    for before, after in itertools.pairwise(states(5)):
        mean, log_std = vae.q_z_given_x(images.to_float(before))
        z = mean + log_std.exp() * torch.randn(3, 2, generator=generator)
        with torch.no_grad():
            x = sampler.draw(vae.h(z), generator=generator)
        assert torch.equal(images.to_float(after), x)
    assert not torch.equal(states(5), states(6))


def test_a_decoder_takes_any_number_of_codes():
    images, vae, z = tiny_images(), tiny_vae().float(), torch.randn(7, 2)
    drawn, few = (markov_chain.Decoder(vae, images, 3)(codes, torch.Generator().manual_seed(0)) for codes in (z, z[:3]))
    assert drawn.shape == (7, 8, 8, 1) and drawn.dtype == torch.uint8 and int(drawn.max()) <= 4
    assert torch.equal(drawn[:3], few)


def test_noise_images_use_every_level_alike():
    noise = markov_chain.noise_images(tiny_images(), 200, torch.Generator().manual_seed(0))
    counts = np.bincount(noise.flatten().numpy(), minlength=5)
    assert len(counts) == 5 and (abs(counts / counts.sum() - 0.2) < 0.02).all()


# Presets


def flops_and_parameters(preset):
    """Of one training step per image, forward and backward, on CIFAR-10's images, and parameters."""
    torch.manual_seed(0)
    vae = PixelVAE(PRESETS[preset], 3, 32, 256, 10, "conv")
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    with FlopCounterMode(display=False) as counter:
        vae(x, torch.zeros(2, dtype=torch.long)).log_p.mean().backward()
    return counter.get_total_flops() / 2, sum(p.numel() for p in vae.parameters())


def test_cost_of_the_presets():
    """All trainings of `gpu` on one H200, at 20 % of its 790 TFLOP/s, within 22 minutes."""
    cpu, _ = flops_and_parameters("cpu")
    gpu, parameters = flops_and_parameters("gpu")
    assert 0.9e9 < cpu < 1.4e9 and 18e9 < gpu < 22e9 and parameters < 9e6
    settings = PRESETS["gpu"]
    steps = settings.pretrain_steps + 6 * settings.finetune_steps + 2 * settings.ablation_steps
    assert steps * settings.batch_size * gpu / (0.2 * 790e12) / 60 < 22


@pytest.mark.slow
def test_the_gpu_preset_takes_a_few_steps(tmp_path, monkeypatch):
    """The networks, precision and objectives of `gpu`, at digits' size, uncompiled."""
    monkeypatch.setenv("PAPERLIB_RUNS", str(tmp_path))
    few = {"dataset": "digits", "pretrain_steps": 2, "finetune_steps": 2, "ablation_steps": 1, "batch_size": 4}
    run = pixelvae.start("gpu", 0, "cpu", "train", {**few, "compile": False, "evaluation_images": 8})
    trained = pixelvae.fit(run, pixelvae.load_images(run))
    assert all(math.isfinite(one.history[-1]["loss"]) for one in trained.values())
    assert trained[PRETRAINING].steps == 2 and len(trained) == 9
