"""Products with a tensor's Hessian or Gauss-Newton block, by differentiating twice: what second-order estimators share.

    L(x)   = (1/N) sum_t -log p_t[x_{t+1}]              mean cross entropy of one sequence, N scored positions
    H v    = d/dW <dL/dW, v>                            the graph of the gradient, sent backwards again
    G v    = (1/N) J' B J v,   B_t = diag(p_t) - p_t p_t'   J v by differentiating u -> J' u, which is linear, once more

Fused attention has no second derivative, so the forward pass runs inside ``sdpa_kernel(MATH)`` and models whose kernel
cannot be switched that way are refused. A weight that the model uses twice (tied) is one variable: both uses and their
cross terms are in its block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...errors import CalibrationError
from .backward import checked_logits
from .base import Problem
from .draws import generator

Product = Callable[[Tensor], Tensor]
"""A symmetric matrix as what it does to a vector; vectors have the shape of the weight."""

DIFFERENTIABLE_TWICE = ("eager", "sdpa")
"""Attention implementations of transformers whose second derivative exists, sdpa inside ``sdpa_kernel(MATH)``."""


def refuse_unless_twice_differentiable(problem: Problem, estimator: str) -> None:
    """Refuse what has no trustworthy second derivative, before any work.

    Raises:
        CalibrationError: a flash or flex attention kernel, or weights narrower than fp32.
    """
    kernel = getattr(getattr(problem.model, "config", None), "_attn_implementation", None)
    if kernel is not None and kernel not in DIFFERENTIABLE_TWICE:
        raise CalibrationError(
            f"the estimator {estimator!r} differentiates twice, and the model's attention {kernel!r} has no second "
            f"derivative; load the model with attn_implementation {' or '.join(map(repr, DIFFERENTIABLE_TWICE))}, "
            "or use a first-order estimator (gnb, fisher, kl)"
        )
    for name, parameter in problem.model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype not in (torch.float32, torch.float64):
            raise CalibrationError(
                f"the estimator {estimator!r} differentiates twice, which needs fp32 or fp64 weights, and {name} is "
                f"{parameter.dtype}: cancellation would leave nothing of the result; call model.float() first, or use "
                "a first-order estimator (gnb, fisher, kl)"
            )


class Curvature:
    """One sequence's loss with its graph, and products with the blocks of the matrices that follow from it.

    Memory: the graph of one forward pass (attention weights included: MATH keeps them), one gradient a tensor asked
    for, and the graph of that gradient, about as large as the forward one again.

    Args:
        problem: model, weights.
        ids: one sequence [T].

    Raises:
        CalibrationError: logits of another shape, without gradient or not finite.
    """

    def __init__(self, problem: Problem, ids: Tensor) -> None:
        with sdpa_kernel(SDPBackend.MATH):
            self.logits = checked_logits(problem.forward, ids)[0, :-1]
        if not bool(self.logits.isfinite().all()):
            raise CalibrationError("the model's logits are not finite on the calibration text")
        self.labels = ids[1:].long()
        if problem.counted is not None:
            self.logits, self.labels = self.logits[problem.counted], self.labels[problem.counted]

    @cached_property
    def loss(self) -> Tensor:
        """Mean cross entropy in nats; fp32 or fp64."""
        return nn.functional.cross_entropy(self.logits, self.labels)

    def hessian(self, weight: nn.Parameter) -> Product | None:
        """v -> H_i v of one tensor; None where the loss does not depend on it."""
        (gradient,) = _differentiate(self.loss, [weight], create_graph=True)
        if gradient is None:
            return None
        if not gradient.requires_grad:  # the loss is linear in this tensor
            return torch.zeros_like

        def product(v: Tensor) -> Tensor:
            (out,) = _differentiate(gradient, [weight], grad_outputs=v)
            return torch.zeros_like(v) if out is None else out

        return product

    def joint_hessian(self, weights: Mapping[str, nn.Parameter]) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
        """v -> (H v)_i for all tensors at once, cross blocks included; tensors without influence are left out."""
        found = _differentiate(self.loss, list(weights.values()), create_graph=True)
        gradients = {path: g for path, g in zip(weights, found, strict=True) if g is not None}
        curved = {path: g for path, g in gradients.items() if g.requires_grad}

        def product(vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            inner = [weights[path] for path in gradients]
            outs: Sequence[Tensor | None] = [None] * len(inner)
            if curved:
                outs = _differentiate(list(curved.values()), inner, grad_outputs=[vectors[path] for path in curved])
            pairs = zip(gradients, inner, outs, strict=True)
            return {path: torch.zeros_like(weight) if out is None else out for path, weight, out in pairs}

        return product

    def gauss_newton(self, weight: nn.Parameter) -> Product | None:
        """v -> G_i v of one tensor, the same matrix as the trace of ``gnb``; None where the logits do not need it."""
        dummy = torch.zeros_like(self.logits, requires_grad=True)
        (pulled,) = _differentiate(self.logits, [weight], grad_outputs=dummy, create_graph=True)
        if pulled is None:
            return None
        p = torch.softmax(self.logits.detach(), dim=-1)

        def product(v: Tensor) -> Tensor:
            (pushed,) = _differentiate(pulled, [dummy], grad_outputs=v)
            assert pushed is not None
            cotangent = p * (pushed - (p * pushed).sum(-1, keepdim=True)) / len(p)
            (out,) = _differentiate(self.logits, [weight], grad_outputs=cotangent)
            assert out is not None
            return out

        return product


def _differentiate(
    outputs: Tensor | Sequence[Tensor],
    inputs: Sequence[Tensor],
    *,
    grad_outputs: Tensor | Sequence[Tensor] | None = None,
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad`` that keeps the graph; a kernel without second derivative is named as the reason."""
    try:
        return torch.autograd.grad(
            outputs, inputs, grad_outputs=grad_outputs, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
    except RuntimeError as error:
        if "is not implemented" not in str(error):
            raise
        raise CalibrationError(
            f"part of the model has no second derivative ({error}); use a first-order estimator (gnb, fisher, kl)"
        ) from None


def blocks(
    problem: Problem, ids: Tensor, matrix: str = "hessian"
) -> Iterator[tuple[str, Product, Tensor, torch.Generator]]:
    """(path, v -> A v of its block, the weight, its random numbers) of every tensor that the loss depends on.

    Args:
        problem: model, weights, seed.
        ids: one sequence [T].
        matrix: ``hessian`` or ``gauss_newton``.
    """
    curvature = Curvature(problem, ids)
    block = curvature.hessian if matrix == "hessian" else curvature.gauss_newton
    for path, weight in problem.weights.items():
        product = block(weight)
        if product is not None:
            yield path, product, weight.detach(), generator(ids, problem.seed, path)
