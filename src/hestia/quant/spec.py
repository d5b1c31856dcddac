"""QuantSpec: one choice of the equation's symbols, frozen, and its JSON."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..errors import ConfigError
from .estimators import STE, Estimator
from .grids import TERNARY, Grid
from .grouping import GroupSize, check_group_size, group_shape
from .held import HeldRule
from .learned import LearnedRule
from .scales import AbsMean, ScaleRule, Scales
from .shifts import OutputShift


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """Grid C, groups, scale rule s, estimator Q_tau and output shift of one weight matrix.

    Raises:
        ConfigError: an impossible group size, a grid that scale rule or estimator does not suit, or one with blocks
            under an estimator that goes weight by weight.
    """

    grid: Grid = TERNARY
    group_size: GroupSize = "row"
    scale: ScaleRule = field(default_factory=AbsMean)
    estimator: Estimator = field(default_factory=STE)
    output_shift: OutputShift | None = None

    def __post_init__(self) -> None:
        check_group_size(self.group_size)
        self.scale.check_grid(self.grid)
        self.estimator.check_grid(self.grid)
        if self.grid.block and self.estimator.differentiates_value:
            raise ConfigError(
                f"{self.estimator.name} rounds weight by weight and cannot keep one zero in {self.grid.block}; use ste"
            )

    @property
    def learns(self) -> bool:
        """Whether the scale is a Parameter (port ``extra_parameters``)."""
        return isinstance(self.scale, LearnedRule)

    def scales(self, w_RGN: Tensor, held: Tensor | None = None) -> Scales:
        """Step and level of every group, ``[R, G, 1]``; ``held`` is what a ``HeldRule`` keeps between steps."""
        if held is None:
            return self.scale(w_RGN, self.grid)
        assert isinstance(self.scale, HeldRule)
        return self.scale.scales(w_RGN, self.grid, held)

    def check_shape(self, shape: tuple[int, int]) -> None:
        """Whether a weight of ``shape`` (out_features, in_features) can be cut into groups and blocks.

        Raises:
            ConfigError: it cannot; the message says what would fit.
        """
        group = group_shape(shape, self.group_size)[2]
        block = self.grid.block
        if block and (shape[1] % block or group % block):
            raise ConfigError(
                f"grid {self.grid.name} counts its zeros in blocks of {block}, which must divide "
                f"in_features={shape[1]} and the group ({group}). "
                f"Write 'row' or a multiple of {block}, or --skip the tensor."
            )

    def to_json(self) -> dict[str, Any]:
        """A JSON object; ``from_json`` is its inverse. What a spec does not have has no key."""
        record = {
            "levels": list(self.grid.values),
            "group_size": self.group_size,
            "scale": self.scale.to_json(),
            "estimator": self.estimator.to_json(),
        }
        if self.grid.block:
            record["block"] = self.grid.block
        if self.output_shift is not None:
            record["output_shift"] = self.output_shift.to_json()
        return record

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> QuantSpec:
        """The inverse of ``to_json``.

        Raises:
            ConfigError: an unknown scale rule or estimator, or a bad value.
        """
        shift = record.get("output_shift")
        return cls(
            grid=replace(Grid.of(record["levels"]), block=record.get("block", 0)),
            group_size=record["group_size"],
            scale=ScaleRule.from_json(record["scale"]),
            estimator=Estimator.from_json(record["estimator"]),
            output_shift=None if shift is None else OutputShift.from_json(shift),
        )
