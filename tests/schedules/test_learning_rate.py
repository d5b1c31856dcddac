import pytest
from hypothesis import given
from hypothesis import strategies as st

from hestia.errors import ConfigError
from hestia.schedules import LearningRateSchedule


def test_the_papers_shape() -> None:
    schedule = LearningRateSchedule()
    assert [schedule.factor(t) for t in (0.0, 0.05, 0.5, 0.9)] == [0.0, 1.0, 1.0, 1.0]
    assert schedule.factor(0.025) == pytest.approx(0.5)
    assert schedule.factor(0.95) == pytest.approx(0.55)
    assert schedule.factor(1.0) == pytest.approx(0.1)


def test_two_stages() -> None:
    schedule = LearningRateSchedule(warmup=0.1, decay=0.2, final=0.0, second_stage=0.5, second_factor=0.3)
    assert schedule.factor(0.49) == 1.0
    assert schedule.factor(0.5) == schedule.factor(0.8) == pytest.approx(0.3)
    assert schedule.factor(0.9) == pytest.approx(0.15)
    assert schedule.factor(1.0) == pytest.approx(0.0)


@given(st.floats(0, 0.5), st.floats(0, 0.5), st.floats(0, 1), st.floats(0, 1))
def test_within_bounds_and_without_jumps(warmup: float, decay: float, final: float, t: float) -> None:
    schedule = LearningRateSchedule(warmup=warmup, decay=decay, final=final)
    assert 0.0 <= schedule.factor(t) <= 1.0
    if warmup > 0.01 and decay > 0.01:
        later = min(1.0, t + 1e-6)
        assert abs(schedule.factor(later) - schedule.factor(t)) <= 1.01e-6 / min(warmup, decay)


def test_no_warmup_and_no_decay_is_constant() -> None:
    schedule = LearningRateSchedule(warmup=0.0, decay=0.0)
    assert {schedule.factor(t) for t in (0.0, 0.3, 1.0)} == {1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup": 1.5}, "warmup must lie in"),
        ({"final": -0.1}, "final must lie in"),
        ({"second_stage": 2.0}, "second_stage is a share"),
        ({"warmup": 0.6, "decay": 0.6}, "overlap"),
        ({"second_stage": 0.01}, r"--second-stage 0\.01 lies outside .* between the warm-up's end \(0\.05\) and the"),
        ({"second_stage": 0.95}, r"--second-stage 0\.95 lies outside .* and the decay's start \(0\.9\)"),
    ],
)
def test_what_is_no_schedule(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LearningRateSchedule(**options)


def test_the_constant_part_includes_both_of_its_ends() -> None:
    for stage in (0.05, 0.9):
        assert LearningRateSchedule(second_stage=stage).factor(0.9) == 0.5


def test_past_the_end_the_rate_stays_where_it_ended() -> None:
    assert LearningRateSchedule(decay=0.5, final=0.1).factor(1.5) == pytest.approx(0.1)
