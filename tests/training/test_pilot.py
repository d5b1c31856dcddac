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
    assert pilot.rates(750)[0] == pytest.approx(1.5 / 750), "the largest rate of a width"
    assert pilot.rates(4096)[0] < pilot.rates(1024)[0] < pilot.rates(256)[0]


def test_the_best_of_the_second_round_wins_and_every_trial_is_logged(tmp_path: Path) -> None:
    """The shorter runs prefer 1e-3, the longer ones 4e-4: the longer ones decide."""
    losses = {
        (4e-3, 12): math.nan,
        (1e-3, 12): 2.25,
        (4e-4, 12): 2.5,
        (1e-4, 12): 3.0,
        (1e-3, 36): 2.1,
        (4e-4, 36): 2.0,
    }
    log = tmp_path / "log.jsonl"
    assert pilot.choose(lambda rate, steps: losses[rate, steps], [4e-3, 1e-3, 4e-4, 1e-4], 300, log) == 4e-4
    rows = [json.loads(line)["pilot"] for line in log.read_text(encoding="utf-8").splitlines()]
    expected = [(*trial, None if math.isnan(loss) else loss) for trial, loss in losses.items()]
    assert [(row["learning_rate"], row["steps"], row["tuning_loss"]) for row in rows] == expected


def test_an_interrupted_pilot_repeats_no_trial(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    ran: list[tuple[float, int]] = []

    def trial(rate: float, steps: int) -> float:
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append((rate, steps))
        return 1.0 + rate

    with pytest.raises(KeyboardInterrupt):
        pilot.choose(trial, [4e-3, 1e-3, 4e-4, 1e-4], 1000, log)
    with open(log, "a", encoding="utf-8") as handle:
        handle.write('{"pilot": {"learning_ra')  # the line that a kill cut off
    again: list[tuple[float, int]] = []

    def second(rate: float, steps: int) -> float:
        again.append((rate, steps))
        return 1.0 + rate

    assert pilot.choose(second, [4e-3, 1e-3, 4e-4, 1e-4], 1000, log) == 1e-4
    assert again == [(1e-4, 12), (1e-4, 40), (4e-4, 40)]


def test_trials_are_never_longer_than_the_run() -> None:
    assert pilot.trial_steps(20) == [12, 20]
    assert pilot.trial_steps(5) == [5, 5]


def test_a_rate_that_a_guard_stopped_loses(tmp_path: Path) -> None:
    def trial(rate: float, steps: int) -> float:
        if rate > 1e-3:
            raise GuardError("step 3: the loss is nan")
        return 5.0

    assert pilot.choose(trial, [1e-2, 1e-3], 100, tmp_path / "log.jsonl") == 1e-3


def test_where_the_longer_trials_diverge_the_next_best_have_theirs(tmp_path: Path) -> None:
    def trial(rate: float, steps: int) -> float:
        if steps == 36 and rate > 5e-4:
            raise GuardError("loss is NaN")
        return 3.0 - rate

    assert pilot.choose(trial, [4e-3, 1.2e-3, 4e-4, 1e-4], 300, tmp_path / "log.jsonl") == 4e-4


def test_when_all_diverge_the_run_stops(tmp_path: Path) -> None:
    with pytest.raises(GuardError, match=r"every pilot diverged \(learning rates 0\.01, 0\.003\); set --lr lower"):
        pilot.choose(lambda rate, steps: math.inf, [1e-2, 3e-3], 100, tmp_path / "log.jsonl")
