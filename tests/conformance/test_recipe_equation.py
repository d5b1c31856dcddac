"""Every recipe obeys the equation: nothing at pressure 0, gradients on the way, levels times scales at the end."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from conformance import CASES, TIMES, Case, disturb, gradients, logits, move, without_ports
from torch import Tensor

import hestia
from hestia import recipes
from hestia.nn import knobs_of, quantized_modules
from hestia.quant import GroupSize


def test_recipes_are_found_and_each_does_a_width() -> None:
    assert len(recipes.names()) >= 3 and {case.recipe for case in CASES} == set(recipes.names())


def test_every_recipe_says_where_it_comes_from() -> None:
    for name in recipes.names():
        kind = type(recipes.get(name))
        written = kind.__doc__ or ""
        assert written and not written.startswith(f"{kind.__name__}("), f"{name}: the class has no docstring of its own"
        module = sys.modules[kind.__module__].__doc__ or ""
        if name != "round_to_nearest":  # which is nobody's
            assert re.search(r"^Sources?: .", module, re.MULTILINE), f"{name}: the module names no source"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pressure_0_is_the_parent_bit_for_bit(case: Case, dtype: torch.dtype) -> None:
    plain = case.parent(dtype).train()
    answer, theirs = logits(plain), gradients(plain)
    model, plan = case.converted(dtype=dtype)
    for t in (0.0, 0.9, 1.0):
        knobs_of(model).set(pressure=0.0, temperature=plan.schedule.base_temperature(t))
        assert torch.equal(logits(model), answer)
        ours = gradients(model)
        assert {*without_ports(ours)} == theirs.keys()
        assert all(bool((ours[name] == 0).all()) for name in ours.keys() - theirs.keys())
        for name, gradient in theirs.items():
            assert torch.equal(ours[name].to(dtype), gradient), name


@pytest.mark.parametrize("group_size", ["row", 16, "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_weight_is_level_times_scale_exactly(case: Case, dtype: torch.dtype, group_size: GroupSize) -> None:
    model, plan = case.converted(dtype=dtype, group_size=group_size, t=1.0)
    disturb(model)
    frozen = hestia.freeze(model)
    assert list(frozen) == list(plan.layers)
    seen: set[int] = set()
    for path, tensor in frozen.items():
        weight = model.get_parameter(f"{path}.weight")
        grid = plan.layers[path].spec.grid
        assert weight.dtype == dtype and tensor.codes.dtype == torch.int8
        seen |= set(tensor.codes.unique().tolist())
        assert set(tensor.codes.unique().tolist()) <= set(grid.levels)
        # every weight against its own scale, in float64 and without the code under test
        rows, columns = weight.shape
        width = {"row": columns, "tensor": columns}.get(group_size, group_size)
        assert isinstance(width, int)
        scales = tensor.scales.double().expand(rows, columns // width).repeat_interleave(width, dim=1)
        assert torch.equal(weight.double(), tensor.codes.double() * scales)
        for held in (torch.float16, torch.bfloat16):
            assert torch.equal(tensor.scales.to(held).float(), tensor.scales)
        assert bool((tensor.scales > 0).all())
    assert seen == set(grid.levels), "a level that no weight takes: the test shows less than it says"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_is_of_the_frozen_model(case: Case, dtype: torch.dtype) -> None:
    model, plan = case.converted(dtype=dtype)
    disturb(model)
    model.eval()
    with torch.no_grad():
        before = logits(model)
        move(model, plan, 0.0)
        assert torch.equal(logits(model), before), "evaluation must not depend on the knobs"
        hestia.freeze(model)
        assert torch.equal(logits(model), before)
        assert not torch.equal(before, logits(case.parent(dtype).eval()))


def test_at_the_end_training_computes_what_is_frozen_up_to_the_snapped_scale(case: Case) -> None:
    model, plan = case.converted(t=1.0)
    assert plan.schedule.pressure(1.0) == 1.0, "the run ends fully quantized"
    for path, layer in quantized_modules(model):
        soft, hard = layer.effective_weight().detach(), layer.codes().dense()
        assert torch.equal(soft == 0, hard == 0), path
        kept = 7 - (layer.quantizer.spec.grid.largest_odd_factor - 1).bit_length()  # bits that snapping leaves a scale
        torch.testing.assert_close(soft, hard, rtol=2.0**-kept, atol=1e-6, msg=path)


@pytest.mark.parametrize("t", TIMES)
def test_gradients_are_finite_and_reach_every_tensor(trained: Case, t: float) -> None:
    model, _ = trained.converted(t=t)
    found = gradients(model)
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, gradient in found.items():
        assert bool(torch.isfinite(gradient).all()), name
        assert bool((gradient != 0).any()), name


def test_schedules_are_continuous_and_stay_in_range(case: Case) -> None:
    schedule = recipes.get(case.recipe).schedule()
    for curve in (schedule.pressure, schedule.base_temperature):
        # a jump stays as high however fine the steps; a continuous curve's largest step shrinks with them
        assert _largest_step(curve, 20_000) <= 0.2 * _largest_step(curve, 2_000)
    for k in range(1001):
        assert 0.0 <= schedule.pressure(k / 1000) <= 1.0
        assert 0.0 <= schedule.base_temperature(k / 1000) < 1e3
    assert schedule.pressure(1.0) == 1.0


def _largest_step(curve: Callable[[float], float], steps: int) -> float:
    values = [curve(k / steps) for k in range(steps + 1)]
    return max(abs(b - a) for a, b in pairwise(values))


def test_eight_micro_batches_give_the_gradient_of_one_batch(trained: Case) -> None:
    model, _ = trained.converted(t=0.5)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(64, (8, 8), generator=generator)

    def whole(m: torch.nn.Module) -> Tensor:
        return m(input_ids=rows, labels=rows, use_cache=False).loss

    once = gradients(model, whole)
    model.zero_grad()
    for k in range(8):
        (model(input_ids=rows[k : k + 1], labels=rows[k : k + 1], use_cache=False).loss / 8).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        limit = 1e-5 * float(once[name].abs().max())
        torch.testing.assert_close(parameter.grad, once[name], rtol=1e-4, atol=limit, msg=name)


def test_a_plan_read_from_json_trains_the_same(case: Case) -> None:
    model, plan = case.converted(t=0.5)
    again = hestia.Plan.from_json(copy.deepcopy(plan.to_json()))
    assert again == plan
    twin = hestia.apply(case.parent().train(), again)
    move(twin, again, 0.5)
    assert torch.equal(logits(twin), logits(model))
