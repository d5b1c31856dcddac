"""Curves on [0, 1]: continuous, monotone, exact at both ends; a fall that would start at 1 does not happen."""

from __future__ import annotations

import math


def ramp(t: float, end: float) -> float:
    """``min(1, t / end)``; 1 everywhere if ``end`` is 0 (Hestia eq. 10)."""
    return 1.0 if end <= 0 else min(1.0, t / end)


def cosine(t: float, start: float) -> float:
    """1 up to ``start``, then half a cosine down to 0 at t = 1 (Hestia eq. 14); 1 everywhere if ``start`` is 1."""
    if t <= start or start >= 1:
        return 1.0
    return 0.5 * (1.0 + math.cos(math.pi * (min(t, 1.0) - start) / (1.0 - start)))


def linear(t: float, start: float) -> float:
    """1 up to ``start``, then a straight line down to 0 at t = 1; 1 everywhere if ``start`` is 1."""
    if t <= start or start >= 1:
        return 1.0
    return (1.0 - min(t, 1.0)) / (1.0 - start)
