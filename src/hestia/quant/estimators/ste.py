"""Straight-through estimators: hard rounding forward, a made-up gradient backward.

STE          Q(z) = nearest level,   dQ/dz := 1                        Bengio et al. 2013, arXiv:1308.3432
clipped STE  Q(z) = nearest level,   dQ/dz := 1[lowest - m <= z <= highest + m]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

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
class ClippedSTE(STE):
    """Identity backward inside the grid's range widened by ``margin`` (in steps), zero outside.

    With margin 0 this is LSQ's mask ``1[Qn <= w/s <= Qp]`` (Esser et al. 2020, arXiv:1902.08153, eq. 3-5).
    """

    name: ClassVar[str] = "clipped_ste"
    margin: float = 0.0

    def gain(self, z: Tensor, grid: Grid, temperature: Tensor) -> Tensor:  # type: ignore[override]
        low, high = grid.values[0] - self.margin, grid.values[-1] + self.margin
        return ((z >= low) & (z <= high)).to(z.dtype)
