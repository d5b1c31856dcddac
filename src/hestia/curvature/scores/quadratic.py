"""The quadratic form: the second-order prediction of the KL, along the very error that rounding makes.

    D_i = 1/2 dW_i' G_i dW_i = 1/2 E <g_i, dW_i>^2 / N                 nats per token

Source: second-order expansion of KL(p || p_i) at the parent, where its gradient vanishes and its Hessian is G; the form
of NViT's and HAWQ's saliency with the error in place of the weight. It costs one inner product in the pass that
measures the trace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..estimators import quantity
from .base import Evidence, Score


@dataclass(frozen=True, kw_only=True)
class Quadratic(Score):
    """Half of dW' G dW: predicted KL of quantizing this tensor alone."""

    name: ClassVar[str] = "quadratic"

    def damage(self, evidence: Evidence, label: str) -> dict[str, float]:
        evidence.spec(label)
        return {path: 0.5 * mean for path, mean in evidence.sensitivity.means(quantity("quadratic", label)).items()}
