"""Equal to the published operators, to the digits that were recorded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hestia import fake_quantize
from hestia.curvature import hestia_scores, temperature_factors
from hestia.quant import AbsMean, Grid, Quantizer, QuantSpec
from hestia.schedules import KnobSchedule

PUBLISHED: dict[str, Any] = json.loads((Path(__file__).parent / "hestia_published.json").read_text(encoding="utf-8"))
CASES: list[dict[str, Any]] = PUBLISHED["cases"]
GROUPS = {-1: "row", 0: "tensor"}
SOFT = [case for case in CASES if case["temperature"] > 0]
HARD = [case for case in CASES if case["temperature"] == 0]


def named(case: dict[str, Any]) -> str:
    return f"{len(case['codebook'])}levels-group{case['group_size']}-tau{case['temperature']}"


def weight() -> Tensor:
    return torch.tensor(PUBLISHED["w"], dtype=torch.float64).reshape(4, 256)


def sampled(values: Tensor) -> Tensor:
    return values.detach().reshape(-1)[PUBLISHED["at"]]


def assert_equals(values: Tensor, published: list[float]) -> None:
    torch.testing.assert_close(sampled(values), torch.tensor(published, dtype=torch.float64), rtol=0, atol=1e-9)


def choices(case: dict[str, Any]) -> dict[str, Any]:
    group = GROUPS.get(case["group_size"], case["group_size"])
    return {"levels": case["codebook"], "group_size": group, "scale": AbsMean(eps=PUBLISHED["eps"])}


def test_no_case_was_lost() -> None:
    assert (len(SOFT), len(HARD)) == (16, 5)
    assert {len(case["codebook"]) for case in CASES} == {2, 3, 4}
    assert {case["group_size"] for case in CASES} == {-1, 0, 128}


@pytest.mark.parametrize("case", SOFT, ids=named)
def test_surrogate_and_gradient(case: dict[str, Any]) -> None:
    w = weight().requires_grad_()
    surrogate = fake_quantize(w, **choices(case), estimator="softmax", temperature=case["temperature"])
    surrogate.backward(torch.tensor(PUBLISHED["g"], dtype=torch.float64).reshape(4, 256))
    assert w.grad is not None
    assert_equals(surrogate, case["H"])
    assert_equals(w.grad, case["dw"])


@pytest.mark.parametrize("case", HARD, ids=named)
@pytest.mark.parametrize("estimator", ["softmax", "ste"])
def test_hard_quantizer(case: dict[str, Any], estimator: str) -> None:
    assert_equals(fake_quantize(weight(), **choices(case), estimator=estimator, temperature=0.0), case["Q"])


@pytest.mark.parametrize("case", HARD, ids=named)
def test_the_exported_weight_is_the_hard_quantizer_up_to_snapping(case: dict[str, Any]) -> None:
    spec = QuantSpec(grid=Grid.of(case["codebook"]), group_size=choices(case)["group_size"])
    exported = sampled(Quantizer(spec).codes(weight()).dense())
    published = torch.tensor(case["Q"], dtype=torch.float32)
    assert torch.equal(exported == 0, published == 0)
    torch.testing.assert_close(exported, published, rtol=2**-8, atol=0)


@pytest.mark.parametrize("row", PUBLISHED["schedule"]["rows"], ids=lambda row: f"step{row['step']}")
def test_schedule(row: dict[str, float]) -> None:
    published = PUBLISHED["schedule"]
    schedule = KnobSchedule(rho=published["rho"], temperature=published["tau_init"])
    t = row["step"] / published["total_steps"]
    assert schedule.pressure(t) == pytest.approx(row["pressure"], abs=1e-9)
    assert schedule.base_temperature(t) == pytest.approx(row["base_temperature"], abs=1e-9)


def test_scores_and_temperatures() -> None:
    published = PUBLISHED["sensitivity"]
    scores = hestia_scores(published["traces"], kappa=published["kappa"])
    assert scores == pytest.approx(published["scores"], abs=1e-9)
    schedule = KnobSchedule(rho=PUBLISHED["schedule"]["rho"], temperature=PUBLISHED["schedule"]["tau_init"])
    factors = temperature_factors(scores, alpha=published["alpha"], centred=False)
    temperatures = {name: schedule.base_temperature(0.6) * factor for name, factor in factors.items()}
    assert temperatures == pytest.approx(published["temperature_at_step_600"], abs=1e-9)
