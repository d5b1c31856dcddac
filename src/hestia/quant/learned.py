"""The equation with a learned scale: ``quantizer.py``'s forward pass, and a gradient for alpha in the backward pass.

d loss / d alpha = factor * lambda * sum over the group of (d loss / d w_hat) * slope
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .held import LearnedRule
from .spec import QuantSpec


class RelaxLearned(torch.autograd.Function):
    """(1 - p) w + p * level * Q(w / step), where step or level is the Parameter ``alpha [R, G, 1]``."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, pressure: Tensor, temperature: Tensor, spec: QuantSpec, alpha: Tensor) -> Tensor:
        step, level = spec.scales(w, alpha)
        ctx.save_for_backward(w, step, level, pressure, temperature)
        ctx.spec = spec
        q = spec.estimator.value(w / step, spec.grid, temperature)
        return q.mul_(pressure * level).addcmul_(w, 1.0 - pressure)

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
        if gain is not None:
            chain = pressure * (level / step) if estimator.differentiates_value else pressure
            grad = gain.mul(chain).add_(1.0 - pressure).mul_(grad)
        return grad, None, None, None, grad_alpha
