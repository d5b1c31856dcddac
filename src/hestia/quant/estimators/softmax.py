"""Hestia's softmax relaxation of rounding (Wang et al. 2026, arXiv:2601.20745, section 4.1 and Lemma 4.1).

    pi(q|z) = exp(-(z - q)^2 / tau) / sum_q' exp(-(z - q')^2 / tau)
    Q_tau(z) = sum_q q pi(q|z)            dQ_tau/dz = (2 / tau) Var_pi(q)

On the ternary grid, with u = exp(-2|z|/tau) and K = exp(1/tau),

    |Q_tau| = (1 - u)(1 + u) / (1 + K u + u^2)          1, K u and u^2 are the odds of sign(z), 0 and -sign(z)
    Var     = (K u + 4 u^2 + K u^3) / (1 + K u + u^2)^2

which is sinh(2|z|/tau) / (cosh(2|z|/tau) + K/2) with the growing exponential divided out,
and on any other grid, with n the level nearest to z and d = q - n,

    pi(q|z) ~ exp(d (2z - n - q) / tau)       Q_tau = n + E[d]        Var = E[d^2] - E[d]^2

Written so, nothing overflows and no variance cancels for any tau > 0: in the first form every term is positive; in the
second pi(n) >= 1/levels bounds what the subtraction can lose, Var >= pi(n) E[d^2]. This matters because 2/tau magnifies
every error of the variance, two million times at tau = 1e-6.

Options bound the gain, all off by default: gain' = clip(gain, floor, ceiling), and at tau = 0 the gradient of another
estimator, ``hard``, instead of the identity. The floor keeps saturated weights learning: 2/tau Var falls below 0.1 for
the 37 % largest Gaussian weights at tau = 0.3 and for 82 % of all at 0.05.

tau = 0 is hard rounding forward and identity backward (the paper's last step). It costs no extra pass over the weights:
the forward pass at a vanishing tau is hard rounding, ties included, and the backward pass switches two 0-d factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import ConfigError
from ..grids import Grid
from .base import Estimator

_VANISHING = 2.0**-100  # stands for tau = 0; a power of two, so z/tau is exact and a tie stays a tie

# Exponents are clamped where a level's share is below e^-40 = 4e-18 and changes no result, not even in fp64. Without it
# they would run into subnormal numbers, which CPUs compute fifty times slower, here and wherever the gradient is used.
_LARGEST_LOG_K = 40.0
_LARGEST_X = 80.0
_SMALLEST_SHARE = -40.0


@dataclass(frozen=True)
class Softmax(Estimator):
    """The mean of a Boltzmann distribution over the grid at temperature tau (see the top of this file).

    Attributes:
        floor: least gain; 0 leaves the derivative as it is.
        ceiling: largest gain; None leaves it as it is.
        hard: name of the estimator whose gain is used at tau = 0.

    Raises:
        ConfigError: a floor or ceiling out of order, or an unknown ``hard``.
    """

    name: ClassVar[str] = "softmax"
    differentiates_value: ClassVar[bool] = True
    floor: float = 0.0
    ceiling: float | None = None
    hard: str = "ste"

    def __post_init__(self) -> None:
        if not 0.0 <= self.floor <= (math.inf if self.ceiling is None else self.ceiling):
            raise ConfigError(f"softmax needs 0 <= floor <= ceiling, got floor={self.floor}, ceiling={self.ceiling}")
        if self.hard != "ste" and Estimator.make(self.hard).differentiates_value:
            raise ConfigError(f"softmax: the gain at temperature 0 must come from a hard estimator, got {self.hard!r}")

    def check_grid(self, grid: Grid) -> None:
        if self.hard != "ste":
            Estimator.make(self.hard).check_grid(grid)

    def value(self, z: Tensor, grid: Grid, temperature: Tensor) -> Tensor:
        inverse = 1.0 / temperature.clamp_min(_VANISHING)
        if grid.is_ternary:
            return _ternary_value(z, inverse)
        nearest = grid.round(z)
        total, first = torch.zeros_like(z), torch.zeros_like(z)
        for away, share in _shares(z, nearest, grid, inverse):
            total.add_(share)
            first.addcmul_(share, away)
        return first.div_(total).mul_(temperature > 0).add_(nearest)

    def gain(self, z: Tensor, grid: Grid, temperature: Tensor) -> Tensor:
        inverse = 1.0 / temperature.clamp_min(_VANISHING)
        hard = None if self.hard == "ste" else Estimator.make(self.hard).gain(z.clone(), grid, temperature)
        variance = _ternary_variance(z, inverse) if grid.is_ternary else _variance(z, grid, inverse)
        soft = (temperature > 0).to(z.dtype)
        gain = variance.mul_(2.0 * inverse * soft)
        if self.floor > 0.0 or self.ceiling is not None:
            gain = gain.clamp_(self.floor, self.ceiling).mul_(soft)
        return gain.add_(1.0 - soft) if hard is None else gain.addcmul_(hard, 1.0 - soft)


def _ternary_exponentials(z: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """``(u, K)``. Where K would pass e^40 it stays there, and x counts from where K u has fallen to e^40.

    Before that point z lies so deep in the dead zone that the levels +-1 share less than e^-40: u = 1, so Q = 0.
    """
    log_k = inverse.clamp_max(_LARGEST_LOG_K)
    return z.abs().mul_(-2.0 * inverse).add_(inverse - log_k).clamp_(-_LARGEST_X, 0.0).exp_(), log_k.exp()


def _ternary_value(z: Tensor, inverse: Tensor) -> Tensor:
    u, k = _ternary_exponentials(z, inverse)
    total = (u + k).mul_(u).add_(1.0)
    return (1.0 - u).mul_(u.add_(1.0)).div_(total).mul_(z.sign_())


def _ternary_variance(z: Tensor, inverse: Tensor) -> Tensor:
    u, k = _ternary_exponentials(z, inverse)
    total = (u + k).mul_(u).add_(1.0)
    # u (K + 4u + K u^2) by Horner's rule: u^2 alone would underflow
    return (u * k).add_(4.0).mul_(u).add_(k).mul_(u).div_(total.square_())


def _shares(z: Tensor, nearest: Tensor, grid: Grid, inverse: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For every level: how far it lies from the nearest one, and its probability as a share of that one's."""
    twice = 2.0 * z - nearest
    for level in grid.values:
        away = level - nearest
        yield away, (twice - level).mul_(away).mul_(inverse).clamp_(_SMALLEST_SHARE, 0.0).exp_()


def _variance(z: Tensor, grid: Grid, inverse: Tensor) -> Tensor:
    total, first, second = torch.zeros_like(z), torch.zeros_like(z), torch.zeros_like(z)
    for away, share in _shares(z, grid.round(z), grid, inverse):
        total.add_(share)
        first.addcmul_(share, away)
        second.addcmul_(share.mul_(away), away)
    first.div_(total)
    return second.div_(total).addcmul_(first, first, value=-1.0)
