"""Port ``correction``: what pulls a latent weight after the optimizer's step, apart from any gradient.

w <- w - lr strength(t) (w - w_hat)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..errors import ConfigError
from .family import Member


@dataclass(frozen=True)
class Correction(Member, ABC):
    """Base of all corrections, applied by the clock under ``no_grad`` after every optimizer step."""

    family: ClassVar[str] = "correction"

    @abstractmethod
    def active(self, t: float) -> bool:
        """Whether it does anything at t; where it does not, w_hat is not computed."""

    @abstractmethod
    def __call__(self, w: Tensor, w_hat: Tensor, state: Mapping[str, Any], lr: float, t: float) -> None:
        """Move ``w`` in place.

        Args:
            w: latent weight, after the step.
            w_hat: its hard quantized value, unsnapped; same shape.
            state: the optimizer's state of ``w``; empty if it keeps none.
            lr: the rate of this step.
            t: share of the run, in [0, 1].
        """


@dataclass(frozen=True)
class Pull(Correction):
    """CAGE's decoupled pull to the grid (arXiv:2510.18784): strength 0 up to ``start``, then a line up to ``strength``.

        w <- w - lr strength_t (w - w_hat),     strength_t = strength (t - start) / (1 - start)

    A pull of more than the whole gap (``lr * strength > 1``) stops at w_hat.

    Raises:
        ConfigError: a negative strength or a start outside [0, 1).
    """

    name: ClassVar[str] = "pull"
    strength: float = 10.0
    start: float = 0.8

    def __post_init__(self) -> None:
        if not self.strength >= 0.0 or not 0.0 <= self.start < 1.0:
            raise ConfigError(
                f"a pull needs strength >= 0 and 0 <= start < 1, got strength={self.strength}, start={self.start}"
            )

    def strength_at(self, t: float) -> float:
        """The factor on the learning rate at t."""
        return self.strength * max(0.0, min(t, 1.0) - self.start) / (1.0 - self.start)

    def active(self, t: float) -> bool:
        return self.strength_at(t) > 0.0

    def __call__(self, w: Tensor, w_hat: Tensor, state: Mapping[str, Any], lr: float, t: float) -> None:
        w.lerp_(w_hat, min(1.0, lr * self.strength_at(t)))
