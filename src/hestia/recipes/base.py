"""What a recipe is: one choice of the equation's symbols for every bit width it knows, and a schedule."""

from __future__ import annotations

import math
import types
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from ..errors import ConfigError, nearest
from ..quant import (
    BINARY,
    INT2,
    INT3,
    INT4,
    TERNARY,
    AbsMean,
    Correction,
    Gaussian,
    Grid,
    GroupSize,
    QuantSpec,
    ScaleRule,
)
from ..quant.family import Member
from ..schedules import KnobSchedule

GRIDS: dict[float, Grid] = {1.0: BINARY, 1.58: TERNARY, 2.0: INT2, 3.0: INT3, 4.0: INT4}
"""Bit width as people write it -> grid."""


def scale_for(grid: Grid) -> ScaleRule:
    """absmean up to three levels, as the ternary papers have it; beyond, where it is too coarse, gaussian."""
    return AbsMean() if len(grid.levels) <= 3 else Gaussian()


@dataclass(frozen=True, kw_only=True)
class Recipe(Member, ABC):
    """One method in one file: a frozen dataclass whose fields are its options.

    Subclass it in a module of this folder, or in a package that lists the module under the entry-point group
    ``hestia.recipes``; give it a ``name`` and a docstring with paper, equation and deviations. Nothing else needs
    to be edited: command line, docs and the conformance suite discover it. Every option has a default.

    Raises:
        ConfigError: an option of the wrong type, or one that schedule, correction, temperatures or quantizer refuse.
    """

    family: ClassVar[str] = "recipe"

    trains: ClassVar[bool] = True
    """False where rounding is all there is."""

    uses_curvature: ClassVar[bool] = False
    """Whether ``temperature_factors`` reads curvature, so that a run calibrates."""

    widths: ClassVar[tuple[float, ...]] = (1.58,)
    """Bit widths ``spec_for`` answers, keys of ``GRIDS``."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for item in fields(self):
            value, hint = getattr(self, item.name), hints[item.name]
            if not _fits(value, hint):
                where = f"recipe {self.name!r}: option {item.name}"
                if get_origin(hint) is Literal:
                    raise ConfigError(f"{where}: unknown {value!r}: {nearest(str(value), map(str, get_args(hint)))}")
                raise ConfigError(f"{where} wants {getattr(hint, '__name__', hint)}, got {value!r}")
        self.schedule()  # what these refuse is refused here, before anything is read or computed
        self.correction()
        self.temperature_factors({"one tensor": 1.0, "another": 2.0})
        for bits in self.widths:
            self._spec(GRIDS[bits], "row")

    def spec_for(self, bits: float, group_size: GroupSize) -> QuantSpec:
        """Grid, scale rule and estimator for a width.

        Raises:
            ConfigError: a width this recipe does not do; those it does are named.
        """
        if bits not in self.widths:
            raise ConfigError(f"recipe {self.name!r} does not do {bits:g} bits; it does {_listed(self.widths)}")
        return self._spec(GRIDS[bits], group_size)

    def mixed_spec(self, bits: float, group_size: GroupSize) -> QuantSpec:
        """``spec_for`` in a plan of several widths, where a recipe may leave what its paper does with one width.

        Raises:
            ConfigError: see ``spec_for``.
        """
        return self.spec_for(bits, group_size)

    @abstractmethod
    def _spec(self, grid: Grid, group_size: GroupSize) -> QuantSpec:
        """The quantizer of one weight on ``grid``."""

    @abstractmethod
    def schedule(self) -> KnobSchedule:
        """Pressure and temperature over training."""

    def correction(self) -> Correction | None:
        """What pulls the latent weights after every optimizer step; nothing by default."""
        return None

    def temperature_factors(self, traces: Mapping[str, float]) -> dict[str, float]:
        """Module path -> factor on the base temperature, from curvature; empty where the recipe ignores it."""
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether an option's value is of its declared type; a whole number is a float, infinity and NaN are not."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if isinstance(hint, types.UnionType):
        return any(_fits(value, kind) for kind in get_args(hint))
    if hint in (int, float):
        number = isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
        return number and math.isfinite(value)
    return not isinstance(hint, type) or isinstance(value, hint)


def _listed(widths: tuple[float, ...]) -> str:
    return ", ".join(f"{w:g}" for w in widths)
