"""Learned step size quantization, ParetoQ's method at 3 and 4 bits, here at ternary and 2 bits.

    w_hat = alpha clip(round(w / alpha), Qn, Qp),                    alpha starts at 2 mean|w| / sqrt(Qp), at least 1e-5
    d w_hat / d w     := 1[Qn <= w / alpha <= Qp]
    d w_hat / d alpha := c (round(w/alpha) - w/alpha) inside, c Qn below, c Qp above,   c = 1 / sqrt(weights Qp)

Source: Esser et al. 2020, arXiv:1902.08153, eq. 1-5 and section 2.2; Liu et al. 2025, arXiv:2502.02631.   lambda = 1
Port: extra_parameters (alpha).
Deviations: weights only; one alpha a group, a row by default (LSQ: a tensor), with c from the whole tensor as in
ParetoQ's code; LSQ's start (ParetoQ starts at max|w| / Qp, which zeroes nearly all ternary weights of a long row).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..quant import ClippedSTE, Grid, GroupSize, LearnedStep, QuantSpec
from ..schedules import KnobSchedule
from .base import Recipe


@dataclass(frozen=True, kw_only=True)
class LSQ(Recipe):
    """Learned steps under a clipped straight-through gradient."""

    name: ClassVar[str] = "lsq"
    widths: ClassVar[tuple[float, ...]] = (1.58, 2.0)

    def _spec(self, grid: Grid, group_size: GroupSize) -> QuantSpec:
        return QuantSpec(grid=grid, group_size=group_size, scale=LearnedStep(), estimator=ClippedSTE())

    def schedule(self) -> KnobSchedule:
        return KnobSchedule(rho=0.0, temperature=0.0)
