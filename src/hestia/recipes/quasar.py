"""QUASAR, in symmetric ternary form: threshold and scale refitted at every step, weighted by Adam's second moment.

    for thresholds t_k = mean|w| (0.40, 0.45, ... 1.20):   q_k = sign(w) 1[|w| > t_k]
        s_k = sum(h q_k w) / sum(h q_k^2),   e_k = sum h (s_k q_k - w)^2
    w_hat = s_k q_k of the k with least e_k,   d w_hat / d w := 1                                 lambda = 1, tau = 0
    h = Adam's exp_avg_sq relative to its mean in the group; 1 everywhere for the first 10 steps

Source: arXiv:2608.13966, and the published code, which fits scale and offset of an asymmetric grid.
Port: importance. h belongs to the layer's state, so evaluation, export and a resumed run use the same codes. Codes can
flip because h moves though w does not; watch the flip rate.
Deviations: symmetric ternary without offset; thresholds relative to mean|w| (paper: clips at 0.30 ... 1.00 of the range
of a group of 128, which for long rows with outliers would miss the best threshold); groups default to rows. What is no
part of a recipe: the paper trains with a teacher, embeddings and norms frozen, and AdamW's betas (0.9, 0.999); with
hestia's 0.95, h remembers 20 steps and not 1,000.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..quant import STE, Grid, GroupSize, QuantSpec, Saliency
from ..schedules import KnobSchedule
from .base import Recipe


@dataclass(frozen=True, kw_only=True)
class Quasar(Recipe):
    """``every`` how many steps h is renewed, ``warmup`` steps before the first time."""

    name: ClassVar[str] = "quasar"
    warmup: int = 10
    every: int = 1

    def _spec(self, grid: Grid, group_size: GroupSize) -> QuantSpec:
        rule = Saliency(warmup=self.warmup, every=self.every)
        return QuantSpec(grid=grid, group_size=group_size, scale=rule, estimator=STE())

    def schedule(self) -> KnobSchedule:
        return KnobSchedule(rho=0.0, temperature=0.0)
