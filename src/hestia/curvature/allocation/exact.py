"""The optimum: one binary variable a group and width, minimised exactly.

    min  sum_g,w D_gw x_gw   subject to   sum_w x_gw = 1 for every g,   sum_g,w B_gw x_gw <= budget

With pairwise terms E (what quantizing two tensors together costs beyond the sum of each alone) the product of two
binaries becomes a variable of its own, y = x_a x_b:   y <= x_a,  y <= x_b,  y >= x_a + x_b - 1.

Source: HAWQ-V2 and V3 choose bits this way (arXiv:1911.03852, 2011.10680); pairwise terms: CLADO, arXiv:2307.05657.
Solver: HiGHS through ``scipy.optimize.milp``, with no gap allowed; deterministic, and groups come in sorted order.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...errors import PlanError
from .problem import Allocation, Choice, Group, Interactions, Problem

_SCALE = 1e4
"""Objective of the first guess: HiGHS stops at an absolute gap of 1e-6, which so is 1e-10 of the damage."""


def optimum(problem: Problem, budget: int, interactions: Interactions | None = None) -> Allocation:
    """The allocation of least damage that takes at most ``budget`` bytes; of equally good ones the same every time.

    Without pairwise terms a greedy allocation bounds the optimum from above and its price a byte (the Lagrange
    multiplier) from below; choices whose own bound lies above both cannot be part of the optimum and are left out.

    Args:
        problem: groups, widths, bytes, damages.
        budget: bytes.
        interactions: pairwise terms; pairs within a tied group count at equal widths.

    Raises:
        PlanError: nothing fits (the smallest feasible bits are named), or an interaction of an unknown tensor.
    """
    problem.require(budget)
    if interactions:
        return _solve(problem, budget, [list(group.choices) for group in problem.groups], 1.0, interactions)
    choices = [_efficient(group) for group in problem.groups]
    best = [options[-1] for options in choices]
    if sum(choice.stored for choice in best) <= budget:
        return problem.allocation({g.name: c.width for g, c in zip(problem.groups, best, strict=True)})
    guess, price = greedy(problem, budget)
    if guess.damage > 0.0:
        lowest = [min(c.damage + price * c.stored for c in options) for options in choices]
        room = guess.damage * (1 + 1e-9) - (math.fsum(lowest) - price * budget) + 1e-9 * price * budget
        choices = [
            [c for c in options if c.damage + price * c.stored - low <= room]
            for options, low in zip(choices, lowest, strict=True)
        ]
    found = _solve(problem, budget, choices, guess.damage, None)
    return guess if guess.damage < found.damage else found


@dataclass(frozen=True)
class _Step:
    """One group from one vertex of its hull to the next: damage saved a byte, and the bytes."""

    gain: float
    group: int
    vertex: int
    cost: int


def greedy(problem: Problem, budget: int) -> tuple[Allocation, float]:
    """A good allocation that fits, best damage a byte first, and the price a byte where it first had to pass."""
    hulls = [_hull(_efficient(group)) for group in problem.groups]
    at, price = [0] * len(hulls), 0.0
    left = budget - sum(hull[0].stored for hull in hulls)
    for step in _steps(hulls):
        if step.cost <= left and at[step.group] == step.vertex:
            at[step.group] += 1
            left -= step.cost
        else:
            price = max(price, step.gain)
    widths = {group.name: hulls[g][at[g]].width for g, group in enumerate(problem.groups)}
    return problem.allocation(widths), price


def supported(problem: Problem) -> list[tuple[int, float]]:
    """(bytes, damage) of the optima that greedy steps reach exactly: found by sorting alone; ``greedy`` has them."""
    hulls = [_hull(_efficient(group)) for group in problem.groups]
    damages = [hull[0].damage for hull in hulls]
    stored = sum(hull[0].stored for hull in hulls)
    found = [(stored, math.fsum(damages))]
    for step in _steps(hulls):
        damages[step.group] = hulls[step.group][step.vertex + 1].damage
        stored += step.cost
        found.append((stored, math.fsum(damages)))
    return found


def _steps(hulls: list[list[Choice]]) -> list[_Step]:
    steps = [
        _Step((a.damage - b.damage) / (b.stored - a.stored), g, k, b.stored - a.stored)
        for g, hull in enumerate(hulls)
        for k, (a, b) in enumerate(zip(hull, hull[1:], strict=False))
    ]
    return sorted(steps, key=lambda step: (-step.gain, step.group, step.vertex))


def _hull(choices: list[Choice]) -> list[Choice]:
    """The lower convex hull of efficient choices: the gain a byte falls from step to step."""
    hull: list[Choice] = []
    for c in choices:
        while len(hull) > 1:
            a, b = hull[-2:]
            if (b.damage - a.damage) * (c.stored - a.stored) < (c.damage - a.damage) * (b.stored - a.stored):
                break
            hull.pop()
        hull.append(c)
    return hull


def _efficient(group: Group) -> list[Choice]:
    """The choices that no other beats in both bytes and damage, smallest first; of equals the narrower."""
    kept: list[Choice] = []
    for choice in sorted(group.choices, key=lambda c: (c.stored, c.damage, c.width)):
        if not kept or choice.damage < kept[-1].damage:
            kept.append(choice)
    return kept


def _solve(
    problem: Problem, budget: int, choices: list[list[Choice]], expected: float, interactions: Interactions | None
) -> Allocation:
    import numpy as np  # here: the rest of the package needs no third party
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    variables = [(g, choice) for g, options in enumerate(choices) for choice in options]
    number = {(g, choice.width): k for k, (g, choice) in enumerate(variables)}
    pairs = _pairs(problem, number, interactions)
    count, total = len(variables), len(variables) + len(pairs)
    objective = np.zeros(total)
    objective[:count] = [choice.damage for _, choice in variables]
    objective[count:] = [extra for _, _, extra in pairs]
    largest = float(np.abs(objective).max(initial=0.0))
    objective *= _SCALE / (expected if expected > 0.0 and not pairs else largest or 1.0)
    one_each = coo_array((np.ones(count), ([g for g, _ in variables], range(count))), shape=(len(choices), total))
    constraints: list[Any] = [LinearConstraint(one_each.tocsr(), 1.0, 1.0)]
    if pairs:
        rows, columns, values, upper = [], [], [], []
        for k, (a, b, _) in enumerate(pairs):
            for entries, bound in (
                (((count + k, 1.0), (a, -1.0)), 0.0),
                (((count + k, 1.0), (b, -1.0)), 0.0),
                (((a, 1.0), (b, 1.0), (count + k, -1.0)), 1.0),
            ):
                for column, value in entries:
                    rows.append(len(upper))
                    columns.append(column)
                    values.append(value)
                upper.append(bound)
        linked = coo_array((values, (rows, columns)), shape=(len(upper), total))
        most: Any = np.array(upper)
        constraints.append(LinearConstraint(linked.tocsr(), -np.inf, most))
    smallest = [min(choice.stored for choice in options) for options in choices]
    extra_bytes = np.zeros((1, total))
    extra_bytes[0, :count] = [choice.stored - smallest[g] for g, choice in variables]
    room = budget - sum(smallest)
    unit = max(1.0, float(extra_bytes.max(initial=0.0)))
    integrality = np.zeros(total)
    integrality[:count] = 1
    slack = 0.0
    while True:  # a solution may overstep the budget by the solver's tolerance: then again with that much less
        limit = LinearConstraint(extra_bytes / unit, -np.inf, (room - slack) / unit)
        with _silenced():
            result = milp(
                objective,
                integrality=integrality,
                bounds=Bounds(0.0, 1.0),
                constraints=[*constraints, limit],
                options={"mip_rel_gap": 0.0},
            )
        if result.x is None:
            raise PlanError(f"the allocation could not be solved: {result.message}")
        widths: dict[str, float] = {}
        for g, group in enumerate(problem.groups):
            options = [number[g, choice.width] for choice in choices[g]]
            widths[group.name] = choices[g][int(np.argmax(result.x[options]))].width
        found = problem.allocation(widths, interactions)
        if found.stored <= budget:
            return found
        slack += max(1.0, float(found.stored - budget))


def _pairs(
    problem: Problem, number: dict[tuple[int, float], int], interactions: Interactions | None
) -> list[tuple[int, int, float]]:
    """(variable, variable, extra damage) of every pair of groups and widths that has one, in a fixed order."""
    group_of = {path: g for g, group in enumerate(problem.groups) for path in group.paths}
    total: dict[tuple[int, int], float] = {}
    for (a, wa, b, wb), extra in sorted((interactions or {}).items()):
        for path in (a, b):
            if path not in group_of:
                raise PlanError(f"an interaction names {path}, which is not among the tensors")
        first, second = number.get((group_of[a], wa)), number.get((group_of[b], wb))
        if first is None or second is None or (group_of[a] == group_of[b] and first != second):
            continue
        key = (min(first, second), max(first, second))
        total[key] = total.get(key, 0.0) + extra
    return [(a, b, extra) for (a, b), extra in sorted(total.items())]


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Nothing reaches file descriptor 1: HiGHS prints debugging lines there, where ``--json`` promises one object."""
    try:
        sys.stdout.flush()
        kept = os.dup(1)
    except (OSError, ValueError):  # standard output is closed: nothing to protect
        yield
        return
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 1)
            yield
            if os.name == "posix":
                ctypes.CDLL(None).fflush(None)  # what C still buffers would appear later
    finally:
        os.dup2(kept, 1)
        os.close(kept)
