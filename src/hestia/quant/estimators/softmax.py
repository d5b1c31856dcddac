"""Hestia's softmax relaxation of rounding (Wang et al. 2026, arXiv:2601.20745, section 4.1 and Lemma 4.1).

    pi(q|z) = exp(-(z - q)^2 / tau) / sum_q' exp(-(z - q')^2 / tau)
    Q_tau(z) = sum_q q pi(q|z)            dQ_tau/dz = (2 / tau) Var_pi(q)

On the ternary grid, with a = |z|, E = exp(-4a/tau), B = exp((1 - 2a)/tau), D = 1 + E + B:

    |Q_tau| = (1 - E) / D        Var = (B + B E + 4 E) / D^2

which is sinh(2z/tau) / (cosh(2z/tau) + exp(1/tau)/2) with the growing exponential divided out. Only B can overflow,
it stands in denominators, and 1/inf = 0 is the right limit. The variance is a sum of products over pairs of levels:
E[q^2] - E[q]^2 would cancel, and 2/tau would magnify the rounding error up to a million times.

tau = 0 is hard rounding forward and identity backward (the paper's last step).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..grids import Grid
from .base import Estimator

_TINY = 1e-30  # stands for tau = 0 inside divisions; the result is replaced there
_LARGEST_EXPONENT = 80.0  # exp(80) squared would overflow fp32, but it is only squared after a division


@dataclass(frozen=True)
class Softmax(Estimator):
    """The mean of a Boltzmann distribution over the grid at temperature tau (see the top of this file)."""

    name: ClassVar[str] = "softmax"
    differentiates_value: ClassVar[bool] = True
    needs_temperature: ClassVar[bool] = True

    def value(self, z: Tensor, grid: Grid, temperature: Tensor) -> Tensor:
        tau = temperature.clamp_min(_TINY)
        soft = _ternary_value(z, tau) if grid.is_ternary else _mean(z, grid, tau)
        return torch.where(temperature > 0, soft, grid.round(z))

    def gain(self, z: Tensor, grid: Grid, temperature: Tensor) -> Tensor:
        tau = temperature.clamp_min(_TINY)
        variance = _ternary_variance(z, tau) if grid.is_ternary else _variance(z, grid, tau)
        return torch.where(temperature > 0, variance * (2.0 / tau), 1.0)


def _ternary_value(z: Tensor, tau: Tensor) -> Tensor:
    a = z.abs()
    tail = torch.expm1(a * (-4.0 / tau))  # E - 1
    zero = torch.exp((1.0 - 2.0 * a) / tau)  # B
    return torch.copysign(-tail / (tail + 2.0 + zero), z)


def _ternary_variance(z: Tensor, tau: Tensor) -> Tensor:
    a = z.abs()
    far = torch.exp(a * (-4.0 / tau))
    zero = torch.exp(((1.0 - 2.0 * a) / tau).clamp_max(_LARGEST_EXPONENT))
    inverse = 1.0 / (1.0 + far + zero)
    return (zero * (1.0 + far) + 4.0 * far) * inverse * inverse


def _nearest_distance(z: Tensor, grid: Grid) -> Tensor:
    """Squared distance to the nearest level: subtracting it keeps every exponent at or below zero."""
    first, *rest = grid.values
    nearest = (z - first).square()
    for level in rest:
        nearest = torch.minimum(nearest, (z - level).square())
    return nearest


def _mean(z: Tensor, grid: Grid, tau: Tensor) -> Tensor:
    nearest = _nearest_distance(z, grid)
    total, weighted = torch.zeros_like(z), torch.zeros_like(z)
    for level in grid.values:
        p = torch.exp((nearest - (z - level).square()) / tau)
        total, weighted = total + p, weighted + level * p
    return weighted / total


def _variance(z: Tensor, grid: Grid, tau: Tensor) -> Tensor:
    nearest, mean = _nearest_distance(z, grid), _mean(z, grid, tau)
    total, weighted = torch.zeros_like(z), torch.zeros_like(z)
    for level in grid.values:
        p = torch.exp((nearest - (z - level).square()) / tau)
        total, weighted = total + p, weighted + p * (level - mean).square()
    return weighted / total
