"""How long each stage of a run took, over all the calls that it took."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ..curvature import parallel
from ..files import read_json, write_json

T = TypeVar("T")


class Clock:
    """Seconds by stage, kept in the run's folder so that a resumed run still knows them."""

    def __init__(self, path: Path, resume: bool) -> None:
        self.path, self._writes = path, parallel.first()
        self.seconds: dict[str, float] = {}
        if resume and path.is_file():
            self.seconds = {str(k): float(v) for k, v in read_json(path).items()}

    def measure(self, stage: str, work: Callable[[], T]) -> T:
        """Run ``work`` and add its time to ``stage``, whether it succeeds or not."""
        started = time.perf_counter()
        try:
            return work()
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started
            if self.path.parent.is_dir() and self._writes:
                write_json(self.path, dict(self.seconds))
