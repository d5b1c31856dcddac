"""One backward pass for all tensors, one gradient alive at a time: what first-order estimators share."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...errors import CalibrationError
from .base import Forward, Problem, Row, quantity


def checked_logits(forward: Forward, ids: Tensor) -> Tensor:
    """Logits [1, T, V] of one sequence.

    Raises:
        CalibrationError: of another shape, or without gradient.
    """
    logits = forward(ids[None])
    if logits.dim() != 3 or logits.shape[:2] != (1, ids.numel()):
        raise CalibrationError(f"forward must return logits [1, {ids.numel()}, vocabulary], got {list(logits.shape)}")
    if not logits.requires_grad:
        raise CalibrationError("the logits carry no gradient: forward must not run under no_grad or detach them")
    return logits


def send_back(problem: Problem, logits: Tensor, cotangents: Tensor, positions: int) -> Row:
    """g_i = sum_t J_t' r_t of every tensor, and the samples that follow from it.

        trace = ||g||^2 / N      quadratic = <g, dW>^2 / N      delta_loss = sum |g dW| / sqrt(N)

    Args:
        problem: weights, candidates, diagonals.
        logits: [1, T, V] with their graph.
        cotangents: r, same shape.
        positions: N.
    """
    row: Row = {}
    weights = problem.weights
    # one zero for all, made beforehand: a new one a gradient would pin the heap above each freed gradient
    consume = partial(_consume, problem, row, positions, logits.new_zeros(()))
    handles = [weight.register_hook(partial(consume, path)) for path, weight in weights.items()]
    try:
        torch.autograd.grad(logits, list(weights.values()), grad_outputs=cotangents, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return row


def _consume(problem: Problem, row: Row, positions: int, zero: Tensor, path: str, gradient: Tensor) -> Tensor:
    """Note the numbers; a view of one zero takes the gradient's place, so that only one gradient is alive at a time."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    samples = {"trace": float(torch.linalg.vector_norm(gradient, dtype=wide)) ** 2 / positions}
    for label, signed, absolute in problem.candidates.products(path, problem.weights[path], gradient):
        samples[quantity("quadratic", label)] = signed**2 / positions
        samples[quantity("delta_loss", label)] = absolute / positions**0.5
    if problem.diagonals is not None:
        problem.diagonals.add(path, gradient, positions)
    row[path] = samples
    return zero.to(gradient).expand_as(gradient)
