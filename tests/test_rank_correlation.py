"""Rank correlations against scipy and closed forms."""

import math

import numpy as np
import pytest
from scipy import stats

from paperlib.stats.rank_correlation import partial_rank_correlation


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("ties", [False, True])
def test_without_controls_it_is_spearman(rng, ties):
    a = rng.normal(size=50)
    b = a**3 + 2 * rng.normal(size=50)
    if ties:
        a, b = a.round(), b.round()
    expected = stats.spearmanr(a, b).statistic
    assert partial_rank_correlation(a, b) == pytest.approx(expected, abs=1e-12)
    assert partial_rank_correlation(np.exp(a), -b) == pytest.approx(-expected, abs=1e-12)
    assert partial_rank_correlation(a, a**3) == 1 and partial_rank_correlation(a, -a) == -1


@pytest.mark.parametrize("ties", [False, True])
def test_with_one_control_it_is_the_closed_form(rng, ties):
    c = rng.normal(size=60)
    a, b = c + rng.normal(size=60), np.exp(c) + rng.normal(size=60)
    if ties:
        a, b, c = a.round(), b.round(), c.round()
    (ab, ac), bc = (stats.spearmanr(a, other).statistic for other in (b, c)), stats.spearmanr(b, c).statistic
    expected = (ab - ac * bc) / math.sqrt((1 - ac**2) * (1 - bc**2))
    assert partial_rank_correlation(a, b, [c]) == pytest.approx(expected, abs=1e-12)


def test_with_more_controls_it_is_the_inverse_of_the_correlation_matrix(rng):
    columns = rng.normal(size=(80, 5)) @ rng.normal(size=(5, 5))
    inverse = np.linalg.inv(stats.spearmanr(columns).statistic)
    expected = -inverse[0, 1] / math.sqrt(inverse[0, 0] * inverse[1, 1])
    a, b, *controls = columns.T
    assert abs(expected) > 0.1
    assert partial_rank_correlation(a, b, controls) == pytest.approx(expected, abs=1e-12)
    assert partial_rank_correlation(a, b, [*controls, controls[0]]) == pytest.approx(expected, abs=1e-12)


def test_a_control_explains_a_correlation_away_or_brings_one_out(rng):
    c, first, second = rng.normal(size=(3, 4000))
    a, b = c + 0.5 * first, c + 0.5 * second
    assert partial_rank_correlation(a, b) > 0.75
    assert abs(partial_rank_correlation(a, b, [c])) < 4 / math.sqrt(4000)
    assert abs(partial_rank_correlation(first, second)) < 4 / math.sqrt(4000)
    assert partial_rank_correlation(first, second, [first + second]) < -0.9


def test_where_controls_say_all_there_is_no_correlation(rng):
    a, b, c = rng.normal(size=(3, 30))
    assert math.isnan(partial_rank_correlation(a, b, [np.exp(a)]))
    assert math.isnan(partial_rank_correlation(a, b, [c, -b]))
    assert math.isnan(partial_rank_correlation(a, np.ones(30), [c]))


def test_observations_that_are_refused(rng):
    a, b = rng.normal(size=(2, 5))
    for wrong in (b[:4], b[:, None], 1.0):
        with pytest.raises(ValueError, match="shapes"):
            partial_rank_correlation(a, b, [wrong])
    with pytest.raises(ValueError, match="finite"):
        partial_rank_correlation(a, np.where(b == b.max(), np.nan, b))
    with pytest.raises(ValueError, match="too few"):
        partial_rank_correlation(a, b, [a, b, a])
