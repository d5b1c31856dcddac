"""Progress bars for everything that takes longer than a second: on standard error, silent unless turned on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

T = TypeVar("T")

console = Console(stderr=True, highlight=False)
_enabled = False


def enable(on: bool = True) -> None:
    """Show progress bars from now on (the command line does; a library call stays silent)."""
    global _enabled
    _enabled = on


def bar() -> Progress:
    """A rich progress display in the house's columns, disabled unless ``enable`` was called."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not _enabled,
        transient=not console.is_terminal,
    )


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate over ``items`` with a bar that shows count, rate and time left."""
    with bar() as display:
        task = display.add_task(description, total=total, note="")
        for item in items:
            yield item
            display.advance(task)


def announce(message: str) -> None:
    """One line on standard error, where progress is shown."""
    if _enabled:
        console.print(message, markup=False)
