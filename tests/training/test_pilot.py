"""The learning-rate pilot: four rates in factors of three, the best by held-out loss, all of them logged."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from hestia.errors import GuardError
from hestia.training import pilot


def test_the_candidates_are_four_in_factors_of_three() -> None:
    for width in (1, 64, 288, 2048, 8192):
        candidates = pilot.rates(width)
        assert len(candidates) == 4
        assert all(a / b == pytest.approx(3.0, rel=0.06) for a, b in zip(candidates, candidates[1:], strict=False))
        assert candidates[0] <= 0.02
    assert pilot.rates(4096)[0] < pilot.rates(1024)[0] < pilot.rates(256)[0]


def test_the_best_wins_and_every_trial_is_logged(tmp_path: Path) -> None:
    losses = {4e-3: math.nan, 1e-3: 2.5, 4e-4: 2.25, 1e-4: 3.0}
    log = tmp_path / "log.jsonl"
    assert pilot.choose(losses.__getitem__, list(losses), log) == 4e-4
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    expected = [(rate, None if math.isnan(loss) else loss) for rate, loss in losses.items()]
    assert [(row["pilot"]["learning_rate"], row["pilot"]["held_out_loss"]) for row in rows] == expected


def test_a_rate_that_a_guard_stopped_loses(tmp_path: Path) -> None:
    def trial(rate: float) -> float:
        if rate > 1e-3:
            raise GuardError("step 3: the loss is nan")
        return 5.0

    assert pilot.choose(trial, [1e-2, 1e-3], tmp_path / "log.jsonl") == 1e-3


def test_when_all_diverge_the_run_stops(tmp_path: Path) -> None:
    with pytest.raises(GuardError, match=r"every pilot diverged \(learning rates 0\.01, 0\.003\); set --lr lower"):
        pilot.choose(lambda rate: math.inf, [1e-2, 3e-3], tmp_path / "log.jsonl")
