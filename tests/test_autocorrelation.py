"""Autocorrelations of chains against loops, and chains whose answer is known."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from paperlib.stats.autocorrelation import autocorrelation, pair_correlation


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
    steps, chains = 6, 5
    states = rng.normal(size=(steps, chains, 2)).cumsum(0) * np.linspace(1, 3, steps)[:, None, None]
    drifting = states + 10 * rng.normal(size=(steps, 1, 2))
    lags = [1, 3, 5]
    found = np.array(autocorrelation(drifting, lags))
    for column, lag in zip(found.T, lags, strict=True):
        value = slow_autocorrelation(states, lag)
        without = np.array([slow_autocorrelation(np.delete(drifting, i, 1), lag) for i in range(chains)])
        deviation = math.sqrt((chains - 1) / chains * ((without - without.mean()) ** 2).sum())
        half = stats.t.ppf(0.975, chains - 1) * deviation
        np.testing.assert_allclose(column, [value, value - half, value + half], rtol=1e-9)
    np.testing.assert_allclose(autocorrelation(torch.from_numpy(drifting), lags), found, rtol=1e-12)


def test_the_memory_of_autoregressive_chains(rng):
    """phi^l, covered 95 times in 100; the first state is drawn from the stationary law."""
    phi, lags, covered, repeats = 0.8, [1, 2, 5], [], 200
    for _ in range(repeats):
        states = [rng.normal(size=(40, 2))]
        while len(states) < 12:
            states.append(phi * states[-1] + math.sqrt(1 - phi**2) * rng.normal(size=(40, 2)))
        values, lows, highs = autocorrelation(np.stack(states), lags)
        truth = phi ** np.array(lags)
        covered.append((lows < truth) & (truth < highs))
        assert (abs(values - truth) < 0.35).all()
    assert ((np.mean(covered, 0) > 0.88) & (np.mean(covered, 0) < 0.99)).all()


def test_chains_without_memory_and_with_nothing_else(rng):
    independent = rng.normal(size=(10, 50, 4)) + 5 * rng.normal(size=(10, 1, 4))
    _, lows, highs = autocorrelation(independent, [1, 2, 4])
    assert ((lows < 0) & (highs > 0)).all() and (highs - lows < 0.2).all()
    still = np.broadcast_to(rng.normal(size=(50, 4)), (10, 50, 4))
    np.testing.assert_allclose(autocorrelation(still, [1, 9]), 1, rtol=1e-12)
    turning = still * (-1.0) ** np.arange(10)[:, None, None]
    np.testing.assert_allclose(autocorrelation(turning, [1, 2]), [[-1, 1]] * 3, rtol=1e-12)
    together = np.broadcast_to(rng.normal(size=(10, 1, 4)), (10, 50, 4))
    assert np.isnan(autocorrelation(together, [1])).all()


def test_pairs_are_chains_of_two_states(rng):
    a, b = rng.normal(size=(2, 60, 3))
    b = 2 * a + b
    expected = slow_autocorrelation(np.stack([a, b]), 1)
    assert pair_correlation(a, b).value == pytest.approx(expected, rel=1e-9)
    assert pair_correlation(a, b).row == pytest.approx(
        np.array(autocorrelation(np.stack([a, b]), [1]))[:, 0], rel=1e-12
    )
    assert pair_correlation(a, a).row == pytest.approx((1, 1, 1)) and pair_correlation(a, -a).high == pytest.approx(-1)
    with pytest.raises(ValueError, match="equal shapes"):
        pair_correlation(a, b[:59])


def test_chains_that_are_refused(rng):
    states = rng.normal(size=(4, 3, 2))
    for wrong in (states[0], states[:, :2], states[:, :, :0]):
        with pytest.raises(ValueError, match=r"\(T, N, d\)"):
            autocorrelation(wrong, [1])
    for lags in ([0], [1, 4], [-1]):
        with pytest.raises(ValueError, match="from 1 to 3"):
            autocorrelation(states, lags)
    with pytest.raises(ValueError, match="not finite"):
        autocorrelation(states * np.where(states == states.max(), math.nan, 1), [1])
