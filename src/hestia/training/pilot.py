"""The learning-rate pilot: short runs at four rates in factors of three, longer ones at the best two, then one choice.

    rate_k = peak / 3^k,  k = 0..3,   peak = min(0.02, 1.5 / width)
    first round: all four, 1 % of the run each      second round: the best two, 4 % each      (12 and 36 steps at least)

Adam's best rate falls about as 1 / width (Yang et al. 2022, arXiv:2203.03466, table 3), and low-bit training wants more
than full precision does: a paper's 5e-5 for a 1B model and 10B tokens moves no code of a small model in a short run.
Each trial is a whole run in miniature, schedules included, so that its hard loss is comparable. The shorter a run, the
higher the rate it likes best: hence the second round, which decides between neighbours on three times the steps or more
(benchmarks/results/pilot has the measurements). The loss is that of text which is not scored later.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from .. import processes
from ..errors import GuardError
from .logfile import append_row

FACTOR = 3.0
ROUNDS = ((4, 0.01, 12), (2, 0.04, 36))
"""(candidates, share of the run, fewest steps) of each round."""

Trial = tuple[float, int]
"""Learning rate and steps."""


def rates(width: int) -> list[float]:
    """The four candidates for a model of hidden size ``width``, largest first, to two digits."""
    peak = min(0.02, 1.5 / max(1, width))
    return [float(f"{peak / FACTOR**k:.1e}") for k in range(4)]


def trial_steps(steps: int) -> list[int]:
    """Steps of a trial in each round, for a run of ``steps``; never more than the run itself.

    >>> trial_steps(300), trial_steps(10_000)
    ([12, 36], [100, 400])
    """
    return [min(steps, max(fewest, round(share * steps))) for _, share, fewest in ROUNDS]


def choose(trial: Callable[[float, int], float], candidates: Sequence[float], steps: int, log: Path) -> float:
    """The candidate with the lowest hard loss in the last round; every trial is appended to the run's log.

    A trial that the log holds already is not run again, so an interrupted pilot goes on where it stopped. A rate whose
    trial a guard stopped counts as infinitely bad.

    Args:
        trial: (rate, steps) -> hard loss.
        candidates: the rates of the first round.
        steps: of the run that the rate is for.
        log: log.jsonl of the run.

    Raises:
        GuardError: every candidate diverged.
    """
    done = _logged(log)
    best_first = list(candidates)
    for (most, _, _), length in zip(ROUNDS, trial_steps(steps), strict=True):
        finite: dict[float, float] = {}
        while best_first and not finite:  # where all of a round diverge, the next best have their turn
            tried, best_first = best_first[:most], best_first[most:]
            for rate in tried:
                if (rate, length) not in done:
                    done[rate, length] = _run(trial, rate, length, log)
            finite = {rate: done[rate, length] for rate in tried if math.isfinite(done[rate, length])}
        best_first = sorted(finite, key=finite.__getitem__)
        if not best_first:
            raise GuardError(f"every pilot diverged (learning rates {', '.join(map(str, candidates))}); set --lr lower")
    return best_first[0]


def _run(trial: Callable[[float, int], float], rate: float, steps: int, log: Path) -> float:
    try:
        loss = trial(rate, steps)
    except GuardError:
        loss = math.inf
    known = loss if math.isfinite(loss) else None
    row = {"pilot": {"learning_rate": rate, "steps": steps, "tuning_loss": known}}
    if processes.first():
        append_row(log, row)
    return math.inf if known is None else known


def _logged(log: Path) -> dict[Trial, float]:
    """The trials in the log of an interrupted pilot; half a line from a killed process is none."""
    found: dict[Trial, float] = {}
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        try:
            row = json.loads(line)["pilot"]
            loss = row["tuning_loss"]
            found[float(row["learning_rate"]), int(row["steps"])] = math.inf if loss is None else float(loss)
        except (json.JSONDecodeError, KeyError, TypeError, ValueError):
            continue
    return found
