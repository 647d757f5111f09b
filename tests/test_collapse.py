"""Notebook 05: its estimators against their definitions, the plan of its trainings, its criteria."""

import math

import numpy as np
import pytest
import torch

from paperlib.data import datasets
from paperlib.pixelvae.collapse import claims, experiment, measurements, training
from paperlib.pixelvae.measurements import WARM_UP
from paperlib.pixelvae.model import PixelVAE
from paperlib.runs.estimate import Estimate
from paperlib.stats.intervals import mean_interval


def test_independent_pixels_is_a_distribution_of_counts():
    train = torch.randint(3, (20, 2, 2, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    every = torch.cartesian_prod(*[torch.arange(3, dtype=torch.uint8)] * 4).reshape(81, 2, 2, 1)
    log_p = measurements.independent_pixels(train, every, 3)
    assert np.exp(log_p).sum() == pytest.approx(1, abs=1e-12)
    for n in (0, 40, 77):
        slow = sum(
            math.log((sum(int(x[i, j]) == int(every[n, i, j]) for x in train) + 1) / 23)
            for i in range(2)
            for j in range(2)
        )
        assert log_p[n] == pytest.approx(slow, abs=1e-12)


def test_a_factored_decoder_sees_no_pixel_and_a_linear_encoder_is_affine():
    torch.manual_seed(0)
    vae = PixelVAE(experiment.Settings(), 1, 8, 17, linear=True, factored=True).double()
    x, y = torch.rand(2, 3, 1, 8, 8, dtype=torch.float64) * 2 - 1
    z = torch.randn(3, 8, dtype=torch.float64)
    x = (x * 8).round() / 8
    changed = x.clone()
    changed[:, :, 0, 0] = -1  # an early pixel moves no later one's parameters: only its own term
    params = vae.decoder(0 * x, vae.h(z))
    torch.testing.assert_close(vae.decoder(0 * changed, vae.h(z)), params, rtol=0, atol=0)
    torch.testing.assert_close(vae.p_x_given_z(x, z), vae.p_x_given_z(x, z, seen=0.0), rtol=0, atol=0)
    means = [vae.q_z_given_x(one)[0] for one in (x, y, (x + y) / 2)]
    torch.testing.assert_close((means[0] + means[1]) / 2, means[2])


def test_classes_of_chains_are_counted_as_by_hand():
    chains = np.zeros((WARM_UP + 6, 3), dtype=np.uint8)
    chains[WARM_UP:] = np.array([[1, 1, 1, 2, 2, 3], [4, 4, 4, 4, 4, 4], [0, 1, 0, 1, 0, 1]]).T
    assert claims.keeps(chains).value == pytest.approx((3 / 5 + 1 + 0) / 3)
    assert claims.run_length(chains).value == pytest.approx(18 / (3 + 1 + 6))
    assert claims.visited(chains).value == pytest.approx((3 + 1 + 2) / 3)
    expected = mean_interval(np.array([3 / 5, 1, 0]))
    assert claims.keeps(chains).row == pytest.approx(expected.row)


def test_noise_is_equal_for_all_scales():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(5000, 2, generator=generator) * torch.tensor([1e-3, 50.0]) + 7
    train, test = measurements.noisy(z, z, 0.5, generator)
    torch.testing.assert_close(train.var(0), torch.full((2,), 1.25), rtol=0.05, atol=0)
    assert not torch.equal(train, test)


def test_every_training_starts_from_an_earlier_one():
    for settings in experiment.PRESETS.values():
        seen = set()
        for name, one in training.plan(settings, 0).items():
            assert not one.start or one.start in seen
            seen.add(name)
        assert {"none", "elbo", "unconditional", f"code-{settings.code_dim}-{settings.min_std:g}"} <= seen


def test_mnist24_is_the_middle_of_mnist_in_the_upper_bits(monkeypatch):
    images = np.random.default_rng(0).integers(256, size=(5, 28, 28, 1), dtype=np.uint8)
    whole = datasets.Split(images, np.arange(5))
    monkeypatch.setattr(datasets, "_read_prepared", lambda name: datasets.Dataset(name, whole, whole, 256, ""))
    middle = datasets.load("mnist24")
    assert middle.train.images.shape == (5, 24, 24, 1) and middle.levels == 16
    assert middle.train.images[3, 0, 5, 0] == images[3, 2, 7, 0] // 16


def test_criteria_can_fail():
    def at(value):
        return Estimate(value, value - 0.01, value + 0.01)

    good = {"kl": 1.0, "kl_factored": 20.0, "rise_of_kl": -1.0, "rise_of_gain": -1.0, "change": 0.1}
    bad = {"kl": 2.5, "kl_factored": 9.0, "rise_of_kl": 0.1, "rise_of_gain": 0.1, "change": 1.0}
    criterion = claims.CLAIMS["P1"].criterion
    assert criterion(**{name: at(value) for name, value in good.items()})
    for name, value in bad.items():
        assert not criterion(**{key: at(number) for key, number in (good | {name: value}).items()}), name
    criterion = claims.CLAIMS["P1b"].criterion
    assert criterion(kl_pretrained=at(9.0), kl_scratch=at(2.0), bound_won=at(0.5))
    assert not criterion(kl_pretrained=at(3.0), kl_scratch=at(2.0), bound_won=at(0.5))
    assert not criterion(kl_pretrained=at(9.0), kl_scratch=at(2.0), bound_won=at(1.0))
