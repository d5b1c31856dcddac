"""The true Hessian's trace for all tensors at once: Hutchinson's estimator with one scaled random block a tensor.

    v_i = c_i e_i,   e_i in {-1, +1}^{n_i}         c_i = tr(G_i)^(-1/2)
    tr(H_i) = E <v_i, (H v)_i> / c_i^2             one product with the whole H serves every tensor

    Var = 2 (||H_ii||_F^2 - sum_k h_kk^2) + sum_{j != i} ||H_ij||_F^2 c_j^2 / c_i^2

Unbiased whatever c is; without scaling the cross blocks carry nearly all of the variance. tr(G_i) comes from a few
Gauss-Newton passes first. Probes are drawn anew for every sequence: fixed ones would never average out.

H is indefinite and its trace may truly be negative: samples are signed, and nothing is clipped.

Cost: forward, backward and ``probes`` double backwards a sequence. Memory: gradient, probe and product of every tensor
(three vectors of the weights' size) and the graph of one forward and one backward pass.

Sources: Hutchinson 1989; Rademacher blocks and their joint variance: arXiv:2605.25674, whose fixed c = 1 is replaced.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import ConfigError
from .base import Candidates, CurvatureEstimator, Problem, Row
from .draws import generator, rademacher
from .gnb import GaussNewton
from .hvp import Curvature, refuse_unless_twice_differentiable


@dataclass(frozen=True, kw_only=True)
class Hutchinson(CurvatureEstimator):
    """Trace of every tensor's Hessian block from joint probes.

    Args:
        probes: joint products a sequence.
        scaling_sequences: sequences whose Gauss-Newton traces set the scales c_i; 0 means c = 1.

    Raises:
        ConfigError: no probe, or a negative number of scaling sequences.
    """

    name: ClassVar[str] = "hutchinson"
    signed: ClassVar[bool] = True

    probes: int = 1
    scaling_sequences: int = 4

    def __post_init__(self) -> None:
        if self.probes < 1 or self.scaling_sequences < 0:
            raise ConfigError(
                "hutchinson wants probes >= 1 and scaling_sequences >= 0, "
                f"got {self.probes} and {self.scaling_sequences}"
            )

    def prepare(self, problem: Problem, sequences: Tensor) -> Problem:
        refuse_unless_twice_differentiable(problem, self.name)
        bare = replace(problem, candidates=Candidates(problem.weights, {}), diagonals=None)
        sums = dict.fromkeys(problem.weights, 0.0)
        for ids in sequences[: self.scaling_sequences]:
            for path, samples in GaussNewton().sample(bare, ids).items():
                sums[path] += samples["trace"]
        used = min(self.scaling_sequences, len(sequences))
        # without a Gauss-Newton trace there is nothing to scale by; sample() and its reader deal with such a tensor
        scales = {path: (total / used) ** -0.5 if used and total > 0.0 else 1.0 for path, total in sums.items()}
        return replace(problem, scales=scales)

    def sample(self, problem: Problem, ids: Tensor) -> Row:
        product = Curvature(problem, ids).joint_hessian(problem.weights)
        draws = {path: generator(ids, problem.seed, path) for path in problem.weights}
        row: Row = {}
        for _ in range(self.probes):
            vectors = {
                path: rademacher(weight, draws[path]).mul_(problem.scales.get(path, 1.0))
                for path, weight in problem.weights.items()
            }
            for path, out in product(vectors).items():
                along = float(torch.sum(vectors[path] * out, dtype=torch.float64)) / problem.scales.get(path, 1.0) ** 2
                samples = row.setdefault(path, {"trace": 0.0})
                samples["trace"] += along / self.probes
        return row
