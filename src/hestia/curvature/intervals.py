"""How far to trust a trace: the interval of the mean of logs, and the error of the plain mean.

One sequence gives one positive sample ``S_k`` of a tensor's trace. Two means answer two questions:

- the arithmetic mean estimates the trace itself. Its samples have heavy tails (one sequence may carry a quarter of the
  sum), so a t interval around it covers its target far too seldom; only its standard error is given.
- the mean of logs estimates the log of the geometric mean. It is close to normal, its t interval holds what it
  promises, and the sensitivity score needs the logarithm anyway. The interval covers the geometric mean, not the trace.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

CONFIDENCE = 0.95


def log_mean_interval(samples: Sequence[float]) -> tuple[float, float]:
    """Mean ``m`` and half-width ``h`` of the t interval of the mean of natural logs.

        m = mean(log S),    h = t_{0.975, n - 1} * sd(log S) / sqrt(n)

    ``exp(m - h) .. exp(m + h)`` is the interval of the geometric mean.

    Args:
        samples: at least two positive numbers, one a sequence.

    >>> m, h = log_mean_interval([1.0, math.e**2])
    >>> round(m, 12), round(h, 4)
    (1.0, 12.7062)
    """
    from scipy.special import stdtrit  # here, so that listing the recipes needs torch alone

    logs = [math.log(sample) for sample in samples]
    quantile = float(stdtrit(len(logs) - 1, 0.5 * (1.0 + CONFIDENCE)))
    return statistics.fmean(logs), quantile * statistics.stdev(logs) / math.sqrt(len(logs))


def jackknife_error(samples: Sequence[float]) -> float:
    """Standard error of the arithmetic mean by leaving out one sequence at a time.

        se^2 = (n - 1)/n * sum_k (mean without k - mean)^2

    Sequences of equal scored length weigh the same, and for that mean the jackknife is ``sd(S) / sqrt(n)`` exactly.

    >>> jackknife_error([1.0, 3.0])
    1.0
    """
    return statistics.stdev(samples) / math.sqrt(len(samples))


def mean_interval(samples: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of the ordinary t interval, for samples that may be negative.

        h = t_{0.975, n - 1} * sd(S) / sqrt(n)

    Tails are heavy, so it covers less than it promises (0.79 for a nominal 0.95 where it was measured): good enough to
    ask whether a signed estimate is distinguishable from zero, not to quote.

    >>> mean_interval([1.0, 3.0])
    (2.0, 12.706204736174694)
    """
    from scipy.special import stdtrit

    quantile = float(stdtrit(len(samples) - 1, 0.5 * (1.0 + CONFIDENCE)))
    return statistics.fmean(samples), quantile * jackknife_error(samples)


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation, ties averaged; NaN where one side is constant.

    >>> round(spearman([1, 2, 3, 4], [1, 3, 2, 4]), 12)
    0.8
    """
    a, b = _ranks(x), _ranks(y)
    if min(a) == max(a) or min(b) == max(b):
        return math.nan
    return statistics.correlation(a, b)


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=lambda k: values[k])
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for place in range(start, end + 1):
            ranks[order[place]] = 0.5 * (start + end)
        start = end + 1
    return ranks
