import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hestia.errors import ConfigError
from hestia.schedules import KnobSchedule, cosine, linear, ramp

shares = st.floats(0, 1)


@st.composite
def schedules(draw: st.DrawFn) -> KnobSchedule:
    temperature = draw(st.floats(0, 10))
    return KnobSchedule(
        rho=draw(shares),
        temperature=temperature,
        hold=draw(st.none() | st.floats(0, 0.99)),
        decay=draw(st.sampled_from(["cosine", "linear"])),
        end_temperature=temperature * draw(shares),
        residual=draw(st.floats(0, 10)),
        residual_warmup=draw(st.floats(0, 0.99)),
    )


def test_the_papers_numbers() -> None:
    schedule = KnobSchedule()
    assert [schedule.pressure(t) for t in (0.0, 0.1, 0.2, 1.0)] == [0.0, 0.5, 1.0, 1.0]
    assert [schedule.base_temperature(t) for t in (0.0, 0.2)] == [0.3, 0.3]
    assert schedule.base_temperature(0.6) == pytest.approx(0.15)
    assert schedule.base_temperature(1.0) == 0.0


def test_curves_are_exact_at_their_ends() -> None:
    for curve in (cosine, linear):
        assert (curve(0.0, 0.2), curve(0.2, 0.2), curve(1.0, 0.2), curve(1.1, 0.2)) == (1.0, 1.0, 0.0, 0.0)
        assert curve(0.6, 0.2) == pytest.approx(0.5)
        assert curve(1.0, 1.0) == 1.0  # nothing is left to decay in
    assert (ramp(0.0, 0.2), ramp(0.2, 0.2), ramp(0.7, 0.2)) == (0.0, 1.0, 1.0)
    assert ramp(0.0, 0.0) == 1.0  # rho = 0 starts fully quantized


@given(schedules(), shares, shares)
def test_pressure_never_falls_and_temperature_never_rises(schedule: KnobSchedule, a: float, b: float) -> None:
    early, late = sorted((a, b))
    assert 0.0 <= schedule.pressure(early) <= schedule.pressure(late) <= 1.0
    hot, cool = schedule.base_temperature(early), schedule.base_temperature(late)
    slack = 1e-12 * schedule.temperature
    assert schedule.temperature + slack >= hot >= cool - slack
    assert cool >= schedule.end_temperature - slack


@given(schedules())
def test_ends_are_exact(schedule: KnobSchedule) -> None:
    assert schedule.base_temperature(0.0) == pytest.approx(schedule.temperature, abs=1e-300)
    assert schedule.pressure(0.0) == (1.0 if schedule.rho == 0 else 0.0)
    assert schedule.pressure(1.0) == 1.0
    held = schedule.rho if schedule.hold is None else schedule.hold
    last = schedule.temperature if held >= 1 else schedule.end_temperature
    assert schedule.base_temperature(1.0) == pytest.approx(last, rel=1e-12, abs=1e-300)


@given(schedules().filter(lambda s: s.rho > 0.01 and (s.rho if s.hold is None else s.hold) < 0.95), shares)
def test_no_jumps(schedule: KnobSchedule, t: float) -> None:
    """Slopes are bounded: 1/rho for the pressure, pi/2 over the rest of the run for the temperature."""
    later = min(1.0, t + 1e-6)
    held = schedule.rho if schedule.hold is None else schedule.hold
    assert abs(schedule.pressure(later) - schedule.pressure(t)) <= 1.01e-6 / schedule.rho
    steepest = 0.5 * math.pi * schedule.temperature / (1 - held)
    assert abs(schedule.base_temperature(later) - schedule.base_temperature(t)) <= 1.01e-6 * steepest + 1e-12


def test_hold_is_apart_from_rho() -> None:
    schedule = KnobSchedule(rho=0.1, hold=0.5, decay="linear", end_temperature=0.1)
    assert schedule.pressure(0.1) == 1.0
    assert schedule.base_temperature(0.5) == pytest.approx(0.3)
    assert schedule.base_temperature(0.75) == pytest.approx(0.2)
    assert schedule.base_temperature(1.0) == pytest.approx(0.1)


@given(peak=st.floats(0.01, 10), warmup=st.floats(0, 1, exclude_max=True))
def test_a_residual_is_gone_at_the_end(peak: float, warmup: float) -> None:
    schedule = KnobSchedule(residual=peak, residual_warmup=warmup)
    assert schedule.residual_share(1.0) == 0.0
    assert KnobSchedule(residual_warmup=1.0).residual_share(1.0) == 0.0


@given(schedules())
def test_json_round_trip(schedule: KnobSchedule) -> None:
    assert KnobSchedule(**schedule.to_json()) == schedule


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -0.1}, r"rho is a share of the run in \[0, 1\], got -0.1"),
        ({"rho": math.nan}, "rho is a share"),
        ({"hold": 1.5}, "hold is a share"),
        ({"temperature": -1.0}, "0 <= end_temperature <= temperature"),
        ({"temperature": math.nan}, "0 <= end_temperature <= temperature"),
        ({"temperature": math.inf}, "finite"),
        ({"end_temperature": 0.4}, "0 <= end_temperature <= temperature"),
        (
            {"residual": 1.0, "residual_warmup": 1.0},
            "residual_warmup must be under 1: the residual falls after it, got 1.0",
        ),
        ({"residual": -0.1}, "residual must be 0 or a positive number, got -0.1"),
        ({"residual": math.inf}, "residual must be 0 or a positive number, got inf"),
        ({"residual": math.nan}, "residual must be 0 or a positive number, got nan"),
        ({"residual_warmup": -0.5}, r"residual_warmup is a share of the run in \[0, 1\], got -0.5"),
        ({"decay": "cosin"}, "did you mean 'cosine'"),
    ],
)
def test_what_is_no_schedule(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KnobSchedule(**options)  # type: ignore[arg-type]
