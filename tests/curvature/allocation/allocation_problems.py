"""Small allocation problems, drawn at random, and the answer by trying everything."""

from __future__ import annotations

import itertools
import random

from hypothesis import strategies as st

from hestia.curvature.allocation import KEPT, Allocation, Interactions, Problem

STORED_BITS = {KEPT: 16.0, 4.0: 4.5, 3.0: 3.4375, 2.0: 2.25, 1.58: 1.6875, 1.0: 1.125}


def model_like(layers: int, seed: int) -> Problem:
    """The projections of a Llama of ``layers`` layers; damages fall fourfold a bit, times a factor a tensor."""
    draw = random.Random(seed)
    stored, weights, damage = {}, {}, {}
    shapes = {"self_attn.q_proj": 4096, "self_attn.k_proj": 1024, "self_attn.v_proj": 1024, "self_attn.o_proj": 4096}
    shapes |= {"mlp.gate_proj": 8192, "mlp.up_proj": 8192, "mlp.down_proj": 8192}
    for layer in range(layers):
        for name, count in shapes.items():
            path, scale = f"model.layers.{layer}.{name}", 10 ** draw.uniform(-4, -1)
            weights[path] = 256 * count
            stored[path] = {w: int(256 * count * bits / 8) for w, bits in STORED_BITS.items()}
            damage[path] = {w: scale * 4.0**-w * draw.uniform(0.8, 1.2) for w in STORED_BITS if w != KEPT}
    return Problem.of(stored, weights, damage)


@st.composite
def problems(draw: st.DrawFn, most: int = 6) -> Problem:
    """At most six tensors, some of them tied, with any bytes and damages."""
    names = [
        f"model.layers.{k}.{name}" for k in (0, 1) for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
    ]
    paths = draw(st.lists(st.sampled_from(names), min_size=1, max_size=most, unique=True))
    all_widths = sorted(STORED_BITS)
    stored, weights, damage = {}, {}, {}
    for path in paths:
        widths = [KEPT, *draw(st.lists(st.sampled_from(all_widths[:-1]), max_size=4, unique=True))]
        weights[path] = draw(st.integers(1, 1000))
        stored[path] = {w: draw(st.integers(1, 5000)) for w in widths}
        damage[path] = {w: draw(st.floats(0, 10).filter(lambda x: x == 0 or x > 1e-6)) for w in widths if w != KEPT}
    return Problem.of(stored, weights, damage)


def brute_force(problem: Problem, budget: int, interactions: Interactions | None = None) -> Allocation | None:
    """The best of all allocations that fit."""
    best: Allocation | None = None
    for combination in itertools.product(*(group.choices for group in problem.groups)):
        widths = {g.name: c.width for g, c in zip(problem.groups, combination, strict=True)}
        found = problem.allocation(widths, interactions)
        if found.stored <= budget and (best is None or found.damage < best.damage):
            best = found
    return best
