"""The knobs: exact, shared, never saved, and never lost to a cast or a meta device."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hestia.errors import ConfigError
from hestia.nn import Knobs, knobs_of

values = st.floats(0.0, 10.0)


@given(values, values)
def test_any_cast_leaves_the_nearest_fp32_numbers(pressure: float, temperature: float) -> None:
    knobs = Knobs()
    knobs.set(pressure=pressure, temperature=temperature)
    for cast in (knobs.half, knobs.bfloat16, knobs.double, knobs.float):
        cast()
        assert knobs.pressure.dtype == torch.float32 and knobs.pressure.shape == ()
        assert knobs.pressure == torch.tensor(pressure) and knobs.temperature == torch.tensor(temperature)
    assert knobs.values == {"pressure": pressure, "temperature": temperature}


def test_set_moves_the_very_tensors_that_a_graph_has_seen() -> None:
    knobs = Knobs(0.0, 0.3)
    pressure, temperature = knobs.pressure, knobs.temperature
    knobs.set(pressure=0.5, temperature=0.1)
    assert knobs.pressure is pressure and float(pressure) == 0.5
    assert knobs.temperature is temperature and temperature == torch.tensor(0.1)


def test_they_are_not_saved_and_not_trained() -> None:
    knobs = Knobs()
    assert not knobs.state_dict() and not list(knobs.parameters())
    assert not any(b.requires_grad for b in knobs.buffers())


def test_a_meta_device_does_not_lose_them() -> None:
    knobs = Knobs(0.75, 0.2).to("meta")
    assert knobs.pressure.is_meta
    knobs.set(pressure=0.5, temperature=0.1)
    knobs.to_empty(device="cpu")
    assert knobs.pressure == 0.5 and knobs.temperature == torch.tensor(0.1)


def test_the_values_handed_out_are_a_copy() -> None:
    knobs = Knobs(0.75, 0.2)
    knobs.values["pressure"] = 9.0
    assert knobs.values["pressure"] == 0.75


def test_a_model_without_knobs_or_with_two_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"converted by hestia\.apply .*found 0"):
        knobs_of(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="found 2"):
        knobs_of(nn.ModuleList([Knobs(), Knobs()]))
    shared = Knobs()
    assert knobs_of(nn.ModuleList([shared, nn.ModuleList([shared])])) is shared


def test_a_residual_is_there_only_where_it_is_set() -> None:
    knobs = Knobs()
    knobs.set(pressure=0.5, temperature=0.1)
    assert not knobs.residual
