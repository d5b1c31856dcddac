"""s, the scale rule: one frozen dataclass a rule, from a grouped weight to its two scales.

    w_hat = level * Q(w / step)

Most rules have ``level == step``, the ``s`` of the equation. Rules that choose codes by one number and
rebuild the weight with another (least squares, TWN) return two. Both are detached: the paper differentiates
neither (Hestia, section 3; BitNet b1.58).

``snap`` then moves the level to a number that fp16, bf16 and fp32 all hold exactly, so every file format
stores the very same scale.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError
from .family import Member
from .grids import BINARY, INT2, INT3, INT4, TERNARY, Grid

SMALLEST_SCALE = 2.0**-14  # smallest normal fp16
LARGEST_SCALE = 65280.0  # largest bf16 that fp16 holds


class Scales(NamedTuple):
    """Two positive tensors ``[R, G, 1]``: ``step`` divides weights before rounding, ``level`` multiplies codes."""

    step: Tensor
    level: Tensor


def snap(scale: Tensor, grid: Grid | None = None) -> Tensor:
    """The nearest scale that is exact in fp16, bf16 and fp32, and with which every level of ``grid`` is exact too.

        s' = clamp(s to 8 - b significant bits, 2**-14, 65280)

    b bits more are what a product with the largest odd factor of a level needs: 0 up to 2 bits (-2 .. 1), 2 on -4 .. 3
    (the 3), 3 on -8 .. 7 (5 and 7). Relative change at most 2**(b - 8) inside the range; idempotent.
    """
    snapped = scale.to(torch.bfloat16).to(scale.dtype)
    odd = 1 if grid is None else grid.largest_odd_factor
    if odd > 1:
        mantissa, exponent = torch.frexp(scale)
        steps = 2.0 ** (8 - (odd - 1).bit_length())
        snapped = torch.ldexp(torch.round(mantissa * steps) / steps, exponent)
    return snapped.clamp(SMALLEST_SCALE, LARGEST_SCALE)


@dataclass(frozen=True)
class ScaleRule(Member, ABC):
    """Base of all scale rules: ``rule(w_RGN, grid) -> Scales``; reductions run over the last dimension.

    Raises:
        ConfigError: ``eps``, or another number that scales a step, is not positive.
    """

    family: ClassVar[str] = "scale rule"

    @property
    def refits(self) -> bool:
        """Whether training fits the level anew to the estimator's soft value: ``sum(Q w) / sum(Q^2)``."""
        return False

    def check_grid(self, grid: Grid) -> None:
        """Whether the rule suits ``grid``; any by default.

        Raises:
            ConfigError: it does not; the message says what would.
        """

    @abstractmethod
    def __call__(self, w_RGN: Tensor, grid: Grid) -> Scales:
        """Step and level of every group; same dtype as ``w_RGN``, always positive and finite for finite weights."""

    def step(self, w_RGN: Tensor, grid: Grid) -> Tensor:
        """The step alone, for training that fits the level itself."""
        return self(w_RGN, grid).step


@dataclass(frozen=True)
class AbsMean(ScaleRule):
    """``step = level = mean|w| + eps`` (BitNet b1.58, arXiv:2402.17764; Hestia, arXiv:2601.20745)."""

    name: ClassVar[str] = "absmean"
    eps: float = 1e-5

    def __post_init__(self) -> None:
        self.require_positive("eps")

    def __call__(self, w_RGN: Tensor, grid: Grid) -> Scales:
        s = w_RGN.abs().mean(dim=-1, keepdim=True) + self.eps
        return Scales(s, s)


@dataclass(frozen=True)
class AbsMax(ScaleRule):
    """``step = level = max|w| / max|C| + eps``: nothing is clipped on a symmetric grid."""

    name: ClassVar[str] = "absmax"
    eps: float = 1e-5

    def __post_init__(self) -> None:
        self.require_positive("eps")

    def __call__(self, w_RGN: Tensor, grid: Grid) -> Scales:
        s = w_RGN.abs().amax(dim=-1, keepdim=True) / grid.max_abs + self.eps
        return Scales(s, s)


@dataclass(frozen=True)
class FittedLevel(ScaleRule):
    """Base of the rules whose level rebuilds the weights best, whatever step chose the codes.

        q = Q(w / step),   level = sum(q w) / sum(q^2)

    A group without a non-zero code keeps ``level = step``. With ``soft`` training fits the level to the estimator's
    soft value, which becomes these codes as the temperature falls to 0; what is frozen is the same.
    """

    eps: float = 1e-5
    soft: bool = False

    def __post_init__(self) -> None:
        self.require_positive("eps")

    @property
    def refits(self) -> bool:
        return self.soft

    def __call__(self, w_RGN: Tensor, grid: Grid) -> Scales:
        step = self.step(w_RGN, grid)
        return Scales(step, best_level(w_RGN, grid.round(w_RGN / step), step))

    @abstractmethod
    def step(self, w_RGN: Tensor, grid: Grid) -> Tensor:
        """What the codes are chosen by."""


