"""Rank correlations against scipy and closed forms."""

import math

import numpy as np
import pytest
from scipy import stats

from paperlib.stats.rank_correlation import correlation_interval, partial_rank_correlation


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("controls", [0, 1, 3])
def test_it_is_the_inverse_of_spearmans_correlation_matrix(rng, controls, ties):
    columns = rng.normal(size=(80, 2 + controls)).cumsum(1)
    columns = columns.round() if ties else columns
    inverse = np.linalg.inv(np.corrcoef(stats.rankdata(columns, axis=0).T))
    expected = -inverse[0, 1] / math.sqrt(inverse[0, 0] * inverse[1, 1])
    a, b, *controls = columns.T
    if not controls:
        assert expected == pytest.approx(stats.spearmanr(a, b).statistic)
    assert abs(expected) > 0.05
    assert partial_rank_correlation(a, b, controls) == pytest.approx(expected, abs=1e-12)
    assert partial_rank_correlation(np.exp(a), -b, [*controls, *controls]) == pytest.approx(-expected, abs=1e-12)
    assert partial_rank_correlation(a, a**3) == 1 and partial_rank_correlation(a, -a) == -1


def test_where_controls_say_all_there_is_no_correlation(rng):
    a, b, c = rng.normal(size=(3, 30))
    assert math.isnan(partial_rank_correlation(a, b, [np.exp(a)]))
    assert math.isnan(partial_rank_correlation(a, b, [c, -b]))
    assert math.isnan(partial_rank_correlation(a, np.ones(30), [c]))


def test_observations_that_are_refused(rng):
    a, b = rng.normal(size=(2, 5))
    for message, *controls in [
        *(("shapes", wrong) for wrong in (b[:4], b[:, None], 1.0)),
        ("finite", np.where(b == b.max(), np.nan, b)),
        ("too few", a, b, a),
    ]:
        with pytest.raises(ValueError, match=message):
            partial_rank_correlation(a, b, controls)


def test_the_interval_holds_the_truth_in_95_of_100_samples():
    """Normal variables whose correlation, one third variable held fixed, is 0.6; Spearman's is (6 / pi) asin(0.3)."""
    random, truth, covered = np.random.default_rng(0), 6 / np.pi * np.arcsin(0.3), 0
    for _ in range(400):
        control, a, noise = random.normal(size=(3, 200))
        b = 0.6 * a + 0.8 * noise
        r = partial_rank_correlation(a, b, [control])
        low, high = correlation_interval(r, 200, 1)
        assert low < r < high
        covered += low < truth < high
    assert 0.92 < covered / 400 < 0.98
    with pytest.raises(ValueError, match="5 observations are too few"):
        correlation_interval(0.5, 5, 2)
