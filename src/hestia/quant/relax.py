"""The equation and its gradient, once:

    w_hat       = (1 - lambda) w + lambda * level * Q_tau(w / step; C)
    d w_hat/d w = (1 - lambda) + lambda * gain * (level / step where the estimator differentiates its value, else 1)

``Relax`` takes step and level as constants; ``RelaxLearned`` also gives a learned one its gradient. Backward recomputes
the gain from ``w``, which autograd holds anyway as a parameter: no weight-sized tensor is saved beside it. Both passes
work in place on their own fresh tensors, because without a compiler every full pass over the weights is what costs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .estimators import Estimator
from .learned import LearnedRule
from .scales import best_level
from .spec import QuantSpec


class Relax(torch.autograd.Function):
    """The equation where no scale is learned: all but ``w`` is constant in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, w: Tensor, pressure: Tensor, temperature: Tensor, spec: QuantSpec, held: Tensor | None
    ) -> Tensor:
        if spec.scale.refits:
            step = spec.scale.step(w, spec.grid)  # a level of the hard codes would be thrown away
            q = spec.estimator.value(w / step, spec.grid, temperature)
            level = best_level(w, q, step)
        else:
            step, level = spec.scales(w, held)
            q = spec.estimator.value(w / step, spec.grid, temperature)
        ctx.save_for_backward(w, step, level, pressure, temperature)
        ctx.spec = spec
        return _blend(w, q, level, pressure)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        w, step, level, pressure, temperature = ctx.saved_tensors
        estimator = ctx.spec.estimator
        gain = estimator.gain(w / step, ctx.spec.grid, temperature)
        return _to_weight(grad, gain, estimator, step, level, pressure), None, None, None, None


class RelaxLearned(torch.autograd.Function):
    """The equation where step or level is the Parameter ``alpha [R, G, 1]``, with a gradient for it too."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, pressure: Tensor, temperature: Tensor, spec: QuantSpec, alpha: Tensor) -> Tensor:
        step, level = spec.scales(w, alpha)
        ctx.save_for_backward(w, step, level, pressure, temperature)
        ctx.spec = spec
        return _blend(w, spec.estimator.value(w / step, spec.grid, temperature), level, pressure)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        w, step, level, pressure, temperature = ctx.saved_tensors
        spec: QuantSpec = ctx.spec
        rule, grid, estimator = spec.scale, spec.grid, spec.estimator
        assert isinstance(rule, LearnedRule)
        q = estimator.value(w / step, grid, temperature)
        gain = estimator.gain(w / step, grid, temperature)
        slope = rule.slope(w / step, q, gain, grid)
        factor = pressure * rule.gradient_factor(w.numel(), grid)
        grad_alpha = factor * (grad * slope).sum(dim=-1, keepdim=True)
        return _to_weight(grad, gain, estimator, step, level, pressure), None, None, None, grad_alpha


def _blend(w: Tensor, q: Tensor, level: Tensor, pressure: Tensor) -> Tensor:
    """w_hat, in the memory of ``q``."""
    return q.mul_(pressure * level).addcmul_(w, 1.0 - pressure)


def _to_weight(
    grad: Tensor, gain: Tensor | None, estimator: Estimator, step: Tensor, level: Tensor, pressure: Tensor
) -> Tensor:
    """The gradient of ``w`` from that of ``w_hat``, in the memory of ``gain``; itself where the gain is 1."""
    if gain is None:
        return grad
    chain = pressure * (level / step) if estimator.differentiates_value else pressure
    return gain.mul_(chain).add_(1.0 - pressure).mul_(grad)
