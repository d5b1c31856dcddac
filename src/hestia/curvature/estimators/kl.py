"""Direct KL, the ground truth: quantize one tensor, run the model, compare its predictions with the parent's.

    KL_i = (1/N) sum_t sum_v p_tv (log p_tv - log p^i_tv)       p^i: tensor i replaced by its quantized self

One forward pass a tensor, candidate and sequence; no gradient at all. It sees what the other tensors' formulas
approximate, at one tensor quantized and all others whole: how errors add up is a second question. A KL that fp32 makes
negative is 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import CalibrationError
from .base import CurvatureEstimator, Problem, Row, quantity


@dataclass(frozen=True, kw_only=True)
class DirectKL(CurvatureEstimator):
    """KL of the next-token distributions, in nats per token, with one tensor quantized."""

    name: ClassVar[str] = "kl"
    primary: ClassVar[str] = "kl"
    needs_candidates: ClassVar[bool] = True
    may_be_zero: ClassVar[bool] = True

    @torch.no_grad()
    def sample(self, problem: Problem, ids: Tensor) -> Row:
        parent = _log_probabilities(problem, ids)
        p = parent.exp()
        row: Row = {}
        for path, weight in problem.weights.items():
            kept = weight.data
            try:
                for label in problem.candidates.labels:
                    weight.data = problem.candidates.dense(path, label).to(kept.dtype)
                    divergence = (p * (parent - _log_probabilities(problem, ids))).sum(-1)
                    if problem.counted is not None:
                        divergence = divergence[problem.counted]
                    mean = float(divergence.double().mean())
                    row.setdefault(path, {})[quantity("kl", label)] = 0.0 if mean < 0.0 else mean
            finally:
                weight.data = kept
        return row


def _log_probabilities(problem: Problem, ids: Tensor) -> Tensor:
    logits = problem.forward(ids[None])[0, :-1]
    wide = torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    if not bool(wide.isfinite().all()):
        raise CalibrationError("the model's logits are not finite on the calibration text")
    return wide
