"""apply, restore and freeze: on every architecture, and refused without a trace where they do not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from toy_models import IDS, LINEAR, llama, qwen2, qwen2_moe, same_bits, snapshot, tied_llama

import hestia
from hestia.errors import GuardError, PlanError
from hestia.nn import QuantLinear, knobs_of, quantized_modules


def answer(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def untouched(model: nn.Module, held: dict[str, Tensor], text: str) -> bool:
    """Whether the model is what it was: bits, modules and modes."""
    return same_bits(snapshot(model), held) and repr(model) == text and not list(quantized_modules(model))


@pytest.mark.parametrize("name", LINEAR)
def test_every_architecture_goes_in_and_out(name: str) -> None:
    model = LINEAR[name]().eval()
    held, before = snapshot(model), answer(model)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings
    plan = hestia.plan(model)
    hestia.apply(model, plan)
    assert [path for path, _ in quantized_modules(model)] == list(plan.layers)
    hard = answer(model)
    assert not torch.equal(hard, before)
    hestia.restore(model)
    assert same_bits(snapshot(model), held) and torch.equal(answer(model), before)
    hestia.apply(model, plan)
    codes = hestia.freeze(model)
    assert torch.equal(answer(model), hard)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert all(torch.equal(model.get_parameter(f"{p}.weight"), tensor.dense()) for p, tensor in codes.items())
    for key, tensor in model.state_dict().items():
        assert key.removesuffix(".weight") in codes or torch.equal(tensor, held[key]), key


def test_a_mixture_of_experts_keeps_its_experts() -> None:
    model = qwen2_moe().eval()
    held = snapshot(model)
    hestia.apply(model, hestia.plan(model))
    codes = hestia.freeze(model)
    for key, tensor in model.state_dict().items():
        assert key.removesuffix(".weight") in codes or torch.equal(tensor, held[key]), key


def test_a_frozen_model_can_be_saved_and_loaded_by_transformers(tmp_path: object) -> None:
    model = tied_llama().eval()
    hestia.apply(model, hestia.plan(model))
    hestia.freeze(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(type(model).from_pretrained(tmp_path).eval()), answer(model))


def test_the_optimizer_may_be_made_before_the_surgery() -> None:
    model = qwen2().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hestia.apply(model, hestia.plan(model, "bitnet_ste"))
    before = snapshot(model)
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    optimizer.step()
    assert all(not torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_container_still_counts_and_runs_its_own_children_only() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    x = torch.randn(5, 8)
    hestia.apply(model, hestia.plan(model))
    assert len(model) == 3 and isinstance(model[-1], QuantLinear)
    hard = model(x)
    hestia.freeze(model)
    assert torch.equal(model(x), hard) and type(model[-1]) is nn.Linear


def test_hooks_and_their_handles_go_in_and_out_with_a_layer() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    seen: list[str] = []
    handles = [
        model[0].register_forward_pre_hook(lambda _, args: seen.append("before")),
        model[0].register_forward_pre_hook(lambda _, args, named: seen.append("named"), with_kwargs=True),
        model[0].register_forward_hook(lambda _, args, out: seen.append("after"), always_call=True),
        model[0].register_full_backward_pre_hook(lambda _, out: seen.append("back")),
        model[0].register_full_backward_hook(lambda _, into, out: seen.append("backward")),
    ]
    everything = ["before", "named", "after", "back", "backward"]

    def calls() -> list[str]:
        seen.clear()
        model(torch.ones(2, 8, requires_grad=True)).sum().backward()
        return seen

    plan = hestia.plan(model)
    assert calls() == everything
    assert calls() == everything and isinstance(hestia.apply(model, plan)[0], QuantLinear)
    assert calls() == everything and type(hestia.restore(model)[0]) is nn.Linear
    assert calls() == everything
    hestia.apply(model, plan)
    hestia.freeze(model)
    assert calls() == everything
    hestia.apply(model, plan)
    for handle in handles:
        handle.remove()
    assert calls() == []


def test_hooks_of_fully_shard_stay_behind() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    hestia.apply(model, hestia.plan(model))
    model[0].register_forward_pre_hook(lambda *_: pytest.fail("it would gather shards that are no more"))
    model[0].unshard = None  # what such a layer has, and no other
    hestia.freeze(model)
    model(torch.ones(2, 8))


# --- refusals: what is said, and that nothing was changed ----------------------------------------------------------


def test_apply_twice_is_refused_and_changes_nothing() -> None:
    model = qwen2()
    plan = hestia.plan(model)
    hestia.apply(model, plan)
    layers, held = dict(quantized_modules(model)), snapshot(model)
    with pytest.raises(PlanError, match=r"already converted; hestia\.restore\(model\) first"):
        hestia.apply(model, plan)
    assert dict(quantized_modules(model)) == layers and same_bits(snapshot(model), held)


def wrong_shape(plan: hestia.Plan) -> hestia.Plan:
    path = list(plan.layers)[-1]
    return replace(plan, layers={**plan.layers, path: replace(plan.layers[path], shape=(32, 65))})


def unknown_path(plan: hestia.Plan) -> hestia.Plan:
    return replace(plan, layers={**plan.layers, "model.layers.9.mlp.up_proj": next(iter(plan.layers.values()))})


def not_linear(plan: hestia.Plan) -> hestia.Plan:
    return replace(plan, layers={**plan.layers, "model.norm": next(iter(plan.layers.values()))})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (wrong_shape, r"layers\.1\.mlp\.down_proj: the plan says \(32, 65\), the model has \(32, 64\)"),
        (unknown_path, r"model\.layers\.9\.mlp\.up_proj: the plan names it, the model has no such module"),
        (not_linear, r"model\.norm: the plan wants an nn\.Linear, the model has LlamaRMSNorm"),
    ],
)
def test_a_plan_for_another_model_is_refused_and_changes_nothing(
    spoil: Callable[[hestia.Plan], hestia.Plan], message: str
) -> None:
    model = llama().bfloat16()
    held, text = snapshot(model), repr(model)
    with pytest.raises(PlanError, match=message):
        hestia.apply(model, spoil(hestia.plan(model)))
    assert untouched(model, held, text)


def test_a_plan_of_a_wider_model_is_refused_and_changes_nothing() -> None:
    model = llama()
    held, text = snapshot(model), repr(model)
    with pytest.raises(PlanError, match=r"q_proj: the plan says \(64, 64\), the model has \(32, 32\)"):
        hestia.apply(model, hestia.plan(llama(hidden_size=64)))
    assert untouched(model, held, text)


def two_planned(model: nn.Module) -> None:
    model.get_submodule("model.layers.1.mlp.up_proj").weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")


def planned_and_kept(model: nn.Module) -> None:
    model.get_submodule("model").extra = nn.Linear(32, 64)
    model.get_submodule("model.extra").weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")


def one_layer_twice(model: nn.Module) -> None:
    model.get_submodule("model.layers.1.mlp").up_proj = model.get_submodule("model.layers.0.mlp.up_proj")


@pytest.mark.parametrize(
    ("tie", "other"),
    [
        (two_planned, "model.layers.1.mlp.up_proj"),
        (planned_and_kept, "model.extra"),
        (one_layer_twice, "model.layers.1.mlp.up_proj"),
    ],
)
def test_a_plan_of_an_untied_twin_is_refused_and_changes_nothing(tie: Callable[[nn.Module], None], other: str) -> None:
    """Both would train one weight, and the second to be frozen would round what the first had rounded."""
    model, plan = llama(), hestia.plan(llama())
    tie(model)
    held, text = snapshot(model), repr(model)
    with pytest.raises(PlanError, match=rf"layers\.0\.mlp\.up_proj: its weight is also that of {other}; make the plan"):
        hestia.apply(model, plan)
    assert untouched(model, held, text)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_freezing_a_broken_weight_names_it_and_changes_nothing(value: float) -> None:
    model = qwen2()
    hestia.apply(model, hestia.plan(model))
    path, layer = list(quantized_modules(model))[-1]
    with torch.no_grad():
        layer.weight[3, 5] = value
    layers, held = dict(quantized_modules(model)), snapshot(model)
    with pytest.raises(GuardError, match=rf"{path}: the weight holds NaN or infinity"):
        hestia.freeze(model)
    assert dict(quantized_modules(model)) == layers and same_bits(snapshot(model), held)


@pytest.mark.parametrize(("recipe", "what"), [("lsq", "learned scale"), ("quasar", "importance")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_freezing_a_broken_scale_or_importance_names_it_and_changes_nothing(
    recipe: str, what: str, value: float
) -> None:
    model = qwen2()
    hestia.apply(model, hestia.plan(model, recipe))
    path, layer = list(quantized_modules(model))[-1]
    assert layer.held is not None
    layer.held.data.view(-1)[3] = value
    layers, held = dict(quantized_modules(model)), snapshot(model)
    with pytest.raises(GuardError, match=rf"{path}: the {what} holds NaN or infinity"):
        hestia.freeze(model)
    assert dict(quantized_modules(model)) == layers and same_bits(snapshot(model), held)


def test_there_is_nothing_to_freeze_before_apply_and_after_freeze() -> None:
    model = qwen2()
    with pytest.raises(PlanError, match="nothing to freeze"):
        hestia.freeze(model)
    hestia.apply(model, hestia.plan(model))
    assert len(hestia.freeze(model)) == 14
    with pytest.raises(PlanError, match="nothing to freeze"):
        hestia.freeze(model)


# --- the layer itself ----------------------------------------------------------------------------------------------


def test_fake_quantize_is_what_the_layer_runs() -> None:
    model = qwen2().train()
    traces = {path: 2.0**k for k, path in enumerate(hestia.plan(model).layers)}
    plan = hestia.plan(model, "hestia", sensitivity=traces)
    hestia.apply(model, plan)
    hestia.nn.knobs_of(model).set(pressure=0.625, temperature=0.25)
    for path, layer in quantized_modules(model):
        by_hand = hestia.fake_quantize(
            layer.weight, temperature=0.25 * plan.layers[path].temperature_factor, pressure=0.625
        )
        torch.testing.assert_close(layer.effective_weight(), by_hand, rtol=1e-6, atol=1e-7)
        x = torch.randn(3, layer.in_features)
        expected = x @ by_hand.T + (layer.bias if layer.bias is not None else 0.0)
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_the_layer_shows_what_it_does() -> None:
    model = qwen2()
    hestia.apply(model, hestia.plan(model, "hestia", group_size=16))
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(layer, QuantLinear)
    assert "in_features=32, out_features=32, bias=True, grid=ternary, group_size=16, scale=absmean" in repr(layer)
    assert "pressure=0, temperature=0.3" in repr(model)


def one_layer(recipe: str) -> tuple[nn.Module, Any]:
    """A model converted for the recipe, training, and its first layer."""
    model = llama()
    hestia.apply(model, hestia.plan(model, recipe))
    return model.train(), next(layer for _, layer in quantized_modules(model))


def test_a_factor_heats_the_layer_by_as_much() -> None:
    model, layer = one_layer("hestia")
    layer.temperature_factor = 4.0
    knobs_of(model).set(pressure=1.0, temperature=0.1)
    heated, soft = layer.gain(), layer.effective_weight()
    layer.temperature_factor = 1.0
    assert not torch.equal(heated, layer.gain())
    knobs_of(model).set(pressure=1.0, temperature=0.4)
    assert torch.equal(heated, layer.gain()) and torch.equal(soft, layer.effective_weight())


def test_a_residual_adds_its_share_of_the_weight_at_any_pressure() -> None:
    model, layer = one_layer("arenas")
    for pressure in (0.5, 1.0):
        knobs_of(model).set(pressure=pressure, temperature=0.0, residual=0.3)
        found = layer.effective_weight().detach()
        knobs_of(model).set(pressure=pressure, temperature=0.0)
        torch.testing.assert_close(found, layer.effective_weight().detach() + 0.3 * layer.weight.detach())


def test_what_a_correction_pulls_to_has_the_learned_scale() -> None:
    _, layer = one_layer("lsq")
    before = layer.unsnapped()
    layer.held.data.mul_(2.0)
    assert float(layer.unsnapped().abs().max()) == pytest.approx(2.0 * float(before.abs().max()))


def test_a_folded_shift_of_a_frozen_layer_stays_frozen() -> None:
    _, layer = one_layer("tequila")
    layer.weight.requires_grad_(False)
    assert layer.bias is None
    layer.fold_shift()
    assert layer.bias is not None and not layer.bias.requires_grad


@pytest.mark.parametrize("recipe", ["hearth", "lsq", "quasar"])
@pytest.mark.parametrize(
    ("parent", "cast"),
    [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.bfloat16, torch.float32)],
)
def test_a_cast_reaches_everything_but_the_latent_weights(recipe: str, parent: torch.dtype, cast: torch.dtype) -> None:
    """What is trained stays fp32 whatever the rest of the model is, and freezes to the rest's dtype of then."""
    model = qwen2().to(parent)
    hestia.apply(model, hestia.plan(model, recipe))
    before = {path: (layer.weight.clone(), layer.held) for path, layer in quantized_modules(model)}
    codes = {path: layer.codes().codes.clone() for path, layer in quantized_modules(model)}
    model.to(cast).eval()
    for path, layer in quantized_modules(model):
        weight, held = before[path]
        assert torch.equal(layer.weight, weight) and layer.weight.dtype == torch.float32
        assert held is None or (layer.held is not None and torch.equal(layer.held, held))
        assert layer.bias is None or layer.bias.dtype == cast
    hard = answer(model)
    frozen = hestia.freeze(model)
    assert all(torch.equal(frozen[path].codes, codes[path]) for path in codes)
    assert {p.dtype for p in model.parameters()} == {cast}
    torch.testing.assert_close(answer(model), hard, rtol=0, atol=0)
    assert model.double().get_parameter("model.layers.0.mlp.up_proj.weight").dtype == torch.float64


