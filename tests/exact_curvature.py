"""Exact curvature of models small enough for it: the second opinion of every estimator's test."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

Logits = Callable[[Tensor], Tensor]
"""Token ids [1, T] -> logits [1, T, V]."""


def tiny_llama(seed: int = 0, *, tied: bool = False, scale: float = 0.4, **more: object) -> LlamaForCausalLM:
    """Two layers, 8 wide, grouped queries, fp64: 1,100 weights in 15 tensors, some with a negative Hessian trace."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=12,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=scale,
        tie_word_embeddings=tied,
        **more,
    )
    return LlamaForCausalLM(config).double().eval()


def linears(model: nn.Module) -> dict[str, nn.Parameter]:
    """Module path -> weight of every linear layer."""
    return {path: module.weight for path, module in model.named_modules() if isinstance(module, nn.Linear)}


def logits_of(model: nn.Module) -> Logits:
    """``model(input_ids=ids).logits``."""
    return lambda ids: model(input_ids=ids).logits


def hessian_blocks(forward: Logits, weights: Mapping[str, nn.Parameter], ids: Tensor) -> dict[str, Tensor]:
    """H_i [n, n] of the mean cross entropy of one sequence, one row a unit vector."""
    with sdpa_kernel(SDPBackend.MATH):
        logits = forward(ids[None])[0, :-1]
    loss = -torch.log_softmax(logits, -1).gather(-1, ids[1:, None]).mean()
    blocks = {}
    for path, weight in weights.items():
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        units = torch.eye(weight.numel(), dtype=weight.dtype).view(-1, *weight.shape)
        rows = [torch.autograd.grad(gradient, weight, unit, retain_graph=True)[0].flatten() for unit in units]
        blocks[path] = torch.stack(rows)
    return blocks


def gauss_newton_blocks(forward: Logits, weights: Mapping[str, nn.Parameter], ids: Tensor) -> dict[str, Tensor]:
    """G_i [n, n] from the full Jacobian: 1/N sum_t J_t' (diag(p_t) - p_t p_t') J_t."""
    logits = forward(ids[None])[0, :-1]
    p_TV = torch.softmax(logits.detach(), -1)
    middle_TVV = torch.diag_embed(p_TV) - p_TV[:, :, None] * p_TV[:, None, :]
    every = torch.eye(logits.numel(), dtype=logits.dtype).view(-1, *logits.shape)
    jacobians = torch.autograd.grad(logits, list(weights.values()), grad_outputs=every, is_grads_batched=True)
    blocks = {}
    for path, jacobian in zip(weights, jacobians, strict=True):
        j_TVn = jacobian.reshape(*logits.shape, -1)
        blocks[path] = torch.einsum("tvn,tvu,tum->nm", j_TVn, middle_TVV, j_TVn) / len(logits)
    return blocks


def assert_mean_is(draws: Mapping[str, list[float]], truth: Mapping[str, float], power: Mapping[str, float]) -> None:
    """Every tensor's mean within 4 standard errors, and those errors small beside ``power``, a scale of the tensor."""
    assert draws.keys() == truth.keys()
    for path, column in draws.items():
        values = torch.tensor(column, dtype=torch.float64)
        error = float(values.std()) / len(values) ** 0.5
        assert error < power[path], f"{path}: standard error {error:.3g} against {power[path]:.3g}: no power"
        assert abs(float(values.mean()) - truth[path]) < 4 * error, path
