"""StableQAT's rotated damped Fourier surrogate (Chen et al. 2026, arXiv:2601.19320): hard forward, bounded gradient.

    Q(z) = nearest level,   dQ/dz := (1 - c) / (1 + c) inside the grid's range, 0 outside
    c = sqrt(2) pi A cos(pi (u + round(u))),   u = (z - lowest level) / distance of two levels

``round(u)`` is not clamped to the grid. With A = 0.21 the gain is 0.035 at a level and 1 halfway between two, never
more; A = 0 is the clipped straight-through estimator, and at A = 1 / (sqrt(2) pi) = 0.225 the gain reaches 0 and then
turns negative.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import ConfigError
from ..grids import Grid
from .ste import Staircase

LARGEST_AMPLITUDE = 1.0 / (math.sqrt(2.0) * math.pi)


@dataclass(frozen=True)
class DampedFourier(Staircase):
    """One harmonic of the surrogate (see the top of this file).

    Raises:
        ConfigError: an amplitude outside [0, 0.225), or a grid whose levels are not equally far apart.
    """

    name: ClassVar[str] = "damped_fourier"
    amplitude: float = 0.21

    def __post_init__(self) -> None:
        if not 0.0 <= self.amplitude < LARGEST_AMPLITUDE:
            raise ConfigError(
                f"damped_fourier: amplitude must lie in [0, {LARGEST_AMPLITUDE:.3f}), got {self.amplitude}"
            )

    def gain(self, z: Tensor, grid: Grid, temperature: Tensor) -> Tensor:  # type: ignore[override]
        inside = (z >= grid.values[0]) & (z <= grid.values[-1])
        # cos(pi (u + round(u))) has period 1 in u: its argument is taken from the nearest integer
        u = self.phase(z, grid)
        c = (u - torch.round(u)).mul_(math.pi).cos_().mul_(self.amplitude * math.sqrt(2.0) * math.pi)
        return (1.0 - c).div_(c.add_(1.0)).mul_(inside)
