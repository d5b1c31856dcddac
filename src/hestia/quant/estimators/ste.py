"""Straight-through estimators: hard rounding forward, a made-up gradient backward.

STE          Q(z) = nearest level,   dQ/dz := 1                        Bengio et al. 2013, 1308.3432
clipped STE  Q(z) = nearest level,   dQ/dz := 1[lowest - m <= z <= highest + m]
trust        Q(z) = nearest level,   dQ/dz := 1[|Q(z) - z| <= r half steps]    Panferov et al. 2025, 2502.05003
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...errors import ConfigError
from ..grids import Grid
from .base import Estimator


@dataclass(frozen=True)
class STE(Estimator):
    """Nearest level forward, identity backward (BitNet b1.58 uses it without a clip mask)."""

    name: ClassVar[str] = "ste"

    def value(self, z: Tensor, grid: Grid, temperature: Tensor) -> Tensor:
        return grid.round(z)

    def gain(self, z: Tensor, grid: Grid, temperature: Tensor) -> None:
        return None


@dataclass(frozen=True)
class Staircase(STE, ABC):
    """Base of the estimators whose gain repeats from level to level.

    Raises:
        ConfigError: a grid whose levels are not equally far apart.
    """

    def check_grid(self, grid: Grid) -> None:
        if grid.distance is None:
            raise ConfigError(f"{self.name}: the levels must be equally far apart, got {grid.name}; use 'ste'")

    @staticmethod
    def phase(z: Tensor, grid: Grid) -> Tensor:
        """``(z - lowest level) / distance`` but for a whole number: ``z`` itself on consecutive integers."""
        assert grid.distance is not None
        consecutive = grid.unit == grid.distance == 1.0
        return z if consecutive else z.sub_(grid.values[0]).div_(grid.distance)


@dataclass(frozen=True)
class ClippedSTE(STE):
    """Identity backward inside the grid's range widened by ``margin`` (in steps), zero outside.

    With margin 0 this is LSQ's mask ``1[Qn <= w/s <= Qp]`` (Esser et al. 2020, arXiv:1902.08153, eq. 3-5).
    """

    name: ClassVar[str] = "clipped_ste"
    margin: float = 0.0

    def gain(self, z: Tensor, grid: Grid, temperature: Tensor) -> Tensor:  # type: ignore[override]
        low, high = grid.values[0] - self.margin, grid.values[-1] + self.margin
        return ((z >= low) & (z <= high)).to(z.dtype)


@dataclass(frozen=True)
class Trust(Staircase):
    """QuEST's trust estimator: a gradient only where rounding moved the weight by at most ``reach`` half steps.

    Inside the grid's range every weight is that near its level, so ``reach = 1`` blocks what lies beyond the outer
    levels by more than half a step: |z| > 1.5 on the ternary grid, |z| > 2 on {-1, 1}, whose step is 2.

    Raises:
        ConfigError: a reach that is not positive: nothing would be trusted; or levels not equally far apart.
    """

    name: ClassVar[str] = "trust"
    reach: float = 1.0

    def __post_init__(self) -> None:
        self.require_positive("reach")

    def gain(self, z: Tensor, grid: Grid, temperature: Tensor) -> Tensor:  # type: ignore[override]
        assert grid.distance is not None
        return (grid.round(z).sub_(z).abs_() <= self.reach * 0.5 * grid.distance).to(z.dtype)
