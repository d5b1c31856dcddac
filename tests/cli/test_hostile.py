"""Hundreds of hostile and broken inputs through the real command line: a documented status, one clear message."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hostile_inputs import CASES, Case, Good
from toy_runs import Invoke

LONGEST = 1500
"""Characters of a message that one still reads."""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_ends_with_its_status_and_one_message(
    case: Case,
    invoke: Invoke,
    toy_parent: Path,
    toy_text: Path,
    toy_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hestia.data.chat.TEMPLATE_SECONDS", 1.0)
    arguments = case.make(Good(tmp_path, toy_parent, toy_text, toy_run))
    status, out, err = invoke(*arguments)
    assert "Traceback" not in err
    assert status in case.statuses, err
    said = [line for line in err.splitlines() if line.startswith("hestia: ")]
    assert len(said) == (status != 0), err
    if status != 0:
        assert out == "" or status == 3  # what verify found is its result
        assert case.says in err
        message = err[err.index("hestia: ") :]
        assert 20 < len(message) < LONGEST
        assert "\x1b" not in message
    assert not (tmp_path / "WAS RUN").exists()
    precious = tmp_path / "outside" / "precious"
    assert not precious.exists() or precious.read_text(encoding="utf-8") == "years of work"
    report = tmp_path / "copy" / "report.html"
    assert not report.is_file() or "<script>alert(1)" not in report.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name", ["weights only as .bin", "yaml 5", "fifo as data", "a.txt.gz of 6e6f7420616e206172636869 14"]
)
def test_a_process_of_its_own_ends_likewise(
    name: str, toy_parent: Path, toy_text: Path, toy_run: Path, tmp_path: Path
) -> None:
    (case,) = [case for case in CASES if case.name == name]
    arguments = case.make(Good(tmp_path, toy_parent, toy_text, toy_run))
    done = subprocess.run(
        [sys.executable, "-m", "hestia", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert [line.startswith("hestia: ") for line in done.stderr.splitlines()] == [True], done.stderr
