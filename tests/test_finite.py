"""Finite models against plain loops over every x and z, and gradients against autograd."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from paperlib.elbo import finite
from paperlib.elbo.finite import Finite


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def by_loops(model):
    """Every quantity of one model in Python floats, from the definitions."""
    p, q, prior, decoder = (table.tolist() for table in vars(model).values())
    xs, zs = range(len(p)), range(len(prior))
    q_z = [sum(p[x] * q[x][z] for x in xs) for z in zs]
    terms = dict.fromkeys(("rate", "reconstruction", "information", "decoder_kl", "evidence_kl", "posterior_kl"), 0.0)
    evidence = [sum(prior[z] * decoder[z][x] for z in zs) for x in xs]
    for x in xs:
        terms["evidence_kl"] += p[x] * math.log(p[x] / evidence[x])
        for z in zs:
            if (joint := p[x] * q[x][z]) > 0:
                terms["rate"] += joint * math.log(q[x][z] / prior[z])
                terms["reconstruction"] += joint * math.log(decoder[z][x])
                terms["information"] += joint * math.log(q[x][z] / q_z[z])
                terms["decoder_kl"] += joint * math.log(joint / q_z[z] / decoder[z][x])
                terms["posterior_kl"] += joint * math.log(q[x][z] * evidence[x] / prior[z] / decoder[z][x])
    terms["prior_kl"] = sum(q_z[z] * math.log(q_z[z] / prior[z]) for z in zs if q_z[z] > 0)
    terms["entropy"] = -sum(value * math.log(value) for value in p)
    return terms


@pytest.fixture(scope="module")
def models():
    return finite.random_model(generator(), 50, x=5, z=4, zeros=0.3)


def one(models, k):
    return Finite(*(table[k] for table in vars(models).values()))


def test_terms_equal_loops(models):
    assert (models.q_z_given_x == 0).any(), "the encoder should have exact zeros"
    for k in range(50):
        model, terms = one(models, k), by_loops(one(models, k))
        for function, value in (
            (finite.rate, terms["rate"]),
            (finite.distortion, -terms["reconstruction"]),
            (finite.elbo, terms["reconstruction"] - terms["rate"]),
            (finite.mutual_information, terms["information"]),
            (finite.decoder_kl, terms["decoder_kl"]),
            (finite.elbo_from_evidence, -terms["evidence_kl"] - terms["posterior_kl"] - terms["entropy"]),
            (finite.elbo_without_entropy, -terms["evidence_kl"] - terms["posterior_kl"]),
            (finite.elbo_from_codes, -terms["prior_kl"] - terms["decoder_kl"] - terms["entropy"]),
        ):
            assert float(function(model)) == pytest.approx(value, abs=1e-12), function.__name__


def test_elbo_never_exceeds_minus_entropy_and_is_zero_for_a_point():
    models = finite.random_model(generator(1), 2000, x=4, z=3)
    assert (finite.elbo(models) + finite.entropy(models.p_x)).max() < 0
    point = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    code = torch.tensor([0.3, 0.7], dtype=torch.float64)
    model = Finite(point, code.expand(3, 2), code, point.expand(2, 3))
    for view in (finite.elbo, finite.elbo_from_evidence, finite.elbo_from_codes):
        assert float(view(model)) == 0


def test_impossible_data_costs_infinitely_much_in_every_view():
    p = torch.tensor([0.5, 0.5], dtype=torch.float64)
    decoder = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    model = Finite(p, p.expand(2, 2), p, decoder)
    for view in (finite.elbo, finite.elbo_from_evidence, finite.elbo_from_codes):
        assert float(view(model)) == -math.inf


def test_an_unused_code_weighs_nothing():
    p = torch.tensor([0.3, 0.7], dtype=torch.float64)
    encoder = torch.tensor([[0.2, 0.8, 0.0], [0.6, 0.4, 0.0]], dtype=torch.float64)
    prior = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    rows = torch.tensor([[0.1, 0.9], [0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)
    model = Finite(p, encoder, prior, rows)
    assert torch.isfinite(finite.elbo_from_codes(model))
    assert torch.equal(model.q_x_given_z[2], p)
    assert torch.equal(finite.matched(p, encoder, prior).p_x_given_z, model.q_x_given_z)
    torch.testing.assert_close(finite.elbo(model), finite.elbo_from_codes(model), rtol=0, atol=1e-14)


def test_tables_are_checked():
    p = torch.tensor([0.5, 0.5], dtype=torch.float64)
    with pytest.raises(ValueError, match="q_z_given_x"):
        Finite(p, torch.tensor([[0.5, 0.6], [0.5, 0.5]], dtype=torch.float64), p, p.expand(2, 2))
    with pytest.raises(ValueError, match="p_x "):
        Finite(torch.tensor([1.5, -0.5], dtype=torch.float64), p.expand(2, 2), p, p.expand(2, 2))


def test_couplings_keep_both_marginals_and_differ():
    p_x = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).expand(20, -1)
    p_z = torch.tensor([[0.6, 0.1, 0.2, 0.1]], dtype=torch.float64).expand(20, -1)
    encoder = finite.random_coupling(p_x, p_z, generator(2), 2.0)
    torch.testing.assert_close((p_x[..., None] * encoder).sum(1), p_z, rtol=0, atol=1e-14)
    torch.testing.assert_close(encoder.sum(-1), torch.ones(20, 3, dtype=torch.float64), rtol=0, atol=1e-14)
    model = Finite(p_x, encoder, p_z, p_x[:, None].expand(-1, 4, -1))
    assert finite.mutual_information(model).std() > 0.05


def most_information_by_bases(x_parts, z_parts):
    """Every corner of the tables with these marginals as a solution of X + Z - 1 linear equations in as many cells."""
    total, cells = sum(x_parts), list(itertools.product(range(len(x_parts)), range(len(z_parts))))
    rows = [[float(i == k) for i, _ in cells] for k in range(len(x_parts))]
    rows += [[float(j == k) for _, j in cells] for k in range(len(z_parts) - 1)]
    system, right = torch.tensor(rows, dtype=torch.float64), torch.tensor([*x_parts, *z_parts[:-1]]).double() / total
    chosen = torch.tensor(list(itertools.combinations(range(len(cells)), len(rows))))
    bases = system[:, chosen].transpose(0, 1)
    regular = torch.linalg.det(bases).abs() > 0.5  # determinants are 0, 1 or -1
    corners = torch.linalg.solve(bases[regular], right.expand(int(regular.sum()), -1))
    corners = corners[(corners > -1e-12).all(-1)].clamp(min=0)
    p, q = (torch.tensor(parts).double() / total for parts in (x_parts, z_parts))
    return float((finite.entropy(p) + finite.entropy(q) - finite.entropy(corners)).max()), len(corners)


@pytest.mark.parametrize(
    ("x_parts", "z_parts"),
    [
        ((5, 3, 2), (4, 4, 2)),
        ((4, 0, 3), (3, 3, 1)),
        ((41, 30, 17, 12), (35, 28, 22, 15)),
    ],
)
def test_the_most_informative_coupling_against_all_corners_by_linear_algebra(x_parts, z_parts):
    table = finite.most_informative_coupling(x_parts, z_parts)
    p, q = (torch.tensor(parts).double() / sum(parts) for parts in (x_parts, z_parts))
    torch.testing.assert_close(table.sum(1), p, rtol=0, atol=1e-15)
    torch.testing.assert_close(table.sum(0), q, rtol=0, atol=1e-15)
    most, corners = most_information_by_bases(x_parts, z_parts)
    assert corners > 5
    information = finite.entropy(p) + finite.entropy(q) - finite.entropy(table.flatten())
    assert float(information) == pytest.approx(most, abs=1e-12)


def test_marginals_of_two_sums_are_refused():
    with pytest.raises(ValueError, match="sum to 3 and 4"):
        finite.most_informative_coupling((1, 2), (1, 3))


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_gradients_equal_autograd(weight):
    models = finite.random_model(generator(3), 10, x=4, z=3)
    encoder = models.q_z_given_x.log().requires_grad_()
    decoder = models.p_x_given_z.log().requires_grad_()
    q, p = encoder.softmax(-1), decoder.softmax(-1)
    joint = models.p_x[..., None] * q
    rate = (joint * (q.log() - models.p_z.log()[:, None])).sum()
    ((joint * p.log().mT).sum() - weight * rate).backward()
    for gradient, wanted in zip(finite.gradients(models, weight), (encoder.grad, decoder.grad), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-13)


def test_ascent_climbs_and_holds_what_has_no_step():
    start = finite.random_model(generator(4), 8, x=4, z=4)
    flow = finite.ascend(start, 200, 1, encoder_step=1.0, decoder_step=1.0)
    objective = -flow.rate - flow.distortion
    assert objective.shape == (201, 8)
    assert objective.diff(dim=0).min() > -1e-14
    torch.testing.assert_close(objective[0], finite.elbo(start))
    torch.testing.assert_close(objective[-1], finite.elbo(flow.model))
    still = finite.ascend(start, 5, 0, decoder_step=1.0).model
    assert torch.equal(still.q_z_given_x, start.q_z_given_x)
    assert not torch.equal(still.p_x_given_z, start.p_x_given_z)


def test_the_best_decoder_is_q_x_given_z_against_every_small_change():
    """E3 without gradients: no perturbed table does better, and what it loses is the KL, of second order."""
    model = finite.random_model(generator(5), 1, x=4, z=3)
    best = finite.matched(model.p_x, model.q_z_given_x, model.p_z)
    top = finite.mutual_information(model) - finite.entropy(model.p_x)
    torch.testing.assert_close(-finite.distortion(best), top, rtol=0, atol=1e-13)
    noise = 1e-3 * torch.randn(50, 3, 4, generator=generator(6), dtype=torch.float64)
    moved = replace(best, p_x_given_z=(best.p_x_given_z.log() + noise).softmax(-1))
    loss = top + finite.distortion(moved)
    assert 0 < loss.min() < loss.max() < 1e-5
    torch.testing.assert_close(loss, finite.decoder_kl(moved), rtol=0, atol=1e-13)


def test_near_the_collapsed_point():
    """(6) of notebook 01: with a, v the relative changes of q(x|z), p(x|z) and u that of q(z),
    ELBO + H = -|a - v|^2/2 - |u|^2/2 and without the KL it is <a, v> - |v|^2/2: a ridge and a saddle."""
    p_x = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    p_z = torch.tensor([0.6, 0.4], dtype=torch.float64)
    noise = 1e-5 * torch.randn(20, 3, 2, generator=generator(7), dtype=torch.float64)
    tilt = 1e-5 * torch.randn(20, 2, 3, generator=generator(8), dtype=torch.float64)
    model = Finite(p_x, (p_z.log() + noise).softmax(-1), p_z, (p_x.log() + tilt).softmax(-1))
    a, v, u = model.q_x_given_z / p_x - 1, model.p_x_given_z / p_x - 1, model.q_z / p_z - 1
    weights, entropy = p_z[:, None] * p_x, finite.entropy(p_x)
    ridge = -0.5 * (weights * (a - v) ** 2).sum((-2, -1)) - 0.5 * (p_z * u**2).sum(-1)
    saddle = (weights * (a * v - 0.5 * v**2)).sum((-2, -1))
    torch.testing.assert_close(finite.elbo(model) + entropy, ridge, rtol=0, atol=1e-13)  # third order
    torch.testing.assert_close(entropy - finite.distortion(model), saddle, rtol=0, atol=1e-13)
    assert ridge.max() < 0
    assert saddle.min() < -1e-12 and saddle.max() > 1e-12
