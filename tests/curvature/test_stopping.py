"""The stopping rule: its two thresholds by independent arithmetic, and what a calibration does with it."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from hestia.curvature import CurvatureEstimator, Stopping, calibrate
from hestia.curvature.estimators import Problem, Row
from hestia.curvature.intervals import mean_interval, spearman
from hestia.errors import ConfigError

torch.set_num_threads(1)

columns = st.lists(st.lists(st.floats(1e-3, 1e3), min_size=6, max_size=6), min_size=3, max_size=6)


@settings(max_examples=40)
@given(columns)
def test_progress_of_positive_samples_equals_scipy(rows: list[list[float]]) -> None:
    samples = {f"t{k}": row for k, row in enumerate(rows)}
    width, agreement = Stopping().progress(samples)
    logs = np.log(rows)
    widths = stats.t.ppf(0.975, 5) * logs.std(axis=1, ddof=1) / math.sqrt(6)
    assert width == pytest.approx(float(np.median(widths)), rel=1e-6, abs=1e-12)
    # the same halves: two means that differ by rounding alone may rank either way
    first, second = logs[:, 0::2].mean(1), logs[:, 1::2].mean(1)
    gaps = [abs(a - b) for half in (first, second) for k, a in enumerate(half) for b in half[:k]]
    if min(gaps) > 1e-9:
        assert agreement == pytest.approx(stats.spearmanr(first, second).statistic, abs=1e-9)


@settings(max_examples=40)
@given(st.lists(st.integers(-3, 3), min_size=3, max_size=9), st.integers(0, 99))
def test_rank_correlation_with_ties_equals_scipy(x: list[int], seed: int) -> None:
    y = np.random.default_rng(seed).integers(-2, 3, len(x)).tolist()
    mine = spearman(x, y)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(mine)
    else:
        assert mine == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-9)


def test_signed_samples_use_relative_intervals_of_the_mean() -> None:
    samples = {"a": [1.0, -0.5, 2.0, 1.5], "b": [4.0, 5.0, 3.0, 4.5], "c": [0.5, 0.25, 0.75, 0.5]}
    width, agreement = Stopping().progress(samples)
    relative = [half / abs(mean) for mean, half in map(mean_interval, samples.values())]
    assert width == pytest.approx(float(np.median(relative)))
    halves = [[float(np.mean(row[k::2])) for row in samples.values()] for k in (0, 1)]
    assert agreement == pytest.approx(stats.spearmanr(*halves).statistic)
    assert Stopping().progress({"a": [1.0, -1.0], "b": [1.0, -1.0]})[0] == math.inf


def test_both_thresholds_must_hold() -> None:
    narrow = {"a": [1.0, 1.01, 1.0, 1.01], "b": [2.0, 2.02, 2.0, 2.02], "c": [3.0, 3.03, 3.0, 3.03]}
    assert Stopping().enough(narrow)
    swapped = {"a": [1.0, 1.03, 1.0, 1.03], "b": [1.01, 1.02, 1.01, 1.02], "c": [1.02, 1.01, 1.02, 1.01]}
    assert Stopping().progress(swapped)[0] < 0.1 and not Stopping().enough(swapped)
    wide = {"a": [1.0, 1.5, 0.8, 1.2], "b": [10.0, 16.0, 8.0, 13.0], "c": [100.0, 140.0, 90.0, 130.0]}
    assert Stopping().progress(wide)[1] == 1.0 and not Stopping().enough(wide)
    assert Stopping(half_width=2.0).enough(wide)


def test_one_tensor_has_no_ranks_to_disagree() -> None:
    assert Stopping().enough({"only": [1.0, 1.01, 1.0, 1.01]})


@pytest.mark.parametrize(
    "bad",
    [{"start": 1}, {"half_width": 0.0}, {"half_width": math.nan}, {"rank_agreement": 1.5}, {"rank_agreement": -0.1}],
)
def test_numbers_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="stopping wants"):
        Stopping(**bad)  # type: ignore[arg-type]


class Settling(CurvatureEstimator):
    """Samples that are noisy at first and quiet from sequence 8 on; the content of a sequence is its number."""

    name: ClassVar[str] = "settling"

    def sample(self, problem: Problem, ids: Tensor) -> Row:
        k = int(ids[0])
        noise = (0.8 if k < 8 else 0.01) * (-1.0) ** k
        return {path: {"trace": (1.0 + place) * math.exp(noise)} for place, path in enumerate(problem.weights)}


@pytest.fixture
def weights() -> tuple[nn.Module, dict[str, nn.Parameter]]:
    model = nn.ModuleList([nn.Linear(2, 2, bias=False) for _ in range(4)])
    return model, {str(k): layer.weight for k, layer in enumerate(model)}


def test_a_calibration_doubles_until_it_has_settled(weights: tuple[nn.Module, dict[str, nn.Parameter]]) -> None:
    model, chosen = weights
    ids = torch.arange(64)[:, None].expand(64, 3)
    rule = Stopping(start=4, half_width=0.25)
    found = calibrate(model, chosen, ids, estimator="settling", stopping=rule)
    assert found.sequences in (16, 32, 64) and found.stopped.startswith(f"settled after {found.sequences} sequences")
    # by hand: the smallest of 4, 8, 16, ... whose interval is narrow enough
    for count in (4, 8, 16, 32, 64):
        logs = np.array([(0.8 if k < 8 else 0.01) * (-1.0) ** k for k in range(count)])
        half = stats.t.ppf(0.975, count - 1) * logs.std(ddof=1) / math.sqrt(count)
        assert (half <= 0.25) == (count >= found.sequences)
    assert all(len(tensor.samples) == found.sequences for tensor in found.tensors.values())


def test_a_budget_that_ends_first_is_said(weights: tuple[nn.Module, dict[str, nn.Parameter]]) -> None:
    model, chosen = weights
    ids = torch.arange(6)[:, None].expand(6, 3)
    found = calibrate(model, chosen, ids, estimator="settling", stopping=Stopping(start=4))
    assert found.sequences == 6 and found.stopped.startswith("the budget of 6 sequences ended first: median half-width")
    fewer = calibrate(model, chosen, ids[:3], estimator="settling", stopping=Stopping(start=32))
    assert fewer.sequences == 3 and "budget of 3" in fewer.stopped
    assert calibrate(model, chosen, ids, estimator="settling").stopped == "all 6 sequences were used"


def test_by_default_the_rule_is_that_of_the_guide() -> None:
    """32 sequences, 10 % of the mean, a rank correlation of 0.98: numbers that users are told."""
    assert (Stopping().start, Stopping().half_width, Stopping().rank_agreement) == (32, 0.10, 0.98)


def test_an_estimate_that_may_be_negative_is_judged_by_the_interval_that_the_artefact_has() -> None:
    """Also where all of its samples happen to be positive."""
    samples = {"a": [1.0, 9.0, 2.0, 1.5], "b": [4.0, 5.0, 3.0, 4.5], "c": [0.5, 0.25, 0.75, 0.5]}
    relative = [half / mean for mean, half in map(mean_interval, samples.values())]
    assert Stopping().progress(samples, signed=True)[0] == pytest.approx(float(np.median(relative)))
    assert Stopping().progress(samples)[0] != pytest.approx(float(np.median(relative)))
