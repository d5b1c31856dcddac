"""The learning-rate pilot: four short runs in factors of three, the best by loss on text that is not scored later.

    rate_k = peak / 3^k,  k = 0..3,   peak = min(0.02, 1.5 / width)

Adam's best rate falls about as 1 / width (Yang et al. 2022, arXiv:2203.03466, table 3), and low-bit training wants more
than full precision does: a paper's 5e-5 for a 1B model and 10B tokens moves no code of a small model in a short run.
Each pilot is a whole run in miniature, schedules included, so that its hard loss is comparable.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import GuardError

FACTOR = 3.0


def rates(width: int) -> list[float]:
    """The four candidates for a model of hidden size ``width``, largest first, to two digits."""
    peak = min(0.02, 1.5 / max(1, width))
    return [float(f"{peak / FACTOR**k:.1e}") for k in range(4)]


def choose(trial: Callable[[float], float], candidates: Sequence[float], log: Path) -> float:
    """The candidate with the lowest hard loss; every trial is appended to the run's log.

    A rate whose trial a guard stopped counts as infinitely bad.

    Raises:
        GuardError: every candidate diverged.
    """
    losses: dict[float, float] = {}
    for rate in candidates:
        try:
            loss = trial(rate)
        except GuardError:
            loss = math.inf
        losses[rate] = loss if math.isfinite(loss) else math.inf
        row = {"pilot": {"learning_rate": rate, "held_out_loss": loss if math.isfinite(loss) else None}}
        with open(log, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")
    best = min(losses, key=lambda rate: losses[rate])
    if not math.isfinite(losses[best]):
        raise GuardError(f"every pilot diverged (learning rates {', '.join(map(str, candidates))}); set --lr lower")
    return best
