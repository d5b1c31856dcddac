"""BAQ's closed form: at high rate a tensor's damage falls by four a bit, and the best bits follow without a search.

    D_i(R) = n_i c_i 4^-R,   sum n_i R_i fixed   =>   R_i = R_mean + 1/2 log2(c_i / GM(c))

c_i is the geometric mean of D_i 4^R / n_i over the widths that were measured. R_i is rounded to the nearest width there
is, and the common offset (R_mean - 1/2 log2 GM(c)) is bisected until the true bytes fit the budget.

Source: Zhang et al. 2025, arXiv:2506.05664, eq. for columns of one matrix; here whole tensors, and the budget holds.
It spends bits by a law that breaks at low rates: a baseline to hold ``optimum`` against, never better than it.
"""

from __future__ import annotations

import math

from .problem import KEPT, Allocation, Choice, Group, Problem

_STEPS = 60


def closed_form(problem: Problem, budget: int) -> Allocation:
    """The closed form's allocation within ``budget`` bytes.

    Raises:
        PlanError: nothing fits; the smallest feasible bits are named.
    """
    problem.require(budget)
    constants = {group.name: _half_log(group) for group in problem.groups}

    def at(offset: float) -> Allocation:
        chosen = {g.name: _nearest(g, offset + constants[g.name]).width for g in problem.groups}
        return problem.allocation(chosen)

    low, high = -max(constants.values()) - 1.0, KEPT - min(constants.values()) + 1.0
    best = problem.allocation(
        {g.name: min(g.choices, key=lambda c: (c.stored, c.damage)).width for g in problem.groups}
    )
    if at(high).stored <= budget:
        return at(high)
    for _ in range(_STEPS):
        middle = 0.5 * (low + high)
        found = at(middle)
        if found.stored <= budget:
            low = middle
            best = found if found.damage <= best.damage else best
        else:
            high = middle
    return best


def _half_log(group: Group) -> float:
    """1/2 log2 c of a group."""
    measured = [choice for choice in group.choices if choice.width != KEPT and choice.damage > 0.0]
    if not measured:
        return 0.0
    return math.fsum(0.5 * math.log2(c.damage / group.weights) + c.width for c in measured) / len(measured)


def _nearest(group: Group, bits: float) -> Choice:
    """The width nearest to ``bits``, the narrower of two."""
    return min(group.choices, key=lambda choice: (abs(choice.width - bits), choice.width))
