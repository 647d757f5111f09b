"""Distances of two samples against loops over pairs, closed forms, and distributions whose answer is known."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from paperlib.runs.estimate import Estimate, rows
from paperlib.stats import two_sample
from paperlib.stats.two_sample import (
    energy_distance,
    gaussian_mmd,
    kernel_distance,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def cubic(u, v):
    return (np.dot(u, v) / len(u) + 1) ** 3


def minus_norm(u, v):
    return -math.sqrt(((u - v) ** 2).sum())


TWO_SAMPLES = [(kernel_distance, cubic), (energy_distance, minus_norm)]


# Two samples


def slow_distance(a, b, kernel):
    """Equation (a) with loops."""
    aa = [kernel(u, v) for i, u in enumerate(a) for j, v in enumerate(a) if i != j]
    bb = [kernel(u, v) for i, u in enumerate(b) for j, v in enumerate(b) if i != j]
    return np.mean(aa) + np.mean(bb) - 2 * np.mean([kernel(u, v) for u in a for v in b])


def slow_estimate(a, b, kernel, groups):
    """Equation (d), with the groups really taken out."""
    parts = zip(np.array_split(np.arange(len(a)), groups), np.array_split(np.arange(len(b)), groups), strict=True)
    without = np.array([slow_distance(np.delete(a, i, 0), np.delete(b, j, 0), kernel) for i, j in parts])
    value, deviation = (
        slow_distance(a, b, kernel),
        math.sqrt((groups - 1) / groups * np.sum((without - without.mean()) ** 2)),
    )
    half = stats.t.ppf(0.975, groups - 1) * deviation
    return value, value - half, value + half


@pytest.mark.parametrize(("distance", "kernel"), TWO_SAMPLES)
@pytest.mark.parametrize("pairs", [2**22, 17])  # whole groups, or a row or two at a time
def test_two_samples_are_the_loops(rng, monkeypatch, distance, kernel, pairs):
    monkeypatch.setattr(two_sample, "PAIRS", pairs)
    a, b = rng.normal(size=(11, 3)), 0.5 + rng.normal(size=(8, 3)) ** 2  # groups of unequal size
    expected = slow_estimate(a, b, kernel, 4)
    assert distance(a, torch.from_numpy(b).float().double(), groups=4).row == pytest.approx(expected, rel=1e-5)
    assert distance(a, b, groups=4).row == pytest.approx(expected, rel=1e-9)
    value, low, high = distance(b, a, groups=4).row
    assert (value, low, high) == pytest.approx(expected, rel=1e-9) and low < value < high


def moments(mean, deviation):
    """The first three moments of N(mean, deviation^2 I) about 0, as tensors."""
    variance = deviation**2 * np.eye(len(mean))
    mixed = np.einsum("i,jk->ijk", mean, variance)
    third = np.einsum("i,j,k->ijk", mean, mean, mean) + mixed + mixed.transpose(1, 0, 2) + mixed.transpose(1, 2, 0)
    return mean, np.outer(mean, mean) + variance, third


def known_kernel_distance(mean, deviation):
    """(b) multiplied out is a sum of products of moments, here of N(0, I) and N(mean, deviation^2 I)."""
    dims = len(mean)
    pairs = zip(moments(np.zeros(dims), 1.0), moments(mean, deviation), strict=True)
    return sum(math.comb(3, k) / dims**k * ((p - q) ** 2).sum() for k, (p, q) in enumerate(pairs, 1))


def known_energy_distance(mean, deviation):
    """For one dimension, by the mean of |N(m, s^2)|."""

    def mean_norm(m, s):
        return s * math.sqrt(2 / math.pi) * math.exp(-(m**2) / (2 * s**2)) + m * math.erf(m / (s * math.sqrt(2)))

    m = float(mean[0])
    return (
        2 * mean_norm(m, math.hypot(1, deviation)) - mean_norm(0, math.sqrt(2)) - mean_norm(0, math.sqrt(2) * deviation)
    )


KNOWN = [
    (kernel_distance, known_kernel_distance, np.array([0.5, 0.0, -0.2]), 1.2),
    (energy_distance, known_energy_distance, np.array([0.6]), 1.3),
]


@pytest.mark.parametrize(("distance", "known", "mean", "deviation"), KNOWN)
def test_intervals_cover_the_truth_95_times_in_100(rng, distance, known, mean, deviation):
    repeats, truth, dims = 200, known(mean, deviation), len(mean)
    found = rows(
        [
            distance(rng.normal(size=(150, dims)), mean + deviation * rng.normal(size=(100, dims)))
            for _ in range(repeats)
        ]
    )
    value, low, high = found.T
    assert abs(value.mean() - truth) < 4 * value.std() / math.sqrt(repeats)  # unbiased
    covered = ((low < truth) & (truth < high)).mean()
    assert 0.88 < covered < 0.99
    halves = (high - value) / stats.t.ppf(0.975, 19)
    assert math.sqrt((halves**2).mean()) == pytest.approx(value.std(), rel=0.2)


@pytest.mark.parametrize(("distance", "known", "mean", "deviation"), KNOWN)
def test_equal_distributions_are_at_distance_0(rng, distance, known, mean, deviation):
    repeats, dims = 200, len(mean)
    found = rows([distance(rng.normal(size=(80, dims)), rng.normal(size=(80, dims))) for _ in range(repeats)])
    value, low, high = found.T
    assert abs(value.mean()) < 4 * value.std() / math.sqrt(repeats) and (value < 0).mean() > 0.3
    assert (low > 0).mean() < 0.01 and (high < 0).mean() < 0.12
    halves = (high - value) / stats.t.ppf(0.975, 19)
    assert 1 < (halves**2).mean() / value.var() < 2.5  # wide, since twice the variance


def test_a_bootstrap_is_too_far(rng):
    """Why it is a jackknife: each resample with replacement is about [E k(u, u) - E k(u, u')] / n farther, a set."""
    a, b = rng.normal(size=(2, 60, 2))
    again = [kernel_distance(a[rng.integers(60, size=60)], b[rng.integers(60, size=60)]).value for _ in range(300)]
    excess = sum(np.mean([cubic(u, u) for u in x]) - np.mean([cubic(u, v) for u in x for v in x]) for x in (a, b)) / 60
    assert np.mean(again) - kernel_distance(a, b).value == pytest.approx(excess, rel=0.2)


def test_a_ratio_leaves_the_same_groups_out_of_all_three(rng):
    a, b, reference = rng.normal(0.5, 1, (60, 3)), rng.normal(1, 1, (50, 3)), rng.normal(0, 1, (70, 3))
    found = two_sample.kernel_distance_ratio(a, b, reference, groups=5)
    whole = [kernel_distance(points, reference, groups=5).value for points in (a, b)]
    assert found.value == pytest.approx(whole[0] / whole[1])
    without = []
    for g in range(5):
        left = [
            np.concatenate([part for k, part in enumerate(np.array_split(p, 5)) if k != g]) for p in (a, b, reference)
        ]
        values = [kernel_distance(points, left[2], groups=2).value for points in left[:2]]
        without.append(values[0] / values[1])
    half = stats.t.ppf(0.975, 4) * math.sqrt(4 / 5 * np.square(np.array(without) - np.mean(without)).sum())
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half))
    equal = two_sample.kernel_distance_ratio(a, a, reference)
    assert equal.row == pytest.approx((1, 1, 1)), "what the reference does to both cancels"


