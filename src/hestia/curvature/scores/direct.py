"""Direct KL: the damage as measured, one tensor quantized at a time.

D_i = KL(p || p_i)                 nats per token, p_i: tensor i alone replaced by its quantized self

A mean that fp32 made negative, as files of earlier versions may hold it, is 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..estimators import quantity
from .base import Evidence, Score


@dataclass(frozen=True, kw_only=True)
class DirectKL(Score):
    """The estimator ``kl``'s mean: nothing is predicted."""

    name: ClassVar[str] = "kl"
    estimator: ClassVar[str] = "kl"

    def damage(self, evidence: Evidence, label: str) -> dict[str, float]:
        evidence.spec(label)
        return {path: max(0.0, mean) for path, mean in evidence.sensitivity.means(quantity("kl", label)).items()}
