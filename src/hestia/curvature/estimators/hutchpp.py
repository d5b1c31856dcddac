"""Hutch++, as Hestia uses it: each tensor's Hessian trace, exactly on a sketched subspace and by probes off it.

    S: n x r random signs,   Q = orth(H S)                                   r products
    tr(H_i) = tr(Q' H Q) + (1/m) sum_j g_j' (I - QQ') H (I - QQ') g_j        r + m products; g_j random signs

The adaptive form: the subspace is chosen by looking at H. Unbiased, exact where rank(H_i) <= r, and its error is
relative to the nuclear norm of H_i, not to the trace: where positive and negative eigenvalues cancel it stays large,
so samples are signed and nothing is clipped.

Defaults are the published ones (rank 10, 20 probes: 40 products a tensor and sequence; 5 sequences of 512 tokens). This
is here to reproduce Hestia and to be measured against: ``gnb`` needs one backward pass where this needs 40 double ones
for every tensor. Deviations: probes are drawn anew for every sequence, and no estimate is clipped at 1e-12.

Memory: 2 r + 3 vectors of the largest tensor's size beside the graphs of one forward and one backward pass.

Sources: Meyer, Musco, Musco, Woodruff 2021 (arXiv:2010.09649), Algorithm 1; Hestia (arXiv:2601.20745).
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
class HutchPlusPlus(CurvatureEstimator):
    """Trace of every tensor's Hessian block, tensor by tensor.

    Args:
        rank: r, columns of the sketch.
        probes: m, random vectors off the sketch.

    Raises:
        ConfigError: either is below 1.
    """

    name: ClassVar[str] = "hutchpp"
    signed: ClassVar[bool] = True

    rank: int = 10
    probes: int = 20

    def __post_init__(self) -> None:
        if self.rank < 1 or self.probes < 1:
            raise ConfigError(f"hutchpp wants rank >= 1 and probes >= 1, got {self.rank} and {self.probes}")

    def prepare(self, problem: Problem, sequences: Tensor) -> Problem:
        refuse_unless_twice_differentiable(problem, self.name)
        return problem

    def sample(self, problem: Problem, ids: Tensor) -> Row:
        return {
            path: {"trace": hutchpp(product, weight, self.rank, self.probes, draws)}
            for path, product, weight, draws in blocks(problem, ids)
        }


@torch.no_grad()
def hutchpp(product: Product, like: Tensor, rank: int, probes: int, draws: torch.Generator) -> float:
    """Trace of the symmetric matrix behind ``product``, from 2 ``rank`` + ``probes`` products.

    Args:
        product: v -> A v; vectors have the shape, dtype and place of ``like``.
        like: decides n = ``like.numel()``.
        rank, probes: r, capped at n; m.
        draws: random numbers.
    """
    q_nr = basis(product, like, min(rank, like.numel()), draws)
    trace = sum(_form(product, column.view_as(like)) for column in q_nr.T)
    if q_nr.shape[0] == q_nr.shape[1]:
        return float(trace)  # nothing is left outside
    for _ in range(probes):
        g = rademacher(like, draws).view(-1)
        g -= q_nr @ (q_nr.T @ g)
        trace += _form(product, g.view_as(like)) / probes
    return float(trace)


def basis(product: Product, like: Tensor, rank: int, draws: torch.Generator) -> Tensor:
    """Q ``[n, rank]``: an orthonormal basis of A S for fresh random signs S."""
    sketch = like.new_empty(like.numel(), rank)
    for j in range(rank):
        sketch[:, j] = product(rademacher(like, draws)).view(-1)
    return torch.linalg.qr(sketch)[0]


def _form(product: Product, v: Tensor) -> float:
    return float(torch.sum(v * product(v), dtype=torch.float64))