def test_spectral_distance_by_hand(rng):
    a, b = rng.exponential(2.0, (30, 6)), rng.exponential(1.0, (25, 6))
    found = two_sample.spectral_distance(a, b, least=0.1, groups=5)

    def value(a, b):
        return math.sqrt(np.mean((np.log(a.mean(0) + 0.1) - np.log(b.mean(0) + 0.1)) ** 2))

    assert found.value == pytest.approx(value(a, b))
    groups = [np.array_split(points, 5) for points in (a, b)]
    without = [value(*(np.concatenate(part[:g] + part[g + 1 :]) for part in groups)) for g in range(5)]
    half = stats.t.ppf(0.975, 4) * math.sqrt(4 / 5 * np.square(np.array(without) - np.mean(without)).sum())
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half))
    assert two_sample.spectral_distance(3 * a, a).value == pytest.approx(math.log(3))
    assert two_sample.spectral_distance(a, a).value == 0
    with pytest.raises(ValueError, match="frequencies"):
        two_sample.spectral_distance(a, b[:, :5])
    with pytest.raises(ValueError, match="groups"):
        two_sample.spectral_distance(a, b, groups=26)


def test_energy_distance_does_not_know_where_the_origin_is(rng):
    a, b = rng.normal(size=(2, 100, 16))
    assert energy_distance(a + 1e6, b + 1e6).row == pytest.approx(energy_distance(a, b).row, abs=1e-7)
    assert energy_distance(3 * a, 3 * b).row == pytest.approx(3 * np.array(energy_distance(a, b).row), rel=1e-9)


@pytest.mark.parametrize("distance", [kernel_distance, energy_distance])
def test_points_that_are_refused(rng, distance):
    a = rng.normal(size=(40, 3))
    assert isinstance(distance(a, a + 1), Estimate)
    for wrong in (a[0], a[None], a[:, :0]):
        with pytest.raises(ValueError, match=r"\(n, d\)"):
            distance(a, wrong)
    with pytest.raises(ValueError, match="dimensions"):
        distance(a, a[:, :2])
    with pytest.raises(ValueError, match="not finite"):
        distance(a, np.where(a == a.max(), math.inf, a))
    for b, groups in ((a[:39], 20), (a, 1), (a, 21)):
        with pytest.raises(ValueError, match="groups"):
            distance(a, b, groups=groups)


# A batch and the standard Gaussian


def gaussian(u, v, s2):
    return math.exp(-((u - v) ** 2).sum() / (2 * s2))


