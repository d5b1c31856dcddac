"""DSQ's soft staircase (Gong et al. 2019, arXiv:1908.05033): hard forward, the derivative of a tanh backward.

In units of the distance d between two levels, with their middle m and a = temperature in (0, 1),

    soft(z) = m + tanh(k (z - m)) / (2 (1 - a)),   k = ln(2 / a - 1),   so that it meets the levels: tanh(k/2) = 1 - a
    Q(z) = nearest level,   dQ/dz := k (1 - tanh(k (z - m))^2) / (2 (1 - a)) up to d / 2 beyond the grid, then 0

The staircase goes on for d / 2 beyond the outer levels, as in the published port to language models (the paper
ends it at them). A small a is a sharp staircase; as a goes to 1 the gain goes to 1. At a = 0 the gain is 1 too, inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..grids import Grid
from .ste import Staircase

_SMALLEST, _LARGEST = 1e-4, 1.0 - 1e-4


@dataclass(frozen=True)
class Tanh(Staircase):
    """The staircase of sharpness ``temperature`` (see the top of this file).

    Raises:
        ConfigError: a grid whose levels are not equally far apart.
    """

    name: ClassVar[str] = "tanh"

    def gain(self, z: Tensor, grid: Grid, temperature: Tensor) -> Tensor:  # type: ignore[override]
        assert grid.distance is not None
        a = temperature.clamp(_SMALLEST, _LARGEST)
        k = torch.log(2.0 / a - 1.0)
        beyond = 0.5 * grid.distance
        inside = (z >= grid.values[0] - beyond) & (z <= grid.values[-1] + beyond)
        soft = (temperature > 0).to(z.dtype)
        u = self.phase(z, grid)
        t = (u - u.floor()).sub_(0.5).mul_(k).tanh_()
        gain = (1.0 - t.square_()).mul_(k / (2.0 * (1.0 - a)))
        return gain.mul_(soft).add_(1.0 - soft).mul_(inside)
