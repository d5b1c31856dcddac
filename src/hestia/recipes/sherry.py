"""Sherry: exactly three of four consecutive weights are non-zero, under an annealed full-precision residual (Arenas).

    in every 4 weights q = 0 for the smallest |w|, sign(w) for the others;     s = mean|w| over q != 0
    w_hat = s q + r(t) w,   d w_hat / d w := 1 + r(t)
    r(t) rises from 0 to ``residual`` over the first tenth of the run, then falls as half a cosine to 0 at the end

Source: arXiv:2601.07892 (2026), and the published code.                              lambda = 1, tau = 0
The grid carries the constraint, so codes hold 1.25 bits per weight; every ternary format stores them.
Deviations: groups default to rows (paper: 128); of equal magnitudes the first is dropped, and a kept weight of 0 counts
as positive. r(1) = 0, and evaluation and export never see the residual. ``arenas`` is the residual alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ..quant import STE, Grid, GroupSize, LeastSquares, QuantSpec
from ..schedules import KnobSchedule
from .base import Recipe


@dataclass(frozen=True, kw_only=True)
class Sherry(Recipe):
    """3:4 ternary; ``residual`` is the residual's peak and 0 trains without it."""

    name: ClassVar[str] = "sherry"
    residual: float = 1.0
    residual_warmup: float = 0.1

    def _spec(self, grid: Grid, group_size: GroupSize) -> QuantSpec:
        # the least-squares level of these codes is the mean of the kept magnitudes
        return QuantSpec(grid=replace(grid, block=4), group_size=group_size, scale=LeastSquares(), estimator=STE())

    def schedule(self) -> KnobSchedule:
        return KnobSchedule(rho=0.0, temperature=0.0, residual=self.residual, residual_warmup=self.residual_warmup)
