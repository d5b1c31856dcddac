"""QuantSpec: one choice of the equation's symbols, frozen, and its JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .estimators import STE, Estimator
from .grids import TERNARY, Grid
from .grouping import GroupSize, check_group_size
from .scales import AbsMean, ScaleRule


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """Grid C, groups, scale rule s and estimator Q_tau of one weight matrix.

    Raises:
        ConfigError: an impossible group size.
    """

    grid: Grid = TERNARY
    group_size: GroupSize = "row"
    scale: ScaleRule = field(default_factory=AbsMean)
    estimator: Estimator = field(default_factory=STE)

    def __post_init__(self) -> None:
        check_group_size(self.group_size)

    def to_json(self) -> dict[str, Any]:
        """A JSON object; ``from_json`` is its inverse."""
        return {
            "levels": list(self.grid.values),
            "group_size": self.group_size,
            "scale": self.scale.to_json(),
            "estimator": self.estimator.to_json(),
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> QuantSpec:
        """The inverse of ``to_json``.

        Raises:
            ConfigError: an unknown scale rule or estimator, or a bad value.
        """
        return cls(
            grid=Grid.of(record["levels"]),
            group_size=record["group_size"],
            scale=ScaleRule.from_json(record["scale"]),
            estimator=Estimator.from_json(record["estimator"]),
        )
