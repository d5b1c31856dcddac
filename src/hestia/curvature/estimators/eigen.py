"""HAWQ's sensitivity: the top eigenvalue of each tensor's Hessian block, by power iteration.

    v <- A v / ||A v||  until  |lambda - lambda_before| <= tolerance |lambda|,     lambda = v' A v

with A = H_i (the default, as published) or G_i. The iteration finds the eigenvalue of largest magnitude, and its sign
is kept: a Hessian's may be negative. One value a sequence, so that Q-BERT's |mean| + standard deviation over subsets of
the data is a function of the table.

The Rayleigh quotient of an unfinished iteration lies below the magnitude, never above; where the two ends of the
spectrum are nearly opposite it may stop between them.

Cost: at most ``iterations`` products a tensor and sequence; a product with H costs one backward pass through the graph
of the gradient, one with G two passes. Memory: 4 vectors of the largest tensor's size beside the graphs.

Sources: HAWQ (Dong et al. 2019, arXiv:1905.03696), section 3; Q-BERT (Shen et al. 2020, arXiv:1909.05840), eq. 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import ConfigError, nearest
from .base import CurvatureEstimator, Problem, Row
from .hvp import Product, blocks, refuse_unless_twice_differentiable

MATRICES = ("hessian", "gauss_newton")


@dataclass(frozen=True, kw_only=True)
class Eigen(CurvatureEstimator):
    """Top eigenvalue of every tensor's block, one a sequence.

    Args:
        matrix: "hessian" or "gauss_newton".
        iterations: at most.
        tolerance: relative change of the eigenvalue at which the iteration ends.

    Raises:
        ConfigError: another matrix, no iteration, or a tolerance that is not positive.
    """

    name: ClassVar[str] = "eigen"
    primary: ClassVar[str] = "eigenvalue"
    signed: ClassVar[bool] = True

    matrix: str = "hessian"
    iterations: int = 30
    tolerance: float = 1e-2

    def __post_init__(self) -> None:
        if self.matrix not in MATRICES:
            raise ConfigError(f"eigen: unknown matrix {self.matrix!r}: {nearest(self.matrix, MATRICES)}")
        if self.iterations < 1 or not self.tolerance > 0.0:
            raise ConfigError(f"eigen wants iterations >= 1 and tolerance > 0, got {self.iterations}, {self.tolerance}")

    def stand_in(self) -> CurvatureEstimator:
        return Eigen(matrix="gauss_newton", iterations=self.iterations, tolerance=self.tolerance)

    def prepare(self, problem: Problem, sequences: Tensor) -> Problem:
        refuse_unless_twice_differentiable(problem, self.name)
        return problem

    def sample(self, problem: Problem, ids: Tensor) -> Row:
        return {
            path: {"eigenvalue": top_eigenvalue(product, weight, self.iterations, self.tolerance, draws)}
            for path, product, weight, draws in blocks(problem, ids, self.matrix)
        }


@torch.no_grad()
def top_eigenvalue(product: Product, like: Tensor, iterations: int, tolerance: float, draws: torch.Generator) -> float:
    """The eigenvalue of largest magnitude, signed, of the symmetric matrix behind ``product``; 0 for a zero matrix."""
    v = torch.randn(like.shape, generator=draws).to(like)
    v /= torch.linalg.vector_norm(v)
    value = 0.0
    for _ in range(iterations):
        out = product(v)
        norm = float(torch.linalg.vector_norm(out))
        before, value = value, float(torch.sum(v * out, dtype=torch.float64))
        if norm == 0.0 or abs(value - before) <= tolerance * abs(value):
            break
        v = out / norm
    return value
