"""Finite models against plain loops over every x and z, gradients against autograd, corners against linear algebra."""

import itertools
import math

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


def test_terms_equal_loops_also_where_a_code_is_not_used():
    models = finite.random_model(generator(), 50, x=5, z=4, zeros=0.3)
    assert (models.q_z_given_x == 0).any(), "the encoder should have exact zeros"
    encoder, decoder = [[0.2, 0.8, 0.0], [0.6, 0.4, 0.0]], [[0.1, 0.9], [0.5, 0.5], [1.0, 0.0]]
    unused = finite.from_lists([0.3, 0.7], encoder, [0.2, 0.3, 0.5], decoder)
    assert torch.equal(unused.q_x_given_z[2], unused.p_x)
    for model in (*(models[k] for k in range(50)), unused):
        terms = by_loops(model)
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


def test_a_point_costs_nothing_and_impossible_data_infinitely_much():
    code = [0.3, 0.7]
    for view in (finite.elbo, finite.elbo_from_evidence, finite.elbo_from_codes):
        assert float(view(finite.from_lists([0, 1, 0], [code] * 3, code, [[0, 1, 0]] * 2))) == 0
        assert float(view(finite.from_lists([0.5, 0.5], [code] * 2, code, [[1, 0]] * 2))) == -math.inf


def test_what_is_no_table_is_refused():
    even = [0.5, 0.5]
    for p_x, row, told in ((even, [0.5, 0.6], "q_z_given_x"), ([1.5, -0.5], even, "p_x ")):
        with pytest.raises(ValueError, match=told):
            finite.from_lists(p_x, [row, even], even, [even, even])
    with pytest.raises(ValueError, match="sum to 3 and 4"):
        finite.most_informative_coupling((1, 2), (1, 3))


def test_couplings_keep_both_marginals_and_differ():
    p_x, p_z = (torch.tensor(p).double().expand(20, -1) / 10 for p in ((5, 3, 2), (6, 1, 2, 1)))
    model = finite.matched(p_x, finite.random_coupling(p_x, p_z, generator(2), 2.0), p_z)
    torch.testing.assert_close(model.q_z, p_z, rtol=0, atol=1e-14)
    torch.testing.assert_close(model.q_xz.sum(-1), p_x, rtol=0, atol=1e-14)
    assert finite.mutual_information(model).std() > 0.05


def least_entropy_by_bases(x_parts, z_parts):
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
    assert len(corners) > 5
    return float(finite.entropy(corners).min())


@pytest.mark.parametrize(
    ("x_parts", "z_parts"), [((5, 3, 2), (4, 4, 2)), ((4, 0, 3), (3, 3, 1)), ((41, 30, 17, 12), (35, 28, 22, 15))]
)
def test_the_most_informative_coupling_against_all_corners_by_linear_algebra(x_parts, z_parts):
    table = finite.most_informative_coupling(x_parts, z_parts)
    for dim, parts in ((1, x_parts), (0, z_parts)):
        torch.testing.assert_close(table.sum(dim), torch.tensor(parts).double() / sum(parts), rtol=0, atol=1e-15)
    assert float(finite.entropy(table.flatten())) == pytest.approx(least_entropy_by_bases(x_parts, z_parts), abs=1e-12)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_gradients_equal_autograd(weight):
    models = finite.random_model(generator(3), 10, x=4, z=3)

    def objective(encoder, decoder):
        model = Finite(models.p_x, encoder.softmax(-1), models.p_z, decoder.softmax(-1))
        return -(finite.distortion(model) + weight * finite.rate(model)).sum()

    logits = models.q_z_given_x.log(), models.p_x_given_z.log()
    wanted = torch.autograd.functional.jacobian(objective, logits)
    torch.testing.assert_close(finite.gradients(models, weight), wanted, rtol=0, atol=1e-13)


def test_ascent_climbs_and_holds_what_has_no_step():
    start = finite.random_model(generator(4), 8, x=4, z=4)
    flow = finite.ascend(start, 200, 1, encoder_step=1.0, decoder_step=1.0)
    objective = -flow.rate - flow.distortion
    assert objective.shape == (201, 8) and objective.diff(dim=0).min() > -1e-14
    torch.testing.assert_close(objective[[0, -1]], torch.stack([finite.elbo(start), finite.elbo(flow.model)]))
    still = finite.ascend(start, 5, 0, decoder_step=1.0).model
    assert torch.equal(still.q_z_given_x, start.q_z_given_x)


def test_near_the_collapsed_point():
    """(6) of notebook 01: with a, v the relative changes of q(x|z), p(x|z) and u that of q(z),
    ELBO + H = -|a - v|^2/2 - |u|^2/2 and without the KL it is <a, v> - |v|^2/2: a ridge and a saddle."""
    p_x, p_z = (torch.tensor(p, dtype=torch.float64) for p in ([0.5, 0.3, 0.2], [0.6, 0.4]))
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
