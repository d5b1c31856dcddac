"""XTrace: Hutch++ in which every test vector serves as probe for the sketch made of the others.

    Y = A Omega = Q R                      Omega: n x s random signs, s products
    Q_(i) = orth(Y without column i)       P_i = Q_(i) Q_(i)'
    t_i = tr(Q_(i)' A Q_(i)) + w_i' (I - P_i) A (I - P_i) w_i           tr(A) = E mean_i t_i

The downdate avoids s factorisations: P_i = Q (I - s_i s_i') Q' with s_i the normalised i-th column of R^-T. With
H = Q' A Q (s more products), W = Q' Omega and, A being symmetric, Q' A Omega = R:

    x_i = W_i - s_i <s_i, W_i>             t_i = tr(H) - s_i' H s_i + <W_i, R_i> - 2 <x_i, R_i> + x_i' H x_i

Unbiased, exact where rank(A) < s, better than Hutch++ at equal products, signed. The spread of the t_i is reported as
``trace_error`` = sd(t_i) / sqrt(s), the sequence's own standard error; it is optimistic (0.81 to 0.88 of the truth
where that was known), and it knows nothing of other sequences.

Cost: 2 s products a tensor and sequence. Memory: 2 s + 3 vectors of the largest tensor's size beside the graphs of one
forward and one backward pass; Omega is drawn again where it is needed a second time.

Source: Epperly, Tropp, Webber 2024 (arXiv:2301.07825), section 2.1 and supplement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import ConfigError
from .base import CurvatureEstimator, Problem, Row
from .draws import rademacher
from .hvp import Product, blocks, refuse_unless_twice_differentiable


@dataclass(frozen=True, kw_only=True)
class XTrace(CurvatureEstimator):
    """Trace of every tensor's Hessian block, tensor by tensor, with its own standard error.

    Args:
        vectors: s, test vectors; twice as many products.

    Raises:
        ConfigError: below 2, where nothing is left out.
    """

    name: ClassVar[str] = "xtrace"
    signed: ClassVar[bool] = True

    vectors: int = 10

    def __post_init__(self) -> None:
        if self.vectors < 2:
            raise ConfigError(f"xtrace wants vectors >= 2, got {self.vectors}")

    def prepare(self, problem: Problem, sequences: Tensor) -> Problem:
        refuse_unless_twice_differentiable(problem, self.name)
        return problem

    def sample(self, problem: Problem, ids: Tensor) -> Row:
        row: Row = {}
        for path, product, weight, draws in blocks(problem, ids):
            trace, error = xtrace(product, weight, self.vectors, draws)
            row[path] = {"trace": trace, "trace_error": error}
        return row


@torch.no_grad()
def xtrace(product: Product, like: Tensor, vectors: int, draws: torch.Generator) -> tuple[float, float]:
    """(trace, its standard error) of the symmetric matrix behind ``product``, from 2 ``vectors`` products.

    Args:
        product: v -> A v; vectors have the shape, dtype and place of ``like``.
        like: decides n = ``like.numel()``.
        vectors: s, capped at n.
        draws: random numbers.
    """
    n, s = like.numel(), min(vectors, like.numel())
    state = draws.get_state()
    y_ns = like.new_empty(n, s)
    for j in range(s):
        y_ns[:, j] = product(rademacher(like, draws)).view(-1)
    q_ns, r_SS = torch.linalg.qr(y_ns)
    del y_ns
    w_SS, h_SS = torch.empty_like(r_SS), torch.empty_like(r_SS)
    draws.set_state(state)
    for j in range(s):
        w_SS[:, j] = q_ns.T @ rademacher(like, draws).view(-1)
        h_SS[:, j] = q_ns.T @ product(q_ns[:, j].reshape(like.shape)).view(-1)
    w_SS, h_SS, r_SS = w_SS.double(), h_SS.double(), r_SS.double()
    h_SS = 0.5 * (h_SS + h_SS.T)
    left_SS = _left_out(r_SS, torch.finfo(like.dtype).eps)
    x_SS = w_SS - left_SS * (left_SS * w_SS).sum(0)
    estimates = (
        torch.trace(h_SS)
        - (left_SS * (h_SS @ left_SS)).sum(0)
        + (w_SS * r_SS).sum(0)
        - 2.0 * (x_SS * r_SS).sum(0)
        + (x_SS * (h_SS @ x_SS)).sum(0)
    )
    error = float(estimates.std()) / s**0.5 if s > 1 else 0.0
    return float(estimates.mean()), error


def _left_out(r_SS: Tensor, eps: float) -> Tensor:
    """s_i as columns: the unit vectors orthogonal to all columns of R but the i-th, in Q's coordinates.

    A matrix of rank below s leaves R singular. Then any such vector will do, since the other columns already span A's
    range; a diagonal held above rounding makes the solve give one.
    """
    largest = r_SS.abs().max()
    if not float(largest) > 0.0:
        return torch.eye(len(r_SS), dtype=r_SS.dtype, device=r_SS.device)
    diagonal = r_SS.diagonal()
    floor = eps * largest
    held = torch.where(diagonal.abs() < floor, floor, diagonal)
    system = r_SS - torch.diag(diagonal) + torch.diag(held)
    eye = torch.eye(len(r_SS), dtype=r_SS.dtype, device=r_SS.device)
    inverse_transposed = torch.linalg.solve_triangular(system.T, eye, upper=False)
    return inverse_transposed / inverse_transposed.norm(dim=0)
