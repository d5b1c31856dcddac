"""The paired t interval against scipy, and its edges."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from hestia.errors import ConfigError
from hestia.evaluation import PairedDifference, gap_closed, holm, over_blocks, paired_difference, paired_p_value

numbers = st.floats(-100, 100)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=12), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_equals_scipy(pairs: list[tuple[float, float]], level: float):
    a, b = np.array(pairs).T
    ours = paired_difference(a.tolist(), b.tolist(), level)
    assert ours.n == len(pairs) and ours.level == level
    assert ours.mean == pytest.approx(float(np.mean(a - b)), abs=1e-9)
    if np.std(a - b) < 1e-9:  # scipy warns about a loss of precision; the interval is a point
        assert ours.high - ours.low == pytest.approx(0.0, abs=1e-6)
        return
    theirs = ttest_rel(a, b).confidence_interval(level)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_a_weight_that_weighs_nothing_or_everything_is_refused(bad: float) -> None:
    with pytest.raises(ConfigError, match="weight of pair 1"):
        paired_difference([1.0, 2.0], [0.0, 0.0], weights=[1.0, bad])


def test_pairing_sees_what_two_separate_intervals_hide():
    texts = np.random.default_rng(0).normal(3.0, 0.5, size=50)  # blocks differ much, methods little
    better = texts - 0.02 + np.random.default_rng(1).normal(0, 0.01, size=50)
    difference = paired_difference(better.tolist(), texts.tolist())
    assert difference.excludes_zero and difference.high < 0
    assert not paired_difference([1.0, 2.0, 3.0], [2.0, 2.0, 2.1]).excludes_zero


def test_blocks_count_by_their_tokens() -> None:
    """A block of 255 targets that got worse and many of 5 that got better: a token got worse."""
    a, b, tokens = [3.1, 1.0, 1.1, 0.9], [3.0, 1.5, 1.4, 1.6], [255, 5, 5, 5]
    plain, weighted = paired_difference(a, b), paired_difference(a, b, weights=tokens)
    assert plain.mean < 0 < weighted.mean

    def loss(nll: list[float]) -> float:
        return sum(t * x for t, x in zip(tokens, nll, strict=True)) / sum(tokens)

    assert weighted.mean == pytest.approx(loss(a) - loss(b), abs=1e-12)


def test_equal_weights_change_nothing() -> None:
    a, b = np.random.default_rng(2).normal(3.0, 0.5, size=(2, 40)).tolist()
    plain, weighted = paired_difference(a, b), paired_difference(a, b, weights=[255] * 40)
    assert weighted.mean == plain.mean
    assert (weighted.low, weighted.high) == pytest.approx((plain.low, plain.high), rel=1e-12)


def test_the_weighted_interval_covers_as_often_as_it_says() -> None:
    """Blocks of very different sizes whose difference a token is 0.1 on average."""
    draw = np.random.default_rng(3)
    rounds, blocks = 2000, 60
    covered = 0
    for _ in range(rounds):
        tokens = draw.integers(5, 256, size=blocks)
        d = 0.1 + draw.normal(0.0, 1.0, size=blocks) / np.sqrt(tokens)
        found = paired_difference(d.tolist(), [0.0] * blocks, weights=tokens.tolist())
        covered += found.low <= 0.1 <= found.high
    assert 0.93 < covered / rounds < 0.97


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "got 1 weights for 2 pairs"),
        ([1.0, 0.0], "weight of pair 1 must be a positive number"),
        ([math.nan, 1.0], "weight of pair 0"),
    ],
)
def test_bad_weights_are_refused(weights: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        paired_difference([1.0, 2.0], [1.0, 1.0], weights=weights)


def test_json_round_trip():
    difference = paired_difference([1.0, 2.0, 4.0], [0.0, 0.5, 1.0])
    assert PairedDifference(**json.loads(json.dumps(difference.to_json()))) == difference


@pytest.mark.parametrize(
    ("a", "b", "level", "message"),
    [
        ([1.0, 2.0], [1.0], 0.95, "got 2 and 1"),
        ([1.0], [1.0], 0.95, "at least two pairs"),
        ([1.0, math.nan], [1.0, 2.0], 0.95, "pair 1 is not finite"),
        ([1.0, 2.0], [1.0, 2.0], 95, "between 0 and 1"),
    ],
)
def test_refusals(a: list[float], b: list[float], level: float, message: str):
    with pytest.raises(ConfigError, match=message):
        paired_difference(a, b, level)


def test_the_interval_of_three_seeds_by_hand():
    # d = 1, 2, 3: mean 2, deviation 1, t(0.975, 2) = 4.302653, half width 4.302653 / sqrt(3) = 2.484138
    difference = paired_difference([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    assert (difference.low, difference.high) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-6)
    assert not difference.excludes_zero


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=8))
def test_the_p_value_equals_scipy_and_agrees_with_the_interval(pairs: list[tuple[float, float]]):
    a, b = np.array(pairs).T
    if np.std(a - b) < 1e-6:
        return
    p = paired_p_value(a.tolist(), b.tolist())
    assert p == pytest.approx(float(ttest_rel(a, b).pvalue), rel=1e-6, abs=1e-12)
    if abs(p - 0.05) > 1e-9:
        assert paired_difference(a.tolist(), b.tolist()).excludes_zero == (p < 0.05)


def test_differences_without_spread_leave_nothing_to_chance():
    assert paired_p_value([2.0, 3.0], [1.0, 2.0]) == 0.0
    assert paired_p_value([2.0, 3.0], [2.0, 3.0]) == 1.0


def test_holm_by_hand():
    # sorted .005 .01 .03 .04 times 4 3 2 1 is .02 .03 .06 .04; the last may not fall below the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    with pytest.raises(ConfigError, match="p value 1"):
        holm([0.1, 1.1])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=10), st.floats(0.001, 0.2))
def test_holm_rejects_what_the_step_down_procedure_rejects(values: list[float], level: float):
    rejected: set[int] = set()
    for place in sorted(range(len(values)), key=lambda i: values[i]):  # the procedure as its paper states it
        if min(1.0, (len(values) - len(rejected)) * values[place]) > level:
            break
        rejected.add(place)
    assert {i for i, p in enumerate(holm(values)) if p <= level} == rejected


def test_gap_closed():
    assert gap_closed(3.0, baseline=3.0, control=2.0) == 0.0
    assert gap_closed(2.0, baseline=3.0, control=2.0) == 1.0
    assert gap_closed(3.5, baseline=3.0, control=2.0) == -0.5
    with pytest.raises(ConfigError, match="no gap"):
        gap_closed(2.0, baseline=2.0, control=2.0)


def test_blocks_that_follow_each_other_are_one_pair() -> None:
    """Where neighbours differ alike, an interval of single blocks is far too narrow."""
    generator = random.Random(0)
    held = {"blocks": 0, "stretches": 0}
    for _ in range(300):
        level, differences = 0.0, []
        for _ in range(216):
            level = 0.9 * level + generator.gauss(0.0, 1.0)  # mean 0
            differences.append(level)
        zeros = [0.0] * len(differences)
        held["blocks"] += not paired_difference(differences, zeros).excludes_zero
        held["stretches"] += not over_blocks(differences, zeros).excludes_zero
    assert held["blocks"] < 0.5 * 300 and held["stretches"] > 0.85 * 300


@given(st.lists(st.tuples(st.floats(0.1, 9.0), st.floats(0.1, 9.0), st.integers(1, 255)), min_size=2, max_size=70))
def test_stretches_have_the_mean_of_their_blocks(rows: list[tuple[float, float, int]]) -> None:
    ours, theirs, tokens = map(list, zip(*rows, strict=True))
    found = over_blocks(ours, theirs, tokens)
    assert found.mean == pytest.approx(paired_difference(ours, theirs, weights=tokens).mean, abs=1e-9)
    assert found.n == max(2, round(len(rows) ** (1 / 3)))
