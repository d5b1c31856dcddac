"""Scale rules that hold something between steps: ports ``extra_parameters`` and ``importance``.

A plain rule is a function of the weight. A learned rule also reads a Parameter, one number a group, and a weighted rule
a detached tensor, one number a weight. The layer owns that tensor (``nn/linear.py``), training fills it, ``freeze`` and
``restore`` drop it. Rules stay frozen values without state.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..errors import ConfigError
from .grids import BINARY, TERNARY, Grid
from .scales import TWN, ScaleRule, Scales, best_level


@dataclass(frozen=True)
class HeldRule(ScaleRule, ABC):
    """Base of the rules that hold a tensor; called without it they answer for a fresh one."""

    @abstractmethod
    def start(self, w_RGN: Tensor, grid: Grid) -> Tensor:
        """The held tensor when training begins, detached: ``[R, G, 1]`` if learned, ``[R, G, N]`` if an importance."""

    @abstractmethod
    def scales(self, w_RGN: Tensor, grid: Grid, held: Tensor) -> Scales:
        """Step and level of every group from weight and held tensor; positive and finite."""

    def __call__(self, w_RGN: Tensor, grid: Grid) -> Scales:
        return self.scales(w_RGN, grid, self.start(w_RGN.detach(), grid))


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
class WeightedRule(HeldRule, ABC):
    """A rule whose held tensor is an importance, one number a weight, which training hands over: Adam's second moment.

    ``every`` is how often, in steps, it hands over a fresh one; ``warmup`` steps go by before the first. Until then,
    and where training has none, all weights count alike.

    Raises:
        ConfigError: a negative ``warmup``, or an ``every`` under 1.
    """

    warmup: int = 10
    every: int = 1

    def __post_init__(self) -> None:
        if self.warmup < 0 or self.every < 1:
            raise ConfigError(
                f"{self.family} {self.name!r} needs warmup >= 0 and every >= 1, "
                f"got warmup={self.warmup}, every={self.every}"
            )

    def start(self, w_RGN: Tensor, grid: Grid) -> Tensor:
        return torch.ones_like(w_RGN)


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
    """

    name: ClassVar[str] = "stretched_elastic"
    stretch: float = 1.5
    clip: float = 0.99
    eps: float = 1e-5

    def __post_init__(self) -> None:
        self.require_positive("stretch", "clip", "eps")

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


@dataclass(frozen=True)
class Saliency(WeightedRule):
    """The threshold and level that lose least, weighted by importance h (QUASAR, arXiv:2608.13966; ternary form).

        t_k = mean|w| (lowest + k width),   q_k = sign(w) 1[|w| > t_k],   k = 0 ... candidates - 1
        level_k = sum(h q_k w) / sum(h q_k^2),   k* = argmin_k sum h (level_k q_k - w)^2
        step = 2 t_k*,   level = level_k*

    All candidates are weighed in one pass: the loss is ``sum h w^2 - A_k^2 / B_k`` with A_k = sum of h|w| and B_k = sum
    of h over ``|w| > t_k``, so h and h|w| are summed by the interval that |w| falls into, from the top down. h counts
    relative to its mean in the group; a group without any h counts every weight alike. With one candidate nothing is
    searched: weighted least squares at the threshold ``lowest``, at a tenth of the time.

    Raises:
        ConfigError: a grid that is neither {-1, 0, 1} nor {-1, 1}: the loss is that of ternary codes.
    """

    name: ClassVar[str] = "saliency"
    lowest: float = 0.4
    width: float = 0.05
    candidates: int = 17
    eps: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("lowest", "width", "candidates", "eps")

    def check_grid(self, grid: Grid) -> None:
        if grid.values not in (BINARY.values, TERNARY.values):
            raise ConfigError(f"scale rule 'saliency' is for binary and ternary, not {grid.name}; use 'gaussian'")

    def scales(self, w_RGN: Tensor, grid: Grid, held: Tensor) -> Scales:
        mean = held.mean(dim=-1, keepdim=True)
        h = torch.where(mean > 0, held / mean.clamp_min(torch.finfo(held.dtype).tiny), 1.0)
        magnitude = w_RGN.abs()
        size = magnitude.mean(dim=-1, keepdim=True) + self.eps
        step = 2.0 * size * self.lowest
        if self.candidates > 1:
            step = step + 2.0 * size * self.width * self._best(magnitude, size, h)
        return Scales(step, best_level(w_RGN, grid.round(w_RGN / step), step, h))

    def _best(self, magnitude: Tensor, size: Tensor, h: Tensor) -> Tensor:
        """k of the best threshold of every group."""
        # interval k holds t_(k-1) < |w| <= t_k, so weights of interval k + 1 and above survive threshold k
        place = ((magnitude / size - self.lowest) / self.width).ceil_().clamp_(0, self.candidates)
        place = place.nan_to_num_().long()  # NaN is no index; step and level keep it for a guard to name
        empty = magnitude.new_zeros(*magnitude.shape[:-1], self.candidates + 1)
        b = _from_the_top(empty.scatter_add(-1, place, h))[..., 1:]
        a = _from_the_top(empty.scatter_add(-1, place, h * magnitude))[..., 1:]
        return (a * a / b.clamp_min(1e-30)).argmax(dim=-1, keepdim=True)


def _from_the_top(sums: Tensor) -> Tensor:
    return sums.flip(-1).cumsum(dim=-1).flip(-1)
