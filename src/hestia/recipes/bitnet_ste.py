"""BitNet b1.58: ternary weights, absmean scale, straight-through gradient from the first step.

    s = mean|w| + eps,   w_hat = s clip(round(w / s), -1, 1),   d w_hat / d w := 1        lambda = 1, tau = 0

Source: Ma et al. 2024, arXiv:2402.17764, eq. 1-3.
Deviations: weights only (the paper also rounds activations to 8 bits per token); one scale per group, a row by default
(paper: a tensor), because file formats and sharding want it; the scale is detached; from 2 bits on, which the paper
does not do, the scale rule is ``gaussian``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..quant import STE, Grid, GroupSize, QuantSpec
from ..schedules import KnobSchedule
from .base import Recipe, scale_for


@dataclass(frozen=True, kw_only=True)
class BitNetSTE(Recipe):
    """Hard rounding with an identity gradient throughout."""

    name: ClassVar[str] = "bitnet_ste"
    widths: ClassVar[tuple[float, ...]] = (1.0, 1.58, 2.0, 3.0, 4.0)

    def _spec(self, grid: Grid, group_size: GroupSize) -> QuantSpec:
        return QuantSpec(grid=grid, group_size=group_size, scale=scale_for(grid), estimator=STE())

    def schedule(self) -> KnobSchedule:
        return KnobSchedule(rho=0.0, temperature=0.0)
