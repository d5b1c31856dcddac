"""How long each stage of a run took, over all the calls that it took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ..errors import ConfigError
from ..files import read_json, write_json

T = TypeVar("T")


class Clock:
    """Seconds by stage, kept in the run's folder so that a resumed run still knows them."""

    def __init__(self, path: Path, resume: bool) -> None:
        self.path = path
        self.kept = False
        """Whether this process may write into the folder: the first one, once it holds it."""
        self.seconds: dict[str, float] = {}
        if resume and path.is_file():
            with contextlib.suppress(ConfigError, TypeError, ValueError):  # damaged: the times begin again
                self.seconds = {str(k): float(v) for k, v in read_json(path).items()}

    def at_least(self, stage: str, seconds: float) -> None:
        """A stage took ``seconds`` before this process, if the clock's file knows of less: that one was killed."""
        self.seconds[stage] = max(self.seconds.get(stage, 0.0), seconds)

    def measure(self, stage: str, work: Callable[[], T]) -> T:
        """Run ``work`` and add its time to ``stage``, whether it succeeds or not."""
        started = time.perf_counter()
        try:
            return work()
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started
            if self.kept:
                write_json(self.path, dict(self.seconds))
