"""StableQAT: LSQ with a bounded Fourier gradient in place of the identity.

    w_hat = alpha clip(round(x), Qn, Qp),   x = w / alpha                                         lambda = 1, tau = 0
    d w_hat / d w     := (1 - c) / (1 + c) 1[Qn <= x <= Qp],   c = sqrt(2) pi A cos(pi (x + round(x))),   A = 0.21
    d w_hat / d alpha := that of LSQ, through the mask and not through the surrogate

Source: Chen et al. 2026, arXiv:2601.19320, and the published code; round(x) is not clamped.
Port: extra_parameters (alpha).
Deviations: ternary besides 2 bits (the paper stops at 2); alpha starts where LSQ starts it, see ``lsq``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..quant import DampedFourier, Grid, GroupSize, LearnedStep, QuantSpec
from ..schedules import KnobSchedule
from .base import Recipe


@dataclass(frozen=True, kw_only=True)
class StableQAT(Recipe):
    """One harmonic of ``amplitude``; 0 is LSQ itself."""

    name: ClassVar[str] = "stableqat"
    widths: ClassVar[tuple[float, ...]] = (1.58, 2.0)
    amplitude: float = 0.21

    def _spec(self, grid: Grid, group_size: GroupSize) -> QuantSpec:
        estimator = DampedFourier(amplitude=self.amplitude)
        return QuantSpec(grid=grid, group_size=group_size, scale=LearnedStep(), estimator=estimator)

    def schedule(self) -> KnobSchedule:
        return KnobSchedule(rho=0.0, temperature=0.0)
