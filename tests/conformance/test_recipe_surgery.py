"""Every recipe leaves the model its owner's: same Parameters, keys, ties, biases and dtypes, and a way back."""

from __future__ import annotations

import copy

import pytest
import torch
from conformance import PORTS_BIASES, Case, disturb, knob_modules, logits, move, without_ports
from torch import nn
from toy_models import same_bits, snapshot

import hestia
from hestia.nn import knobs_of, quantized_modules

pytestmark = pytest.mark.filterwarnings("ignore:the weights have changed since hestia.apply")  # by hand, in place


def parameters(model: nn.Module) -> dict[str, int]:
    return {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}


def is_tied(model: nn.Module) -> bool:
    return model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way_out", ["freeze", "restore"])
def test_parameters_keys_ties_and_biases_survive_the_way_in_and_out(
    case: Case, dtype: torch.dtype, way_out: str
) -> None:
    model = case.parent(dtype)
    before, held, text = parameters(model), snapshot(model), repr(model)
    plan = case.plan(model)
    assert hestia.apply(model, plan) is model
    assert {n: i for n, i in parameters(model).items() if n in before} == before and is_tied(model)
    assert without_ports(model.state_dict()) == list(held) and without_ports(parameters(model)) == list(before)
    for name, parameter in model.named_parameters():
        latent = name.removesuffix(".weight") in plan.layers or "._hestia." in name
        assert parameter.dtype == (torch.float32 if latent else dtype), name
    disturb(model)
    hestia.freeze(model) if way_out == "freeze" else hestia.restore(model)
    after = model.state_dict()
    added = PORTS_BIASES if case.shifts and way_out == "freeze" else []
    assert {n: i for n, i in parameters(model).items() if n not in added} == before and is_tied(model)
    assert [name for name in after if name not in added] == list(held) and {*added} <= {*after}
    assert not knob_modules(model) and (repr(model) == text or bool(added))
    for name, tensor in held.items():
        assert after[name].dtype == dtype
        if name.removesuffix(".weight") not in plan.layers and not (case.shifts and name.endswith("_proj.bias")):
            assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_restore_gives_the_parent_back_bit_for_bit(case: Case, dtype: torch.dtype) -> None:
    model = case.parent(dtype)
    model.get_parameter("model.layers.0.mlp.up_proj.weight").data[0, 0] = -0.0
    held = snapshot(model)
    hestia.restore(hestia.apply(model, case.plan(model)))
    assert same_bits(snapshot(model), held)
    assert not list(quantized_modules(model)) and not knob_modules(model)


def test_apply_and_freeze_keep_the_mode_and_what_is_trainable(case: Case) -> None:
    model = case.parent().eval()
    model.get_parameter("model.layers.0.self_attn.q_proj.weight").requires_grad_(False)
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {path: module.training for path, module in model.named_modules()}
    hestia.apply(model, case.plan(model))
    assert {p: m.training for p, m in model.named_modules() if p in modes} == modes
    hestia.freeze(model)
    assert {p: m.training for p, m in model.named_modules()} == modes
    after = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: needs for name, needs in after.items() if name in trainable} == trainable


def test_a_deep_copy_has_knobs_of_its_own_and_shares_them_among_its_layers(case: Case) -> None:
    model, plan = case.converted(t=0.5)
    twin = copy.deepcopy(model)
    assert len(knob_modules(twin)) == 1 and knob_modules(twin).isdisjoint(knob_modules(model))
    assert set(parameters(twin).values()).isdisjoint(parameters(model).values()) and is_tied(twin)
    before = logits(model)
    assert torch.equal(logits(twin), before)
    knobs_of(twin).set(pressure=0.25, temperature=0.7)
    assert knobs_of(model).values["pressure"] == plan.schedule.pressure(0.5)
    assert torch.equal(logits(model), before) and not torch.equal(logits(twin), before)
    hestia.restore(twin)
    assert len(knob_modules(model)) == 1


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double", "float"])
def test_a_cast_leaves_the_knobs_in_fp32_and_exact(case: Case, cast: str) -> None:
    model, _ = case.converted()
    knobs_of(model).set(pressure=1.0 / 3.0, temperature=0.123456789)
    getattr(model, cast)()
    knobs = knobs_of(model)
    assert knobs.pressure.dtype == knobs.temperature.dtype == torch.float32
    assert knobs.pressure == torch.tensor(1.0 / 3.0) and knobs.temperature == torch.tensor(0.123456789)
    assert len(knob_modules(model)) == 1
    assert bool(torch.isfinite(logits(model)).all())


def test_a_model_born_on_the_meta_device_is_filled_after_the_surgery(case: Case) -> None:
    plain = case.parent()
    with torch.device("meta"):
        model = case.make()
    plan = case.plan(model)
    hestia.apply(model, plan).train()
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    move(model, plan, 0.5)
    model.to_empty(device="cpu")
    knobs = knobs_of(model)
    assert knobs.pressure == torch.tensor(plan.schedule.pressure(0.5))
    assert knobs.temperature == torch.tensor(plan.schedule.base_temperature(0.5))
    model.tie_weights()  # to_empty unties, with hestia or without
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and not without_ports(missing)
    for _, layer in quantized_modules(model):
        layer.restart()
    for name, buffer in plain.named_buffers():  # rotary frequencies are the architecture's to refill
        model.get_buffer(name).copy_(buffer)
    expected, _ = case.converted(t=0.5)
    assert torch.equal(logits(model), logits(expected))
    assert len(knob_modules(model)) == 1
