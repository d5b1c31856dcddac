"""The largest eigenvalue of a tensor's Hessian block.

    hawq     D_i = lambda_i / n_i * ||dW_i||^2       (mean over data)      HAWQ, Dong et al. 2019, arXiv:1905.03696
    q_bert   D_i = |mean_k lambda_ik| + std_k lambda_ik                     Q-BERT, Shen et al. 2020, arXiv:1909.05840

lambda_ik is measured on sequence (data subset) k by power iteration. HAWQ orders bit widths by lambda/n; the squared
error is its rule for the order of fine-tuning, used here so that candidates can be told apart. Deviation: in ``hawq``,
where the mean is not surely positive, as when signs flip from sequence to sequence, the Gauss-Newton eigenvalue takes
its place.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import ClassVar, Literal

from .base import Evidence, Score


@dataclass(frozen=True, kw_only=True)
class Eigen(Score):
    """Top eigenvalue, as HAWQ or as Q-BERT uses it."""

    name: ClassVar[str] = "eigen"
    estimator: ClassVar[str] = "eigen"
    form: Literal["hawq", "q_bert"] = "hawq"

    def damage(self, evidence: Evidence, label: str) -> dict[str, float]:
        evidence.spec(label)
        sensitivity, tensors = evidence.sensitivity, evidence.sensitivity.tensors
        columns = sensitivity.column("eigenvalue")
        if self.form == "q_bert":
            return {path: abs(statistics.fmean(c)) + statistics.pstdev(c) for path, c in columns.items()}
        if sensitivity.primary == "eigenvalue":
            means = sensitivity.values
        else:
            means = {path: abs(statistics.fmean(column)) for path, column in columns.items()}
        return {path: means[path] / t.weights * t.errors[label] for path, t in tensors.items()}
