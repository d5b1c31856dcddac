"""Omega: mean curvature times rounding error.

    Omega_i = tr(G_i) / n_i * ||dW_i||^2          tr(G_i): the arithmetic mean over sequences, whatever the estimator

Source: HAWQ-V2 (Dong et al. 2020, arXiv:1911.03852, eq. 5), there with the Hessian's trace. Exact where the error is
isotropic in the eigenbasis; at 1.58 bits it is not, and Omega underestimates the KL many times over: a rank, not nats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...errors import CalibrationError
from .base import Evidence, Score


@dataclass(frozen=True, kw_only=True)
class Omega(Score):
    """Trace a weight, times the squared rounding error."""

    name: ClassVar[str] = "omega"

    def damage(self, evidence: Evidence, label: str) -> dict[str, float]:
        evidence.spec(label)
        sensitivity, tensors = evidence.sensitivity, evidence.sensitivity.tensors
        if sensitivity.primary != "trace":
            raise CalibrationError(
                f"the score 'omega' needs traces, and the estimator {sensitivity.estimator!r} measured "
                f"{sensitivity.primary!r}: calibrate with --estimator gnb"
            )
        traces = {path: t.value if t.signed else t.trace for path, t in tensors.items()}
        return {path: traces[path] / t.weights * t.errors[label] for path, t in tensors.items()}
