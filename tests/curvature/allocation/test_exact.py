"""The optimum equals brute force, keeps its budget and its ties, and is the same on every run."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
from allocation_problems import STORED_BITS, brute_force, model_like, problems
from hypothesis import given, settings
from hypothesis import strategies as st

from hestia.curvature.allocation import KEPT, Problem, closed_form, optimum, positional, random_widths, tie_of, uniform
from hestia.curvature.allocation.baq import _nearest
from hestia.curvature.allocation.controls import _ladder
from hestia.curvature.allocation.exact import greedy, supported
from hestia.curvature.allocation.problem import up
from hestia.errors import PlanError


@settings(max_examples=60, deadline=None)
@given(problems(), st.floats(0, 1))
def test_the_optimum_is_that_of_brute_force(problem: Problem, share: float) -> None:
    most = sum(max(c.stored for c in g.choices) for g in problem.groups)
    budget = problem.smallest + int(share * (most - problem.smallest))
    found, best = optimum(problem, budget), brute_force(problem, budget)
    assert best is not None and found.stored <= budget
    assert found.damage == pytest.approx(best.damage, rel=1e-9, abs=1e-15)


@settings(max_examples=40, deadline=None)
@given(problems(most=4), st.floats(0, 1), st.integers(0, 2**32))
def test_with_pairwise_terms_it_still_is(problem: Problem, share: float, seed: int) -> None:
    draw = random.Random(seed)
    paths = [path for group in problem.groups for path in group.paths]
    interactions = {
        (a, wa, b, wb): draw.uniform(-2, 2)
        for a in paths
        for b in paths
        if a < b
        for wa in STORED_BITS
        for wb in STORED_BITS
        if draw.random() < 0.5
    }
    most = sum(max(c.stored for c in g.choices) for g in problem.groups)
    budget = problem.smallest + int(share * (most - problem.smallest))
    found, best = optimum(problem, budget, interactions), brute_force(problem, budget, interactions)
    assert best is not None and found.stored <= budget
    assert found.damage == pytest.approx(best.damage, rel=1e-9, abs=1e-9)


def test_pairwise_terms_change_the_choice() -> None:
    stored = {name: {KEPT: 16, 2.0: 2} for name in ("a", "b", "c")}
    damage = {"a": {2.0: 1.0}, "b": {2.0: 1.1}, "c": {2.0: 1.2}}
    problem = Problem.of(stored, dict.fromkeys(stored, 8), damage)
    assert optimum(problem, 20).widths == {"a": 2.0, "b": 2.0, "c": KEPT}
    together = {("a", 2.0, "b", 2.0): 5.0}
    found = optimum(problem, 20, together)
    assert found.widths == {"a": 2.0, "b": KEPT, "c": 2.0} and found.damage == pytest.approx(2.2)
    with pytest.raises(PlanError, match="an interaction names d"):
        optimum(problem, 20, {("a", 2.0, "d", 2.0): 5.0})


def test_permuted_input_and_repeated_runs_give_the_same_allocation() -> None:
    """Many exact ties: every tensor alike, so that any of thousands of allocations is optimal."""
    paths = [f"model.layers.{k}.mlp.down_proj" for k in range(24)]
    stored = {path: {KEPT: 1600, 2.0: 225, 1.58: 169} for path in paths}
    damage = {path: {2.0: 0.1, 1.58: 0.3} for path in paths}
    first = optimum(Problem.of(stored, dict.fromkeys(paths, 800), damage), 24 * 190)
    for seed in range(3):
        shuffled = random.Random(seed).sample(paths, len(paths))
        again = Problem.of({p: stored[p] for p in shuffled}, dict.fromkeys(shuffled, 800), damage)
        assert optimum(again, 24 * 190) == first


def test_another_process_gives_the_same_allocation() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from allocation_problems import model_like\n"
        "from hestia.curvature.allocation import optimum\n"
        "p = model_like(4, 0); print(sorted(optimum(p, p.bytes_for(1.9)).widths.items()))"
    )
    folder = __file__.rpartition("/")[0]
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    problem = model_like(4, 0)
    assert done.stdout.strip() == str(sorted(optimum(problem, problem.bytes_for(1.9)).widths.items()))


@pytest.mark.parametrize("bits", [1.2, 1.6, 1.9, 2.5, 3.0])
def test_nothing_beats_the_optimum_and_everything_keeps_the_budget(bits: float) -> None:
    problem = model_like(6, 1)
    budget = problem.bytes_for(bits)
    best = optimum(problem, budget)
    assert best.bits <= bits
    others = [
        uniform(problem, budget),
        positional(problem, budget),
        closed_form(problem, budget),
        greedy(problem, budget)[0],
    ]
    others += [random_widths(problem, budget, seed) for seed in range(3)]
    for other in others:
        assert other.stored <= budget and other.damage >= best.damage * (1 - 1e-9)
    for found in (best, *others):
        for layer in range(6):
            assert len({found.widths[f"model.layers.{layer}.self_attn.{x}_proj"] for x in "qkv"}) == 1
            assert len({found.widths[f"model.layers.{layer}.mlp.{x}_proj"] for x in ("gate", "up")}) == 1


def test_a_budget_that_nothing_fits_names_the_smallest_that_does() -> None:
    problem = model_like(2, 0)
    for solve in (optimum, closed_form, uniform, random_widths, positional):
        with pytest.raises(PlanError, match=r"0.9 bits per weight cannot be reached.* --bits 1\.1250 or more"):
            solve(problem, problem.bytes_for(0.9))
    assert set(optimum(problem, problem.bytes_for(1.125)).widths.values()) == {1.0}


def test_enough_bits_keep_everything_and_a_useless_width_is_not_bought() -> None:
    problem = model_like(2, 0)
    assert set(optimum(problem, problem.bytes_for(16.0)).widths.values()) == {KEPT}
    free = Problem.of({"a": {4.0: 450, 2.0: 225}}, {"a": 800}, {"a": {4.0: 0.5, 2.0: 0.5}})
    assert optimum(free, 1000).widths == {"a": 2.0}


@pytest.mark.parametrize(
    ("stored", "damage", "message"),
    [
        ({}, {}, "no tensor"),
        ({"a": {2.0: 1}}, {}, "a: no damage is known for 2 bits"),
        ({"a": {2.0: 1}}, {"a": {2.0: -1.0}}, "a: the damage at 2 bits must be 0 or a positive number, got -1"),
        ({"a": {2.0: 1}}, {"a": {2.0: float("nan")}}, "a: the damage at 2 bits"),
        ({"x.q_proj": {2.0: 1}, "x.k_proj": {3.0: 1}}, {}, r"x\.\{k,q,v\}_proj: no width is stored exactly for all"),
    ],
)
def test_bad_numbers_are_refused(stored: dict, damage: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Problem.of(stored, dict.fromkeys(stored, 8), damage)


def test_what_engines_fuse_is_tied() -> None:
    assert len({tie_of(f"model.layers.0.self_attn.{x}_proj") for x in "qkv"}) == 1
    assert tie_of("model.layers.0.mlp.gate_proj") == tie_of("model.layers.0.mlp.up_proj")
    experts = {tie_of(f"model.layers.0.mlp.experts.{k}.{x}_proj") for k in range(3) for x in ("gate", "up", "down")}
    assert experts == {"model.layers.0.mlp.experts.*"}
    assert tie_of("model.layers.0.self_attn.q_proj") != tie_of("model.layers.1.self_attn.q_proj")
    assert tie_of("model.layers.0.mlp.shared_expert.down_proj") == "model.layers.0.mlp.shared_expert.down_proj"


def test_the_solver_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    problem = model_like(12, 0)
    for bits in (1.3, 1.5, 1.7, 1.9, 2.1):
        optimum(problem, problem.bytes_for(bits))
    print("still here")
    assert capfd.readouterr().out == "still here\n"


def test_supported_allocations_are_optimal_at_their_own_size() -> None:
    problem = model_like(2, 5)
    for stored, damage in supported(problem)[::3]:
        best = optimum(problem, stored)
        assert (best.stored, best.damage) == (stored, pytest.approx(damage, rel=1e-9))
        assert greedy(problem, stored)[0].damage == pytest.approx(damage, rel=1e-9)


def test_what_engines_fuse_is_tied_by_every_family_s_names() -> None:
    assert tie_of("h.w1") == tie_of("h.w3") != tie_of("h.w2")
    assert tie_of("a.query") == tie_of("a.key") == tie_of("a.value") != tie_of("a.output")


def test_bits_that_are_printed_are_always_enough() -> None:
    assert [up(bits) for bits in (1.125, 1.12341, 1.12349, 1.1234)] == [1.125, 1.1235, 1.1235, 1.1234]
    problem = model_like(2, 3)
    for stored in range(problem.smallest, problem.smallest + 200):
        assert (
            problem.bytes_for(problem.bits(stored)) == stored and problem.bytes_for(up(problem.bits(stored))) >= stored
        )


def test_the_closed_form_takes_the_narrower_of_two_widths_as_near() -> None:
    problem = Problem.of({"a": {1.0: 100, 3.0: 300}}, {"a": 800}, {"a": {1.0: 0.5, 3.0: 0.25}})
    assert _nearest(problem.groups[0], 2.0).width == 1.0


def test_of_two_widths_of_one_size_the_ladder_has_the_wider() -> None:
    problem = Problem.of({"a": {1.0: 100, 2.0: 100, 3.0: 200}}, {"a": 800}, {"a": {1.0: 0.5, 2.0: 0.25, 3.0: 0.1}})
    assert [choice.width for choice in _ladder(problem.groups[0])] == [2.0, 3.0]
