"""How training went (log.jsonl)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .fields import mapping, number, text


@dataclass(frozen=True, kw_only=True)
class TrainingRow:
    """One training line of log.jsonl; ``loss`` is the soft loss, of the weights on their way to the grid."""

    step: int
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    pressure: float | None = None
    temperature: tuple[float | None, float | None, float | None] = (None, None, None)
    saturated: float | None = None


@dataclass(frozen=True)
class TrainingLog:
    """log.jsonl.

    Attributes:
        rows: the training lines in order of step; of steps that a resumed run repeated, the later line.
        hard: (step, loss of the model that would be exported at this step, on text it is not trained on; not
            the held-out blocks of the report, which no decision of a run may see).
        pilots: (learning rate, steps, hard loss on that same text) of the pilot runs; the loss is None where the pilot
            diverged, the steps where an older log does not say.
        events: (step, what happened): losses that jumped, tensors whose codes collapsed or came back.
        skipped: lines that could not be read.
    """

    rows: tuple[TrainingRow, ...] = ()
    hard: tuple[tuple[int, float], ...] = ()
    pilots: tuple[tuple[float, int | None, float | None], ...] = ()
    events: tuple[tuple[int, str], ...] = ()
    skipped: int = 0


def read_log(path: Path) -> TrainingLog:
    """log.jsonl; empty where there is none.

    Raises:
        ConfigError: it is there and cannot be read.
    """
    if not path.is_file():
        return TrainingLog()
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise ConfigError(f"{path}: not readable ({error})") from None
    rows: dict[int, TrainingRow] = {}
    hard: dict[int, float] = {}
    pilots: list[tuple[float, int | None, float | None]] = []
    events: set[tuple[int, str]] = set()
    skipped = 0
    for line in filter(str.strip, lines):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):  # a killed run can leave half a line
            skipped += 1
            continue
        if not isinstance(entry, dict):
            skipped += 1
            continue
        pilot = entry.get("pilot")
        if isinstance(pilot, dict):
            rate = number(pilot.get("learning_rate"))
            if rate is not None:
                steps = number(pilot.get("steps"))
                pilots.append((rate, None if steps is None else int(steps), number(pilot.get("tuning_loss"))))
            continue
        step = number(entry.get("step"))
        if step is None:
            continue
        if (loss := number(entry.get("hard_loss"))) is not None:
            hard[int(step)] = loss
        if "loss" in entry:
            rows[int(step)] = _training_row(int(step), entry)
        events |= {(int(step), event) for event in _events(entry)}
    ordered = tuple(rows[step] for step in sorted(rows))
    return TrainingLog(ordered, tuple(sorted(hard.items())), tuple(pilots), tuple(sorted(events)), skipped)


def _events(entry: dict[str, Any]) -> Iterator[str]:
    spike, before = number(entry.get("loss_spike")), number(entry.get("highest_before"))
    if spike is not None and before is not None:
        yield f"the loss jumped to {spike:.3f}, from at most {before:.3f} in the steps before"
    for path, how in mapping(entry.get("collapsed")).items():
        yield text(f"{path}: codes {'use both signs again' if how is None else f'collapsed, {how}'}")


def _training_row(step: int, entry: dict[str, Any]) -> TrainingRow:
    heat = entry.get("temperature")
    low, mean, high = (number(mapping(heat).get(key)) for key in ("min", "mean", "max"))
    if (single := number(heat)) is not None:
        low = mean = high = single
    return TrainingRow(
        step=step,
        loss=number(entry.get("loss")),
        learning_rate=number(entry.get("learning_rate")),
        grad_norm=number(entry.get("grad_norm")),
        pressure=number(entry.get("pressure")),
        temperature=(low, mean, high),
        saturated=number(entry.get("saturated")),
    )
