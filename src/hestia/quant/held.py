"""Scale rules that hold something between steps: the base of ``learned.py`` and ``importance.py``.

A plain rule is a function of the weight. A learned rule also reads a Parameter, one number per group, and a weighted
rule a detached tensor, one number per weight. The layer owns that tensor (``nn/held.py``), training fills it,
``freeze`` and ``restore`` drop it. Rules stay frozen values without state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from .grids import Grid
from .scales import ScaleRule, Scales


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
