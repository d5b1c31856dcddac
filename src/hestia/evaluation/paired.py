"""Is one method better than another, or is it the seed? Differences of paired measurements, with an interval.

    d_i = a_i - b_i,   mean(d) +- t_{(1 + level)/2, n-1} * std(d) / sqrt(n)

Pairing removes what both sides share (the seed's data order, the text of the block), so the interval of the difference
is much narrower than the two intervals apart. What a pair is decides what the interval speaks about: pairs of seeds
about training the method again, pairs of blocks about other text with these two very models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from ..errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Mean of ``a - b`` over ``n`` pairs with its t interval ``[low, high]`` at ``level``."""

    mean: float
    low: float
    high: float
    n: int
    level: float

    @property
    def excludes_zero(self) -> bool:
        """True where the interval lies on one side of zero: a difference that may be claimed."""
        return self.low > 0.0 or self.high < 0.0

    def to_json(self) -> dict[str, Any]:
        """A JSON object; ``PairedDifference(**record)`` is its inverse."""
        return asdict(self)


def paired_difference(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> PairedDifference:
    """The t interval of the mean of ``a[i] - b[i]``.

    Args:
        a, b: one number a pair (a seed, a block), in the same order.
        level: coverage, in (0, 1).

    Raises:
        ConfigError: lengths differ, fewer than two pairs, a value that is not finite, a level outside (0, 1).

    >>> paired_difference([2.0, 2.5, 3.0], [1.0, 1.0, 1.0]).mean
    1.5
    """
    if len(a) != len(b):
        raise ConfigError(f"pairs need two sequences of one length, got {len(a)} and {len(b)}")
    if len(a) < 2:
        raise ConfigError(f"an interval needs at least two pairs, got {len(a)}: run more seeds or more blocks")
    if not 0.0 < level < 1.0:
        raise ConfigError(f"level is a probability between 0 and 1, such as 0.95, got {level}")
    differences = [float(x) - float(y) for x, y in zip(a, b, strict=True)]
    for i, difference in enumerate(differences):
        if not math.isfinite(difference):
            raise ConfigError(f"pair {i} is not finite: {float(a[i])} and {float(b[i])}")

    from scipy.special import stdtrit

    n = len(differences)
    mean = fmean(differences)
    half = float(stdtrit(n - 1, 0.5 + level / 2)) * stdev(differences) / math.sqrt(n)
    return PairedDifference(mean=mean, low=mean - half, high=mean + half, n=n, level=level)
