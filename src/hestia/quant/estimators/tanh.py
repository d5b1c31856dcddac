"""DSQ's soft staircase (Gong et al. 2019, arXiv:1908.05033): hard forward, the derivative of a tanh backward.

Between two levels one step apart, with their middle m and a = temperature in (0, 1),

    soft(z) = m + tanh(k (z - m)) / (2 (1 - a)),   k = ln(2 / a - 1),   so that it meets the levels: tanh(k/2) = 1 - a
    Q(z) = nearest level,   dQ/dz := k (1 - tanh(k (z - m))^2) / (2 (1 - a)) up to half a step beyond the grid, then 0

The staircase goes on for half a step beyond the outer levels, as in the published port to language models (the paper
ends it at them). A small a is a sharp staircase; as a goes to 1 the gain goes to 1. At a = 0 the gain is 1 too, inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import ConfigError
from ..grids import Grid
from .ste import STE

_SMALLEST, _LARGEST = 1e-4, 1.0 - 1e-4


@dataclass(frozen=True)
class Tanh(STE):
    """The staircase of sharpness ``temperature`` (see the top of this file); for grids whose levels are 1 apart."""

    name: ClassVar[str] = "tanh"
    needs_temperature: ClassVar[bool] = True

    def gain(self, z: Tensor, grid: Grid, temperature: Tensor) -> Tensor:  # type: ignore[override]
        if any(b - a != 1.0 for a, b in zip(grid.values, grid.values[1:], strict=False)):
            raise ConfigError(f"tanh: the levels must be 1 apart, got {grid.name}")
        a = temperature.clamp(_SMALLEST, _LARGEST)
        k = torch.log(2.0 / a - 1.0)
        inside = (z >= grid.values[0] - 0.5) & (z <= grid.values[-1] + 0.5)
        soft = (temperature > 0).to(z.dtype)
        t = (z - z.floor()).sub_(0.5).mul_(k).tanh_()
        gain = (1.0 - t.square_()).mul_(k / (2.0 * (1.0 - a)))
        return gain.mul_(soft).add_(1.0 - soft).mul_(inside)
