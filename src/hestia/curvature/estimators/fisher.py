"""The empirical Fisher: the Gauss-Newton estimator with the text's own labels in place of random cotangents.

    r_t = p_t - onehot(y_t)        y_t: the token that follows position t
    g_i = sum_t J_t' r_t           the gradient of the summed cross entropy of one sequence
    tr(E_i) = ||g_i||^2 / N        flavour: squared after summing over a sequence, so positions correlate

It equals the Gauss-Newton trace in expectation only where the model's distribution is the data's; on a well-fitted
model the two agree within tens of per cent. Kept because GuidedQuant-style tools are built on it.

Source: Kunstner et al. 2019, arXiv:1905.12558 (what it is, and what it is not).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import CalibrationError
from .backward import checked_logits, send_back
from .base import CurvatureEstimator, Problem, Row


@dataclass(frozen=True, kw_only=True)
class Fisher(CurvatureEstimator):
    """Squared gradients of the true labels, summed over a sequence before squaring."""

    name: ClassVar[str] = "fisher"
    squares: ClassVar[bool] = True

    def sample(self, problem: Problem, ids: Tensor) -> Row:
        logits = checked_logits(problem.forward, ids)
        scored = logits.detach()[0, :-1]
        residual = torch.zeros_like(logits)
        p = torch.softmax(scored, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        if not bool(p.isfinite().all()):
            raise CalibrationError("the model's logits are not finite on the calibration text")
        p[torch.arange(len(scored), device=p.device), ids[1:]] -= 1.0
        residual[0, :-1] = p
        if problem.counted is not None:
            residual[0, :-1][~problem.counted] = 0.0
        return send_back(problem, logits, residual, problem.positions(ids))
