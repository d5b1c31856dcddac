"""Sensitivity as a grid of layer by projection: the rows and shades of the page's heat map, and an SVG of its own.

A module path is read as ``...<layer>.<projection>``: its first number is the layer, what follows is the projection,
``model.layers.3.self_attn.q_proj`` -> (3, ``self_attn.q_proj``). Paths without a number are in the table only.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .sensitivity import Trace

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


_CELL, _LEFT, _TOP = (92, 30), 56, 64
_COLD, _HOT, _INK = (255, 247, 237), (194, 65, 12), "#374151"


def draw(heat: HeatMap, title: str) -> str:
    """The heat map as an SVG file: ``title`` above, layers down, projections across, every cell with its number."""
    width = _LEFT + _CELL[0] * len(heat.columns) + 16
    height = _TOP + _CELL[1] * len(heat.rows) + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{_INK}">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="8" y="22" font-size="14">{_escaped(title)}</text>',
    ]
    for place, label in enumerate(heat.labels):
        parts.append(_text(_LEFT + (place + 0.5) * _CELL[0], _TOP - 10, _escaped(label)))
    for down, (layer, cells) in enumerate(heat.rows):
        middle = _TOP + (down + 0.5) * _CELL[1] + 4
        parts.append(_text(_LEFT - 24, middle, str(layer)))
        for across, cell in enumerate(cells):
            if cell is not None:
                parts.append(_cell(cell, _LEFT + across * _CELL[0], _TOP + down * _CELL[1], middle))
    return "\n".join([*parts, "</svg>", ""])


def _cell(cell: Cell, x: float, y: float, middle: float) -> str:
    red, green, blue = (round(c + (h - c) * cell.shade) for c, h in zip(_COLD, _HOT, strict=True))
    ink = "#ffffff" if cell.shade > 0.6 else _INK
    size = f'width="{_CELL[0] - 2}" height="{_CELL[1] - 2}" rx="3"'
    box = f'<rect x="{x + 1:g}" y="{y + 1:g}" {size} fill="rgb({red},{green},{blue})"/>'
    tip = f"<title>{_escaped(cell.trace.path)}: {cell.value:.4g}</title>"
    return f"<g>{tip}{box}{_text(x + _CELL[0] / 2, middle, f'{cell.value:.3g}', ink)}</g>"


def _text(x: float, y: float, words: str, ink: str = _INK) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="middle" fill="{ink}">{words}</text>'


def _escaped(words: str) -> str:
    return html.escape("".join(c if c.isprintable() else " " for c in words))
