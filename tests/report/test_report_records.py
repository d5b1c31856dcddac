"""records.py: report.json strictly, the rest if it is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_runs import PATHS, make_run, report

from hestia.errors import ConfigError
from hestia.report.html import write_report
from hestia.report.model_card import write_model_card
from hestia.report.records import RunRecord


def promised() -> list[str]:
    """Every promised key of report.json, dotted."""
    nested = {
        "nll": ("parent", "round_to_nearest", "quantized"),
        "bits_per_weight": ("quantized_layers", "whole_model"),
        "weights": ("quantized", "kept"),
        "seconds": ("calibrate", "train", "total"),
    }
    keys = ["recipe", "target", "seed", "tokens", "learning_rate", "kl_to_parent", "top1_agreement"]
    keys += ["tokens_per_second", "exports", *nested]
    return keys + [f"{outer}.{inner}" for outer, names in nested.items() for inner in names]


@pytest.mark.parametrize("key", promised())
def test_a_missing_promised_key_is_named(tmp_path: Path, key: str) -> None:
    record = report()
    *outer, last = key.split(".")
    place: dict[str, Any] = record[outer[0]] if outer else record
    del place[last]
    with pytest.raises(ConfigError, match=rf"report\.json: missing key '{key}'"):
        RunRecord.load(make_run(tmp_path / "run", report=record))


@pytest.mark.parametrize("key", ["target", "path", "bytes", "sha256"])
def test_a_missing_key_of_an_export_is_named_with_its_place(tmp_path: Path, key: str) -> None:
    record = report()
    del record["exports"][1][key]
    with pytest.raises(ConfigError, match=rf"exports\[1\]\.{key}"):
        RunRecord.load(make_run(tmp_path / "run", report=record))


@pytest.mark.parametrize(
    ("key", "value"), [("tokens", "many"), ("kl_to_parent", True), ("nll", [1.0]), ("exports", {"hf": 1}), ("model", 3)]
)
def test_a_mistyped_key_is_named(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key):
        RunRecord.load(make_run(tmp_path / "run", report=report() | {key: value}))


def test_everything_is_read(tmp_path: Path) -> None:
    record = RunRecord.load(make_run(tmp_path / "run"))
    assert record.name == "run" and record.model == "books-6m" and record.commit == ""
    assert (record.nll_parent, record.nll_round_to_nearest, record.nll_quantized) == (3.3171, 7.9184, 3.6022)
    assert [e.target for e in record.exports] == ["gguf:tq2_0", "hf"]
    assert record.exports[0].verify and record.exports[0].verify.codes_equal is True
    assert record.nll_intervals["quantized_minus_round_to_nearest"].low == -4.371
    assert record.sensitivity and len(record.sensitivity.tensors) == len(PATHS)
    assert len(record.log.rows) == 151 and len(record.log.hard) == 7 and len(record.log.pilots) == 4
    assert record.log.pilots[-1] == (5.4e-2, 12, None)
    assert record.codes["model.layers.0.self_attn.q_proj"].zero == 0.31
    assert record.options == {"tokens": "600k", "lr": "auto", "seed": 0, "data": ["my books.txt"]}


def test_only_report_json_is_needed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", plan=None, sensitivity=None, diagnostics=None)
    (run / "log.jsonl").unlink()
    (run / "run.yaml").unlink()
    record = RunRecord.load(run)
    assert record.plan is None and record.sensitivity is None and not record.histograms and not record.log.rows


def test_a_teacher_is_named_whatever_else_the_record_says_of_it(tmp_path: Path) -> None:
    for teacher, read in (
        (None, {}),
        ("parent", {}),
        (
            {"model": "<blink>", "weight": "all", "noise": 0.1},
            {"model": "<blink>", "divergence": "", "weight": None, "noise": 0.1},
        ),
    ):
        folder = make_run(tmp_path / str(teacher)[:4], report={**report(), "teacher": teacher})
        record = RunRecord.load(folder)
        assert record.teacher == read
        assert record.method == report()["recipe"] + (" + teacher" if read else "")
        write_report(folder)
        write_model_card(folder)
        assert "<blink>" not in (folder / "report.html").read_text(encoding="utf-8")


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no report\.json.*--resume"):
        RunRecord.load(tmp_path)


def test_a_damaged_optional_artefact_is_an_error_not_a_gap(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "sensitivity.json").write_text('{"schema": 1, "tensors": {')
    with pytest.raises(ConfigError, match=r"sensitivity\.json"):
        RunRecord.load(run)


def test_a_histogram_of_the_wrong_length_is_named(tmp_path: Path) -> None:
    bad = {"schema": 1, "histograms": {"model.x": {"edges": [0, 1, 2], "before": [1, 2, 3], "after": [1, 2]}}}
    with pytest.raises(ConfigError, match=r"histograms\['model\.x'\].*3 edges, 3 counts before"):
        RunRecord.load(make_run(tmp_path / "run", diagnostics=bad))


def test_promised_numbers_may_be_null(tmp_path: Path) -> None:
    record = report() | {"learning_rate": None, "tokens_per_second": None, "kl_to_parent": None}
    record["nll"] = {"parent": None, "round_to_nearest": None, "quantized": None}
    loaded = RunRecord.load(make_run(tmp_path / "run", report=record))
    assert loaded.learning_rate is None and loaded.nll_quantized is None


def test_the_log_survives_a_kill_and_a_resume(tmp_path: Path) -> None:
    lines = [
        '{"step": 10, "loss": 5.0}',
        '{"step": 20, "loss": 4.0, "temperature": 0.3}',
        '{"step": 20, "hard_loss": 4.5}',
        '{"step": 30, "los',  # the kill
        '{"step": 20, "loss": 3.0, "temperature": {"min": 0.1, "mean": null, "max": 0.4}}',  # the resume repeats a step
        '{"step": 40, "loss": null}',
        "[1]",
    ]
    log = RunRecord.load(make_run(tmp_path / "run", log_text="\n".join(lines))).log
    assert [(row.step, row.loss) for row in log.rows] == [(10, 5.0), (20, 3.0), (40, None)]
    assert log.rows[1].temperature == (0.1, None, 0.4)
    assert log.hard == ((20, 4.5),)
    assert log.skipped == 2


def test_a_line_separator_inside_a_string_does_not_cut_a_log_line(tmp_path: Path) -> None:
    line = json.dumps({"step": 1, "loss": 2.0, "note": "a\u2028b"}, ensure_ascii=False)
    log = RunRecord.load(make_run(tmp_path / "run", log_text=line)).log
    assert log.skipped == 0 and log.rows[0].loss == 2.0


def test_export_paths_inside_the_run_become_relative(tmp_path: Path) -> None:
    run = tmp_path / "run"
    record = report()
    record["exports"][0]["path"] = str(run / "exports" / "gguf-tq2_0" / "model.gguf")
    assert RunRecord.load(make_run(run, report=record)).exports[0].path == "exports/gguf-tq2_0/model.gguf"
