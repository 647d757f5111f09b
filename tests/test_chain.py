"""Chains against powers of the kernel, pairs of rows and closed forms; E6 of notebook 01 tries (7) to (10) as well."""

import math
from dataclasses import replace

import pytest
import torch

from paperlib.elbo import chain, finite

F64 = {"dtype": torch.float64}


def test_stationary_distribution_by_powers_and_dobrushin_by_pairs():
    for seed in range(5):
        kernel = torch.randn(5, 5, generator=torch.Generator().manual_seed(seed), **F64).softmax(-1)
        rest = torch.linalg.matrix_power(kernel, 4096)[0]
        torch.testing.assert_close(chain.stationary(kernel), rest, atol=1e-11, rtol=0)
        pairs = max(0.5 * float((row - other).abs().sum()) for row in kernel for other in kernel)
        assert float(chain.dobrushin(kernel)) == pytest.approx(pairs, abs=1e-14)
    with pytest.raises(ValueError, match="more than one stationary distribution"):
        chain.stationary(torch.eye(3, **F64))


def test_distance_falls_as_predicted():
    for seed in range(10):
        model = finite.random_model(torch.Generator().manual_seed(seed), 1, x=6, z=5, sharpness=1.0)[0]
        spectrum = chain.spectrum(model.p_x, model.q_z_given_x)
        steps = int(-9 / math.log10(float(spectrum.eigenvalues[1])))
        kernel = chain.transition(model.q_z_given_x, model.q_x_given_z)
        last = float(chain.distances(kernel, model.p_x, steps)[-1])
        assert 1e-11 < last < 1e-7
        assert last == pytest.approx(float(chain.predicted_distances(model.p_x, spectrum, steps)[-1]), rel=0.01)


@pytest.mark.parametrize("flip", [0.3, 0.1, 0.01])
def test_a_fair_bit_read_by_a_noisy_code_attains_the_first_order_bound(flip):
    """With the worst small error (11) is reached, and (10) missed by the factor sqrt(1 - tau)."""
    half, q = torch.tensor([0.5, 0.5], **F64), torch.tensor([[1 - flip, flip], [flip, 1 - flip]], **F64)
    model = finite.matched(half, q, half)
    decoder = (model.q_x_given_z.log() + torch.tensor([1e-4, -1e-4], **F64)).softmax(-1)
    kernel, price = chain.transition(q, decoder), finite.decoder_kl(replace(model, p_x_given_z=decoder))
    apart = float(chain.total_variation(chain.stationary(kernel), half))
    gap, tau = chain.spectrum(half, q).gap, chain.dobrushin(kernel)
    assert float(gap) == pytest.approx(4 * flip * (1 - flip), abs=1e-12)
    assert apart == pytest.approx(float(chain.first_order_bound(price, gap)), rel=1e-3)
    assert apart == pytest.approx(float(chain.stationary_bound(price, tau) * (1 - tau).sqrt()), rel=1e-3)


def test_codes_that_no_data_point_uses_do_not_count():
    q_xz = torch.rand(4, 3, generator=torch.Generator().manual_seed(0), **F64)
    q_xz /= q_xz.sum()
    p_x = q_xz.sum(1)
    wider = torch.zeros(5, 5, **F64)
    wider[:4, 1:4] = q_xz
    second = float(chain.spectrum(p_x, q_xz / p_x[:, None]).eigenvalues[1])
    assert float(chain.maximal_correlation(q_xz)) ** 2 == pytest.approx(second, abs=1e-12)
    assert float(chain.maximal_correlation(wider)) ** 2 == pytest.approx(second, abs=1e-12)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1), (2, 2), (4, 3)])
def test_what_says_nothing_has_no_correlation(shape):
    independent = torch.full(shape, 1 / math.prod(shape), **F64)
    assert float(chain.maximal_correlation(independent)) == pytest.approx(0, abs=1e-9)


def test_a_spectrum_needs_two_data_points_of_positive_probability():
    for p_x in ([1.0], [1.0, 0.0]):
        with pytest.raises(ValueError, match="two or more data points"):
            chain.spectrum(torch.tensor(p_x, **F64), torch.full((len(p_x), 2), 0.5, **F64))
