"""From curvature to a score in (0, 1).

Source: Wang et al. 2026 (Hestia, arXiv:2601.20745), eq. 13. Deviation: a trace that is not positive is refused, never
clipped (one clipped value is an outlier in the logarithm that halves the spread of all other scores).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ...errors import CalibrationError, ConfigError
from .base import Evidence, Score


def hestia_scores(traces: Mapping[str, float], kappa: float = 1.0) -> dict[str, float]:
    """s_i, the share of a tensor on the scale from least to most sensitive.

        s_i = sigmoid( kappa * (log h_i - mean_j log h_j) / (std_j log h_j + 1e-8) )

    with the population standard deviation over the tensors of ``traces``.

    Args:
        traces: module path -> h_i > 0. Any mean of a tensor's samples will do; the geometric one is the steadier
            (``Sensitivity.values``).
        kappa: slope, dimensionless; the paper's is 1.

    Raises:
        CalibrationError: no trace at all, or one that is not positive and finite; the tensor is named.
        ConfigError: a slope that is not finite.

    >>> {path: round(score, 6) for path, score in hestia_scores({"a": 1.0, "b": 100.0}).items()}
    {'a': 0.268941, 'b': 0.731059}
    """
    if not math.isfinite(kappa):
        raise ConfigError(f"kappa must be finite, got {kappa}")
    if not traces:
        raise CalibrationError("no traces to score: the sensitivity holds no tensor")
    for path, trace in traces.items():
        if not (math.isfinite(trace) and trace > 0.0):
            raise CalibrationError(f"{path}: a trace must be positive and finite to have a score, got {trace}")
    logs = {path: math.log(trace) for path, trace in traces.items()}
    mean = statistics.fmean(logs.values())
    spread = statistics.pstdev(logs.values(), mu=mean) + 1e-8
    return {path: _sigmoid(kappa * (value - mean) / spread) for path, value in logs.items()}


def _sigmoid(x: float) -> float:
    return 0.5 * (1.0 + math.tanh(0.5 * x))  # never overflows


@dataclass(frozen=True, kw_only=True)
class HestiaScore(Score):
    """s_i as a damage: what the paper paces its temperatures by; the same for every candidate."""

    name: ClassVar[str] = "hestia"
    by_candidate: ClassVar[bool] = False
    kappa: float = 1.0

    def damage(self, evidence: Evidence, label: str) -> dict[str, float]:
        return hestia_scores(evidence.sensitivity.values, kappa=self.kappa)
