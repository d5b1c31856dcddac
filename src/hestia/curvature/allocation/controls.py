"""Allocations that know nothing of curvature: what an allocation by damage has to beat at equal stored bits."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable

from .problem import Allocation, Choice, Group, Problem

_LAYER = re.compile(r"\.(\d+)\.")


def uniform(problem: Problem, budget: int) -> Allocation:
    """The widest width that all groups have and that fits; where they share none, the smallest of each.

    Raises:
        PlanError: nothing fits; the smallest feasible bits are named.
    """
    problem.require(budget)
    shared = set.intersection(*({choice.width for choice in group.choices} for group in problem.groups))
    fitting = [
        found
        for width in sorted(shared)
        if (found := problem.allocation({g.name: width for g in problem.groups})).stored <= budget
    ]
    return max(fitting, key=lambda found: (found.stored, -found.damage)) if fitting else _smallest(problem)


def random_widths(problem: Problem, budget: int, seed: int = 0) -> Allocation:
    """From the smallest upwards: a group drawn at random goes up one step, until none fits any more.

    Raises:
        PlanError: nothing fits; the smallest feasible bits are named.
    """
    problem.require(budget)
    draw = random.Random(seed)
    ladders = {group.name: _ladder(group) for group in problem.groups}
    at = dict.fromkeys(ladders, 0)
    left = budget - problem.smallest
    while True:
        able = [n for n, k in at.items() if k + 1 < len(ladders[n]) and _step(ladders[n], k) <= left]
        if not able:
            return problem.allocation({name: ladders[name][k].width for name, k in at.items()})
        name = draw.choice(able)
        left -= _step(ladders[name], at[name])
        at[name] += 1


def positional(problem: Problem, budget: int) -> Allocation:
    """``uniform``, and what it leaves of the budget goes to the first and last layers, one step each, inwards.

    Raises:
        PlanError: nothing fits; the smallest feasible bits are named.
    """
    start = uniform(problem, budget)
    ladders = {group.name: _ladder(group) for group in problem.groups}
    widths = {group.name: start.widths[group.paths[0]] for group in problem.groups}
    left = budget - start.stored
    while True:
        spent = False
        for group in _from_the_ends(problem.groups):
            here = group.at(widths[group.name])
            above = [c for c in ladders[group.name] if c.stored > here.stored and c.stored - here.stored <= left]
            if above:
                widths[group.name] = above[0].width
                left -= above[0].stored - here.stored
                spent = True
        if not spent:
            return problem.allocation(widths)


def _ladder(group: Group) -> list[Choice]:
    """Choices of growing size; of equally large ones the widest."""
    steps: dict[int, Choice] = {}
    for choice in sorted(group.choices):
        steps[choice.stored] = choice
    return [steps[stored] for stored in sorted(steps)]


def _step(ladder: list[Choice], k: int) -> int:
    return ladder[k + 1].stored - ladder[k].stored


def _smallest(problem: Problem) -> Allocation:
    return problem.allocation({group.name: _ladder(group)[0].width for group in problem.groups})


def _from_the_ends(groups: Iterable[Group]) -> list[Group]:
    """Groups by the distance of their layer to the nearer end of the model."""
    layers = {group.name: int(found[1]) if (found := _LAYER.search(group.name)) else 0 for group in groups}
    last = max(layers.values())
    return sorted(groups, key=lambda g: (min(layers[g.name], last - layers[g.name]), layers[g.name], g.name))
