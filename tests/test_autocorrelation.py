"""Autocorrelations of chains against loops, and chains whose answer is known."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from paperlib.stats.autocorrelation import autocorrelation, integrated_time, pair_correlation


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def slow_autocorrelation(states, lag):
    """Equation (a) with loops."""
    steps, chains, _ = states.shape
    above = below = 0.0
    for t in range(steps - lag):
        one, two = (states[s] - states[s].mean(0) for s in (t, t + lag))
        above += sum(one[i] @ two[i] for i in range(chains)) / (chains - 1)
        below += sum(one[i] @ one[i] + two[i] @ two[i] for i in range(chains)) / (chains - 1) / 2
    return above / below


def test_autocorrelation_is_the_loop(rng):
    """For chains that drift together and grow apart with time."""
    steps, chains, lags = 6, 5, [1, 3, 5]
    states = rng.normal(size=(steps, chains, 2)).cumsum(0) * np.linspace(1, 3, steps)[:, None, None]
    states += 10 * rng.normal(size=(steps, 1, 2))
    result = np.array(autocorrelation(torch.from_numpy(states), lags))
    for column, lag in zip(result.T, lags, strict=True):
        value = slow_autocorrelation(states, lag)
        without = np.array([slow_autocorrelation(np.delete(states, i, 1), lag) for i in range(chains)])
        std = math.sqrt((chains - 1) / chains * ((without - without.mean()) ** 2).sum())
        half = stats.t.ppf(0.975, chains - 1) * std
        np.testing.assert_allclose(column, [value, value - half, value + half], rtol=1e-9)
    np.testing.assert_allclose(pair_correlation(*states[:2]).row, np.array(autocorrelation(states[:2], [1]))[:, 0])


def test_around_a_given_mean_the_loop_is_over_second_moments(rng):
    """What all chains share counts, and each chain is a group of the jackknife."""
    states, mean = rng.normal(size=(7, 5, 3)).cumsum(0) + 2, np.array([0.5, -1.0, 2.0])

    def slow(chains, lag):
        x = states[:, chains] - mean
        return (x[:-lag] * x[lag:]).sum() / ((x[:-lag] ** 2).sum() + (x[lag:] ** 2).sum()) * 2

    for column, lag in zip(np.array(autocorrelation(states, [1, 4], mean)).T, (1, 4), strict=True):
        without = np.array([slow([k for k in range(5) if k != left], lag) for left in range(5)])
        half = stats.t.ppf(0.975, 4) * math.sqrt(4 / 5 * ((without - without.mean()) ** 2).sum())
        value = slow(range(5), lag)
        np.testing.assert_allclose(column, [value, value - half, value + half], rtol=1e-9)
    together = np.broadcast_to(rng.normal(size=(1, 1, 3)), (7, 5, 3))
    np.testing.assert_allclose(autocorrelation(together, [1], mean)[0], 1)


def test_the_integrated_time_of_a_geometric_memory():
    rho = 0.8 ** np.arange(1, 60)
    assert integrated_time(rho, least=1e-4) == pytest.approx((1 + 0.8) / (1 - 0.8), abs=0.01)
    assert integrated_time([0.5, 0.2, 0.04, 0.3]) == pytest.approx(2.4), "what comes after noise does not count"
    assert integrated_time([0.01, 0.9]) == 1


def test_the_memory_of_autoregressive_chains(rng):
    """phi^l, covered 95 times in 100; the first state is drawn from the stationary distribution."""
    phi, lags, covered = 0.8, [1, 2, 5], []
    truth = phi ** np.array(lags)
    for _ in range(200):
        states = [rng.normal(size=(40, 2))]
        while len(states) < 12:
            states.append(phi * states[-1] + math.sqrt(1 - phi**2) * rng.normal(size=(40, 2)))
        _, lows, highs = autocorrelation(np.stack(states), lags)
        covered.append((lows < truth) & (truth < highs))
    assert ((np.mean(covered, 0) > 0.88) & (np.mean(covered, 0) < 0.99)).all()


def test_chains_that_stand_still_or_move_as_one(rng):
    still = np.broadcast_to(rng.normal(size=(50, 4)), (10, 50, 4))
    np.testing.assert_allclose(autocorrelation(still, [1, 9]), 1, rtol=1e-12)
    together = np.broadcast_to(rng.normal(size=(10, 1, 4)), (10, 50, 4))
    assert np.isnan(autocorrelation(together, [1])).all()


def test_chains_that_are_refused(rng):
    states = rng.normal(size=(4, 3, 2))
    for message, wrong, lags in [
        *((r"\(T, N, d\)", wrong, [1]) for wrong in (states[0], states[:, :2], states[:, :, :0])),
        *(("from 1 to 3", states, lags) for lags in ([0], [1, 4], [-1], [])),
        ("not finite", states * np.where(states == states.max(), math.nan, 1), [1]),
    ]:
        with pytest.raises(ValueError, match=message):
            autocorrelation(wrong, lags)
    for wrong in (np.zeros(3), np.zeros((4, 3, 2)), np.array([0, math.nan])):
        with pytest.raises(ValueError, match=r"finite and \(d,\)"):
            autocorrelation(states, [1], wrong)
    with pytest.raises(ValueError, match="equal shapes"):
        pair_correlation(states[0], states[0, :2])
