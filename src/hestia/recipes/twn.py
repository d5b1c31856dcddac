"""Ternary weight networks: a lower threshold than rounding, and the least-squares scale of what survives it.

    delta = factor mean|w|,   q = sign(w) 1[|w| > delta],   s = mean of |w| where q != 0,   w_hat = s q
    d w_hat / d w := 1                                                                     lambda = 1, tau = 0

Source: Li et al. 2016, arXiv:1605.04711, eq. 4-6; factor 0.75 is theirs for a Gaussian, public code often has 0.7.
Deviations: one scale per group, a row by default (paper: a layer); |w| = delta counts as zero; scale and threshold
follow the weights at every step and are detached.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..quant import STE, TWN, Grid, GroupSize, QuantSpec
from ..schedules import KnobSchedule
from .base import Recipe


@dataclass(frozen=True, kw_only=True)
class TernaryWeightNetworks(Recipe):
    """TWN: ``factor`` sets the threshold."""

    name: ClassVar[str] = "twn"
    factor: float = 0.75

    def _spec(self, grid: Grid, group_size: GroupSize) -> QuantSpec:
        return QuantSpec(grid=grid, group_size=group_size, scale=TWN(factor=self.factor), estimator=STE())

    def schedule(self) -> KnobSchedule:
        return KnobSchedule(rho=0.0, temperature=0.0)
