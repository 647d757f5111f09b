"""Aggregate posterior against a slow loop in extended precision, in every regime of the weights."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.distributions import Normal

from paperlib.stats import aggregate_posterior
from paperlib.stats.aggregate_posterior import Codes, conditional, heaviest, log_density, log_weights
from paperlib.system.files import ROOT


def slow(z, codes, x=None):
    """log q(z), weights, E_q[x|z] and Var_q[x|z], one code at a time in 80-bit numbers."""
    mean, log_std = (a.numpy().astype(np.longdouble) for a in (codes.mean, codes.log_std))
    data = None if x is None else x.double().flatten(1).numpy().astype(np.longdouble)
    log_q, weights, average, variance = [], [], [], []
    for code in z.double().numpy().astype(np.longdouble):
        terms = ((code - mean) / np.exp(log_std)) ** 2 + 2 * log_std + np.log(2 * np.longdouble(np.pi))
        exponents = -terms.sum(1) / 2
        scaled = np.exp(exponents - exponents.max())
        w = scaled / scaled.sum()
        log_q.append(exponents.max() + np.log(scaled.sum()) - np.log(np.longdouble(len(mean))))
        weights.append(w)
        if data is not None:
            average.append(w @ data)
            variance.append(w @ (data - average[-1]) ** 2)
    stacked = [np.array(a).astype(np.float64) for a in (log_q, weights, average, variance)]
    return tuple(torch.from_numpy(a) for a in stacked)


def check(z, codes, x, **options):
    """All that `conditional` and `log_density` say of z, against the slow loop."""
    log_q, weights, mean, variance = slow(z, codes, x)
    result = conditional(z, codes, x, **options)
    scale = 1e-15 * log_q.abs()
    assert (log_density(z, codes) - log_q).abs().le(1e-6 + scale).all()
    assert (result.log_q - log_q).abs().le(1e-6 + scale).all()
    torch.testing.assert_close(result.ess, 1 / weights.square().sum(1), rtol=1e-5, atol=0)
    extent = float(x.double().max() - x.double().min()) or 1.0
    torch.testing.assert_close(result.mean.flatten(1), mean, rtol=0, atol=1e-6 * extent)
    smallest = 1e-28 * extent**2
    if result.variance is not None:
        torch.testing.assert_close(result.variance.flatten(1), variance, rtol=1e-5, atol=smallest)
    torch.testing.assert_close(result.trace, variance.sum(1), rtol=1e-5, atol=smallest)
    return result


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(params=["few", "many", "small tiles"])
def path(request, monkeypatch):
    """Force differences, force matrix products, or cut everything into tiles with rests."""
    if request.param == "few":
        monkeypatch.setattr(aggregate_posterior, "FEW", 10**6)
    else:
        monkeypatch.setattr(aggregate_posterior, "FEW", 0 if request.param == "many" else 40)
    if request.param == "small tiles":
        for name, value in [("ROWS", 7), ("COLUMNS", 101), ("GATHERED", 500)]:
            monkeypatch.setattr(aggregate_posterior, name, value)
    return request.param


def random_codes(generator, count, width, std):
    mean = torch.randn(count, width, generator=generator)
    jitter = 0.3 * torch.randn(count, width, generator=generator)
    return Codes(mean, math.log(std) + jitter)


def images(generator, count, pixels):
    """Greys and what breaks short cuts: dead pixels, a rare bright one, saturated ones."""
    x = torch.randint(0, 256, (count, pixels), generator=generator)
    x = torch.where(torch.rand(count, pixels, generator=generator) < 0.6, x, 255 * (x > 128))
    x[:, :2] = torch.tensor([0, 200])
    x[:, 2] = 0
    x[count // 2, 2] = 255
    x[:, 3] = torch.where(torch.arange(count) % 2 == 0, 253, x[:, 3])
    return x.to(torch.uint8)


@pytest.mark.parametrize("std", [0.01, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("width", [1, 2, 10, 50])
def test_random_codes(generator, path, width, std):
    codes = random_codes(generator, 703, width, std)
    z = torch.cat([torch.randn(12, width, generator=generator), codes.mean[:5]])
    check(z, codes, images(generator, 703, 12))


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.float16, torch.float32, torch.float64])
def test_kinds_and_shapes_of_images(generator, path, kind):
    codes = random_codes(generator, 300, 2, 0.5)
    x = images(generator, 300, 12)
    x = x > 128 if kind == torch.bool else x
    x = (x / 255 if kind.is_floating_point else x).to(kind).reshape(300, 3, 2, 2)
    z = torch.randn(9, 2, generator=generator)
    result = check(z, codes, x)
    assert result.mean.shape == result.variance.shape == (9, 3, 2, 2)
    assert {result.mean.dtype, result.variance.dtype, result.log_q.dtype} == {torch.float64}
    assert check(z, codes, x, per_pixel=False).variance is None


@pytest.mark.parametrize("size", [30.0, 1e8])
@pytest.mark.parametrize("width", [1, 10, 50, 200])
def test_sharp_codes_far_apart(generator, path, width, size):
    """Stds of 0.01 and means of 30, where a float32 expansion is off by nats, and beyond.

    At 1e8 even products of float64 numbers are off by ten thousand nats.
    """
    mean = size * torch.sign(torch.randn(600, width, generator=generator)).double()
    mean += 0.005 * torch.randn(600, width, generator=generator)
    codes = Codes(mean, math.log(0.01))
    z = codes.mean[:8] + 0.01 * torch.randn(8, width, generator=generator)
    check(z, codes, images(generator, 600, 12))


def test_sharp_codes_of_many_near_duplicates(generator, path):
    """Many points weigh although products of float64 numbers are no longer right to 1e-7."""
    mean = torch.full((600, 400), 30.0, dtype=torch.float64)
    mean[::2] *= -1
    mean += 5e-4 * torch.randn(600, 400, generator=generator)
    codes = Codes(mean, math.log(0.01))
    z = codes.mean[:4] + 1e-3
    assert aggregate_posterior._Table(codes).is_coarse(z)
    assert 50 < check(z, codes, images(generator, 600, 12)).ess.min() < 301


@pytest.mark.parametrize("distance", [1e2, 1e4])
@pytest.mark.parametrize("std", [0.01, 1.0])
def test_codes_far_from_all_data(generator, path, distance, std):
    codes = random_codes(generator, 300, 3, std)
    z = distance * torch.randn(6, 3, generator=generator)
    check(z, codes, images(generator, 300, 12))


def test_codes_absurdly_far_do_not_overflow(generator, path):
    codes = random_codes(generator, 300, 3, 0.01)
    z = [[1e9, 0, 0], [1e30, -1e30, 1e30], [1e50, 1e50, -1e50]]
    z = torch.tensor(z, dtype=torch.float64)
    expected = slow(z, codes)[0]
    result = conditional(z, codes, images(generator, 300, 12))
    torch.testing.assert_close(log_density(z, codes), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(result.log_q, expected, rtol=1e-12, atol=0)
    assert result.mean.isfinite().all() and result.variance.ge(0).all()
    assert log_weights(z, codes).exp().sum(1).allclose(torch.ones(3).double())


def test_duplicated_points(generator, path):
    once = random_codes(generator, 5, 2, 0.5)
    x = images(generator, 5, 8)
    often = once[torch.arange(500) % 5]
    z = torch.randn(9, 2, generator=generator)
    one, many = check(z, once, x), check(z, often, x[torch.arange(500) % 5])
    torch.testing.assert_close(many.log_q, one.log_q)
    torch.testing.assert_close(many.ess, 100 * one.ess)
    torch.testing.assert_close(many.variance, one.variance, rtol=1e-5, atol=0)

    same = once[torch.zeros(500, dtype=torch.long)]
    result = conditional(z, same, x[torch.zeros(500, dtype=torch.long)])
    torch.testing.assert_close(result.ess, torch.full((9,), 500.0).double())
    torch.testing.assert_close(result.mean, x[:1].double().expand(9, -1), rtol=1e-12, atol=0)
    assert result.variance.abs().max() < 1e-20


def test_one_point(generator, path):
    codes, x = random_codes(generator, 1, 4, 0.1), images(generator, 1, 8)
    z = torch.randn(5, 4, generator=generator)
    result = check(z, codes, x, labels=torch.tensor([2]))
    assert torch.equal(result.ess, torch.ones(5).double())
    assert torch.equal(result.mean, x.double().expand(5, -1))
    assert not result.variance.any()
    assert torch.equal(result.labels, torch.eye(3).double()[[2] * 5])
    information = aggregate_posterior.mutual_information(codes, generator=generator)
    assert information == pytest.approx((0, 0, 0), abs=1e-12)


@pytest.mark.parametrize("tail", [1e-3, 1e-6, 1e-9, 1e-12, 1e-15, 1e-20])
def test_tiny_variances(generator, path, tail):
    """One point with nearly all the weight; the rest carries a variance of about `tail`."""
    count, pixels = 400, 16
    # The exponent of the first point is 0, that of the others log(tail / count).
    mean = torch.full((count, 1), math.sqrt(-2 * math.log(tail / count)), dtype=torch.float64)
    mean[0] = 0
    mean += 1e-3 * torch.randn(count, 1, generator=generator)
    codes, z = Codes(mean, 0.0), torch.zeros(2, 1)
    x = torch.rand(count, pixels, generator=generator, dtype=torch.float64)
    x[:, 0], x[:, 1], x[0, 2], x[0, 3] = 0.3, (x[:, 1] > 0.5).double(), 0, 1
    x[1:, 4] = x[0, 4] + 1e-3 * x[1:, 4]
    result = check(z, codes, x)
    assert 0.01 * tail < result.trace[0] / pixels < tail
    assert not result.variance[:, 0].any()
    check(z, codes, x, per_pixel=False)


def test_nearly_equal_images(generator, path):
    """Many points weigh alike, and the variance is 1e-12 because the images differ by 1e-6."""
    codes = random_codes(generator, 400, 2, 1.0)
    x = 0.7 + 1e-6 * torch.rand(400, 9, generator=generator, dtype=torch.float64)
    x[:, ::2] = 1 - x[:, ::2]
    z = torch.randn(5, 2, generator=generator)
    result = conditional(z, codes, x)
    _, _, mean, variance = slow(z, codes, x)
    assert result.ess.min() > 10 and 1e-15 < variance.min() < variance.max() < 1e-12
    torch.testing.assert_close(result.variance, variance, rtol=1e-5, atol=0)
    torch.testing.assert_close(result.mean, mean, rtol=0, atol=1e-9)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_reduced_precision_asked_for_elsewhere(generator, monkeypatch, precision):
    monkeypatch.setattr(aggregate_posterior, "FEW", 0)
    codes, x = random_codes(generator, 300, 2, 0.5), images(generator, 300, 12)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        check(torch.randn(5, 2, generator=generator), codes, x)
    finally:
        torch.set_float32_matmul_precision(before)
    with torch.autocast("cpu", torch.bfloat16):
        check(torch.randn(5, 2, generator=generator), codes, x)


def test_label_mixture(generator, path):
    codes, x = random_codes(generator, 500, 2, 0.2), images(generator, 500, 8)
    labels = torch.randint(0, 7, (500,), generator=generator)
    z = torch.randn(11, 2, generator=generator)
    weights = slow(z, codes)[1]
    expected = torch.stack([weights[:, labels == k].sum(1) for k in range(7)], 1)
    result = conditional(z, codes, x, labels)
    torch.testing.assert_close(result.labels, expected, rtol=1e-6, atol=1e-12)
    assert conditional(z, codes, x, labels.to(torch.uint8)).labels.shape == (11, 7)
    assert conditional(z, codes, x).labels is None


def test_log_weights_and_the_heaviest(generator, path):
    codes = random_codes(generator, 500, 3, 0.3)
    z = torch.randn(9, 3, generator=generator)
    expected = slow(z, codes)[1]
    torch.testing.assert_close(log_weights(z, codes).exp(), expected, rtol=1e-9, atol=1e-300)
    weights, order = expected.sort(dim=1, descending=True)
    for k in (1, 7, 500):
        points, heaviness = heaviest(z, codes, k)
        assert torch.equal(points, order[:, :k])
        torch.testing.assert_close(heaviness, weights[:, :k], rtol=1e-6, atol=1e-300)


@pytest.mark.parametrize("others", [1e-30, 1e-10, 0.3])
def test_one_heavy_point_among_many(generator, monkeypatch, others):
    """Matrix products keep the accuracy where one point has nearly all the weight: the slow way is not needed."""

    def refused(*arguments):
        raise AssertionError("an entry was left to be done by differences")

    monkeypatch.setattr(aggregate_posterior, "FEW", 0)
    monkeypatch.setattr(aggregate_posterior, "_variance", refused)
    mean = torch.full((900, 1), math.sqrt(-2 * math.log(others / 900)), dtype=torch.float64)
    mean += 1e-2 * torch.randn(900, 1, generator=generator)
    mean[500] = 0
    codes, z = Codes(mean, 0.0), torch.zeros(3, 1)
    x = torch.randint(0, 256, (900, 12), generator=generator).to(torch.uint8)
    for per_pixel in (True, False):
        result = check(z, codes, x, labels=(torch.arange(900) == 500).long(), per_pixel=per_pixel)
    torch.testing.assert_close(result.labels[:, 0], torch.full((3,), others / (1 + others)).double(), rtol=0.1, atol=0)


@pytest.mark.parametrize("unit", [1e-30, 1e-21, 1e19, 1e30])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_units_whose_squares_do_not_fit_float32(generator, path, kind, unit):
    codes, x = random_codes(generator, 300, 2, 0.5), torch.rand(300, 12, generator=generator, dtype=torch.float64)
    x, z = (unit * (x - 0.5)).to(kind), torch.randn(9, 2, generator=generator)
    _, _, mean, variance = slow(z, codes, x)
    result = conditional(z, codes, x)
    torch.testing.assert_close(result.mean, mean, rtol=0, atol=1e-6 * unit)
    torch.testing.assert_close(result.variance, variance, rtol=1e-5, atol=0)
    torch.testing.assert_close(result.trace, variance.sum(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("distance", [1e3, 1e9, 1e20])
def test_weights_of_the_heaviest_sum_to_one_at_far_codes(generator, path, distance):
    once = random_codes(generator, 8, 3, 0.3)
    twice = once[torch.arange(16) % 8]  # pairs of equal points share the weight at any distance
    z = distance * torch.randn(6, 3, generator=generator).double()
    expected = slow(z, twice)[1].sort(dim=1, descending=True).values
    points, weights = heaviest(z, twice, 16)
    torch.testing.assert_close(weights.sum(1), torch.ones(6).double(), rtol=1e-12, atol=0)
    assert weights[:, :2].allclose(torch.full((6, 2), 0.5).double(), rtol=1e-12)
    if distance < 1e9:  # beyond, float64 differences of exponents are whole nats
        torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-300)
    assert (points[:, 0] % 8 == points[:, 1] % 8).all()


def test_information_of_codes_far_apart_and_of_equal_codes():
    apart = Codes(1e3 * torch.arange(64.0)[:, None], -1.0)
    generator = torch.Generator().manual_seed(0)
    nats, error, ceiling = aggregate_posterior.mutual_information(apart, generator=generator)
    assert ceiling == math.log(64)
    assert nats == pytest.approx(ceiling, abs=1e-12) and error < 1e-12
    equal = Codes(torch.ones(64, 5), -1.0)
    nats, error, _ = aggregate_posterior.mutual_information(equal, generator=generator)
    assert abs(nats) < 1e-9 and error < 1e-9


def test_information_against_quadrature(generator):
    """Twelve codes on a line: I = h(q(z)) - E h(q(z|x)) by the trapezium rule."""
    mean = torch.randn(12, 1, generator=generator).double()
    log_std = -1 + 0.5 * torch.randn(12, 1, generator=generator).double()
    codes = Codes(mean, log_std)
    grid = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = Normal(mean, log_std.exp()).log_prob(grid).exp().mean(0)
    entropy = -torch.trapezoid(torch.xlogy(density, density), grid)
    exact = (entropy - log_std.mean() - 0.5 * math.log(2 * math.pi * math.e)).item()

    runs = [aggregate_posterior.mutual_information(codes, generator=generator) for _ in range(2000)]
    nats = torch.tensor([run.nats for run in runs]).double()
    spread = nats.std().item() / math.sqrt(len(nats))
    assert 0 < spread < 0.02 and abs(nats.mean().item() - exact) < 4 * spread


def test_information_from_some_points(generator):
    codes = random_codes(generator, 2000, 2, 0.3)
    whole = aggregate_posterior.mutual_information(codes, generator=generator)
    some = aggregate_posterior.mutual_information(codes, points=500, generator=generator)
    assert some.ceiling == whole.ceiling and some.standard_error > 1.5 * whole.standard_error
    assert abs(some.nats - whole.nats) < 4 * some.standard_error
    assert math.isnan(aggregate_posterior.mutual_information(codes, points=1, generator=generator).standard_error)


def test_no_codes(generator):
    codes, none = random_codes(generator, 30, 2, 0.3), torch.zeros(0, 2)
    labels = torch.zeros(30, dtype=torch.long)
    assert log_density(none, codes).shape == (0,)
    assert conditional(none, codes, images(generator, 30, 8), labels).variance.shape == (0, 8)


def test_mistakes_are_refused(generator):
    codes, x = random_codes(generator, 30, 2, 0.3), images(generator, 30, 8)
    z, labels = torch.zeros(4, 2), torch.zeros(30, dtype=torch.long)
    for message, call in [
        ("N and D above 0", lambda: Codes(torch.zeros(0, 2), 0.0)),
        ("N and D above 0", lambda: Codes(torch.zeros(3), 0.0)),
        ("does not broadcast", lambda: Codes(torch.zeros(3, 2), torch.zeros(2, 2))),
        ("not finite", lambda: Codes(torch.full((3, 2), torch.nan), 0.0)),
        ("not finite", lambda: Codes(torch.zeros(3, 2), -torch.inf)),
        ("codes are", lambda: log_density(torch.zeros(4, 3), codes)),
        ("codes are", lambda: log_density(torch.zeros(2), codes)),
        ("not finite", lambda: log_density(torch.full((4, 2), torch.nan), codes)),
        ("30 codes, but 29", lambda: conditional(z, codes, x[:29])),
        ("labels", lambda: conditional(z, codes, x, labels[:29])),
        ("labels", lambda: conditional(z, codes, x, labels - 1)),
        ("31 heaviest of 30", lambda: heaviest(z, codes, 31)),
        ("31 of 30", lambda: aggregate_posterior.mutual_information(codes, points=31)),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


MEMORY = """
import resource, torch
from paperlib.stats.aggregate_posterior import Codes, conditional, log_density
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
generator = torch.Generator().manual_seed(0)
x = torch.randint(0, 256, (30_000, 32), generator=generator).to(torch.uint8)
codes, z = Codes(torch.randn(30_000, 2, generator=generator), {log_std}), torch.randn(2000, 2)
conditional(z[:50], codes[:500], x[:500])
before = peak()
conditional(z, codes, x)
log_density(z, codes)
print(peak() - before)
"""


@pytest.mark.parametrize("log_std", [-4.0, -1.0])
def test_memory_is_bounded(log_std):
    """All pairs at once would take 458 MiB for the exponents alone."""
    program = MEMORY.format(log_std=log_std)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert float(done.stdout) < 250
