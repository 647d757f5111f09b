"""Distances of two samples against loops over pairs, closed forms, and distributions whose answer is known."""

import functools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from paperlib.runs.estimate import rows
from paperlib.stats import two_sample
from paperlib.stats.two_sample import energy_distance, gaussian_mmd, kernel_distance, spectral_distance


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def cubic(u, v):
    return (np.dot(u, v) / len(u) + 1) ** 3


def minus_norm(u, v):
    return -math.sqrt(((u - v) ** 2).sum())


def slow_distance(a, b, kernel, together=(1, 1)):
    """Equation (a) with loops."""

    def within(points, unit):
        pairs = [(i, j) for i in range(len(points)) for j in range(len(points)) if i // unit != j // unit]
        return np.mean([kernel(points[i], points[j]) for i, j in pairs])

    return within(a, together[0]) + within(b, together[1]) - 2 * np.mean([kernel(u, v) for u in a for v in b])


kernel_loop, energy_loop = (functools.partial(slow_distance, kernel=kernel) for kernel in (cubic, minus_norm))


def spectral_loop(a, b):
    return math.sqrt(np.mean((np.log(a.mean(0) + 0.1) - np.log(b.mean(0) + 0.1)) ** 2))


LOOPS = [
    (kernel_distance, kernel_loop, (11, 8)),  # groups of unequal size
    (energy_distance, energy_loop, (11, 8)),
    (functools.partial(kernel_distance, together=(3, 2)), functools.partial(kernel_loop, together=(3, 2)), (24, 16)),
    (two_sample.kernel_distance_ratio, lambda a, b, c: kernel_loop(a, c) / kernel_loop(b, c), (11, 8, 9)),
    (
        functools.partial(two_sample.kernel_distance_difference, together=(1, 2)),
        lambda a, b, c: kernel_loop(a, c) - kernel_loop(b, c, together=(2, 1)),
        (11, 16, 9),
    ),
    (functools.partial(spectral_distance, least=0.1), spectral_loop, (11, 8)),
]


@pytest.mark.parametrize(("distance", "slow", "sizes"), LOOPS)
@pytest.mark.parametrize("pairs", [2**22, 17])  # whole groups, or a row or two at a time
def test_values_and_intervals_are_the_loops(rng, monkeypatch, pairs, distance, slow, sizes):
    """The interval by the jackknife, with the groups really taken out."""
    monkeypatch.setattr(two_sample, "PAIRS", pairs)
    monkeypatch.setattr(two_sample, "GROUPS", 4)
    sets = [rng.exponential(1 + k, (size, 3)) for k, size in enumerate(sizes)]
    parts = [np.array_split(points, 4) for points in sets]
    without = np.array([slow(*(np.concatenate(part[:g] + part[g + 1 :]) for part in parts)) for g in range(4)])
    half = stats.t.ppf(0.975, 3) * math.sqrt(3 / 4 * np.sum((without - without.mean()) ** 2))
    value = slow(*sets)
    assert distance(*sets).row == pytest.approx((value, value - half, value + half), rel=1e-9)
    assert distance(torch.from_numpy(sets[0]).requires_grad_(), *sets[1:]) == distance(*sets)


def moments(mean, std):
    """The first three moments of N(mean, std^2 I) about 0, as tensors."""
    variance = std**2 * np.eye(len(mean))
    mixed = np.einsum("i,jk->ijk", mean, variance)
    third = np.einsum("i,j,k->ijk", mean, mean, mean) + mixed + mixed.transpose(1, 0, 2) + mixed.transpose(1, 2, 0)
    return mean, np.outer(mean, mean) + variance, third


def known_kernel_distance(mean, std):
    """(b) multiplied out is a sum of products of moments, here of N(0, I) and N(mean, std^2 I)."""
    dims = len(mean)
    pairs = zip(moments(np.zeros(dims), 1.0), moments(mean, std), strict=True)
    return sum(math.comb(3, k) / dims**k * ((p - q) ** 2).sum() for k, (p, q) in enumerate(pairs, 1))


def known_energy_distance(mean, std):
    """For one dimension, by the mean of |N(m, s^2)|."""

    def mean_norm(m, s):
        return s * math.sqrt(2 / math.pi) * math.exp(-(m**2) / (2 * s**2)) + m * math.erf(m / (s * math.sqrt(2)))

    return 2 * mean_norm(mean[0], math.hypot(1, std)) - mean_norm(0, math.sqrt(2)) - mean_norm(0, math.sqrt(2) * std)


@pytest.mark.parametrize(
    ("distance", "known", "mean", "std"),
    [
        (kernel_distance, known_kernel_distance, np.array([0.5, 0.0, -0.2]), 1.2),
        (energy_distance, known_energy_distance, np.array([0.6]), 1.3),
    ],
)
def test_intervals_cover_the_truth_95_times_in_100(rng, distance, known, mean, std):
    def drawn(mean, std):
        sizes = (150, len(mean)), (100, len(mean))
        return rows([distance(rng.normal(size=sizes[0]), mean + std * rng.normal(size=sizes[1])) for _ in range(200)]).T

    truth, (value, low, high) = known(mean, std), drawn(mean, std)
    assert abs(value.mean() - truth) < 4 * value.std() / math.sqrt(200), "unbiased"
    assert 0.88 < ((low < truth) & (truth < high)).mean() < 0.99
    value, low, high = drawn(0 * mean, 1)
    assert abs(value.mean()) < 4 * value.std() / math.sqrt(200), "0 for equal distributions"
    assert (low > 0).mean() < 0.01 and (high < 0).mean() < 0.12


def test_energy_distance_does_not_know_where_the_origin_is(rng):
    a, b = rng.normal(size=(2, 100, 16))
    assert energy_distance(a + 1e6, b + 1e6).row == pytest.approx(energy_distance(a, b).row, abs=1e-7)


@pytest.mark.parametrize("distance", [kernel_distance, energy_distance, spectral_distance])
def test_points_that_are_refused(rng, distance):
    a = rng.normal(size=(40, 3))
    for message, wrong in (
        (r"\(n, d\)", a[0]),
        (r"\(n, d\)", a[None]),
        (r"\(n, d\)", a[:, :0]),
        ("dimensions", a[:, :2]),
        ("not finite", np.where(a == a.max(), math.inf, a)),
        ("20 groups", a[:19] if distance is spectral_distance else a[:39]),
    ):
        with pytest.raises(ValueError, match=message):
            distance(a, wrong)
    with pytest.raises(ValueError, match="belong together"):
        kernel_distance(a, a, together=(3, 1))


def test_gaussian_mmd_is_the_loop(rng):
    """With E_v and E_uv of (d) by quadrature, dimension by dimension."""
    z, total = 0.3 + rng.normal(size=(7, 3)), 0.0
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()
    for s2 in (0.75, 3, 12):
        one = np.exp(-((z[:, :, None] - nodes) ** 2) / (2 * s2)) @ weights  # (B, D)
        both = (weights @ np.exp(-((nodes[:, None] - nodes) ** 2) / (2 * s2)) @ weights) ** 3
        apart = [((u - v) ** 2).sum() for i, u in enumerate(z) for j, v in enumerate(z) if i != j]
        total += (np.exp(np.array(apart) / (-2 * s2)).mean() - 2 * one.prod(1).mean() + both) / 3
    z = torch.from_numpy(z).requires_grad_()
    assert gaussian_mmd(z).item() == pytest.approx(total, rel=1e-9)
    assert torch.autograd.gradcheck(gaussian_mmd, z)
    for wrong in (torch.zeros(3), torch.zeros(1, 3), torch.zeros(3, 0)):
        with pytest.raises(ValueError, match=r"\(B, D\)"):
            gaussian_mmd(wrong)


def test_gaussian_mmd_in_half_precision_is_widened(rng):
    z = torch.from_numpy(rng.normal(size=(64, 8))).bfloat16()
    exact = gaussian_mmd(z.double()).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for given in (z, z.float()):
            value = gaussian_mmd(given)
            assert value.dtype == torch.float32 and value.item() == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize("apart", [0.0, 5e3])
def test_gaussian_mmd_far_from_the_origin_needs_no_float64(rng, apart):
    """Also where the batch is two distant groups, so that no common shift brings it near 0."""
    z = torch.from_numpy(rng.normal(size=(64, 8))).float() + 5e3
    z[::2] += apart
    z.requires_grad_()
    value, exact = gaussian_mmd(z), gaussian_mmd(z.double())
    assert value.item() == pytest.approx(exact.item(), abs=1e-4) and 0 < exact.item() < 1
    gradients = (torch.autograd.grad(one, z)[0] for one in (value, exact))
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)


def test_a_ratio_of_nothing_to_nothing_is_nan(rng):
    """Without a warning, which the tests take for an error."""
    a = rng.normal(size=(40, 3))
    same = np.zeros((40, 3))
    with np.errstate(all="raise"):
        assert all(math.isnan(number) for number in two_sample.kernel_distance_ratio(same, same, same).row)
        assert two_sample.kernel_distance_ratio(a, same, same).value == math.inf