def test_a_wrapper_is_looked_through() -> None:
    """Paths, codes and biases are the model's, whatever compiles or copies it."""
    for wrap in (lambda m: torch.compile(m, backend="eager"), nn.DataParallel):
        for recipe in ("hearth", "tequila"):
            plain, inner = llama(), llama()
            plan = hestia.plan(plain, recipe)
            wrapped = wrap(inner)
            assert hestia.plan(wrapped, recipe).layers == plan.layers
            assert hestia.apply(wrapped, plan) is wrapped
            assert [path for path, _ in quantized_modules(wrapped)] == list(plan.layers)
            with pytest.raises(PlanError, match="already converted"):
                hestia.apply(wrapped, plan)
            assert hestia.restore(wrapped) is wrapped and not list(quantized_modules(inner))
            codes = hestia.freeze(hestia.apply(wrapped, plan))
            hestia.apply(plain, plan)
            assert list(codes) == list(hestia.freeze(plain))
            assert same_bits(snapshot(inner), snapshot(plain))
            assert inner.config.to_dict() == plain.config.to_dict()


def test_layers_that_are_more_than_linear_are_not_replaced() -> None:
    """A forward of their own, in the instance; a parameter of their own; hooks that fetch the weight."""

    class Gated(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.gate = nn.Parameter(torch.ones(8))

    plain = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    plan = hestia.plan(plain, group_size="row", target="hf")
    for strange in (Gated(), nn.Linear(8, 8)):
        if not isinstance(strange, Gated):
            strange.forward = lambda x: x  # type: ignore[method-assign]
        model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": strange})
        found = hestia.plan(model, target="hf", allow_partial=True)
        assert list(found.layers) == ["a"] and "not an nn.Linear" in found.warnings[0]
        with pytest.raises(PlanError, match=r"b: more than an nn\.Linear"):
            hestia.apply(model, plan)
    offloaded = cpu_offload(llama().eval(), execution_device=torch.device("cpu"))
    with pytest.raises(PlanError, match=r"q_proj: offloaded or spread over devices by accelerate"):
        hestia.plan(offloaded)
    adapted = llama()
    adapted.peft_config = {"default": object()}
    with pytest.raises(PlanError, match="merge them first"):
        hestia.plan(adapted)
