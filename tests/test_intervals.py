"""Intervals against textbooks and scipy."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from paperlib.stats.intervals import accuracy_gain, interval_over_seeds, mean_interval


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_mean_interval_is_the_textbooks(rng):
    values = rng.normal(size=50)
    expected = stats.norm.interval(0.95, values.mean(), stats.sem(values))
    assert mean_interval(values).row == pytest.approx((values.mean(), *expected), rel=1e-4)
    assert mean_interval(torch.from_numpy(values)) == mean_interval(values)
    for wrong in ([1.0], values[None], [1.0, math.nan]):
        with pytest.raises(ValueError, match="two or more"):
            mean_interval(wrong)


def test_accuracy_gain_is_mcnemars(rng):
    """What both get right does not matter: with b and c examples that one alone gets right, (b - c) / n."""
    right = np.repeat([True, True, False, False], [50, 13, 4, 33])
    baseline = np.repeat([True, False, True, False], [50, 13, 4, 33])
    order = rng.permutation(100)
    value, low, high = accuracy_gain(right[order], baseline[order]).row
    half = 1.96 * math.sqrt((13 + 4 - (13 - 4) ** 2 / 100) / 99 / 100)
    assert (value, low, high) == pytest.approx((0.09, 0.09 - half, 0.09 + half), rel=1e-9)
    assert accuracy_gain(torch.from_numpy(right), baseline).value == pytest.approx(0.09)
    for wrong in (baseline[:99], baseline.astype(int)):
        for pair in ((right, wrong), (wrong, right)):
            with pytest.raises(ValueError, match="bools"):
                accuracy_gain(*pair)


def test_the_interval_over_seeds_is_students(rng):
    values = [0.61, 0.7, 0.64]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    mean, low, high = interval_over_seeds(values).row
    assert mean == pytest.approx(0.65) and (low, high) == pytest.approx(tuple(expected))
    assert high - mean == pytest.approx(4.302653 * np.std(values, ddof=1) / math.sqrt(3), rel=1e-6)  # from tables
    for wrong in ([0.6], [0.6, math.nan], [[0.6, 0.7]]):
        with pytest.raises(ValueError, match="two or more"):
            interval_over_seeds(wrong)
