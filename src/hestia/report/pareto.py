"""Predicted KL against bits per weight, in characters: plain ASCII, as wide as the terminal, no colour needed."""

from __future__ import annotations

import math
from collections.abc import Sequence

_LEFT = 11  # the axis and its labels


def terminal(curve: Sequence[Sequence[float]], chosen: Sequence[float], columns: int = 80, rows: int = 14) -> str:
    """The curve and the chosen point; KL on a logarithmic axis, points of KL 0 on the lowest line.

    Args:
        curve: (bits, predicted KL), ascending in bits.
        chosen: the plan's own point, drawn as ``O``.
        columns: of the whole picture, at least 40 of which are used.
        rows: of the plot.
    """
    points = [(float(bits), float(damage)) for bits, damage in (*curve, chosen)]
    positive = [damage for _, damage in points if damage > 0.0]
    high = math.log10(max(positive, default=1.0))
    low = min(math.log10(min(positive, default=1.0)), high - 0.5)
    left, right = min(bits for bits, _ in points), max(bits for bits, _ in points)
    right = right if right > left else left + 1.0
    width = max(40, columns) - _LEFT - 1
    cells = [[" "] * width for _ in range(rows)]

    def place(bits: float, damage: float) -> tuple[int, int]:
        height = (math.log10(damage) - low) / (high - low) if damage > 0.0 else 0.0
        return round((1.0 - height) * (rows - 1)), round((bits - left) / (right - left) * (width - 1))

    for bits, damage in points[:-1]:
        row, column = place(bits, damage)
        cells[row][column] = "."
    row, column = place(*points[-1])
    cells[row][column] = "O"
    lines = ["predicted KL, nats per token (log scale)"]
    for k, line in enumerate(cells):
        label = f"{10 ** (high - (high - low) * k / (rows - 1)):.2g}" if k in (0, rows // 2, rows - 1) else ""
        lines.append(f"{label:>{_LEFT - 2}} |{''.join(line).rstrip()}")
    lines.append(" " * (_LEFT - 1) + "+" + "-" * width)
    ends = f"{left:.2f}", f"{right:.2f}"
    lines.append(" " * _LEFT + ends[0] + " bits per weight".center(width - len(ends[0]) - len(ends[1])) + ends[1])
    lines.append(f"O: this plan, {points[-1][0]:.4f} bits per weight, predicted KL {points[-1][1]:.4g}")
    return "\n".join(lines)
