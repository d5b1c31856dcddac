"""CAGE: straight-through training whose latent weights are pulled to the grid late in the run.

    s = mean|w| + eps,   w_hat = s clip(round(w / s), -1, 1),   d w_hat / d w := 1                lambda = 1, tau = 0
    after the optimizer's step:   w <- w - lr strength_t (w - w_hat)
    strength_t = 0 up to t = start, then a line up to ``strength`` at t = 1

Source: arXiv:2510.18784 (2025), the decoupled form; strength 10, start 0.8.
Port: correction. The pull scales with the learning rate: at 5e-5 it closes 5e-4 of the gap a step, at 1e-3 a hundredth.
In all it closes 1 - exp(-sum lr strength_t): 63 % in 31,729 steps at 5e-5 that decay over the last tenth, 9 % in 488 at
5e-4 that decay over the last fifth.
Deviations: weights only, on the absmean ternary quantizer (the paper uses QuEST's with rotation at 3 and 4 bits). A
strong pull lowers its level: on the grid mean|w| is below it, for some weights are zero (docs/log.md, 2026-11-27).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..quant import STE, AbsMean, Correction, Grid, GroupSize, Pull, QuantSpec
from ..schedules import KnobSchedule
from .base import Recipe


@dataclass(frozen=True, kw_only=True)
class CAGE(Recipe):
    """``strength`` of the pull in units of the learning rate, from ``start`` of the run on."""

    name: ClassVar[str] = "cage"
    strength: float = 10.0
    start: float = 0.8

    def _spec(self, grid: Grid, group_size: GroupSize) -> QuantSpec:
        return QuantSpec(grid=grid, group_size=group_size, scale=AbsMean(), estimator=STE())

    def schedule(self) -> KnobSchedule:
        return KnobSchedule(rho=0.0, temperature=0.0)

    def correction(self) -> Correction:
        return Pull(strength=self.strength, start=self.start)
