"""Hundreds of hostile and broken inputs through the real command line: a documented status, one clear message."""

from __future__ import annotations

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
