"""What a candidate does to a tensor, in nats per token, by a sensitivity: what people read and plans spend by."""

from __future__ import annotations

from .scores import DirectKL, Evidence, Quadratic, Score
from .sensitivity import Sensitivity

READINGS: tuple[tuple[Score, str], ...] = ((DirectKL(), "measured KL"), (Quadratic(), "half of dW' G dW"))
"""Scores that are predicted KL, and what they are in words; the first that was measured is taken."""


def damages(sensitivity: Sensitivity, label: str) -> tuple[dict[str, float], str] | None:
    """(module path -> KL in nats per token, where it comes from); None where the candidate ``label`` has neither."""
    for score, words in READINGS:
        if f"{score.name}:{label}" in sensitivity.quantities:
            return score.damage(Evidence(sensitivity=sensitivity), label), words
    return None
