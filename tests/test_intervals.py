"""Intervals against textbooks and scipy."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from paperlib.stats.intervals import accuracy_gain, interval_over_seeds, mean_interval, ratio_of_means


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_means_have_the_intervals_of_textbooks(rng):
    values = rng.normal(size=50)
    normal = stats.norm.interval(0.95, values.mean(), stats.sem(values))
    assert mean_interval(values).row == pytest.approx((values.mean(), *normal), rel=1e-4)
    assert mean_interval(torch.from_numpy(values)) == mean_interval(values)
    student = stats.ttest_1samp(values[:3], 0).confidence_interval(0.95)
    assert interval_over_seeds(list(values[:3])).row == pytest.approx((values[:3].mean(), *student))
    for wrong in ([1.0], [[0.6, 0.7]], [1.0, math.nan]):
        for interval in (mean_interval, interval_over_seeds):
            with pytest.raises(ValueError, match="two or more"):
                interval(wrong)


def test_accuracy_gain_is_mcnemars(rng):
    """What both get right does not matter: with b and c examples that one alone gets right, (b - c) / n."""
    right = np.repeat([True, True, False, False], [50, 13, 4, 33])
    baseline = np.repeat([True, False, True, False], [50, 13, 4, 33])
    order = rng.permutation(100)
    half = 1.96 * math.sqrt((13 + 4 - (13 - 4) ** 2 / 100) / 99 / 100)
    row = accuracy_gain(torch.from_numpy(right[order]), baseline[order]).row
    assert row == pytest.approx((0.09, 0.09 - half, 0.09 + half), rel=1e-9)
    for wrong in (baseline[:99], baseline.astype(int)):
        for pair in ((right, wrong), (wrong, right)):
            with pytest.raises(ValueError, match="bools"):
                accuracy_gain(*pair)


def test_a_ratio_is_that_of_pairs_and_nan_over_nothing(rng):
    """The interval against bootstraps of whole pairs; what both share must not widen it."""
    shared = rng.exponential(size=400)
    a, b = shared + 0.1 * rng.normal(size=400), 2 * shared + 0.1 * rng.normal(size=400)
    rows = rng.integers(400, size=(4000, 400))
    std = (a[rows].mean(1) / b[rows].mean(1)).std()
    ratio = ratio_of_means(a, torch.from_numpy(b))
    assert ratio.value == pytest.approx(a.mean() / b.mean())
    assert (ratio.high - ratio.low) / 2 == pytest.approx(1.96 * std, rel=0.05)
    assert all(math.isnan(number) for number in ratio_of_means(0 * a, 0 * b).row)
    with pytest.raises(ValueError, match="same examples"):
        ratio_of_means(a, b[:1])
