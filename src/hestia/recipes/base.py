"""What a recipe is: one choice of the equation's symbols for every bit width it knows, and a schedule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..errors import ConfigError
from ..quant import BINARY, INT2, TERNARY, Grid, GroupSize, QuantSpec
from ..quant.family import Member
from ..schedules import KnobSchedule

GRIDS: dict[float, Grid] = {1.0: BINARY, 1.58: TERNARY, 2.0: INT2}
"""Bit width as people write it -> grid."""


@dataclass(frozen=True, kw_only=True)
class Recipe(Member, ABC):
    """One method in one file: a frozen dataclass whose fields are its options.

    Subclass it in a module of this folder, or in a package that lists the module under the entry-point group
    ``hestia.recipes``; give it a ``name`` and a docstring with paper, equation and deviations. Nothing else needs
    to be edited: command line, docs and the conformance suite discover it.
    """

    family: ClassVar[str] = "recipe"

    trains: ClassVar[bool] = True
    """False where rounding is all there is."""

    widths: ClassVar[tuple[float, ...]] = (1.58,)
    """Bit widths ``spec_for`` answers, keys of ``GRIDS``."""

    def spec_for(self, bits: float, group_size: GroupSize) -> QuantSpec:
        """Grid, scale rule and estimator for a width.

        Raises:
            ConfigError: a width this recipe does not do; those it does are named.
        """
        if bits not in self.widths:
            raise ConfigError(f"recipe {self.name!r} does not do {bits:g} bits; it does {_listed(self.widths)}")
        return self._spec(GRIDS[bits], group_size)

    @abstractmethod
    def _spec(self, grid: Grid, group_size: GroupSize) -> QuantSpec:
        """The quantizer of one weight on ``grid``."""

    @abstractmethod
    def schedule(self) -> KnobSchedule:
        """Pressure and temperature over training."""

    def temperature_factors(self, traces: Mapping[str, float]) -> dict[str, float]:
        """Module path -> factor on the base temperature, from curvature; empty where the recipe ignores it."""
        return {}


def _listed(widths: tuple[float, ...]) -> str:
    return ", ".join(f"{w:g}" for w in widths)
