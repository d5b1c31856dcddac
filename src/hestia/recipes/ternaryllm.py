"""TernaryLLM's dual learnable ternarization with its shift held at 0: a learned scale under a fixed rule of codes.

    delta = factor mean|w|,   q = sign(w) 1[|w| > delta],   w_hat = alpha q,   alpha starts at mean|w| where q != 0
    d w_hat / d w := 1,   d w_hat / d alpha = q                                                   lambda = 1, tau = 0

Source: Chen et al. 2024, arXiv:2406.07177, w_hat = alpha q + gamma with both learned.
Port: extra_parameters (alpha).
Deviations: gamma = 0, because a shift needs the row sums of the activations at inference and is no ternary file; no
feature distillation (any teacher composes with this recipe); the threshold's factor is TWN's 0.75.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..quant import STE, Grid, GroupSize, LearnedLevel, QuantSpec
from ..schedules import KnobSchedule
from .base import Recipe


@dataclass(frozen=True, kw_only=True)
class TernaryLLM(Recipe):
    """DLT without shift; ``factor`` sets the threshold."""

    name: ClassVar[str] = "ternaryllm"
    factor: float = 0.75

    def _spec(self, grid: Grid, group_size: GroupSize) -> QuantSpec:
        return QuantSpec(grid=grid, group_size=group_size, scale=LearnedLevel(factor=self.factor), estimator=STE())

    def schedule(self) -> KnobSchedule:
        return KnobSchedule(rho=0.0, temperature=0.0)
