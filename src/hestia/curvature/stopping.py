"""When are there enough sequences? Start small and double, until the intervals are narrow and the ranking has settled.

    stop at n when   median_i h_i <= half_width      and      split-half Spearman of the log-means >= rank_agreement

h_i is the half-width of tensor i's 95 % log-mean interval, in natural logs (0.10 is about 10 %). The split takes every
second sequence; both halves rank the tensors by their mean log. The thresholds are those at which a 42-tensor model was
found settled (128 sequences). Halves of arithmetic means, all that a signed estimate has, disagree longer.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from .intervals import log_mean_interval, mean_interval, spearman


@dataclass(frozen=True, kw_only=True)
class Stopping:
    """The rule's numbers.

    Args:
        start: sequences before the rule is asked for the first time; doubled until it says stop.
        half_width: largest median half-width of the log-mean intervals (of the relative ones for signed samples).
        rank_agreement: smallest Spearman correlation between the two halves' rankings.

    Raises:
        ConfigError: a number out of range.
    """

    start: int = 32
    half_width: float = 0.10
    rank_agreement: float = 0.98

    def __post_init__(self) -> None:
        if self.start < 2 or not self.half_width > 0.0 or not 0.0 <= self.rank_agreement <= 1.0:
            raise ConfigError(
                f"stopping wants start >= 2, half_width > 0 and rank_agreement in [0, 1], got {self.start}, "
                f"{self.half_width}, {self.rank_agreement}"
            )

    def progress(self, samples: Mapping[str, Sequence[float]], signed: bool = False) -> tuple[float, float]:
        """(median half-width, split-half Spearman) of the samples so far: module path -> one number a sequence.

        Of an estimate that may be negative (``signed``), or where a sample is 0, the artefact has intervals of the
        plain mean, and so they decide.
        """
        positive = not signed and all(sample > 0.0 for column in samples.values() for sample in column)
        widths, first, second = [], [], []
        for column in samples.values():
            if positive:
                widths.append(log_mean_interval(column)[1])
                halves = [statistics.fmean(map(math.log, column[k::2])) for k in (0, 1)]
            else:
                mean, half = mean_interval(column)
                widths.append(half / abs(mean) if mean else math.inf)
                halves = [statistics.fmean(column[k::2]) for k in (0, 1)]
            first.append(halves[0])
            second.append(halves[1])
        agreement = spearman(first, second) if len(first) > 1 else 1.0
        return statistics.median(widths), agreement

    def enough(self, samples: Mapping[str, Sequence[float]], signed: bool = False) -> bool:
        """Whether both thresholds hold."""
        width, agreement = self.progress(samples, signed)
        return width <= self.half_width and agreement >= self.rank_agreement
