"""Scores and factors against the published operators (eq. 13 and 15), and their properties."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hestia.curvature import hestia_scores, temperature_factors
from hestia.errors import CalibrationError, ConfigError
from hestia.schedules import KnobSchedule

# Values of the published HESTIA operators (PKU-LLM-DS-LAB/Hestia, Apache-2.0), float64; rho 0.2, tau0 0.3, 1,000 steps.
TRACES = {"q": 3.2, "k": 0.9, "v": 812.0, "o": 455.5, "gate": 61.0, "up": 150.25, "down": 23000.0}
SCORES = {
    "q": 0.24598775336437387,
    "k": 0.1795313489906708,
    "v": 0.6509070523054765,
    "o": 0.6084993475884627,
    "gate": 0.4521426621660371,
    "up": 0.5229346125647033,
    "down": 0.8423515269190038,
}
TEMPERATURE_AT_STEP_600 = {
    "q": 0.1655097979934397,
    "k": 0.1611680861430617,
    "v": 0.19461010881141919,
    "o": 0.1913367631059486,
    "gate": 0.17973658438514337,
    "up": 0.18489889073813018,
    "down": 0.21009838160864408,
}

traces = st.dictionaries(st.text("abcdef", min_size=1), st.floats(1e-12, 1e12), min_size=2, max_size=20)


def test_scores_and_temperatures_equal_the_published_ones() -> None:
    scores = hestia_scores(TRACES, kappa=1.0)
    assert scores == pytest.approx(SCORES, abs=1e-9)
    base = KnobSchedule(rho=0.2, temperature=0.3).base_temperature(600 / 1000)
    factors = temperature_factors(scores, alpha=0.4, centred=False)
    assert {path: base * factor for path, factor in factors.items()} == pytest.approx(TEMPERATURE_AT_STEP_600, abs=1e-9)


@settings(max_examples=50)
@given(traces, st.floats(1e-6, 1e6))
def test_scores_lie_between_0_and_1_keep_the_order_and_ignore_the_unit(values: dict[str, float], unit: float) -> None:
    scores = hestia_scores(values)
    assert all(0.0 < score < 1.0 for score in scores.values())
    for a in values:
        for b in values:
            if values[a] <= values[b]:
                assert scores[a] <= scores[b]
    if max(values.values()) > 1.001 * min(values.values()):
        scaled = hestia_scores({path: unit * value for path, value in values.items()})
        assert scaled == pytest.approx(scores, abs=1e-6)


@settings(max_examples=50)
@given(traces, st.floats(-5.0, 5.0))
def test_centred_factors_have_geometric_mean_1_and_differ_by_one_common_factor(
    values: dict[str, float], alpha: float
) -> None:
    scores = hestia_scores(values)
    plain = temperature_factors(scores, alpha=alpha, centred=False)
    centred = temperature_factors(scores, alpha=alpha, centred=True)
    assert sum(map(math.log, centred.values())) == pytest.approx(0.0, abs=1e-9)
    ratios = [plain[path] / centred[path] for path in scores]
    assert max(ratios) == pytest.approx(min(ratios), rel=1e-9)


def test_the_sign_of_alpha_decides_who_stays_hot() -> None:
    scores = hestia_scores({"flat": 1.0, "curved": 10.0})
    hot = temperature_factors(scores, alpha=0.4, centred=True)
    cold = temperature_factors(scores, alpha=-0.4, centred=True)
    assert hot["curved"] > 1.0 > hot["flat"] and cold["curved"] < 1.0 < cold["flat"]
    assert set(temperature_factors(scores, alpha=0.0, centred=False).values()) == {1.0}


def test_equal_traces_get_equal_scores() -> None:
    assert hestia_scores({"a": 3.0, "b": 3.0}) == pytest.approx({"a": 0.5, "b": 0.5}, abs=1e-6)
    assert hestia_scores({"a": 3.0}) == {"a": 0.5}


@pytest.mark.parametrize("bad", [0.0, -1e-9, math.nan, math.inf])
def test_a_trace_is_never_clipped(bad: float) -> None:
    with pytest.raises(CalibrationError, match=r"b: .*positive and finite"):
        hestia_scores({"a": 1.0, "b": bad})


def test_bad_options_are_refused() -> None:
    with pytest.raises(CalibrationError, match="no traces"):
        hestia_scores({})
    with pytest.raises(ConfigError, match="kappa"):
        hestia_scores({"a": 1.0}, kappa=math.nan)
    for alpha in (math.nan, 11.0, -math.inf):
        with pytest.raises(ConfigError, match=r"alpha must lie in \[-10, 10\]"):
            temperature_factors({"a": 0.5}, alpha=alpha, centred=False)
