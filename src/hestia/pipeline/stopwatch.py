"""When a run began, and how long each of its stages took, over all the calls that it took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from ..errors import ConfigError
from ..files import read_json, write_json

T = TypeVar("T")


class Stopwatch:
    """Seconds by stage, kept in the run's folder so that a resumed run still knows them."""

    def __init__(self, path: Path, resume: bool) -> None:
        self.path = path
        self._kept = False
        self.started = datetime.now(UTC)
        self.seconds: dict[str, float] = {}
        if resume and path.is_file():
            with contextlib.suppress(ConfigError, TypeError, ValueError):  # damaged: the times begin again
                record = read_json(path)
                started = record.pop("started", None)
                self.seconds = {str(k): float(v) for k, v in record.items()}
                self.started = self.started if started is None else datetime.fromisoformat(started)

    def keep(self) -> None:
        """Write into the folder from now on: the first process does, once it holds it."""
        self._kept = True
        self._write()

    def at_least(self, stage: str, seconds: float) -> None:
        """A stage took ``seconds`` before this process, if its file knows of less: that one was killed."""
        self.seconds[stage] = max(self.seconds.get(stage, 0.0), seconds)

    def total(self, now: float) -> float:
        """Seconds of the run, ``now`` of them this process's; of one that was killed only its stages are known."""
        stages = sum(seconds for stage, seconds in self.seconds.items() if stage != "total")
        return max(self.seconds.get("total", 0.0) + now, stages)

    def measure(self, stage: str, work: Callable[[], T]) -> T:
        """Run ``work`` and add its time to ``stage``, whether it succeeds or not."""
        started = time.perf_counter()
        try:
            return work()
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started
            if self._kept:
                self._write()

    def _write(self) -> None:
        write_json(self.path, {"started": self.started.isoformat(), **self.seconds})
