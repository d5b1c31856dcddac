"""Round to nearest: no training at all, the floor that every method must beat.

s = mean|w| + 1e-5,   w_hat = s clip(round(w / s))         1 and 1.58 bits; from 2 bits on the rule ``gaussian``
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..quant import STE, Grid, GroupSize, QuantSpec, ScaleRule
from ..schedules import KnobSchedule
from .base import Recipe, scale_for


@dataclass(frozen=True, kw_only=True)
class RoundToNearest(Recipe):
    """The parent, rounded. ``scale`` names the rule; auto is what the trained recipes start from."""

    name: ClassVar[str] = "round_to_nearest"
    trains: ClassVar[bool] = False
    widths: ClassVar[tuple[float, ...]] = (1.0, 1.58, 2.0, 3.0, 4.0)
    scale: str = "auto"

    def _spec(self, grid: Grid, group_size: GroupSize) -> QuantSpec:
        scale = scale_for(grid) if self.scale == "auto" else ScaleRule.make(self.scale)
        return QuantSpec(grid=grid, group_size=group_size, scale=scale, estimator=STE())

    def schedule(self) -> KnobSchedule:
        return KnobSchedule(rho=0.0, temperature=0.0)
