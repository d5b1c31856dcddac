"""Tequila: weights trapped in the dead zone also act as a bias, which gives them a gradient of their own.

    s = mean|w| + eps,   q = clip(round(w / s), -1, 1),   D = {i: q_i = 0}
    y = x (s q)^T + b + strength sum over D of w,   d w_hat / d w := 1,   d y / d w gets + strength on D    lambda = 1

Source: arXiv:2509.23809 (2025), and the published code; strength 1e-3.
Port: output_shift. The sum is a static number an output: it is frozen into the layer's bias, so the file is ternary
plus biases, and the plan refuses an architecture or an engine that has no place for them.
Deviations: groups default to rows (paper: 128). |w| = s / 2 counts as dead, as rounding half to even has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..quant import STE, AbsMean, DeadZone, Grid, GroupSize, QuantSpec
from ..schedules import KnobSchedule
from .base import Recipe


@dataclass(frozen=True, kw_only=True)
class Tequila(Recipe):
    """Absmean rounding plus the dead zone's sum, ``strength`` times."""

    name: ClassVar[str] = "tequila"
    strength: float = 1e-3

    def _spec(self, grid: Grid, group_size: GroupSize) -> QuantSpec:
        shift = DeadZone(strength=self.strength)
        return QuantSpec(grid=grid, group_size=group_size, scale=AbsMean(), estimator=STE(), output_shift=shift)

    def schedule(self) -> KnobSchedule:
        return KnobSchedule(rho=0.0, temperature=0.0)
