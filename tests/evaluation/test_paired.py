"""The paired t interval against scipy, and its edges."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from hestia.errors import ConfigError
from hestia.evaluation import PairedDifference, paired_difference

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


def test_pairing_sees_what_two_separate_intervals_hide():
    texts = np.random.default_rng(0).normal(3.0, 0.5, size=50)  # blocks differ much, methods little
    better = texts - 0.02 + np.random.default_rng(1).normal(0, 0.01, size=50)
    difference = paired_difference(better.tolist(), texts.tolist())
    assert difference.excludes_zero and difference.high < 0
    assert not paired_difference([1.0, 2.0, 3.0], [2.0, 2.0, 2.1]).excludes_zero


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