@pytest.mark.parametrize("scales", [(0.25, 1, 4), (0.5,)])
def test_gaussian_mmd_is_the_loop(rng, scales):
    """With E_v and E_uv by quadrature, dimension by dimension."""
    z, total = 0.3 + rng.normal(size=(7, 3)), 0.0
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()
    for s2 in (3 * scale for scale in scales):
        one = np.exp(-((z[:, :, None] - nodes) ** 2) / (2 * s2)) @ weights  # (B, D)
        both = (weights @ np.exp(-((nodes[:, None] - nodes) ** 2) / (2 * s2)) @ weights) ** 3
        within = [gaussian(u, v, s2) for i, u in enumerate(z) for j, v in enumerate(z) if i != j]
        total += (np.mean(within) - 2 * one.prod(1).mean() + both) / len(scales)
    assert gaussian_mmd(torch.from_numpy(z), scales).item() == pytest.approx(total, rel=1e-9)
    if len(scales) == 3:
        assert gaussian_mmd(torch.from_numpy(z)).item() == pytest.approx(total, rel=1e-9)


def test_gaussian_mmd_against_sampling(rng):
    """A second sample in place of the closed form gives the same on average."""
    z, differences = 0.8 * rng.normal(size=(20, 4)) + 0.3, []
    for _ in range(200):
        v, sampled = rng.normal(size=(100, 4)), 0.0
        for s2 in (1, 4, 16):
            kernel = [np.exp(-((x[:, None] - y) ** 2).sum(2) / (2 * s2)) for x, y in ((z, z), (v, v), (z, v))]
            zz, vv = ((k.sum() - len(k)) / (len(k) * (len(k) - 1)) for k in kernel[:2])
            sampled += (zz + vv - 2 * kernel[2].mean()) / 3
        differences.append(sampled - gaussian_mmd(torch.from_numpy(z)).item())
    assert abs(np.mean(differences)) < 4 * np.std(differences) / math.sqrt(len(differences))


def test_gaussian_mmd_is_0_on_average_for_the_gaussian_alone(rng):
    def mean_and_error(draw):
        values = [gaussian_mmd(torch.from_numpy(draw())).item() for _ in range(400)]
        return np.mean(values), np.std(values) / math.sqrt(400)

    mean, error = mean_and_error(lambda: rng.normal(size=(30, 5)))
    assert abs(mean) < 4 * error
    for draw in (lambda: 1.2 * rng.normal(size=(30, 5)), lambda: 0.8 * rng.normal(size=(30, 5)) + 0.1):
        mean, error = mean_and_error(draw)
        assert mean > 4 * error


def test_gaussian_mmd_has_the_gradient_that_pulls_in(rng):
    z = torch.from_numpy(rng.normal(size=(5, 3))).requires_grad_()
    assert torch.autograd.gradcheck(gaussian_mmd, z)
    far = (3 + torch.from_numpy(rng.normal(size=(20, 3)))).requires_grad_()
    gaussian_mmd(far).backward()
    assert far.grad.sum(0).min() > 0  # downhill is towards 0


def test_gaussian_mmd_in_half_precision_is_widened(rng):
    z = torch.from_numpy(rng.normal(size=(64, 8))).bfloat16()
    exact = gaussian_mmd(z.double()).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for given in (z, z.float()):
            found = gaussian_mmd(given)
            assert found.dtype == torch.float32 and found.item() == pytest.approx(exact, abs=1e-6)


def test_batches_that_are_refused():
    for wrong in (torch.zeros(3), torch.zeros(1, 3), torch.zeros(3, 0)):
        with pytest.raises(ValueError, match=r"\(B, D\)"):
            gaussian_mmd(wrong)
    for scales in ((), (1, 0), (-1,), (math.nan,)):
        with pytest.raises(ValueError, match="positive"):
            gaussian_mmd(torch.zeros(3, 2), scales)


# Rows that belong together


def test_pairs_that_belong_together_are_left_out():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (12, 8))

    def mean(u, v, unit=0):
        pairs = [(i, j) for i in range(len(u)) for j in range(len(v)) if not unit or i // unit != j // unit]
        return sum((u[i] @ v[j] / 3 + 1) ** 3 for i, j in pairs) / len(pairs)

    expected = mean(a, a, 3) + mean(b, b, 1) - 2 * mean(a, b)
    found = two_sample.kernel_distance(a, b, groups=2, together=(3, 1))
    assert found.value == pytest.approx(float(expected), rel=1e-12)


def test_states_of_one_chain_do_not_bias_the_distance():
    """Copies of each point in a row: as unbiased as the points themselves, where the plain statistic is not."""
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(60):
        a, b = (torch.randn(40, 2, generator=generator, dtype=torch.float64) for _ in range(2))
        copies = a.repeat_interleave(4, 0)
        values.append(
            [
                two_sample.kernel_distance(copies, b, groups=10, together=(4, 1)).value,
                two_sample.kernel_distance(copies, b, groups=10).value,
                two_sample.kernel_distance(a, b, groups=10).value,
            ]
        )
    apart, plain, single = np.mean(values, 0)
    assert apart == pytest.approx(single, abs=1e-9) and plain > apart + 0.1


def test_rows_that_belong_together_stay_in_one_group():
    a = torch.randn(40, 2)
    with pytest.raises(ValueError, match="belong together"):
        two_sample.kernel_distance(a, a[:30], groups=10, together=(3, 1))
