"""BAQ: what GPTQ would lose on each tensor, under the high-rate law.

    e_q = (w_q - Q(w_q)) / U_qq,   w_F <- w_F - e_q U_qF        GPTQ over the columns, U' U = (X'X/N + damping)^-1
    L   = sum_q |e_q|^2 / 2                                     loss of the layer's output at the reference width R0
    c   = L 2^(2 R0),   D(R) = c 2^(-2R)                        R = log2 of the number of levels

Sources: BAQ (arXiv:2506.05664) for the law and c; GPTQ (Frantar et al. 2022, arXiv:2210.17323) for the pass. Deviation:
one constant a tensor (theirs: a column, inside one matrix), so that it allocates over a model; losses of different
layers are compared as they are, without weighing what a layer's output does to the loss, which is this score's
weakness.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import CalibrationError
from ...quant import INT3, Gaussian, Quantizer, QuantSpec
from ...quant.grouping import to_groups
from .base import Evidence, Score


@dataclass(frozen=True, kw_only=True)
class BAQ(Score):
    """GPTQ's loss constants from the inputs' second moments; ``damping`` is relative to the mean diagonal."""

    name: ClassVar[str] = "baq"
    damping: float = 0.01

    def damage(self, evidence: Evidence, label: str) -> dict[str, float]:
        if evidence.weights is None or evidence.inputs is None:
            raise CalibrationError("the score 'baq' needs weights and input moments; give Evidence(weights=, inputs=)")
        spec = evidence.spec(label)
        reference = QuantSpec(grid=INT3, group_size=spec.group_size, scale=Gaussian())
        factor = 2.0 ** (2.0 * (reference.grid.bits - spec.grid.bits))
        losses = {
            path: gptq_loss(weight, evidence.inputs[path], reference, self.damping)
            for path, weight in evidence.weights.items()
        }
        return {path: loss * factor for path, loss in losses.items()}


@torch.no_grad()
def gptq_loss(weight: Tensor, moment: Tensor, spec: QuantSpec, damping: float = 0.01) -> float:
    """sum_q |e_q|^2 / 2 of a GPTQ pass over the columns of ``weight`` ``[O, I]``.

    Args:
        weight: the matrix; scales are those of the uncompensated weights.
        moment: X'X / N ``[I, I]``.
        spec: the quantizer.
        damping: added to the diagonal, relative to its mean.
    """
    w = weight.detach().double().clone()
    h = moment.double().clone()
    mean = float(h.diagonal().mean())
    h.diagonal().add_(damping * mean if mean > 0.0 else 1.0)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    scales = Quantizer(spec).scales(to_groups(w, spec.group_size))
    shape = to_groups(w, spec.group_size).shape
    step, level = (s.expand(shape).reshape(w.shape) for s in scales)
    loss = 0.0
    for q in range(w.shape[1]):
        rounded = level[:, q] * spec.grid.round(w[:, q] / step[:, q])
        error = (w[:, q] - rounded) / upper[q, q]
        loss += 0.5 * float(error.square().sum())
        w[:, q + 1 :] -= torch.outer(error, upper[q, q + 1 :])
    return loss if math.isfinite(loss) else math.inf
