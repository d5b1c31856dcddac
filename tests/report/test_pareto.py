"""The curve in characters and in files."""

from __future__ import annotations

import pytest

from hestia.report.pareto import terminal
from hestia.report.plots import pareto

CURVE = [(1.7, 0.5), (2.0, 0.3), (2.5, 0.1), (4.5, 0.01), (16.0, 0.0)]


@pytest.mark.parametrize("columns", [20, 60, 100, 173])
def test_the_terminal_curve_keeps_to_its_width_and_shows_the_plan(columns: int) -> None:
    text = terminal(CURVE, (2.0, 0.3), columns)
    lines = text.splitlines()
    assert max(map(len, lines)) <= max(columns, 58) and text.isascii()
    body = [line.partition("|")[2] for line in lines if "|" in line]
    assert sum(line.count("O") for line in body) == 1
    assert "O: this plan, 2.0000 bits per weight, predicted KL 0.3" in text
    falling = [
        k for column in range(max(map(len, body))) for k, line in enumerate(body) if line[column : column + 1].strip()
    ]
    assert falling == sorted(falling), "further right is never higher"
    assert "1.70" in lines[-2] and lines[-2].endswith("16.00")


def test_a_single_point_without_damage_is_drawn_too() -> None:
    assert "O" in terminal([(16.0, 0.0)], (16.0, 0.0), 80)
    assert pareto([(16.0, 0.0)], (16.0, 0.0), "svg").startswith(b"<?xml")


def test_the_figure_is_the_same_file_every_time_and_stands_alone() -> None:
    svg, png = (pareto(CURVE, (2.0, 0.3), form) for form in ("svg", "png"))
    assert svg == pareto(CURVE, (2.0, 0.3), "svg")
    assert png == pareto(CURVE, (2.0, 0.3), "png") and png.startswith(b"\x89PNG")
    assert b"var(--" not in svg and b"2.00 bits, KL 0.3" in svg and b"xmlns" in svg
