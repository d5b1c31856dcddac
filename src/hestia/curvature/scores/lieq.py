"""LieQ's geometry: how far a weight's spectrum is from that of noise. Data-free.

    RC = exp(-H(p)),  p = sigma / sum sigma          spectral compactness: 1 / (number of directions in use)
    E  = sum of the largest k sigma^2 / sum sigma^2  energy share, k = a twentieth of the directions
    D  = minmax(RC - RC0) + minmax(E - E0)           RC0, E0: the same of a Gaussian matrix of this shape

The more compact a spectrum, the more it has learnt, and the more it would lose. minmax scales over the model's tensors.

Source: LieQ (arXiv:2508.03332), whose code and exact weighting are not public. Deviations: spectra of the weights (its
first version: of the projected tokens), the two terms weighted alike, per tensor (theirs: per layer).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import CalibrationError
from .base import Evidence, Score


@dataclass(frozen=True, kw_only=True)
class LieQ(Score):
    """Spectral compactness and energy beyond chance; the same for every candidate."""

    name: ClassVar[str] = "lieq"
    by_candidate: ClassVar[bool] = False
    share: float = 0.05

    def damage(self, evidence: Evidence, label: str) -> dict[str, float]:
        if evidence.weights is None:
            raise CalibrationError("the score 'lieq' looks at the weights; give Evidence(weights=...)")
        geometry = {path: self._beyond_chance(weight) for path, weight in evidence.weights.items()}
        compact = _minmax({path: values[0] for path, values in geometry.items()})
        energy = _minmax({path: values[1] for path, values in geometry.items()})
        return {path: compact[path] + energy[path] for path in geometry}

    @torch.no_grad()
    def _beyond_chance(self, weight: Tensor) -> tuple[float, float]:
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        (compact, energy), (compact0, energy0) = self.spectrum(weight.detach().float().cpu()), self.spectrum(noise)
        return compact - compact0, energy - energy0

    def spectrum(self, weight: Tensor) -> tuple[float, float]:
        """(RC, E) of a matrix ``[O, I]``; of zeros, (0, 0): nothing is learnt, and nothing can be lost."""
        sigma = torch.linalg.svdvals(weight).double()
        if not bool(sigma.any()):
            return 0.0, 0.0
        p = sigma / sigma.sum()
        compact = float(torch.exp((p * p.clamp_min(1e-300).log()).sum()))
        top = max(1, round(self.share * len(sigma)))
        return compact, float(sigma[:top].square().sum() / sigma.square().sum())


def _minmax(values: dict[str, float]) -> dict[str, float]:
    low, high = min(values.values()), max(values.values())
    return {path: (value - low) / (high - low) if high > low else 0.0 for path, value in values.items()}
