"""From scores to the factor on every tensor's temperature.

Source: Wang et al. 2026 (Hestia, arXiv:2601.20745), eq. 15. Deviation: the factors may be centred, or matched.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

from ..errors import ConfigError

MAX_ALPHA = 10.0


def temperature_factors(
    scores: Mapping[str, float], *, alpha: float, centred: bool, matched: bool = False
) -> dict[str, float]:
    """exp(alpha (s_i - c)): what multiplies the base temperature of each tensor.

    Args:
        scores: module path -> s_i in (0, 1).
        alpha: strength and sign; above 0 a sensitive tensor stays hotter (soft) for longer, below 0 it hardens earlier.
            0 makes all factors 1.
        centred: c = mean(s), so the factors change who is hot and not how hot all are (the geometric mean temperature
            stays); otherwise c = 0 (the paper).
        matched: divide all factors by their arithmetic mean, so that the mean temperature itself is that of alpha = 0.

    Raises:
        ConfigError: alpha outside [-10, 10] or not a number.
    """
    if not abs(alpha) <= MAX_ALPHA:
        raise ConfigError(f"alpha must lie in [-{MAX_ALPHA:g}, {MAX_ALPHA:g}] (the paper uses 0.4), got {alpha}")
    centre = statistics.fmean(scores.values()) if centred and scores else 0.0
    factors = {path: math.exp(alpha * (score - centre)) for path, score in scores.items()}
    mean = statistics.fmean(factors.values()) if matched and factors else 1.0
    return {path: factor / mean for path, factor in factors.items()}
