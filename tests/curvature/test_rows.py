"""Rows become matrices and rows again."""

from __future__ import annotations

import math

import torch

from hestia.curvature.rows import from_matrices, names_of, to_matrices


def test_what_is_missing_stays_missing_and_nan_stays_nan() -> None:
    rows = [{"a": {"trace": 1.5}}, {}, {"b": {"trace": math.nan, "kl:ternary": 0.0}, "a": {"trace": 1e-300}}]
    names = names_of(rows)
    assert names == [("a", "trace"), ("b", "trace"), ("b", "kl:ternary")]
    samples, present = to_matrices(rows, names)
    assert samples.dtype == torch.float64 and present.tolist() == [[True, False, False], [False] * 3, [True] * 3]
    for there in (present, present.double()):  # between processes it travels as a number
        again = from_matrices(samples, there, names)
        assert repr(again[:2]) == repr(rows[:2])
        assert again[2]["a"] == rows[2]["a"] and again[2]["b"]["kl:ternary"] == 0.0
        assert math.isnan(again[2]["b"]["trace"])
