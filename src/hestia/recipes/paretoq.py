"""ParetoQ's stretched elastic quantization (SEQ) at ternary: a learned range a row, divided into three equal parts.

    w_hat = alpha (2/3) round(1.5 clip(w / alpha, -0.99, 0.99)),     alpha starts at max|w|, at least 1e-5
    d w_hat / d w     := 1[|w / alpha| <= 0.99]
    d w_hat / d alpha := c (w_hat - w) / alpha inside, c sign(w) outside,     c = 1 / sqrt(weights)       lambda = 1

Source: Liu et al. 2025, arXiv:2502.02631, eq. 5-7 and the published code. LSQ, which the paper uses at 3 and 4 bits, is
the recipe ``lsq``.
Port: extra_parameters (alpha). Outside the clip the published gradient of alpha takes the end of the clipped range, 1,
though the outer level is 2/3 alpha; so do we. Weights outside the clip get no gradient.
Deviations: ternary only; its 2-bit grid (-3, -1, 1, 3) has no two-bit file; groups other than rows are allowed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..quant import ClippedSTE, Grid, GroupSize, QuantSpec, StretchedElastic
from ..schedules import KnobSchedule
from .base import Recipe


@dataclass(frozen=True, kw_only=True)
class ParetoQ(Recipe):
    """SEQ: learned scales, a gradient only inside the clip."""

    name: ClassVar[str] = "paretoq"

    def _spec(self, grid: Grid, group_size: GroupSize) -> QuantSpec:
        rule = StretchedElastic()
        # |w / alpha| <= 0.99 in steps of alpha / 1.5 is |z| <= 1.485
        estimator = ClippedSTE(margin=rule.clip * rule.stretch - grid.values[-1])
        return QuantSpec(grid=grid, group_size=group_size, scale=rule, estimator=estimator)

    def schedule(self) -> KnobSchedule:
        return KnobSchedule(rho=0.0, temperature=0.0)
