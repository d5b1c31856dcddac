"""Progress for everything that takes longer than a second: on standard error, silent unless turned on.

On a terminal it is a bar; elsewhere (a log file, continuous integration) a plain line every few seconds.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import IO, Any, TypeVar, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 5.0

_enabled = False


class _StandardError:
    """Standard error for as long as somebody listens: what a closed pipe or a lost terminal refuses ends no run."""

    def write(self, text: str) -> int:
        try:
            return sys.stderr.write(text)
        except (OSError, ValueError):
            enable(False)
            return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


console = Console(file=cast("IO[str]", _StandardError()), highlight=False)


def enable(on: bool = True) -> None:
    """Show progress from now on (the command line does; a library call stays silent)."""
    global _enabled
    _enabled = on


def bar() -> Progress:
    """A rich progress display in the house's columns; disabled without a terminal, or unless ``enable`` was called."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not (_enabled and console.is_terminal),
    )


class Lines:
    """What the bar shows, as a line every ``SECONDS_BETWEEN_LINES``, where there is no terminal.

    Args:
        description: what is being done.
        total: how many items there are, if known.
        done: how many were done before.
    """

    def __init__(self, description: str, total: int | None, done: int = 0) -> None:
        self.description, self.total, self.before = description, total, done
        self.started = self.printed = time.monotonic()

    def at(self, done: int, note: str = "") -> None:
        """``done`` items are done; print it if the last line is old enough."""
        now = time.monotonic()
        if not _enabled or console.is_terminal or now - self.printed < SECONDS_BETWEEN_LINES:
            return
        self.printed = now
        parts = [f"{done:,}" if self.total is None else f"{done:,} of {self.total:,}"]
        if self.total is not None and done > self.before:
            left = (now - self.started) / (done - self.before) * (self.total - done)
            parts.append(f"{left:.0f} s left")
        announce(f"{self.description}: {', '.join([*parts, *([note] if note else [])])}")


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate over ``items`` and show count, rate and time left; an empty description shows nothing."""
    if not description:
        yield from items
        return
    lines = Lines(description, total)
    with bar() as display:
        task = display.add_task(description, total=total, note="")
        for done, item in enumerate(items, start=1):
            yield item
            display.advance(task)
            lines.at(done)


def announce(message: str) -> None:
    """One line on standard error, where progress is shown."""
    if _enabled:
        console.print(message, markup=False, emoji=False, soft_wrap=True)
