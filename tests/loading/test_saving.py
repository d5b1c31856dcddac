"""What a frozen child carries of its parent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file
from toy_folders import edit_config
from transformers import AutoModelForCausalLM, Gemma3TextConfig, PretrainedConfig

from hestia import loading
from hestia.errors import ConfigError
from hestia.loading.saving import earlier_keys


def test_a_frozen_child_carries_its_parents_tokenizer_files_byte_for_byte(parent_copy: Path, tmp_path: Path) -> None:
    (parent_copy / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    (parent_copy / "evil.py").write_text("", encoding="utf-8")
    named = Path("additional_chat_templates", "tool_use.jinja")
    (parent_copy / named).parent.mkdir()
    (parent_copy / named).write_bytes(b"{{ tools }}\r\n")
    (parent_copy / named.parent / "evil.py").write_text("", encoding="utf-8")
    (parent_copy / named.parent / "out.jinja").symlink_to("/etc/hostname")
    source = loading.resolve(str(parent_copy))
    model = loading.load_model(source)
    loading.cast_parameters(model, torch.bfloat16)
    loading.save(model, source, tmp_path / "child", loading.load_tokenizer(source))
    names = {path.name for path in (tmp_path / "child").iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "additional_chat_templates",
    }  # fmt: skip
    assert [path.name for path in (tmp_path / "child" / named.parent).iterdir()] == ["tool_use.jinja"]
    for name in (
        str(named),
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ):
        assert (tmp_path / "child" / name).read_bytes() == (parent_copy / name).read_bytes(), name
    assert {t.dtype for t in load_file(tmp_path / "child" / "model.safetensors").values()} == {torch.bfloat16}


def test_a_frozen_child_carries_the_terms_of_its_parent(parent_copy: Path, tmp_path: Path) -> None:
    terms = ("LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md")
    for name in terms:
        (parent_copy / name).write_text(name, encoding="utf-8")
    source = loading.resolve(str(parent_copy))
    loading.save(loading.load_model(source), source, tmp_path / "child")
    assert all((tmp_path / "child" / name).read_text(encoding="utf-8") == name for name in terms)
    assert {parent_copy / name for name in terms} < set(loading.copied(parent_copy))


def test_a_cache_without_terms_and_card_will_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def snapshot(name: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        if "README.md" in allow_patterns:
            raise LocalEntryNotFoundError("incomplete")
        return str(tmp_path)

    monkeypatch.setattr(loading.saving, "snapshot_download", snapshot)
    assert loading.tokenizer_folder(loading.Source("owner/name", "owner/name", "c0ffee")) == tmp_path
    assert "LICENSE*" in asked[0] and "tokenizer*" in asked[0]
    assert "LICENSE*" not in asked[1] and "tokenizer*" in asked[1]


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def saved(parent: Path, folder: Path) -> dict[str, Any]:
    """config.json of a child of ``parent``."""
    source = loading.resolve(str(parent))
    loading.save(loading.load_model(source), source, folder, loading.load_tokenizer(source))
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def test_transformers_4_finds_the_rotation_where_it_looks(parent_copy: Path, tmp_path: Path) -> None:
    edit_config(parent_copy, rope_parameters=LLAMA3)
    config = saved(parent_copy, tmp_path / "child")
    assert config["rope_parameters"] == LLAMA3
    assert config["rope_theta"] == 500000.0
    assert config["rope_scaling"] == {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        a, b = (AutoModelForCausalLM.from_pretrained(f)(ids).logits for f in (parent_copy, tmp_path / "child"))
    assert torch.equal(a, b)


def test_both_rotations_of_gemma_3() -> None:
    config = Gemma3TextConfig(num_hidden_layers=6).to_dict()
    assert config["rope_parameters"]["full_attention"]["rope_theta"] == 1_000_000
    assert earlier_keys(config) == {"rope_theta": 1_000_000, "rope_local_base_freq": 10_000}
    assert earlier_keys({}) == earlier_keys({"rope_theta": 1.0, "rope_parameters": {"rope_theta": 1.0}}) == {}


def test_a_head_of_its_own_is_said_to_be_one(parent_copy: Path, tmp_path: Path) -> None:
    """transformers 5 leaves a stored head untied, whatever config.json says."""
    edit_config(parent_copy, tie_word_embeddings=True)
    config = saved(parent_copy, tmp_path / "child")
    assert config["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(tmp_path / "child" / "model.safetensors")


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model", "vocab.txt", "chat_template.jinja"])
def test_a_tokenizer_that_is_a_link_to_elsewhere_is_refused_before_training(
    parent_copy: Path, tmp_path: Path, name: str
) -> None:
    source = loading.resolve(str(parent_copy))
    loading.require_own_tokenizer(source)
    (tmp_path / name).write_text("{}")
    (parent_copy / name).unlink(missing_ok=True)
    (parent_copy / name).symlink_to(tmp_path / name)
    with pytest.raises(ConfigError, match=r"a link to .* given to nobody\. Put the file itself there: cp -L"):
        loading.require_own_tokenizer(source)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized already; take the checkpoint in bf16"),
        ({"vision_config": {"hidden_size": 8}}, "a model of more than text"),
        ({"audio_config": {"hidden_size": 8}}, "a model of more than text"),
        ({"rescale_every": 6}, "divide their weights by powers of two, .* set rescale_every to 0"),
    ],
)
def test_what_could_not_be_handed_back_is_refused(parent_copy: Path, config: dict[str, Any], says: str) -> None:
    source = loading.resolve(str(parent_copy))
    model = loading.empty_model(source, loading.load_config(source))
    with pytest.raises(ConfigError, match=says):
        loading.require_trainable(source, PretrainedConfig(**config), model)
    loading.require_trainable(source, model.config, model)
    type(model).__module__, before = "transformers_modules.evil", type(model).__module__
    try:
        with pytest.raises(ConfigError, match="code from its own folder"):
            loading.require_trainable(source, model.config, model)
    finally:
        type(model).__module__ = before


def test_a_parent_s_generation_settings_that_saving_refuses_are_copied(parent_copy: Path, tmp_path: Path) -> None:
    """A temperature without sampling: transformers refuses to write it, at the end of a night."""
    settings = parent_copy / "generation_config.json"
    settings.write_text(json.dumps({"temperature": 0.7, "top_p": 0.9}), encoding="utf-8")
    source = loading.resolve(str(parent_copy))
    model = loading.load_model(source)
    model.generation_config.top_k = -1  # as a loop of one's own may have left it
    loading.save(model, source, tmp_path / "child")
    assert (tmp_path / "child" / "generation_config.json").read_bytes() == settings.read_bytes()
    assert model.generation_config.top_k == -1
