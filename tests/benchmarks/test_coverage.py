"""The intervals hold what they promise on the bundled model: a smaller run of the coverage benchmark."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "curvature" / "coverage.py"


@pytest.fixture(scope="module")
def benchmark_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("coverage_benchmark", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow  # a pool of 400 sequences of the 6M model: a minute
def test_the_log_mean_interval_covers_on_the_bundled_model(benchmark_module: ModuleType) -> None:
    samples = benchmark_module.pool(400, 64, seed=1)
    assert len(samples) == 42
    for n in (32, 64):
        found = benchmark_module.coverage(samples, n, 400, seed=2)
        assert found["log_mean"]["mean"] >= 0.90 and found["log_mean"]["worst"] >= 0.85, found
        assert found["met"]


def test_the_count_is_right_where_coverage_is_known(benchmark_module: ModuleType) -> None:
    """Lognormal columns are covered about 95 times in 100; intervals of a much too short sample spread are not."""
    generator = np.random.default_rng(0)
    pool = {"a": generator.lognormal(0.0, 1.0, 5000), "b": generator.lognormal(3.0, 0.5, 5000)}
    found = benchmark_module.coverage(pool, 32, 600, seed=0)
    assert 0.92 < found["log_mean"]["worst"] <= found["log_mean"]["mean"] < 0.98
    spiked = {"a": np.where(np.arange(5000) % 500 == 0, 1e6, 1.0)}
    assert benchmark_module.coverage(spiked, 32, 300, seed=0)["log_mean"]["mean"] < 0.2
    assert not benchmark_module.coverage(spiked, 32, 300, seed=0)["met"]


def test_the_recorded_result_meets_the_goal() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "curvature" / "coverage.json").read_text())
    assert record["pool_sequences"] >= 1000 and record["resamplings"] >= 200
    assert [row["n"] for row in record["coverage"]] == [32, 64]
    for row in record["coverage"]:
        tensors = [entry["log_mean"] for entry in row["tensors"].values()]
        assert len(tensors) == 42
        assert row["log_mean"]["mean"] == pytest.approx(sum(tensors) / 42, abs=1e-4) and min(tensors) >= 0.85
        assert row["log_mean"]["mean"] >= 0.90
