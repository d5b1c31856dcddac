"""Port ``extra_parameters``: scale rules whose scale is learned; ``relax.py`` gives it its gradient.

d loss / d alpha = factor * lambda * sum over the group of (d loss / d w_hat) * slope
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..errors import ConfigError
from .grids import Grid
from .held import HeldRule
from .scales import TWN, Scales


@dataclass(frozen=True)
class LearnedRule(HeldRule, ABC):
    """A rule whose held tensor ``alpha`` is a Parameter with a gradient of its own."""

    @abstractmethod
    def slope(self, z: Tensor, q: Tensor, gain: Tensor | None, grid: Grid) -> Tensor:
        """d w_hat / d alpha of every weight at pressure 1.

        Args:
            z: ``w / step``; theirs to overwrite, as is ``q``.
            q: the estimator's value.
            gain: the estimator's gain, which is used again; None means 1.
            grid: the grid.
        """

    def gradient_factor(self, weights: int, grid: Grid) -> float:
        """What the summed gradient of alpha is multiplied with; ``weights`` counts the whole tensor."""
        return 1.0


@dataclass(frozen=True)
class LearnedStep(LearnedRule):
    """LSQ's learned step (Esser et al. 2020, arXiv:1902.08153).

        step = level = max(alpha, eps)                     alpha starts at 2 mean|w| / sqrt(Qp)
        d w_hat / d alpha = q - z inside [Qn, Qp], Qn or Qp outside; times 1 / sqrt(weights Qp)

    With ``through="gain"`` the chain rule runs through the estimator's own gain, ``q - gain z``; inside the range and
    for an identity gain the two agree.

    Raises:
        ConfigError: a grid whose highest level Qp is not positive.
    """

    name: ClassVar[str] = "learned_step"
    through: Literal["mask", "gain"] = "mask"
    eps: float = 1e-5

    def __post_init__(self) -> None:
        self.require_positive("eps")

    def check_grid(self, grid: Grid) -> None:
        if grid.values[-1] <= 0:
            raise ConfigError(f"scale rule 'learned_step' needs a level above 0, got {grid.name}; use 'absmax'")

    def start(self, w_RGN: Tensor, grid: Grid) -> Tensor:
        return 2.0 * w_RGN.abs().mean(dim=-1, keepdim=True) / math.sqrt(grid.values[-1]) + self.eps

    def scales(self, w_RGN: Tensor, grid: Grid, held: Tensor) -> Scales:
        s = held.clamp_min(self.eps)
        return Scales(s, s)

    def slope(self, z: Tensor, q: Tensor, gain: Tensor | None, grid: Grid) -> Tensor:
        if self.through == "gain":
            return q - (z if gain is None else gain * z)
        inside = (z >= grid.values[0]) & (z <= grid.values[-1])
        return q - z * inside

    def gradient_factor(self, weights: int, grid: Grid) -> float:
        return 1.0 / math.sqrt(weights * grid.values[-1])


@dataclass(frozen=True)
class StretchedElastic(LearnedRule):
    """ParetoQ's SEQ on the ternary grid (Liu et al. 2025, arXiv:2502.02631).

        w_hat = alpha (2/3) round(1.5 clip(w / alpha, -0.99, 0.99))       alpha starts at max|w|
        d w_hat / d alpha = (q - z) / 1.5 where |w / alpha| <= 0.99, else sign(w); times 1 / sqrt(weights)

    so step = level = alpha / 1.5. Outside the clip the published gradient takes the end of the clipped range (1), not
    of the grid (2/3); so do we.

    Raises:
        ConfigError: a grid other than {-1, 0, 1}: three parts of the range are three levels.
    """

    name: ClassVar[str] = "stretched_elastic"
    stretch: float = 1.5
    clip: float = 0.99
    eps: float = 1e-5

    def __post_init__(self) -> None:
        self.require_positive("stretch", "clip", "eps")

    def check_grid(self, grid: Grid) -> None:
        if not grid.is_ternary:
            raise ConfigError(f"scale rule 'stretched_elastic' is for ternary, not {grid.name}; use 'learned_step'")

    def start(self, w_RGN: Tensor, grid: Grid) -> Tensor:
        return w_RGN.abs().amax(dim=-1, keepdim=True)

    def scales(self, w_RGN: Tensor, grid: Grid, held: Tensor) -> Scales:
        s = held.clamp_min(self.eps) / self.stretch
        return Scales(s, s)

    def slope(self, z: Tensor, q: Tensor, gain: Tensor | None, grid: Grid) -> Tensor:
        inside = z.abs() <= self.clip * self.stretch
        return torch.where(inside, (q - z) / self.stretch, z.sign())

    def gradient_factor(self, weights: int, grid: Grid) -> float:
        return 1.0 / math.sqrt(weights)


@dataclass(frozen=True)
class LearnedLevel(LearnedRule):
    """DLT's learned scale under TWN's threshold (Chen et al. 2024, arXiv:2406.07177), without its shift.

    step = 2 factor mean|w|,   level = max(alpha, eps),   d w_hat / d alpha = q          alpha starts at TWN's level
    """

    name: ClassVar[str] = "learned_level"
    factor: float = 0.75
    eps: float = 1e-5

    def __post_init__(self) -> None:
        self.require_positive("factor", "eps")

    def start(self, w_RGN: Tensor, grid: Grid) -> Tensor:
        return TWN(factor=self.factor, eps=self.eps)(w_RGN, grid).level

    def scales(self, w_RGN: Tensor, grid: Grid, held: Tensor) -> Scales:
        step = 2.0 * self.factor * w_RGN.abs().mean(dim=-1, keepdim=True) + self.eps
        return Scales(step, held.clamp_min(self.eps))

    def slope(self, z: Tensor, q: Tensor, gain: Tensor | None, grid: Grid) -> Tensor:
        return q
