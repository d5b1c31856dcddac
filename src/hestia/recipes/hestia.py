"""HESTIA: a softmax over the grid, eased in by pressure, hardened tensor by tensor, paced by curvature.

    w_hat   = (1 - lambda(t)) w + lambda(t) s sum_q q pi(q | w/s)        pi(q|z) ~ exp(-(z - q)^2 / tau_i(t))
    s       = mean|w| + 1e-5 over the group, detached
    lambda  = min(1, t / rho)                                                                          eq. 10
    s_i     = sigmoid(kappa (log h_i - mean log h) / std log h)           h_i: curvature of tensor i   eq. 13
    tau_i   = tau0 decay(t) exp(alpha (s_i - c))                          decay: cosine after rho      eq. 14, 15

Source: Wang et al. 2026, arXiv:2601.20745.
Deviations: h_i is the Gauss-Newton trace (never negative, one backward a sequence), its geometric mean over sequences,
instead of Hutch++ on the Hessian; groups default to rows (paper: 128). Widths of 3 and 4 bits, which the paper does
not do, use the scale rule ``gaussian``, and so do 2 bits in a plan of several widths (``mixed_spec``); with
``scale="gaussian"`` all widths do. The sign of alpha and the centring c are options because the published evidence
does not settle them: with alpha > 0 a sensitive tensor stays hotter for longer, ``centred`` makes c the mean score so
that alpha does not move the mean log temperature, ``matched`` divides by the mean factor so that it does not move the
mean temperature. Without a sensitivity every factor is 1, which is alpha = 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from ..curvature import hestia_scores, temperature_factors
from ..quant import Gaussian, Grid, GroupSize, QuantSpec, ScaleRule, Softmax
from ..schedules import KnobSchedule
from .base import Recipe


@dataclass(frozen=True, kw_only=True)
class Hestia(Recipe):
    """The paper's method.

    Attributes:
        alpha: strength and sign of the curvature term; 0 ignores curvature.
        centred: subtract the mean score, so that alpha keeps the geometric mean temperature.
        kappa: slope of the score's sigmoid.
        rho: share of the run over which pressure rises.
        matched: divide the factors by their mean, so that alpha keeps the arithmetic mean temperature.
        scale: rule of the scale; absmean (the paper's) suits {-1, 0, 1} better than {-2, -1, 0, 1}, and from 3 bits on
            gaussian takes its place.
        temperature: tau0 (paper 0.3; the published code starts at 0.351, where soft rounding moves Gaussian weights
            least).
        hold: share of the run before the temperature falls; None means rho.
        decay: "cosine" or "linear".
        end_temperature: temperature of the last step.
    """

    name: ClassVar[str] = "hestia"
    uses_curvature: ClassVar[bool] = True
    widths: ClassVar[tuple[float, ...]] = (1.0, 1.58, 2.0, 3.0, 4.0)
    alpha: float = 0.4
    centred: bool = False
    matched: bool = False
    kappa: float = 1.0
    rho: float = 0.2
    temperature: float = 0.3
    scale: Literal["absmean", "absmax", "least_squares", "gaussian"] = "absmean"
    hold: float | None = None
    decay: Literal["cosine", "linear"] = "cosine"
    end_temperature: float = 0.0

    def _spec(self, grid: Grid, group_size: GroupSize) -> QuantSpec:
        beyond = self.scale == "absmean" and len(grid.levels) > 4
        scale = Gaussian() if beyond else ScaleRule.make(self.scale)
        return QuantSpec(grid=grid, group_size=group_size, scale=scale, estimator=Softmax())

    def mixed_spec(self, bits: float, group_size: GroupSize) -> QuantSpec:
        """At 2 bits gaussian: a mixed plan is not in the paper, and its damages are measured with that rule."""
        spec = self.spec_for(bits, group_size)
        return replace(spec, scale=Gaussian()) if bits >= 2.0 and self.scale == "absmean" else spec

    def schedule(self) -> KnobSchedule:
        return KnobSchedule(
            rho=self.rho,
            temperature=self.temperature,
            hold=self.hold,
            decay=self.decay,
            end_temperature=self.end_temperature,
        )

    def temperature_factors(self, traces: Mapping[str, float]) -> dict[str, float]:
        scores = hestia_scores(traces, kappa=self.kappa)
        return temperature_factors(scores, alpha=self.alpha, centred=self.centred, matched=self.matched)
