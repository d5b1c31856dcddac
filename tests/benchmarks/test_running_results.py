"""What the committed measurements of kills and checkpoints say, and that the kill benchmark itself still works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hestia.files import read_json

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RESULTS = BENCHMARKS / "results" / "running"


def test_fifty_kills_were_fifty_exact_resumes() -> None:
    record = read_json(RESULTS / "kills.json", schema=1)
    rows = record["kills"]
    assert len(rows) >= 50
    assert [row["number"] for row in rows] == list(range(len(rows)))
    assert all(row["exact"] and row["resumed_status"] == 0 and row["differing"] == [] for row in rows)
    assert sum(row["unfinished_checkpoint"] for row in rows) >= 10
    assert max(row["lost_steps"] for row in rows) <= record["save_every"]
    assert record["sum"]["exact_resumes"] == record["sum"]["kills"] == len(rows)
    assert {"torch", "transformers", "python"} <= set(record["versions"]) and record["machine"]["cpu"]


def test_checkpoints_take_two_hundredths_of_a_run_at_most() -> None:
    record = read_json(RESULTS / "checkpoint_cost.json", schema=1)
    step = min(record["seconds_a_step"], record["processor_seconds_a_step"])
    saving = 5 * record["seconds_a_checkpoint"]
    assert record["share"] == pytest.approx(saving / (record["default_steps"] * step + saving))
    assert record["share"] <= 0.02
    assert record["default_interval"] == record["default_steps"] // 5


@pytest.mark.slow
def test_the_kill_benchmark_runs_and_goes_on_where_it_was(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "kills.py"), "--folder", str(tmp_path), "--results"]
    for kills in (1, 2):
        done = subprocess.run(
            [*command, str(tmp_path / "kills.json"), "--kills", str(kills)],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["exact_resumes"] == kills
        assert len(done.stdout.splitlines()) == 2  # the new kill and the sum
