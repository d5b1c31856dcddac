"""The paper's equations as they stand there: no care for overflow, memory or speed. Use float64 and a moderate tau.

pi(q|z) = softmax_q(-(z - q)^2 / tau),   H = s sum_q q pi(q|z),   s = mean|w| + 1e-5 over the group, detached
"""

import torch
from torch import Tensor


def probabilities(z: Tensor, levels: tuple[float, ...], tau: float) -> Tensor:
    """The whole table pi(q|z), ``[..., levels]``."""
    q = torch.tensor(levels, dtype=z.dtype)
    return torch.softmax(-(z.unsqueeze(-1) - q).square() / tau, dim=-1)


def relaxed(z: Tensor, levels: tuple[float, ...], tau: float) -> Tensor:
    """Q_tau(z), differentiable by autograd."""
    return (probabilities(z, levels, tau) * torch.tensor(levels, dtype=z.dtype)).sum(-1)


def variance(z: Tensor, levels: tuple[float, ...], tau: float) -> Tensor:
    """Var_pi(q), as a sum over pairs of levels, in which nothing cancels."""
    p, q = probabilities(z, levels, tau), torch.tensor(levels, dtype=z.dtype)
    pairs = p.unsqueeze(-1) * p.unsqueeze(-2) * (q.unsqueeze(-1) - q).square()
    return 0.5 * pairs.sum((-1, -2))


def absmean(w: Tensor, group: int) -> Tensor:
    """mean|w| + 1e-5 of every ``group`` consecutive weights, at every weight; same shape as ``w``."""
    blocks = w.detach().reshape(-1, group)
    return (blocks.abs().mean(1, keepdim=True) + 1e-5).expand_as(blocks).reshape(w.shape)


def surrogate(w: Tensor, levels: tuple[float, ...], group: int, tau: float, pressure: float) -> Tensor:
    """(1 - lambda) w + lambda s Q_tau(w / s)."""
    s = absmean(w, group)
    return (1 - pressure) * w + pressure * s * relaxed(w / s, levels, tau)
