"""Chains against independent ways: general eigenvalues, powers of the kernel, closed forms, search."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from paperlib.elbo import chain, finite


def random_code(seed, x=5, z=4, zeros=0.0):
    generator = torch.Generator().manual_seed(seed)
    model = finite.random_model(generator, 1, x=x, z=z, sharpness=1.0, zeros=zeros)
    model = finite.Finite(*(table[0] for table in vars(model).values()))
    return model, chain.transition(model.q_z_given_x, model.q_x_given_z)


@pytest.mark.parametrize("seed", range(5))
def test_reversible_positive_and_at_rest_in_p(seed):
    model, kernel = random_code(seed)
    torch.testing.assert_close(model.p_x @ kernel, model.p_x, rtol=0, atol=1e-14)
    flow = model.p_x[:, None] * kernel
    torch.testing.assert_close(flow, flow.T, rtol=0, atol=1e-15)
    general = np.sort(np.linalg.eigvals(kernel.numpy()).real)[::-1]
    assert general.min() > -1e-12
    np.testing.assert_allclose(chain.spectrum(model.p_x, model.q_z_given_x).eigenvalues, general, atol=1e-12)
    torch.testing.assert_close(chain.stationary(kernel), torch.linalg.matrix_power(kernel, 4096)[0], atol=1e-11, rtol=0)


def test_the_second_eigenvalue_is_the_squared_maximal_correlation():
    """Against alternating expectations; for two binary variables also against their plain correlation."""
    for seed in range(20):
        model, _ = random_code(seed)
        second = chain.spectrum(model.p_x, model.q_z_given_x).eigenvalues[1]
        assert float(chain.maximal_correlation(model.q_xz)) ** 2 == pytest.approx(float(second), abs=1e-10)
        model, _ = random_code(seed, x=2, z=2)
        joint = model.q_xz
        (a, b), (c, d) = joint.tolist()
        phi = (a * d - b * c) / math.sqrt((a + b) * (c + d) * (a + c) * (b + d))
        assert float(chain.maximal_correlation(joint)) == pytest.approx(abs(phi), abs=1e-12)
        assert float(chain.spectrum(model.p_x, model.q_z_given_x).eigenvalues[1]) == pytest.approx(phi**2, abs=1e-12)


def test_the_slowest_function_is_an_eigenfunction():
    model, kernel = random_code(3)
    spectrum = chain.spectrum(model.p_x, model.q_z_given_x)
    f = spectrum.slowest
    torch.testing.assert_close(kernel @ f, spectrum.eigenvalues[1] * f, rtol=0, atol=1e-13)
    assert float(model.p_x @ f) == pytest.approx(0, abs=1e-13)
    assert float(model.p_x @ f**2) == pytest.approx(1, abs=1e-13)


def test_distance_falls_as_predicted():
    for seed in range(10):
        model, kernel = random_code(seed, x=6, z=5)
        spectrum = chain.spectrum(model.p_x, model.q_z_given_x)
        steps = int(-9 / math.log10(float(spectrum.eigenvalues[1])))
        distances = chain.distances(kernel, model.p_x, steps)
        predicted = chain.predicted_distances(model.p_x, spectrum, steps)
        assert 1e-11 < distances[-1] < 1e-7
        assert float(distances[-1] / predicted[-1]) == pytest.approx(1, rel=0.01)
        assert float(distances[0]) == pytest.approx(1 - float(model.p_x.min()))


@pytest.mark.parametrize("seed", range(5))
def test_degrading_a_code_raises_no_eigenvalue(seed):
    """And by more than the second: K minus the degraded kernel is positive semidefinite under p."""
    model, kernel = random_code(seed)
    channel = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(-1)
    worse = replace(model, q_z_given_x=model.q_z_given_x @ channel)
    slower = chain.spectrum(worse.p_x, worse.q_z_given_x).eigenvalues
    assert (slower <= chain.spectrum(model.p_x, model.q_z_given_x).eigenvalues + 1e-13).all()
    root = model.p_x.sqrt()
    apart = root[:, None] * (kernel - chain.transition(worse.q_z_given_x, worse.q_x_given_z)) / root
    assert torch.linalg.eigvalsh(0.5 * (apart + apart.T)).min() > -1e-13
    assert finite.mutual_information(worse) < finite.mutual_information(model)


def test_parts_of_the_support():
    p = torch.full((4,), 0.25, dtype=torch.float64)
    bit = torch.tensor([[1, 0], [0, 1], [1, 0], [0, 1]], dtype=torch.float64)
    chained = torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [0, 0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
    for q, parts in ((bit, [0, 1, 0, 1]), (torch.eye(4, dtype=torch.float64), [0, 1, 2, 3]), (chained, [0] * 4)):
        assert chain.components(p[:, None] * q).tolist() == parts
        assert int((chain.spectrum(p, q).eigenvalues > 1 - 1e-12).sum()) == len(set(parts))


def test_a_hard_bit_never_mixes_however_little_it_says():
    """The rare side holds 2 %: I is 0.098 nat, and the worst start stays 98 % away for ever."""
    p = torch.tensor([0.6, 0.38, 0.02], dtype=torch.float64)
    q = torch.tensor([[1, 0], [1, 0], [0, 1]], dtype=torch.float64)
    model = finite.Finite(p, q, torch.tensor([0.5, 0.5], dtype=torch.float64), p.expand(2, 3))
    kernel = chain.transition(q, model.q_x_given_z)
    assert float(finite.mutual_information(model)) == pytest.approx(0.098, abs=1e-3)
    assert float(chain.distances(kernel, p, 1000)[-1]) == pytest.approx(0.98, abs=1e-12)
    with pytest.raises(ValueError, match="more than one stationary distribution"):
        chain.stationary(kernel)


def test_dobrushin_by_pairs():
    _, kernel = random_code(5)
    pairs = [
        0.5 * sum(abs(float(a - b)) for a, b in zip(kernel[x], kernel[y], strict=True))
        for x in range(5)
        for y in range(5)
    ]
    assert float(chain.dobrushin(kernel)) == pytest.approx(max(pairs), abs=1e-14)


def test_the_bound_holds_and_would_fail_without_its_denominator():
    broken = 0
    for seed in range(300):
        model, _ = random_code(seed)
        noise = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        decoder = (model.q_x_given_z.log() + 0.5 * noise).softmax(-1)
        wrong = replace(model, p_x_given_z=decoder)
        kernel = chain.transition(model.q_z_given_x, decoder)
        apart = chain.total_variation(chain.stationary(kernel), model.p_x)
        tau = chain.dobrushin(kernel)
        one_step = chain.total_variation(model.p_x @ kernel, model.p_x)
        assert apart <= one_step / (1 - tau) + 1e-13
        assert one_step <= torch.sqrt(0.5 * finite.decoder_kl(wrong)) + 1e-13
        assert apart <= chain.stationary_bound(finite.decoder_kl(wrong), tau)
        broken += bool(apart > one_step)
    assert broken > 100, "the stationary distribution should be further off than that of one step"


def test_small_errors_obey_the_first_order_bound_and_it_is_attained():
    """(11) for random codes and decoders; a fair bit read by a noisy code with the worst small error reaches it."""
    reached = []
    for seed in range(200):
        model, _ = random_code(seed)
        noise = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        decoder = (model.q_x_given_z.log() + 1e-5 * noise).softmax(-1)
        price = finite.decoder_kl(replace(model, p_x_given_z=decoder))
        exact = 0.5 * (model.q_z @ ((decoder / model.q_x_given_z - 1) ** 2 * model.q_x_given_z).sum(-1))
        assert float(price) == pytest.approx(float(exact), rel=1e-2)  # price is not yet rounding
        apart = chain.total_variation(chain.stationary(chain.transition(model.q_z_given_x, decoder)), model.p_x)
        gap = chain.spectrum(model.p_x, model.q_z_given_x).gap
        reached.append(float(apart / chain.first_order_bound(exact, gap)))
    assert max(reached) < 1
    assert max(reached) > 0.5
    half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    for flip in (0.3, 0.1, 0.01):
        q = torch.tensor([[1 - flip, flip], [flip, 1 - flip]], dtype=torch.float64)
        model = finite.matched(half, q, half)
        tilt = 1e-4 * torch.tensor([1.0, -1.0], dtype=torch.float64)
        decoder = (model.q_x_given_z.log() + tilt).softmax(-1)
        kernel = chain.transition(q, decoder)
        price = finite.decoder_kl(replace(model, p_x_given_z=decoder))
        apart = chain.total_variation(chain.stationary(kernel), half)
        gap, tau = chain.spectrum(half, q).gap, chain.dobrushin(kernel)
        assert float(gap) == pytest.approx(4 * flip * (1 - flip), abs=1e-12)
        assert float(apart) == pytest.approx(float(chain.first_order_bound(price, gap)), rel=1e-3)
        short = float(apart / chain.stationary_bound(price, tau))
        assert short == pytest.approx(math.sqrt(1 - float(tau)), rel=1e-3)
