"""The cheapest plan within a bound, the curve, and the closed form."""

from __future__ import annotations

import math

import pytest
from allocation_problems import brute_force, model_like, problems
from hypothesis import given, settings
from hypothesis import strategies as st

from hestia.curvature.allocation import KEPT, Problem, cheapest, closed_form, curve, optimum, positional, random_widths
from hestia.errors import PlanError


@settings(max_examples=25, deadline=None)
@given(problems(most=4), st.floats(0.01, 20))
def test_the_cheapest_is_that_of_brute_force(problem: Problem, most: float) -> None:
    found = cheapest(problem, most)
    assert found.damage <= most
    smaller = brute_force(problem, found.stored - 1)
    assert smaller is None or smaller.damage > most * (1 - 1e-9)


def test_a_bound_below_every_allocation_names_what_is_reached() -> None:
    problem = Problem.of({"a": {4.0: 450, 2.0: 225}}, {"a": 800}, {"a": {4.0: 0.5, 2.0: 2.0}})
    assert cheapest(problem, 1.0).widths == {"a": 4.0}
    with pytest.raises(PlanError, match=r"--max-kl 0\.1 cannot be reached.* KL of 0\.5 nats per token at 4\.5 bits"):
        cheapest(problem, 0.1)
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(PlanError, match="must be a positive number"):
            cheapest(problem, bad)


def test_the_curve_falls_and_ends_where_nothing_is_quantized() -> None:
    problem = model_like(3, 2)
    points = curve(problem)
    assert all(a.bits < b.bits and a.damage > b.damage for a, b in zip(points, points[1:], strict=False))
    assert (
        points[0].bits == pytest.approx(1.125) and points[-1].bits == pytest.approx(16.0) and points[-1].damage == 0.0
    )
    [one] = curve(problem, [0.5, 1.9])
    best = optimum(problem, problem.bytes_for(1.9))
    assert (one.bits, one.damage) == (best.bits, best.damage)


def test_the_closed_form_is_reverse_water_filling() -> None:
    """Constants 1, 16, 256 and 4096: bits 1, 3, 5, 7 have mean 4 and equal losses; with widths at every integer."""
    widths = [float(w) for w in range(1, 9)]
    stored = {f"t{k}": {w: int(100 * w) for w in widths} for k in range(4)}
    damage = {f"t{k}": {w: 16.0**k * 4.0**-w for w in widths} for k in range(4)}
    problem = Problem.of(stored, dict.fromkeys(stored, 800), damage)
    found = closed_form(problem, 1600)
    assert [found.widths[f"t{k}"] for k in range(4)] == [1.0, 3.0, 5.0, 7.0]
    assert found.damage == pytest.approx(optimum(problem, 1600).damage)


def test_the_closed_form_is_close_to_the_optimum_where_its_law_holds() -> None:
    problem = model_like(8, 3)
    budget = problem.bytes_for(2.5)
    assert closed_form(problem, budget).damage < 2.5 * optimum(problem, budget).damage


def test_positional_gives_the_ends_more_and_random_follows_its_seed() -> None:
    problem = model_like(6, 0)
    budget = problem.bytes_for(2.6)
    widths = positional(problem, budget).widths
    ends = [widths[f"model.layers.{k}.mlp.down_proj"] for k in (0, 5)]
    assert min(ends) > widths["model.layers.3.mlp.down_proj"]
    assert random_widths(problem, budget, 1) == random_widths(problem, budget, 1) != random_widths(problem, budget, 2)
    assert KEPT not in widths.values()
