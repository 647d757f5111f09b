"""Finite models against plain loops over every x and z, and gradients against autograd."""

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
    found = dict.fromkeys(("rate", "reconstruction", "information", "decoder_kl", "evidence_kl", "posterior_kl"), 0.0)
    evidence = [sum(prior[z] * decoder[z][x] for z in zs) for x in xs]
    for x in xs:
        found["evidence_kl"] += p[x] * math.log(p[x] / evidence[x])
        for z in zs:
            if (joint := p[x] * q[x][z]) > 0:
                found["rate"] += joint * math.log(q[x][z] / prior[z])
                found["reconstruction"] += joint * math.log(decoder[z][x])
                found["information"] += joint * math.log(q[x][z] / q_z[z])
                found["decoder_kl"] += joint * math.log(joint / q_z[z] / decoder[z][x])
                found["posterior_kl"] += joint * math.log(q[x][z] * evidence[x] / prior[z] / decoder[z][x])
    found["prior_kl"] = sum(q_z[z] * math.log(q_z[z] / prior[z]) for z in zs if q_z[z] > 0)
    found["entropy"] = -sum(value * math.log(value) for value in p)
    return found


@pytest.fixture(scope="module")
def models():
    return finite.random_model(generator(), 50, x=5, z=4, zeros=0.3)


def one(models, k):
    return Finite(*(table[k] for table in vars(models).values()))


def test_terms_equal_loops(models):
    assert (models.q_z_given_x == 0).any(), "the encoder should have exact zeros"
    for k in range(50):
        model, found = one(models, k), by_loops(one(models, k))
        for function, value in (
            (finite.rate, found["rate"]),
            (finite.distortion, -found["reconstruction"]),
            (finite.elbo, found["reconstruction"] - found["rate"]),
            (finite.mutual_information, found["information"]),
            (finite.decoder_kl, found["decoder_kl"]),
            (finite.elbo_from_evidence, -found["evidence_kl"] - found["posterior_kl"] - found["entropy"]),
            (finite.elbo_from_codes, -found["prior_kl"] - found["decoder_kl"] - found["entropy"]),
        ):
            assert float(function(model)) == pytest.approx(value, abs=1e-12), function.__name__


def test_the_post_is_off_by_the_entropy(models):
    """And by nothing else: not by a constant, not by another sign."""
    off = finite.elbo_from_evidence(models, entropy_term=False) - finite.elbo(models)
    torch.testing.assert_close(off, finite.entropy(models.p_x), rtol=0, atol=1e-12)
    assert off.min() > 0.1


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


def test_kl_of_the_other_order_differs():
    """The views would not agree with a reversed KL: the test above is worth something only if KL is asymmetric."""
    p, q = torch.tensor([0.9, 0.1], dtype=torch.float64), torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert float(finite.kl(p, q)) == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2))
    assert abs(finite.kl(p, q) - finite.kl(q, p)) > 0.1


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
        ((7, 2, 2), (5, 3, 2, 1)),
        ((1, 1, 1), (1, 1, 1)),
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


def test_no_coupling_knows_more_than_the_most_informative_one():
    parts = ((36, 24, 18, 13, 9), (30, 25, 20, 15, 10))
    p, q = (torch.tensor(part).double() / 100 for part in parts)
    table = finite.most_informative_coupling(*parts)
    most = finite.entropy(p) + finite.entropy(q) - finite.entropy(table.flatten())
    sharpness = torch.linspace(0, 12, 2000, dtype=torch.float64)[:, None, None]
    encoders = finite.random_coupling(p.expand(2000, -1), q.expand(2000, -1), generator(6), sharpness)
    knows = finite.mutual_information(finite.matched(p.expand(2000, -1), encoders, q.expand(2000, -1)))
    assert 0.9 * most < knows.max() <= most
    assert float(most) == pytest.approx(1.302498, abs=1e-6)
    with pytest.raises(ValueError, match="sum to 3 and 4"):
        finite.most_informative_coupling((1, 2), (1, 3))


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_gradients_equal_autograd(weight):
    models = finite.random_model(generator(3), 10, x=4, z=3)
    encoder = models.q_z_given_x.log().requires_grad_()
    decoder = models.p_x_given_z.log().requires_grad_()
    q, p = encoder.softmax(-1), decoder.softmax(-1)
    joint = models.p_x[..., None] * q
    rate = (joint * (q.log() - models.p_z.log()[:, None])).sum()
    ((joint * p.log().mT).sum() - weight * rate).backward()
    for found, wanted in zip(finite.gradients(models, weight), (encoder.grad, decoder.grad), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)


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
    best = Finite(model.p_x, model.q_z_given_x, model.p_z, model.q_x_given_z)
    top = finite.mutual_information(model) - finite.entropy(model.p_x)
    torch.testing.assert_close(-finite.distortion(best), top, rtol=0, atol=1e-13)
    for seed in range(50):
        noise = 1e-3 * torch.randn(1, 3, 4, generator=generator(seed), dtype=torch.float64)
        moved = Finite(model.p_x, model.q_z_given_x, model.p_z, (best.p_x_given_z.log() + noise).softmax(-1))
        loss = top + finite.distortion(moved)
        assert 0 < float(loss) < 1e-5
        torch.testing.assert_close(loss, finite.decoder_kl(moved), rtol=0, atol=1e-13)


def test_near_the_collapsed_point():
    """The expansion of notebook 01: with a, v the relative changes of q(x|z), p(x|z) and u that of q(z),
    ELBO + H = -|a - v|^2/2 - |u|^2/2 and without the KL it is <a, v> - |v|^2/2: a ridge and a saddle."""
    p_x = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    p_z = torch.tensor([0.6, 0.4], dtype=torch.float64)
    size = 1e-5

    def residual(seed):
        noise = size * torch.randn(3, 2, generator=generator(seed), dtype=torch.float64)
        tilt = size * torch.randn(2, 3, generator=generator(seed + 100), dtype=torch.float64)
        model = Finite(p_x, (p_z.log() + noise).softmax(-1), p_z, (p_x.log() + tilt).softmax(-1))
        a, v = model.q_x_given_z / p_x - 1, model.p_x_given_z / p_x - 1
        u = model.q_z / p_z - 1
        weights = p_z[:, None] * p_x
        ridge = -0.5 * (weights * (a - v) ** 2).sum() - 0.5 * (p_z * u**2).sum()
        saddle = (weights * (a * v - 0.5 * v**2)).sum()
        entropy = finite.entropy(p_x)
        return finite.elbo(model) + entropy - ridge, -finite.distortion(model) + entropy - saddle, ridge, saddle

    ridges, saddles = [], []
    for seed in range(20):
        of_ridge, of_saddle, ridge, saddle = residual(seed)
        assert abs(of_ridge) < 1e-13  # third order
        assert abs(of_saddle) < 1e-13
        ridges.append(float(ridge))
        saddles.append(float(saddle))
    assert max(ridges) < 0
    assert min(saddles) < -1e-12
    assert max(saddles) > 1e-12
