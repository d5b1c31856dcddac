"""Bits against damage: the cheapest allocation within a bound on the damage, and the whole curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import PlanError
from .exact import greedy, optimum, supported
from .problem import Allocation, Interactions, Problem

POINTS = 60
"""Of the curve, at most."""


@dataclass(frozen=True)
class Point:
    """One optimum: stored bits per weight, and its predicted damage."""

    bits: float
    damage: float


def cheapest(problem: Problem, most: float, interactions: Interactions | None = None) -> Allocation:
    """The smallest allocation whose predicted damage is at most ``most``: bisection over the budget.

    Raises:
        PlanError: ``most`` is no positive number, or less than any allocation reaches; what is reached is named.
    """
    if not most > 0.0:
        raise PlanError(f"--max-kl must be a positive number of nats per token, got {most}")
    low, best = _bracket(problem, most, interactions)
    if best.damage > most:
        raise PlanError(
            f"--max-kl {most:g} cannot be reached: the best plan that is stored exactly has a predicted KL of "
            f"{best.damage:.4g} nats per token at {best.bits:.4g} bits per weight"
        )
    unit = math.gcd(*(c.stored - g.choices[0].stored for g in problem.groups for c in g.choices)) or 1
    while best.stored - low > unit:  # the optimum of ``low`` hurts too much, that of ``best.stored`` does not
        middle = low + max(unit, (best.stored - low) // 2 // unit * unit)
        found = optimum(problem, middle, interactions)
        if found.damage <= most:
            best = found
        else:
            low = middle
    return best


def curve(
    problem: Problem, budgets: Sequence[float] | None = None, interactions: Interactions | None = None
) -> list[Point]:
    """The optimum at every budget in bits per weight, each point once; budgets that nothing fits are left out.

    Without budgets: at most ``POINTS`` of those optima that need no search (``supported``), from the smallest
    allocation to the one where no width helps any more; pairwise terms then count at budgets spread as evenly.
    """
    if budgets is None and not interactions:
        whole = [Point(problem.bits(stored), damage) for stored, damage in supported(problem)]
        places = sorted({round(k * (len(whole) - 1) / (POINTS - 1)) for k in range(POINTS)})
        return [whole[k] for k in places]
    if budgets is None:
        low, high = problem.bits(problem.smallest), problem.bits(problem.largest)
        budgets = [low + (high - low) * k / (POINTS - 1) for k in range(POINTS)]
    points: list[Point] = []
    for bits in sorted(budgets):
        budget = problem.bytes_for(bits)
        if budget >= problem.smallest:
            found = optimum(problem, budget, interactions)
            points.append(Point(found.bits, found.damage))
    return list(dict.fromkeys(points))


def _bracket(problem: Problem, most: float, interactions: Interactions | None) -> tuple[int, Allocation]:
    """Bytes whose optimum hurts too much (or fewer than any takes), and an optimum that does not (or the best)."""
    low = problem.smallest - 1
    if interactions:
        smallest = optimum(problem, problem.smallest, interactions)
        if smallest.damage <= most:
            return smallest.stored, smallest
        ceiling = sum(max(c.stored for c in g.choices) for g in problem.groups)
        return smallest.stored, optimum(problem, ceiling, interactions)
    stored = low
    for stored, damage in supported(problem):
        if damage <= most:
            break
        low = stored
    return low, greedy(problem, stored)[0]
