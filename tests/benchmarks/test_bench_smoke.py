"""What ``make bench-smoke`` accepts as the same row, and that the committed row is one of today's settings."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "experiments"))

import smoke
import stages

from hestia.files import read_json


def test_the_committed_row_was_made_by_todays_settings() -> None:
    stage = stages.load("smoke")
    (job,) = stages.final_jobs(stage, stage.arm(smoke.ARM))
    assert f"{job.name}.json" == smoke.ROW
    record = stages.load_result(job)  # refuses one that was made otherwise
    assert record["nll"] > 0 and record["texts"]["test"]


def test_only_rounding_may_differ() -> None:
    row = read_json(stages.RESULTS / "stage_smoke" / smoke.ROW)
    assert smoke.differences(row, row) == []
    assert smoke.differences({**row, "nll": row["nll"] + 0.01}, row) == []
    (far,) = smoke.differences({**row, "nll": row["nll"] + 0.03}, row)
    assert far.startswith("nll is ")
    (other,) = smoke.differences({**row, "texts": {}}, row)
    assert other == "texts differs"
    (missing,) = smoke.differences({**row, "kl_to_parent": None}, row)
    assert missing.startswith("kl_to_parent is None")


def test_a_row_that_says_more_than_the_committed_one_is_the_same_row() -> None:
    row = read_json(stages.RESULTS / "stage_smoke" / smoke.ROW)
    assert smoke.differences({**row, "plan": {**row["plan"], "said_since": 1}}, row) == []
    assert smoke.differences({**row, "plan": {**row["plan"], "layers": -1}}, row) == ["plan differs"]
    assert smoke.differences({**row, "plan": {}}, row) == ["plan differs"]
