"""Progress: silent in a library, a line now and then where there is no terminal, whole lines always."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest

from hestia import progress


@pytest.fixture
def shown() -> Iterator[None]:
    """Progress is on for the test, as under the command line."""
    before = progress._enabled
    progress.enable()
    yield
    progress.enable(before)


def test_a_library_call_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    progress.enable(False)
    assert list(progress.track(range(5), "reading", total=5)) == [0, 1, 2, 3, 4]
    progress.announce("hello")
    assert capfd.readouterr() == ("", "")


def test_without_a_terminal_there_is_a_line_every_few_seconds(
    shown: None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    assert list(progress.track(range(6), "reading", total=6)) == list(range(6))
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == ["reading: 3 of 6, 6 s left", "reading: 6 of 6, 0 s left"]


def test_a_quick_job_says_nothing(shown: None, capfd: pytest.CaptureFixture[str]) -> None:
    assert list(progress.track(iter("ab"), "reading")) == ["a", "b"]
    assert capfd.readouterr() == ("", "")


def test_a_resumed_job_counts_the_time_of_its_own_items(
    shown: None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    lines = progress.Lines("training", 100, 50)
    now[0] = 10.0
    lines.at(60, "loss 1.234")
    lines.at(61, "loss 1.233")
    assert capfd.readouterr().err == "training: 60 of 100, 40 s left, loss 1.234\n"


def test_a_long_announcement_stays_one_line_and_markup_is_text(shown: None, capfd: pytest.CaptureFixture[str]) -> None:
    message = "written to [bold]" + "x" * 300 + "[/bold] :smile:"
    progress.announce(message)
    assert capfd.readouterr().err == message + "\n"


def test_nobody_listening_any_more_ends_nothing(shown: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("sys.stderr", Closed())
    progress.announce("a line")
    assert list(progress.track(range(3), "reading", total=3)) == [0, 1, 2]
    assert not progress._enabled
