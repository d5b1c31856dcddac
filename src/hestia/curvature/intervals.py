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


def log_mean_interval(samples: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Mean ``m`` and half-width ``h`` of the t interval of the mean of natural logs.

        m = mean(log S),    h = t_{(1 + confidence) / 2, n - 1} * sd(log S) / sqrt(n)

    ``exp(m - h) .. exp(m + h)`` is the interval of the geometric mean.

    Args:
        samples: at least two positive numbers, one a sequence.
        confidence: in (0, 1).

    >>> m, h = log_mean_interval([1.0, math.e**2])
    >>> round(m, 12), round(h, 4)
    (1.0, 12.7062)
    """
    from scipy.special import stdtrit  # here, so that listing the recipes needs torch alone

    logs = [math.log(sample) for sample in samples]
    quantile = float(stdtrit(len(logs) - 1, 0.5 * (1.0 + confidence)))
    return statistics.fmean(logs), quantile * statistics.stdev(logs) / math.sqrt(len(logs))


def jackknife_error(samples: Sequence[float]) -> float:
    """Standard error of the arithmetic mean by leaving out one sequence at a time.

        se^2 = (n - 1)/n * sum_k (mean without k - mean)^2

    Sequences of equal scored length weigh the same, and for that mean the jackknife is ``sd(S) / sqrt(n)`` exactly.

    >>> jackknife_error([1.0, 3.0])
    1.0
    """
    return statistics.stdev(samples) / math.sqrt(len(samples))
