"""Every architecture: exact bytes, the same logits where an engine is installed, or a refusal before any file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "exports"))

import toy_architectures

from hestia.errors import ExportError
from hestia.export import engines, export_model, llama_cpp, mlx_engine
from hestia.export.gguf import export_gguf
from hestia.export.gguf_check import check_gguf
from hestia.export.gguf_families import window_of
from hestia.export.gguf_reader import open_checked
from hestia.export.huggingface import load, logits
from hestia.export.mlx import export_mlx, mlx_config
from hestia.export.verify import verify
from hestia.targets import target

LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
IDS = torch.tensor([[(i * 7919) % 380 for i in range(40)]])


@pytest.mark.parametrize("kind", toy_architectures.ARCHITECTURES)
def test_exact_in_gguf_and_run_where_llama_cpp_is(tmp_path: Path, kind: str) -> None:
    architecture = toy_architectures.ARCHITECTURES[kind]
    width = {"hidden_size": 320} if kind == "Gemma 3" else {}  # its root, the embedding's scale, is not exact in bf16
    model = architecture.build(**width)
    frozen = toy_architectures.freeze(model, tmp_path / "run", tokenizer=architecture.tokenizer())
    path = tmp_path / "a.gguf"
    export_gguf(frozen, target("gguf:q2_0"), path)
    assert check_gguf(path, frozen, "gguf:q2_0") == []
    file = open_checked(path)
    assert file.text("tokenizer.chat_template") == toy_architectures.TEMPLATE
    assert file.text("hestia.generation_config") == toy_architectures.GENERATION
    keys = dict(file.metadata)
    window = frozen.config.get("sliding_window")
    for key, value in keys.items():
        if key.endswith(".attention.sliding_window"):
            assert value.show(0) == str(window)
    assert any(key.endswith("sliding_window") for key in keys) == (kind in ("Gemma 2", "Gemma 3"))
    assert keys["general.sampling.top_k"].show(0) == "20" and "general.sampling.temp" in keys
    if not llama_cpp.available():
        return
    result = verify(path, frozen.run, token_ids=IDS)
    assert result.ok, result.differences
    assert result.kl is not None and result.kl < 1.2 * result.details["kl_emulated"] + 1e-9
    assert result.details["tokenizer"]["equal"] > 15


@pytest.mark.parametrize("kind", toy_architectures.REFUSED)
@pytest.mark.parametrize("name", ["gguf:q2_0", "mlx"])
def test_refused_before_any_file(tmp_path: Path, kind: str, name: str) -> None:
    frozen = toy_architectures.freeze(toy_architectures.REFUSED[kind].build(), tmp_path / "run")
    with pytest.raises(ExportError, match=r"no GGUF export|query_pre_attn_scalar|no sliding windows"):
        export_model(frozen, name, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("fallback", [True, False])
def test_unigram_tokenizers_go_where_they_are_carried_as_they_are(tmp_path: Path, fallback: bool) -> None:
    architecture = toy_architectures.ARCHITECTURES["Llama, own head"]
    frozen = toy_architectures.freeze(
        architecture.build(), tmp_path / "run", tokenizer=toy_architectures.unigram(fallback=fallback)
    )
    with pytest.raises(ExportError, match="Unigram tokenizer cannot be exported to GGUF"):
        export_model(frozen, "gguf:q2_0", tmp_path / "a.gguf")
    for name in ("hf", "mlx"):
        export_model(frozen, name, tmp_path / name)
        for file in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
            assert (tmp_path / name / file).read_bytes() == (frozen.folder / file).read_bytes()
    assert verify(tmp_path / "hf", frozen.run, token_ids=IDS).ok


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("Gemma 2, other scale", {}, "query_pre_attn_scalar 100, llama.cpp takes 64"),
        ("Gemma 2", {"layer_types": ["full_attention"] * 2}, "layer_types"),
        ("Gemma 2", {"final_logit_softcapping": None}, "always has both soft caps"),
        ("Gemma 3", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping has no GGUF export"),
        ("SmolLM3", {"no_rope_layers": [1, 1, 1, 1]}, "no_rope_layers"),
    ],
)
def test_settings_that_llama_cpp_has_built_in_otherwise(
    tmp_path: Path, kind: str, change: dict[str, object], message: str
) -> None:
    architecture = {**toy_architectures.ARCHITECTURES, **toy_architectures.REFUSED}[kind]
    frozen = toy_architectures.freeze(architecture.build(), tmp_path / "run")
    frozen.config.update(change)
    with pytest.raises(ExportError, match=message):
        export_gguf(frozen, target("gguf:q2_0"), tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("Gemma 3", {"layer_types": ["sliding_attention"] * 5}, "n at most 5"),
        ("Gemma 3", {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}, "n at most 3"),
        ("Gemma 3", {"final_logit_softcapping": 30.0}, "mlx-lm has no final_logit_softcapping"),
        ("Gemma 3", {"use_bidirectional_attention": True}, "mlx-lm has no use_bidirectional_attention"),
        ("Gemma 3", {"rope_parameters": {"full_attention": DEFAULT, "sliding_attention": LINEAR}}, "windowed layers"),
        (
            "Gemma 3",
            {"rope_parameters": {"full_attention": LONG, "sliding_attention": DEFAULT}},
            "rope type 'longrope'",
        ),
        (
            "Gemma 3",
            {"attention_bias": True},
            "attention_bias; mlx-lm loads no bias of self_attn.q_proj for gemma3_text",
        ),
        ("Qwen3", {"attention_bias": True}, "attention_bias; mlx-lm loads no bias of self_attn.q_proj for qwen3"),
        (
            "Qwen3",
            {"rope_parameters": LONG},
            r"rope type 'longrope'; checked in mlx-lm for qwen3: default, linear, llama3, yarn",
        ),
        ("Qwen3", {"rope_parameters": {**YARN, "attention_factor": 1.5}}, "yarn with attention_factor 1.5"),
        ("Qwen3", {"rope_parameters": {**YARN, "truncate": False}}, "yarn with truncate False"),
        ("Qwen3", {"rope_parameters": {**YARN, "original_max_position_embeddings": None}}, "original_max_position_em"),
        ("Gemma 2", {"rope_parameters": LINEAR, "sliding_window": 128}, r"rope type 'linear'.* gemma2: default$"),
        ("Qwen2, biases", {"head_dim": 32}, "qwen2 in mlx-lm needs head_dim x heads"),
        ("Llama, own head", {"partial_rotary_factor": 0.5}, "mlx-lm rotates whole heads of llama"),
        ("Llama, own head", {"hidden_act": "gelu"}, "llama in mlx-lm uses silu, the model gelu"),
    ],
)
def test_settings_that_mlx_lm_has_built_in_otherwise(
    tmp_path: Path, kind: str, change: dict[str, object], message: str
) -> None:
    frozen = toy_architectures.freeze(toy_architectures.ARCHITECTURES[kind].build(), tmp_path / "run")
    frozen.config.update(change)
    with pytest.raises(ExportError, match=message):
        export_mlx(frozen, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_the_rope_scaling_of_full_layers_is_where_mlx_lm_reads_it(tmp_path: Path) -> None:
    rope = {"full_attention": LINEAR, "sliding_attention": DEFAULT}
    model = toy_architectures.ARCHITECTURES["Gemma 3"].build(rope_parameters=rope, hidden_size=320)
    frozen = toy_architectures.freeze(model, tmp_path / "run", tokenizer=toy_architectures.byte_fallback())
    config = mlx_config(frozen)
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert (config["rope_theta"], config["rope_local_base_freq"], config["sliding_window_pattern"]) == (1e6, 1e4, 6)
    export_mlx(frozen, tmp_path / "out")
    if mlx_engine.available():
        result = verify(tmp_path / "out", frozen.run, token_ids=IDS)
        assert result.ok, result.differences


@pytest.mark.skipif(not mlx_engine.available(), reason="mlx-lm is not installed")
@pytest.mark.parametrize("rope", [YARN, {**YARN, "beta_fast": 16.0, "beta_slow": 2.0}, LINEAR])
def test_scaled_rotations_are_computed_alike_by_mlx_lm(tmp_path: Path, rope: dict[str, object]) -> None:
    frozen = toy_architectures.freeze(
        toy_architectures.ARCHITECTURES["Qwen3"].build(rope_parameters=rope), tmp_path / "run"
    )
    export_mlx(frozen, tmp_path / "out")
    result = verify(tmp_path / "out", frozen.run, token_ids=IDS)
    assert result.ok, result.differences
    assert result.max_abs_logit_diff is not None and result.max_abs_logit_diff < 1e-4


def test_a_window_that_no_layer_has_is_none(tmp_path: Path) -> None:
    build = toy_architectures.ARCHITECTURES["Qwen2, biases"].build
    for last, window in ((9, None), (1, 64)):
        model = build(use_sliding_window=True, sliding_window=64, max_window_layers=last)
        assert window_of(model.config.to_dict()) == window
        frozen = toy_architectures.freeze(model, tmp_path / f"run-{last}")
        export_gguf(frozen, target("gguf:q2_0"), tmp_path / f"{last}.gguf")
        keys = dict(open_checked(tmp_path / f"{last}.gguf").metadata)
        assert int(keys["qwen2.context_length"].show(0)) == (window or 128)
        if window is None:
            assert mlx_config(frozen)["model_type"] == "qwen2"
        else:
            with pytest.raises(ExportError, match="mlx-lm has no sliding windows for qwen2, the model 64"):
                mlx_config(frozen)


def test_gemma_3_is_compared_with_mlx_lm_at_its_scale_of_the_embedding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = toy_architectures.ARCHITECTURES["Gemma 3"].build(hidden_size=320)
    frozen = toy_architectures.freeze(model, tmp_path / "run", tokenizer=toy_architectures.byte_fallback())
    export_mlx(frozen, tmp_path / "out")

    def computed(scale: float) -> Callable[[Path, list[list[int]]], np.ndarray]:
        def answer(path: Path, ids: list[list[int]]) -> np.ndarray:
            engine = load(frozen.folder)
            embedding = engine.get_input_embeddings()
            embedding.register_forward_hook(lambda module, given, out: out / 320**0.5 * scale)
            return logits(engine, torch.tensor(ids)).numpy()

        return answer

    monkeypatch.setattr(engines, "version", lambda package: "0.32")
    monkeypatch.setattr(mlx_engine, "available", lambda: True)
    monkeypatch.setattr(mlx_engine, "logits", computed(17.875))
    result = verify(tmp_path / "out", frozen.run, token_ids=IDS)
    assert result.ok, result.differences
    assert any("17.8885 as 17.875" in note for note in result.notes)
    monkeypatch.setattr(mlx_engine, "logits", computed(320**0.5))
    assert "logits: differ by" in verify(tmp_path / "out", frozen.run, token_ids=IDS).differences[0]
