"""log.jsonl, written line by line: a disk that refuses a line, for a minute or for good, ends no training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..progress import announce

LOG_FILE = "log.jsonl"

_broken: set[Path] = set()
"""Logs whose last line may be half a line."""


def append_row(log: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON object; where that fails it is said once, and the next one begins on a line of its own."""
    start = "\n" if log in _broken else ""
    try:
        with open(log, "a", encoding="utf-8") as handle:
            handle.write(f"{start}{json.dumps(row)}\n")
    except OSError as error:
        if log not in _broken:
            announce(f"{log}: a line could not be written ({error}); training goes on")
        _broken.add(log)
    else:
        _broken.discard(log)
