"""DeltaLoss: the first-order change of the loss, every weight's share counted with its absolute value.

    D_i = E sum |g_i dW_i|

Source: SignRoundV2 (arXiv:2512.04746). Deviations: the gradient is that of random logit cotangents at the parent
(theirs: of the labels, at the quantized model), so that it comes from the same pass as the trace; no activation term.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..estimators import quantity
from .base import Evidence, Score


@dataclass(frozen=True, kw_only=True)
class DeltaLoss(Score):
    """Sum of |gradient times rounding error|."""

    name: ClassVar[str] = "delta_loss"

    def damage(self, evidence: Evidence, label: str) -> dict[str, float]:
        evidence.spec(label)
        return evidence.sensitivity.means(quantity("delta_loss", label))
