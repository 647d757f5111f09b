"""The claims of notebook 01 and the criteria that decide them; all are mathematics, judged under every preset."""

import math
from functools import partial

from paperlib.runs.claims import Claim
from paperlib.runs.estimate import Estimate


def _within(tolerance: float, *quantities: Estimate) -> bool:
    return all(quantity.value <= tolerance for quantity in quantities)  # also false for nan


def _indifferent(
    most_I_of_elbo, I_without_kl, flows_arrived, rates_differ_by, ends_with_more_I, stop_short_without_kl, **exact
) -> bool:
    return (
        _within(1e-12, *exact.values())
        and 0 < most_I_of_elbo.value < I_without_kl.value
        and flows_arrived.value >= 90
        and rates_differ_by.value >= 0.5
        and ends_with_more_I.value >= 90
        and stop_short_without_kl.value < 100
    )


def _mixes_as_stated(
    degraded_slower_by, bound_broken_by, parts_agree, more_I, less_I, gap_of_more_I, gap_of_less_I, **exact
) -> bool:
    return (
        _within(1e-9, *exact.values())
        and _within(0, degraded_slower_by, bound_broken_by)
        and parts_agree.value == 100
        and more_I.value > less_I.value
        and gap_of_more_I.value > gap_of_less_I.value
    )


Exact = partial(Claim, exact=True)
CLAIMS = {
    "E1": Exact(
        "L = -KL(p(x) ‖ p_θ(x)) - E KL(q(z|x) ‖ p_θ(z|x)) - H(p), so L ≤ -H(p); without H(p) it is off by H(p).",
        "residuals at most 1e-12; the best L of 8 equal points is -log 8, of one point 0",
        lambda residual_below, without_entropy_below, best_elbo, best_elbo_of_a_point: (
            _within(1e-12, residual_below, without_entropy_below)
            and abs(best_elbo.value + math.log(8)) <= 1e-12
            and best_elbo_of_a_point.value == 0
        ),
        reading=(
            "The three expressions agree within {residual_below} nats; the best ELBO of eight equally likely points "
            "is {best_elbo}, not 0."
        ),
        own=True,
    ),
    "E2": Exact(
        "For linear-Gaussian models the same holds with h(p): L + h(p) ≤ 0, while L itself may be positive.",
        "residual at most 1e-10; L + h(p) ≤ 0, and 0 at best; an L > 0; Monte Carlo within 4 standard errors",
        lambda residual_below, best_L_plus_h_below, greatest_L_plus_h, example_L, worst_standard_errors: (
            _within(1e-10, residual_below, best_L_plus_h_below)
            and greatest_L_plus_h.value <= 0 < example_L.value
            and _within(4, worst_standard_errors)
        ),
        reading=(
            "The closed forms agree within {residual_below}, with Monte Carlo too; an L of {example_L} occurs, where "
            "the post has at most 0."
        ),
        own=True,
    ),
    "E3": Exact(
        "E_q log p(x|z) is greatest at p(x|z) = q(x|z), where it is I_q(x;z) - H(p); the gap is E KL(q(x|z) ‖ p(x|z)).",
        "identity within 1e-12; gradient ascent on free tables within 1e-9 of the closed form, at q(x|z) within 1e-4",
        lambda residual_below, ascent_short_by_below, table_apart_below: (
            _within(1e-12, residual_below) and _within(1e-9, ascent_short_by_below) and _within(1e-4, table_apart_below)
        ),
        reading=(
            "The identity holds within {residual_below}; decoders trained from random tables end within "
            "{ascent_short_by_below} of the maximum."
        ),
    ),
    "E4": Exact(
        "The best factored Gaussian has the mean and variances of q(x|z); it costs negentropy + ½ log(∏v / |Σ|).",
        "optimisation within 1e-6 of both; for Gaussians in bins it is false by more than 0.001 nat",
        lambda moments_apart_below, price_apart_below, false_in_bins_by: (
            _within(1e-6, moments_apart_below, price_apart_below) and false_in_bins_by.value > 1e-3
        ),
        reading="An optimiser that does not know the formula agrees with it within {price_apart_below} nats.",
        own=True,
    ),
    "E5": Exact(
        "The ELBO has the same maximum at every I that q(z) = p(z) allows; without its KL the maximum is at I = H(p); "
        "the collapsed point is stationary for both.",
        "maxima attained and gradients 0 within 1e-12; the largest I of the ELBO's maximum below H(p); 90 % of the "
        "flows under the ELBO come within 1e-3 of -H(p), at rates 0.5 nat apart; 90 % end with more I without the KL, "
        "not all of them short of distortion 0.01",
        _indifferent,
        reading=(
            "Both maxima are attained within {elbo_attained_below}; {flows_arrived} of the flows under the ELBO reach"
            " -H(p), at rates that differ by {rates_differ_by}."
        ),
        own=True,
    ),
    "E6": Exact(
        "With p(x|z) = q(x|z) the chain is reversible at p(x); its eigenvalues are ≥ 0, the second is the squared "
        "maximal correlation; degrading a code slows nothing; on a disconnected support it never mixes; more I can "
        "be faster; a wrong decoder shifts the stationary distribution by at most √(½ E KL) / (1 - τ).",
        "residuals at most 1e-9, gap = exp(-2I) for the scalar Gaussian too; degrading raises no eigenvalue by more "
        "than 1e-12; one eigenvalue 1 per part; the bound never broken; a code with more I and a greater gap",
        _mixes_as_stated,
        reading=(
            "The identities hold within {residual_below}; a code with {more_I:value} nats can mix faster than one "
            "with {less_I:value}."
        ),
        own=True,
    ),
}
