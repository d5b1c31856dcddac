"""DSQ: hard rounding forward, the slope of a tanh staircase backward, learned steps.

    w_hat = alpha clip(round(x), Qn, Qp),   x = w / alpha                                                   lambda = 1
    d w_hat / d w     := g(x) = k (1 - tanh(k (x - m))^2) / (2 (1 - a)) 1[Qn - 1/2 <= x <= Qp + 1/2],   k = ln(2/a-1)
    d w_hat / d alpha := c (Q(x) - g(x) x),   c = 1 / sqrt(weights Qp)                 m: middle of two neighbours

Source: Gong et al. 2019, arXiv:1908.05033, as ported to language models by Chen et al. 2026 (arXiv:2601.19320), with a
= 0.2 at the start.
Port: extra_parameters (alpha). The sharpness a is the temperature of the schedule.
Deviations: a is constant or annealed (``end_sharpness``) instead of learned; alpha starts where LSQ starts it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import ConfigError
from ..quant import Grid, GroupSize, LearnedStep, QuantSpec, Tanh
from ..schedules import KnobSchedule
from .base import Recipe


@dataclass(frozen=True, kw_only=True)
class DSQ(Recipe):
    """``sharpness`` is a, in (0, 1); it falls to ``end_sharpness`` over the run, small is sharp.

    Raises:
        ConfigError: a sharpness outside (0, 1), or one that ends above its start.
    """

    name: ClassVar[str] = "dsq"
    widths: ClassVar[tuple[float, ...]] = (1.58, 2.0)
    sharpness: float = 0.2
    end_sharpness: float = 0.2

    def _spec(self, grid: Grid, group_size: GroupSize) -> QuantSpec:
        return QuantSpec(grid=grid, group_size=group_size, scale=LearnedStep(through="gain"), estimator=Tanh())

    def schedule(self) -> KnobSchedule:
        if not 0.0 < self.end_sharpness <= self.sharpness < 1.0:
            raise ConfigError(
                "dsq: the options must satisfy 0 < end_sharpness <= sharpness < 1, "
                f"got sharpness={self.sharpness}, end_sharpness={self.end_sharpness}"
            )
        return KnobSchedule(rho=0.0, temperature=self.sharpness, end_temperature=self.end_sharpness)
