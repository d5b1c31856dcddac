"""Every architecture: exact bytes, the same logits where an engine is installed, or a refusal before any file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "exports"))

import toy_architectures

from hestia.errors import ExportError
from hestia.export import export_model, llama_cpp
from hestia.export.gguf import export_gguf
from hestia.export.gguf_check import check_gguf
from hestia.export.gguf_reader import open_checked
from hestia.export.verify import verify
from hestia.targets import target

IDS = torch.tensor([[(i * 7919) % 380 for i in range(40)]])


@pytest.mark.parametrize("kind", toy_architectures.ARCHITECTURES)
def test_exact_in_gguf_and_run_where_llama_cpp_is(tmp_path: Path, kind: str) -> None:
    architecture = toy_architectures.ARCHITECTURES[kind]
    frozen = toy_architectures.freeze(architecture.build(), tmp_path / "run", tokenizer=architecture.tokenizer())
    path = tmp_path / "a.gguf"
    export_gguf(frozen, target("gguf:q2_0"), path)
    assert check_gguf(path, frozen, "gguf:q2_0") == []
    file = open_checked(path)
    assert file.text("tokenizer.chat_template") == toy_architectures.TEMPLATE
    assert file.text("hestia.generation_config") == toy_architectures.GENERATION
    keys = dict(file.metadata)
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
