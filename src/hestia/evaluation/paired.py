"""Is one method better than another, or is it the seed? Differences of paired measurements, with an interval.

    d_i = a_i - b_i,   mean(d) +- t_{(1 + level)/2, n-1} * std(d) / sqrt(n)

Pairing removes what both sides share (the seed's data order, the text of the block), so the interval of the difference
is much narrower than the two intervals apart. What a pair is decides what the interval speaks about: pairs of seeds
about training the method again, stretches of blocks about other such text with these two very models.

Blocks of w_i counted tokens each give the difference of the two losses a token as a ratio, with the error of the delta
method,

    mean(d) = sum w_i d_i / sum w_i,   std(d) of  (w_i / mean(w)) (d_i - mean(d))

which equal weights leave as it was.

Neighbouring blocks are of one document and differ alike, so blocks are no independent pairs: their mean is taken over
stretches of consecutive ones, few and long (``over_blocks``).

Of several methods compared with one, some would "win" by luck: Holm's step-down correction (Holm 1979, "A simple
sequentially rejective multiple test procedure") bounds the chance of any false claim by the level of a single one,

    p_(1) <= ... <= p_(m),   adjusted p_(i) = max_{j <= i} min(1, (m - j + 1) p_(j))

and a difference may be claimed where its adjusted p is below 1 - level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
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


def paired_difference(
    a: Sequence[float], b: Sequence[float], level: float = 0.95, weights: Sequence[float] | None = None
) -> PairedDifference:
    """The t interval of the mean of ``a[i] - b[i]``.

    Args:
        a, b: one number a pair (a seed, a block), in the same order.
        level: coverage, in (0, 1).
        weights: what each pair counts, such as a block's tokens; None: all alike.

    Raises:
        ConfigError: lengths differ, fewer than two pairs, a value that is not finite, a weight that is not positive, a
            level outside (0, 1).

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
    if weights is None:
        mean, pulls = fmean(differences), differences
    else:
        shares = _shares(weights, n)
        mean = fmean([share * d for share, d in zip(shares, differences, strict=True)])
        pulls = [share * (d - mean) for share, d in zip(shares, differences, strict=True)]
    half = float(stdtrit(n - 1, 0.5 + level / 2)) * stdev(pulls) / math.sqrt(n)
    return PairedDifference(mean=mean, low=mean - half, high=mean + half, n=n, level=level)


def over_blocks(a: Sequence[float], b: Sequence[float], weights: Sequence[float] | None = None) -> PairedDifference:
    """The 95 % interval of the mean of ``a[i] - b[i]`` over blocks of text in their order.

    The pairs are round(N^(1/3)) stretches of consecutive blocks, two at least: what blocks share with their neighbours
    then lies inside a pair. On windows of 64 to 512 blocks of three test files it held the mean of the whole file in
    0.5 to 1.0 of cases, where intervals of single blocks did in 0.2 to 0.8 (docs/log.md, 2026-11-28): other documents
    differ more than a few stretches can tell.

    Args:
        a, b: the loss of every block.
        weights: tokens that count of every block; None: all alike.

    Raises:
        ConfigError: as ``paired_difference``.

    >>> over_blocks([1.0, 1.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]).n
    2
    """
    whole = paired_difference(a, b, weights=weights)  # refuses what cannot be paired
    counts = [1.0] * whole.n if weights is None else [float(w) for w in weights]
    stretches = max(2, round(whole.n ** (1 / 3)))
    cuts = [round(i * whole.n / stretches) for i in range(stretches + 1)]
    parts = [range(start, end) for start, end in pairwise(cuts)]
    sums = [sum(counts[i] for i in part) for part in parts]
    ours, theirs = (
        [sum(counts[i] * x[i] for i in part) / total for part, total in zip(parts, sums, strict=True)] for x in (a, b)
    )
    return paired_difference(ours, theirs, weights=sums)


def _shares(weights: Sequence[float], n: int) -> list[float]:
    """``weights`` over their mean."""
    if len(weights) != n:
        raise ConfigError(f"pairs need one weight each, got {len(weights)} weights for {n} pairs")
    for i, weight in enumerate(weights):
        if not 0.0 < weight < math.inf:
            raise ConfigError(f"the weight of pair {i} must be a positive number, got {weight}")
    average = fmean(weights)
    return [weight / average for weight in weights]


def paired_p_value(a: Sequence[float], b: Sequence[float]) -> float:
    """The two-sided p of Student's t test that the mean of ``a[i] - b[i]`` is zero.

        p = 2 T_{n-1}(-|t|),   t = mean(d) sqrt(n) / std(d)

    It is below ``1 - level`` exactly where the interval of that level excludes zero. Differences that are all the same
    leave nothing to chance: 0, or 1 where they are zero.

    Raises:
        ConfigError: as ``paired_difference``.

    >>> round(paired_p_value([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]), 4)
    0.0742
    """
    mean = paired_difference(a, b).mean
    differences = [float(x) - float(y) for x, y in zip(a, b, strict=True)]
    spread = stdev(differences)
    if spread == 0.0:
        return 0.0 if mean else 1.0

    from scipy.special import stdtr

    n = len(differences)
    return 2.0 * float(stdtr(n - 1, -abs(mean) * math.sqrt(n) / spread))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p of every comparison, in the given order.

    Raises:
        ConfigError: a value outside [0, 1].

    >>> [round(p, 3) for p in holm([0.04, 0.01, 0.03])]
    [0.06, 0.03, 0.06]
    """
    for place, p in enumerate(p_values):
        if not 0.0 <= p <= 1.0:
            raise ConfigError(f"p value {place} is a probability between 0 and 1, got {p}")
    adjusted = [1.0] * len(p_values)
    floor = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = floor
    return adjusted


def gap_closed(nll: float, baseline: float, control: float) -> float:
    """How much of the way from a baseline to a control a method goes: 0 at the baseline, 1 at the control.

        (NLL_baseline - NLL) / (NLL_baseline - NLL_control)

    Raises:
        ConfigError: the control is no better than the baseline, so that there is no gap.

    >>> gap_closed(2.25, baseline=2.5, control=2.0)
    0.5
    """
    if not baseline > control:
        raise ConfigError(f"there is no gap to close: the baseline has {baseline} nats, the control {control}")
    return (baseline - nll) / (baseline - control)
