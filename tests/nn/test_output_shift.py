"""An output shift becomes an ordinary bias: in the frozen layer, in both kinds of file, or it is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import toy_models
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import hestia
from hestia.errors import PlanError
from hestia.export import export_model
from hestia.export.frozen import FrozenModel, save_codes
from hestia.nn import knobs_of, quantized_modules
from hestia.tiny import model_path

IDS = toy_models.IDS
PLACES = {"attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_down": "mlp.down_proj"}


def dead_sum(w: Tensor, strength: float) -> Tensor:
    """Row by row, weight by weight."""
    out = []
    for row in w.tolist():
        limit = 0.5 * (sum(map(abs, row)) / len(row) + 1e-5)
        out.append(strength * sum(x for x in row if abs(x) < limit))
    return torch.tensor(out)


def layer_of(bias: bool, strength: float = 0.5) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 6, bias=bias))
    plan = hestia.plan(model, "tequila", options={"strength": strength})
    hestia.apply(model, plan)
    return model, dict(quantized_modules(model))["0"]


@pytest.mark.parametrize("bias", [False, True])
def test_output_gradient_and_frozen_bias_are_the_dead_zones_sum(bias: bool) -> None:
    model, layer = layer_of(bias)
    x, w = torch.randn(5, 24), layer.weight.detach().clone()
    given = torch.zeros(6) if layer.bias is None else layer.bias.detach().clone()
    expected = given + dead_sum(w, 0.5)
    model.train()
    knobs_of(model).set(pressure=1.0, temperature=0.0)
    out = model(x)
    s = w.abs().mean(1, keepdim=True) + 1e-5
    q = torch.clamp(torch.round(w / s), -1, 1)
    torch.testing.assert_close(out, x @ (s * q).T + expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    # identity through rounding everywhere, and on the dead zone strength times the gradient of the output besides
    through = upstream.T @ x + 0.5 * upstream.sum(0)[:, None] * (q == 0)
    torch.testing.assert_close(layer.weight.grad, through, rtol=1e-5, atol=1e-5)

    model.eval()
    with torch.no_grad():
        hard = model(x)
        hestia.freeze(model)
        linear = model[0]  # type: ignore[index]
        assert torch.equal(model(x), hard)
        assert type(linear) is nn.Linear
        torch.testing.assert_close(linear.bias.detach(), expected, rtol=1e-6, atol=1e-7)


def test_pressure_eases_the_shift_in() -> None:
    model, layer = layer_of(True)
    model.train()
    x = torch.zeros(1, 24)
    for pressure in (0.0, 0.25, 1.0):
        knobs_of(model).set(pressure=pressure, temperature=0.0)
        expected = layer.bias + pressure * dead_sum(layer.weight.detach(), 0.5)
        torch.testing.assert_close(model(x)[0], expected, rtol=1e-5, atol=1e-6)


def frozen_run(folder: Path, make: Any, target: str, **more: Any) -> tuple[FrozenModel, Tensor, Any]:
    model = make(**more)
    hestia.apply(model, hestia.plan(model, "tequila", target, options={"strength": 0.5}))
    with torch.no_grad():
        hard = model.eval()(input_ids=IDS).logits
        codes = hestia.freeze(model)
        assert torch.equal(model(input_ids=IDS).logits, hard)
    model.save_pretrained(folder / "model")
    save_codes(folder / "codes.safetensors", codes)
    return FrozenModel(folder), hard, model


@pytest.mark.parametrize("make", [toy_models.llama, toy_models.tied_llama])
def test_the_file_says_that_it_has_biases_and_loads_with_them(tmp_path: Path, make: Any) -> None:
    frozen, hard, _ = frozen_run(tmp_path, make, "hf")
    assert frozen.config["attention_bias"] is True and frozen.config["mlp_bias"] is True
    dense = AutoModelForCausalLM.from_pretrained(frozen.folder).eval()
    export_model(frozen, "hf", tmp_path / "hf")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").eval()
    with torch.no_grad():
        assert torch.equal(dense(input_ids=IDS).logits, hard)
        assert torch.equal(packed(input_ids=IDS).logits, hard)


def test_kept_layers_of_a_biased_architecture_get_zeros(tmp_path: Path) -> None:
    model = toy_models.llama()
    plan = hestia.plan(model, "tequila", skip="*.q_proj", allow_partial=True)
    hestia.freeze(hestia.apply(model, plan))
    assert not model.get_parameter("model.layers.0.self_attn.q_proj.bias").any()
    assert model.get_parameter("model.layers.0.self_attn.k_proj.bias").any()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert list(again.state_dict()) == list(model.state_dict())


def test_attention_alone_needs_no_bias_in_the_mlp() -> None:
    model = toy_models.llama()
    hestia.freeze(hestia.apply(model, hestia.plan(model, "tequila", skip="*.mlp.*", allow_partial=True)))
    assert model.config.attention_bias is True and model.config.mlp_bias is False
    assert "model.layers.0.mlp.up_proj.bias" not in model.state_dict()


def test_llama_cpp_gets_the_biases_with_the_rows_of_q_and_k_in_its_order(tmp_path: Path) -> None:
    frozen, _, model = frozen_run(tmp_path, toy_models.llama, "gguf:q4_0", vocab_size=4096)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(model_path() / name, tmp_path / "model" / name)
    export_model(frozen, "gguf:q4_0", tmp_path / "model.gguf")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    for name, path in PLACES.items():
        bias = model.get_parameter(f"model.layers.1.{path}.bias").detach()
        assert torch.equal(torch.from_numpy(tensors[f"blk.1.{name}.bias"].data.copy()), bias), name
    q = model.get_parameter("model.layers.0.self_attn.q_proj.bias").detach()
    turned = q.reshape(2, 2, 8).transpose(1, 2).flatten()  # two heads of 16: 0, 8, 1, 9, ...
    assert torch.equal(torch.from_numpy(tensors["blk.0.attn_q.bias"].data.copy()), turned)


@pytest.mark.parametrize(
    ("make", "target", "message"),
    [
        (toy_models.qwen2, "hf", "Qwen2ForCausalLM has no bias for 8 of 14 tensors, the first is .*o_proj"),
        (toy_models.mistral, "hf", "MistralForCausalLM has no bias for 14 of 14 tensors"),
    ],
)
def test_a_model_without_a_place_for_them_is_refused_by_name(make: Any, target: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        hestia.plan(make(), "tequila", target)
    assert hestia.plan(toy_models.qwen2(), "tequila", "hf", skip=["*.mlp.*", "*.o_proj"], allow_partial=True).layers


def test_an_engine_without_a_place_for_them_is_refused_by_name() -> None:
    keep: dict[str, Any] = {"skip": "*.mlp.*", "allow_partial": True}
    assert hestia.plan(toy_models.qwen3(), "tequila", "hf", **keep).layers  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"llama.cpp loads none for 2 of 8 tensors of qwen3, the first is .*o_proj"):
        hestia.plan(toy_models.qwen3(), "tequila", "gguf:q4_0", **keep)
    with pytest.raises(PlanError, match=r"mlx-lm loads none for 8 of 8 tensors of qwen3, the first is .*k_proj"):
        hestia.plan(toy_models.qwen3(), "tequila", ["hf", "mlx"], **keep)
    keep["skip"] = ["*.mlp.*", "*.o_proj"]  # the option that biases the others gives o_proj one, of zeros
    with pytest.raises(PlanError, match=r"llama.cpp loads none for 2 of 8 tensors of qwen3, the first is .*o_proj"):
        hestia.plan(toy_models.qwen3(), "tequila", "gguf:q4_0", **keep)
