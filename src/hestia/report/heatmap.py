"""Sensitivity as a grid of layer by projection: the rows and shades of the page's heat map.

A module path is read as ``...<layer>.<projection>``: its first number is the layer, what follows is the projection,
``model.layers.3.self_attn.q_proj`` -> (3, ``self_attn.q_proj``). Paths without a number are in the table only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .records import Trace

_LAYER = re.compile(r"^(?:.*?\.)?(\d+)\.(.+)$", re.DOTALL)


@dataclass(frozen=True)
class Cell:
    """One matrix: its trace, and a shade from 0 (the lowest of the map) to 1 on a log scale."""

    trace: Trace
    value: float
    shade: float


@dataclass(frozen=True)
class HeatMap:
    """Projections across, layers down; a cell is None where a layer has no such projection.

    Attributes:
        columns: projections, in the order of the model; ``labels`` are their shortest distinct names.
        rows: (layer, one cell a column).
        low, high: the values of shade 0 and 1.
    """

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    rows: tuple[tuple[int, tuple[Cell | None, ...]], ...]
    low: float
    high: float


def heat_map(traces: Sequence[Trace]) -> HeatMap | None:
    """The heat map of the geometric means (of the trace, where there is none); None without a placeable tensor."""
    placed: dict[tuple[int, str], tuple[Trace, float]] = {}
    for trace in traces:
        value = trace.geometric_mean if trace.geometric_mean is not None else trace.trace
        match = _LAYER.match(trace.path)
        if match and value is not None and value > 0 and len(match[1]) < 7:
            placed[int(match[1]), match[2]] = (trace, value)
    if not placed:
        return None
    values = [value for _, value in placed.values()]
    low, high = min(values), max(values)
    span = math.log(high) - math.log(low)
    columns = tuple(dict.fromkeys(projection for _, projection in placed))

    def cell(layer: int, projection: str) -> Cell | None:
        if (layer, projection) not in placed:
            return None
        trace, value = placed[layer, projection]
        return Cell(trace, value, (math.log(value) - math.log(low)) / span if span > 0 else 0.5)

    layers = sorted({layer for layer, _ in placed})
    rows = tuple((layer, tuple(cell(layer, projection) for projection in columns)) for layer in layers)
    return HeatMap(columns, _labels(columns), rows, low, high)


def _labels(columns: Sequence[str]) -> tuple[str, ...]:
    short = [column.rsplit(".", 1)[-1] for column in columns]
    return tuple(s if short.count(s) == 1 else column for s, column in zip(short, columns, strict=True))
