"""Port ``output_shift``: a static bias that a layer's weights give its output.

    y = x w_hat^T + b + lambda shift(w)

It depends on no input, so ``freeze`` folds it into the layer's bias, and the file holds an ordinary bias.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .family import Member


@dataclass(frozen=True)
class OutputShift(Member, ABC):
    """Base of all shifts: ``shift(w_OI, codes_OI) -> [O]``, differentiable in ``w_OI``."""

    family: ClassVar[str] = "output shift"

    @abstractmethod
    def __call__(self, w_OI: Tensor, codes_OI: Tensor) -> Tensor:
        """The shift of every output; ``codes_OI`` are the hard codes of ``w_OI``, a constant."""


@dataclass(frozen=True)
class DeadZone(OutputShift):
    """``shift_o = strength * sum of w_oi over the weights whose code is 0`` (Tequila, arXiv:2509.23809)."""

    name: ClassVar[str] = "dead_zone"
    strength: float = 1e-3

    def __call__(self, w_OI: Tensor, codes_OI: Tensor) -> Tensor:
        return self.strength * (w_OI * (codes_OI == 0)).sum(dim=-1)
