"""What an estimator is: two elementwise functions of ``z = w / step``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..family import Member
from ..grids import Grid


@dataclass(frozen=True)
class Estimator(Member, ABC):
    """Base of all estimators: what rounding returns, and the gradient it pretends to have.

    ``z`` is fp32 or fp64 of any shape, ``temperature`` a 0-d tensor of the same dtype. Both functions are
    elementwise, allocate no tensor larger than ``z``, and never return NaN for finite input. ``z`` is theirs to
    overwrite, and what they return is the caller's: without a compiler every fresh tensor and every pass counts.
    """

    family: ClassVar[str] = "estimator"

    differentiates_value: ClassVar[bool] = False
    """True where ``gain`` is the derivative of ``value``, so that ``d w_hat / d w`` carries the chain factor
    ``level / step``; False where it is a straight-through stand-in for that whole derivative."""

    def check_grid(self, grid: Grid) -> None:
        """Whether the estimator suits ``grid``; any by default.

        Raises:
            ConfigError: it does not; the message says what would.
        """

    @abstractmethod
    def value(self, z: Tensor, grid: Grid, temperature: Tensor) -> Tensor:
        """Q_tau(z): the (soft) rounded value in grid units."""

    @abstractmethod
    def gain(self, z: Tensor, grid: Grid, temperature: Tensor) -> Tensor | None:
        """dQ_tau/dz as the backward pass sees it; None means 1 everywhere."""