@dataclass(frozen=True)
class LeastSquares(FittedLevel):
    """Codes by absmean, then the level that reconstructs them best.

        step = mean|w| + eps,   q = Q(w / step),   level = sum(q w) / sum(q^2)

    For a Gaussian the relative squared error falls from 0.264 (absmean) to 0.213 with the same codes.
    """

    name: ClassVar[str] = "least_squares"

    def step(self, w_RGN: Tensor, grid: Grid) -> Tensor:
        return w_RGN.abs().mean(dim=-1, keepdim=True) + self.eps


@dataclass(frozen=True)
class TWN(FittedLevel):
    """Ternary weight networks (Li et al. 2016, arXiv:1605.04711, eq. 6).

        delta = factor * mean|w|,   q = sign(w) 1[|w| > delta],   level = mean of |w| where q != 0

    Written for any grid as ``step = 2 delta`` (a code leaves zero at half a step) and a least-squares level, which is
    that mean on the ternary grid.
    """

    name: ClassVar[str] = "twn"
    factor: float = 0.75

    def __post_init__(self) -> None:
        self.require_positive("factor", "eps")

    def step(self, w_RGN: Tensor, grid: Grid) -> Tensor:
        return 2.0 * self.factor * w_RGN.abs().mean(dim=-1, keepdim=True) + self.eps


@dataclass(frozen=True)
class RootMeanSquare(ScaleRule):
    """``step = level = clip rms(w) / max|C| + eps``: the grid ends at ``clip`` root mean squares (QuEST).

    The clips that round a Gaussian with the least squared error are 1.224 for {-1, 0, 1} and 0.798 for {-1, 1}
    (Panferov et al. 2025, arXiv:2502.05003).
    """

    name: ClassVar[str] = "rms"
    clip: float = 1.224
    eps: float = 1e-5

    def __post_init__(self) -> None:
        self.require_positive("clip", "eps")

    def __call__(self, w_RGN: Tensor, grid: Grid) -> Scales:
        largest = w_RGN.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(w_RGN.dtype).tiny)
        rms = largest * (w_RGN / largest).square().mean(dim=-1, keepdim=True).sqrt()  # a square alone could overflow
        s = self.clip / grid.max_abs * rms + self.eps
        return Scales(s, s)


_NORMAL_DEVIATION = math.sqrt(0.5 * math.pi)

NORMAL_STEPS = {
    BINARY.values: 1.0,  # any: only signs count
    TERNARY.values: 1.225,
    INT2.values: 1.05,
    INT3.values: 0.6,
    INT4.values: 0.34,
}
"""c(C) of ``Gaussian`` by grid: found by search over quantiles of the normal distribution, as its test does again."""


@dataclass(frozen=True)
class Gaussian(FittedLevel):
    """The step that suits the grid if the weights are normal, and the level that rebuilds these very weights best.

        step = c(C) sqrt(pi/2) mean|w| + eps,   c(C) = argmin_c E[(x - a Q(x / c))^2],   x ~ N(0, 1)
        level = sum(q w) / sum(q^2)             as a in c(C)

    sqrt(pi/2) mean|w| is the standard deviation of normal weights; it neither overflows nor hangs on a few large ones.
    Where absmean is far too coarse from 4 bits on (0.8 sigma against 0.34), this suits every width.
    Source: the MSE-optimal clipping of QuEST (arXiv:2502.05003), here with a refitted level.

    Raises:
        ConfigError: a grid whose c(C) is not in ``NORMAL_STEPS``.
    """

    name: ClassVar[str] = "gaussian"

    def check_grid(self, grid: Grid) -> None:
        if grid.values not in NORMAL_STEPS:
            raise ConfigError(f"scale rule 'gaussian' knows no step for the grid {grid.name}; use 'least_squares'")

    def step(self, w_RGN: Tensor, grid: Grid) -> Tensor:
        self.check_grid(grid)
        return NORMAL_STEPS[grid.values] * _NORMAL_DEVIATION * w_RGN.abs().mean(dim=-1, keepdim=True) + self.eps


def best_level(w_RGN: Tensor, q_RGN: Tensor, fallback: Tensor, h_RGN: Tensor | None = None) -> Tensor:
    """argmin_s sum h (w - s q)^2, kept positive; ``fallback`` where every code is zero; no ``h``: all count alike."""
    weighted = q_RGN if h_RGN is None else h_RGN * q_RGN
    power = (weighted * q_RGN).sum(dim=-1, keepdim=True)
    level = (weighted * w_RGN).sum(dim=-1, keepdim=True) / power.clamp_min(1e-30)
    return torch.where((power > 0) & (level > 0), level, fallback)
