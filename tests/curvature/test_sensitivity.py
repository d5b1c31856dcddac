"""The artefact: statistics with second opinions, the file, the table."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hestia.curvature import Sensitivity, TensorSensitivity
from hestia.curvature.intervals import jackknife_error, log_mean_interval
from hestia.curvature.show import table
from hestia.errors import CalibrationError, ConfigError

positive = st.floats(1e-20, 1e20)


def a_sensitivity(**changes: object) -> Sensitivity:
    generator = np.random.default_rng(0)
    samples = {"layers.0.q": generator.lognormal(0, 1, 8), "layers.0.k": generator.lognormal(5, 0.1, 8)}
    tensors = {path: TensorSensitivity.of(path, 64, [float(s) for s in row]) for path, row in samples.items()}
    values = {
        "estimator": "gnb",
        "seed": 3,
        "sequences": 8,
        "scored_positions": 40,
        "model": {"path": "m"},
        "seconds": 1.5,
    }
    return Sensitivity(**{"tensors": tensors, **values, **changes})  # type: ignore[arg-type]


@settings(max_examples=50)
@given(st.lists(positive, min_size=2, max_size=40))
def test_statistics_equal_scipy(samples: list[float]) -> None:
    tensor = TensorSensitivity.of("w", 10, samples)
    logs = np.log(samples)
    if np.ptp(logs) > 1e-9:
        low, high = stats.t.interval(0.95, len(logs) - 1, loc=logs.mean(), scale=stats.sem(logs))
        assert math.log(tensor.low) == pytest.approx(low, abs=1e-9, rel=1e-9)
        assert math.log(tensor.high) == pytest.approx(high, abs=1e-9, rel=1e-9)
    assert tensor.geometric_mean == pytest.approx(stats.gmean(samples), rel=1e-9)
    assert tensor.trace == pytest.approx(np.mean(samples), rel=1e-12)
    assert tensor.largest_share == pytest.approx(max(samples) / sum(samples), rel=1e-12)
    assert tensor.low <= tensor.geometric_mean <= tensor.high
    assert tensor.geometric_mean <= tensor.trace * (1 + 1e-12)


@settings(max_examples=50)
@given(st.lists(st.floats(0.1, 10.0), min_size=2, max_size=12))
def test_standard_error_is_the_jackknife_by_its_definition(samples: list[float]) -> None:
    n, mean = len(samples), np.mean(samples)
    without = np.array([np.mean(samples[:k] + samples[k + 1 :]) for k in range(n)])
    expected = math.sqrt((n - 1) / n * float(((without - mean) ** 2).sum()))
    assert jackknife_error(samples) == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("n", [8, 32])
def test_the_interval_covers_the_geometric_mean_of_heavy_tails(n: int) -> None:
    """Simulated lognormal sequences (coefficient of variation 1.3): 95 % +- 3 binomial standard errors."""
    generator = np.random.default_rng(n)
    trials = 1500
    hits = 0
    for row in generator.lognormal(2.0, 1.0, (trials, n)).tolist():
        mean, half = log_mean_interval(row)
        hits += abs(mean - 2.0) <= half
    assert abs(hits / trials - 0.95) < 3 * math.sqrt(0.95 * 0.05 / trials)


def test_round_trip_is_exact(tmp_path: Path) -> None:
    written = a_sensitivity()
    written.save(tmp_path / "sensitivity.json")
    assert Sensitivity.load(tmp_path / "sensitivity.json") == written
    record = json.loads((tmp_path / "sensitivity.json").read_text())
    assert record["schema"] == 2
    assert record["tensors"]["layers.0.q"]["trace"] == written.traces["layers.0.q"]
    assert len(record["tensors"]["layers.0.q"]["samples"]) == 8


def test_sums_of_an_earlier_measurement_do_not_stay_beside_a_new_one(tmp_path: Path) -> None:
    a_sensitivity(diagonals={"layers.0.q": torch.ones(3)}).save(tmp_path / "sensitivity.json")
    assert (tmp_path / "sensitivity.safetensors").is_file()
    a_sensitivity().save(tmp_path / "sensitivity.json")
    assert not (tmp_path / "sensitivity.safetensors").exists()


def test_statistics_come_from_the_samples_and_not_from_the_file() -> None:
    record = a_sensitivity().to_json()
    record["tensors"]["layers.0.q"]["trace"] = 1e9
    assert Sensitivity.from_json(record) == a_sensitivity()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["tensors"]["layers.0.q"].pop("samples"), r"s\.json: layers\.0\.q: missing key 'samples'"),
        (lambda r: r.pop("estimator"), r"s\.json: missing key 'estimator'"),
        (lambda r: r["tensors"]["layers.0.q"]["samples"].pop(), r"layers\.0\.q: 7 samples where the file speaks of 8"),
        (
            lambda r: r["tensors"]["layers.0.q"]["samples"].__setitem__(2, -1.0),
            r"layers\.0\.q: sequence 2: .*got -1\.0",
        ),
        (lambda r: r["tensors"]["layers.0.q"]["samples"].__setitem__(2, None), r"s\.json: layers\.0\.q: "),
        (lambda r: r.__setitem__("tensors", [1]), r"s\.json: "),
    ],
)
def test_a_damaged_file_is_refused_with_the_place(tmp_path: Path, change: object, message: str) -> None:
    record = a_sensitivity().to_json()
    change(record)  # type: ignore[operator]
    path = tmp_path / "s.json"
    path.write_text(json.dumps(record))
    with pytest.raises(CalibrationError, match=message):
        Sensitivity.load(path)


def test_another_schema_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text('{"schema": 1}')
    with pytest.raises(ConfigError, match="schema 1, this version reads schema 2"):
        Sensitivity.load(tmp_path / "s.json")
    with pytest.raises(ConfigError, match="no such file"):
        Sensitivity.load(tmp_path / "none.json")


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_sample_is_never_clipped(bad: float) -> None:
    with pytest.raises(CalibrationError, match=r"w: sequence 1: .*positive and finite"):
        TensorSensitivity.of("w", 4, [1.0, bad, 2.0])
    with pytest.raises(CalibrationError, match=r"w: .*at least 2 sequences, got 1"):
        TensorSensitivity.of("w", 4, [1.0])


def test_the_table_names_what_takes_the_place_of_a_doubtful_eigenvalue() -> None:
    """Surely negative is no less a reason than about zero."""
    tensor = TensorSensitivity.of("w", 4, [-5.0, -5.1, -5.0], signed=True, gauss_newton=[4.0, 5.0, 6.0])
    assert tensor.value == 5.0
    text = table(a_sensitivity(tensors={"w": tensor}, estimator="eigen", primary="eigenvalue"))
    assert "* in 1 tensors the interval is not wholly positive: the Gauss-Newton eigenvalue takes the place" in text


def test_the_table_is_sorted_by_trace_and_warns_of_one_large_sequence() -> None:
    text = table(a_sensitivity())
    assert text.index("layers.0.k") < text.index("layers.0.q")
    assert "8 sequences x 5 scored positions" in text
    assert "one sequence carries over 10%" in text


def test_a_doubtful_value_without_a_stand_in_is_refused() -> None:
    tensor = TensorSensitivity.of("w", 4, [-1.0, 2.0], signed=True)
    with pytest.raises(CalibrationError, match="nothing stands in for it"):
        _ = tensor.value


def test_a_second_quantity_of_another_length_is_refused_by_name() -> None:
    record = a_sensitivity().to_json()
    record["tensors"]["layers.0.q"]["others"] = {"quadratic:ternary": [1.0] * 7}
    with pytest.raises(CalibrationError, match=r"layers\.0\.q: .*7 .*8"):
        Sensitivity.from_json(record)
