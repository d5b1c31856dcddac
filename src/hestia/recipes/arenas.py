"""Arenas: straight-through ternary training under an annealed full-precision residual, without Sherry's constraint.

    s = mean|w| + eps,   w_hat = s clip(round(w / s), -1, 1) + r(t) w,   d w_hat / d w := 1 + r(t)
    r(t) rises from 0 to ``residual`` over the first tenth of the run, then falls as half a cosine to 0 at the end

Source: Sherry, arXiv:2601.07892 (2026); the paper adds it to ordinary ternary training too.
Deviations: groups default to rows. The residual is added, not mixed in: at its peak the layer is twice as large.
r(1) = 0, and evaluation and export never see it.                                                 lambda = 1, tau = 0
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..quant import STE, AbsMean, Grid, GroupSize, QuantSpec
from ..schedules import KnobSchedule
from .base import Recipe


@dataclass(frozen=True, kw_only=True)
class Arenas(Recipe):
    """``residual`` is the residual's peak, ``residual_warmup`` the share of the run over which it rises."""

    name: ClassVar[str] = "arenas"
    residual: float = 1.0
    residual_warmup: float = 0.1

    def _spec(self, grid: Grid, group_size: GroupSize) -> QuantSpec:
        return QuantSpec(grid=grid, group_size=group_size, scale=AbsMean(), estimator=STE())

    def schedule(self) -> KnobSchedule:
        return KnobSchedule(rho=0.0, temperature=0.0, residual=self.residual, residual_warmup=self.residual_warmup)
