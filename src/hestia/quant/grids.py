"""C, the grid: the levels a weight may take, in units of its scale.

A grid holds integers, because integers are what files store. A list of levels that is not integral is
accepted when a power of two turns it into integers; that power then moves into the scale, exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError

_NAMES = {
    (-1, 1): "binary",
    (-1, 0, 1): "ternary",
    (-2, -1, 0, 1): "int2",
    tuple(range(-4, 4)): "int3",
    tuple(range(-8, 8)): "int4",
}


@dataclass(frozen=True)
class Grid:
    """The allowed levels ``unit * levels`` in ascending order.

    Args:
        levels: distinct integers in [-128, 127], ascending: the codes that files store.
        unit: power of two that multiplies every level (1 unless the grid was given as fractions).
        block: consecutive weights of which exactly one, the smallest, is zero and no other is (Sherry's 3:4 is
            ``block=4`` on the ternary grid); 0 for no such constraint.

    Raises:
        ConfigError: fewer than two levels, levels out of order or out of int8, or a block on another grid than
            {-1, 0, 1}.
    """

    levels: tuple[int, ...]
    unit: float = 1.0
    block: int = 0

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.levels, self.levels[1:], strict=False))
        if len(self.levels) < 2 or not ascending:
            raise ConfigError(f"a grid needs at least two ascending, distinct levels, got {list(self.levels)}")
        if self.levels[0] < -128 or self.levels[-1] > 127:
            raise ConfigError(f"levels must fit int8 [-128, 127], got {list(self.levels)}")
        if math.frexp(self.unit)[0] != 0.5:
            raise ConfigError(f"a grid's unit must be a power of two, got {self.unit}")
        if self.block and (self.block < 2 or self.values != (-1.0, 0.0, 1.0)):
            raise ConfigError(f"one zero in {self.block} weights is defined on -1, 0, 1, got {list(self.values)}")

    @classmethod
    def of(cls, levels: list[float] | tuple[float, ...]) -> Grid:
        """The grid of any list of levels whose common step is a power of two, such as ``[-1.5, -0.5, 0.5, 1.5]``.

        Raises:
            ConfigError: levels that are not finite or that share no power-of-two step down to 2**-7.
        """
        if not all(math.isfinite(v) for v in levels):
            raise ConfigError(f"grid levels must be finite, got {list(levels)}")
        ordered = sorted({float(v) for v in levels})
        for exponent in range(8):
            scaled = [v * 2**exponent for v in ordered]
            if all(v == int(v) for v in scaled):
                return cls(tuple(int(v) for v in scaled), unit=2.0**-exponent)
        raise ConfigError(
            f"grid levels {list(levels)} have no common power-of-two step: integer codes cannot store them. "
            "Use integers, or halves, quarters, ... of them, and let the scale carry the rest."
        )

    @property
    def name(self) -> str:
        """``binary``, ``ternary``, ``int2``, ``int3``, ``int4``, ``ternary 3:4``, or the levels themselves."""
        if self.block:
            return f"ternary {self.block - 1}:{self.block}"
        if self.unit == 1.0 and self.levels in _NAMES:
            return _NAMES[self.levels]
        return "[" + ", ".join(f"{v * self.unit:g}" for v in self.levels) + "]"

    @property
    def bits(self) -> float:
        """Information per weight, ``log2(number of levels)``: 1.585 for ternary, 1.25 for ternary 3:4."""
        if self.block:
            return (math.log2(self.block) + self.block - 1) / self.block
        return math.log2(len(self.levels))

    @property
    def values(self) -> tuple[float, ...]:
        """The levels as numbers, ``unit * levels``."""
        return tuple(v * self.unit for v in self.levels)

    @property
    def max_abs(self) -> float:
        """The largest magnitude on the grid."""
        return max(abs(self.values[0]), abs(self.values[-1]))

    @property
    def distance(self) -> float | None:
        """Between neighbouring levels; None where it is not the same everywhere."""
        values = self.values
        for low, high in zip(values, values[1:], strict=False):  # a plain loop: see below
            if high - low != values[1] - values[0]:
                return None
        return values[1] - values[0]

    @property
    def largest_odd_factor(self) -> int:
        """The largest odd factor of a level: 1 up to 2 bits, 3 on -4 .. 3, 7 on -8 .. 7."""
        largest = 1  # a plain loop, because a compiler that traces through here knows no max() of a generator
        for level in self.levels:
            odd = abs(level)
            while odd and odd % 2 == 0:
                odd //= 2
            largest = odd if odd > largest else largest
        return largest

    @property
    def is_ternary(self) -> bool:
        """Whether this is {-1, 0, 1}, for which the softmax has a closed form."""
        return self.values == (-1.0, 0.0, 1.0)

    def round(self, z: Tensor) -> Tensor:
        """The nearest grid value of every element of ``z``, in the dtype of ``z``.

        Consecutive integers round half to even, as the paper's ``clip(round(z))`` does; on other grids a
        tie goes to the lower level. NaN stays NaN. With a block the last dimension is cut into blocks.
        """
        if self.block:
            return self._round_blocks(z)
        first, last = self.levels[0], self.levels[-1]
        if last - first == len(self.levels) - 1:
            if self.unit == 1.0:
                return torch.round(z).clamp_(first, last)
            return torch.round(z / self.unit).clamp_(first, last).mul_(self.unit)
        values = self.values
        out = torch.full_like(z, values[0])
        for low, high in zip(values, values[1:], strict=False):
            out = out + (high - low) * (z > 0.5 * (low + high))
        return torch.where(z.isnan(), z, out)

    def _round_blocks(self, z: Tensor) -> Tensor:
        """0 for the first smallest magnitude of every block, the sign (of 0: plus) for all others."""
        magnitude = z.abs().unflatten(-1, (-1, self.block))
        smallest = magnitude == magnitude.amin(dim=-1, keepdim=True)
        dropped = (smallest & (smallest.cumsum(dim=-1) == 1)).flatten(-2)
        signs = torch.where(z < 0, -1.0, 1.0).to(z.dtype).masked_fill_(dropped, 0.0)
        return torch.where(z.isnan(), z, signs)


BINARY = Grid((-1, 1))
TERNARY = Grid((-1, 0, 1))
INT2 = Grid((-2, -1, 0, 1))
INT3 = Grid(tuple(range(-4, 4)))
INT4 = Grid(tuple(range(-8, 8)))
