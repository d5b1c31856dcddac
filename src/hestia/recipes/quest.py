"""QuEST: a grid fitted to the root mean square, and a gradient only where rounding can be trusted.

    s = c rms(w),   w_hat = s Q(w / s),   c = 1.224 on {-1, 0, 1}, 0.798 on {-1, 1}               lambda = 1, tau = 0
    d w_hat / d w := 1[|w_hat - w| <= half a step]:   blocks |w| > 1.5 s (ternary), |w| > 2 s ({-1, 1})

Source: Panferov et al. 2025, arXiv:2502.05003, and the published code, whose c minimise a Gaussian's squared error.
Deviations: no Hadamard rotation, because an online one needs its own kernel; so the mask is taken in the weights' own
basis, and what lies beyond it gets no gradient until its row's rms grows. The ternary grid has a level at 0 with step
c rms (public copies carry the grid of even level counts, which has none). Weights only; groups default to rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..quant import BINARY, Grid, GroupSize, QuantSpec, RootMeanSquare, Trust
from ..schedules import KnobSchedule
from .base import Recipe


@dataclass(frozen=True, kw_only=True)
class QuEST(Recipe):
    """Trust estimator on the least-squared-error grid; ``reach`` is the trusted distance in half steps."""

    name: ClassVar[str] = "quest"
    widths: ClassVar[tuple[float, ...]] = (1.0, 1.58)
    reach: float = 1.0

    def _spec(self, grid: Grid, group_size: GroupSize) -> QuantSpec:
        scale = RootMeanSquare(clip=0.798 if grid == BINARY else 1.224)
        return QuantSpec(grid=grid, group_size=group_size, scale=scale, estimator=Trust(reach=self.reach))

    def schedule(self) -> KnobSchedule:
        return KnobSchedule(rho=0.0, temperature=0.0)
