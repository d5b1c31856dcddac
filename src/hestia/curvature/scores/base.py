"""What a score is: evidence and a candidate quantizer in, one damage per tensor out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...errors import CalibrationError
from ...quant import QuantSpec
from ...quant.family import Member
from ..sensitivity import Sensitivity


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What scores may look at; most need the sensitivity alone.

    Attributes:
        sensitivity: samples of every quantity that was measured.
        weights: module path -> weight ``[O, I]``, for scores that look at the weights themselves.
        inputs: module path -> second moment of the layer's inputs ``[I, I]`` (``inputs.input_moments``).
    """

    sensitivity: Sensitivity
    weights: Mapping[str, Tensor] | None = None
    inputs: Mapping[str, Tensor] | None = None

    def spec(self, label: str) -> QuantSpec:
        """The candidate called ``label``.

        Raises:
            CalibrationError: it was not among the candidates; those that were are named.
        """
        candidates = self.sensitivity.candidates
        if label not in candidates:
            measured = ", ".join(candidates) or "none"
            raise CalibrationError(f"{label!r} is no candidate of this sensitivity; measured were: {measured}")
        return QuantSpec.from_json(candidates[label])


@dataclass(frozen=True, kw_only=True)
class Score(Member, ABC):
    """Base of all scores: larger means that quantizing the tensor hurts more."""

    family: ClassVar[str] = "score"

    by_candidate: ClassVar[bool] = True
    """Whether the damage depends on the candidate; if not, a tensor has one number for all of them."""

    estimator: ClassVar[str] = "gnb"
    """The estimator that measures what this score reads."""

    @abstractmethod
    def damage(self, evidence: Evidence, label: str) -> dict[str, float]:
        """Module path -> damage of the candidate ``label``.

        Raises:
            CalibrationError: the evidence does not hold what this score reads; what is missing is named.
        """
