"""What was measured of every weight matrix (sensitivity.json)."""

from __future__ import annotations

from dataclasses import dataclass

from .fields import Object, mapping, number, text

SENSITIVITY_SCHEMA = 2


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What was measured of one weight matrix (sensitivity.json), by the file's ``primary`` quantity.

    Attributes:
        path: its module path.
        trace: arithmetic mean over sequences, and ``standard_error`` of it.
        geometric_mean: exp of the mean log, which ``low`` to ``high`` covers; None for signed estimates, whose interval
            covers ``trace``.
        largest_share: the part of the sum that one sequence gives; a mean above 0.1 rests on few sequences.
        weights: number of weights.
    """

    path: str
    trace: float | None
    standard_error: float | None = None
    geometric_mean: float | None = None
    low: float | None = None
    high: float | None = None
    largest_share: float | None = None
    weights: int | None = None


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """sensitivity.json without its samples; ``primary`` names the quantity, such as ``trace`` or ``kl:ternary``."""

    estimator: str
    primary: str
    seed: int | None
    sequences: int | None
    scored_positions: int | None
    tensors: tuple[Trace, ...]


def read_sensitivity(record: Object | None) -> Sensitivity | None:
    """sensitivity.json; None where there is none."""
    if record is None:
        return None
    tensors = record.object("tensors")
    traces: list[Trace] = []
    for path, entry in tensors.raw.items():
        values = mapping(entry)
        weights = number(values.get("weights"))
        traces.append(
            Trace(
                path=text(path),
                trace=number(values.get("trace")),
                standard_error=number(values.get("standard_error")),
                geometric_mean=number(values.get("geometric_mean")),
                low=number(values.get("low")),
                high=number(values.get("high")),
                largest_share=number(values.get("largest_share")),
                weights=None if weights is None else int(weights),
            )
        )
    seed, sequences, positions = (number(record.raw.get(k)) for k in ("seed", "sequences", "scored_positions"))
    return Sensitivity(
        estimator=text(record.raw.get("estimator")),
        primary=text(record.raw.get("primary")) or "trace",
        seed=None if seed is None else int(seed),
        sequences=None if sequences is None else int(sequences),
        scored_positions=None if positions is None else int(positions),
        tensors=tuple(traces),
    )
