"""Port ``importance``: scale rules that weigh every weight by a number that training hands over."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from .grids import BINARY, TERNARY, Grid
from .held import HeldRule
from .scales import Scales, best_level


@dataclass(frozen=True)
class WeightedRule(HeldRule, ABC):
    """A rule whose held tensor is an importance, one number per weight, from training: Adam's second moment.

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
class Saliency(WeightedRule):
    """The threshold and level that lose least, weighted by importance h (QUASAR, arXiv:2608.13966; ternary form).

        t_k = mean|w| (lowest + k width),   q_k = sign(w) 1[|w| > t_k],   k = 0 ... candidates - 1
        level_k = sum(h q_k w) / sum(h q_k^2),   k* = argmin_k sum h (level_k q_k - w)^2
        step = 2 t_k*,   level = level_k*

    The loss is ``sum h w^2 - A_k^2 / B_k`` with A_k = sum of h|w| and B_k = sum of h over ``|w| > t_k``: two sums a
    candidate, and no rounding. h counts relative to its mean in the group; a group without any h counts every weight
    alike. With one candidate nothing is searched: weighted least squares at the threshold ``lowest``, at a tenth of the
    time.

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
        place = place.nan_to_num_()  # NaN is no index; step and level keep it for a guard to name
        above = _above_in_one_pass if magnitude.device.type == "cpu" else _above_one_by_one
        b, a = above(place, h, self.candidates), above(place, h * magnitude, self.candidates)
        return (a * a / b.clamp_min(1e-30)).argmax(dim=-1, keepdim=True)


def _above_in_one_pass(place: Tensor, h: Tensor, candidates: int) -> Tensor:
    """Sum of ``h`` over ``place > k`` for every k, ``[R, G, candidates]``: by interval, then from the top down."""
    sums = h.new_zeros(*h.shape[:-1], candidates + 1).scatter_add(-1, place.long(), h)
    return sums.flip(-1).cumsum(dim=-1).flip(-1)[..., 1:]


def _above_one_by_one(place: Tensor, h: Tensor, candidates: int) -> Tensor:
    """The same in a pass for each k: a GPU scatters in any order, and another order may find another best k."""
    return torch.cat([h.where(place > k, 0.0).sum(dim=-1, keepdim=True) for k in range(candidates)], dim=-1)
