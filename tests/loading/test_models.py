"""Configurations and weights: what comes in, and what is refused by name."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_folders import edit_config
from toy_runs import make_parent
from transformers import LlamaForCausalLM

import hestia
from hestia import loading
from hestia.errors import ConfigError


def test_a_model_comes_in_fp32_and_eval_mode_whatever_it_is_stored_in(tmp_path: Path) -> None:
    folder = make_parent(tmp_path / "model")
    LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    source = loading.resolve(str(folder))
    model = loading.load_model(source)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(p, stored[name].float()) for name, p in model.named_parameters())
    assert loading.parent_dtype(source, loading.load_config(source)) == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_parents_dtype_without_a_word_in_the_config_is_that_of_its_tensors(
    parent_copy: Path, dtype: torch.dtype
) -> None:
    tensors = {name: t.to(dtype) for name, t in load_file(parent_copy / "model.safetensors").items()}
    save_file(tensors, parent_copy / "model.safetensors", metadata={"format": "pt"})
    edit_config(parent_copy, dtype=None, torch_dtype=None)
    source = loading.resolve(str(parent_copy))
    config = loading.load_config(source)
    assert config.dtype == loading.parent_dtype(source, config) == dtype
    assert hestia.plan(loading.empty_model(source, config)).itemsize == dtype.itemsize


def test_a_model_for_another_task_is_refused(parent_copy: Path) -> None:
    edit_config(parent_copy, architectures=["BertForMaskedLM"])
    with pytest.raises(ConfigError, match="BertForMaskedLM is no causal language model"):
        loading.load_config(loading.resolve(str(parent_copy)))
    edit_config(parent_copy, architectures=["LlamaForCausalLM", "LlamaForTokenClassification"])
    loading.load_config(loading.resolve(str(parent_copy)))


def test_the_empty_model_has_every_shape_and_no_weight(toy_parent: Path) -> None:
    source = loading.resolve(str(toy_parent))
    empty = loading.empty_model(source, loading.load_config(source))
    full = loading.load_model(source)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in full.named_parameters()}


def test_weights_that_do_not_fit_are_named(parent_copy: Path) -> None:
    source = loading.resolve(str(parent_copy))
    tensors = load_file(parent_copy / "model.safetensors")
    cut = {name: t for name, t in tensors.items() if "layers.1.mlp" not in name}
    save_file(cut, parent_copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 3 weights, the first is model\.layers\.1\.mlp\.down_proj\.weight"):
        loading.load_model(source)
    save_file(
        {**tensors, "model.norm.weight": torch.ones(32)}, parent_copy / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(ConfigError, match=r"another shape than in config\.json, first .*model\.norm\.weight"):
        loading.load_model(source)
    tensors["model.layers.0.input_layernorm.weight"][7] = torch.inf
    save_file(tensors, parent_copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.input_layernorm\.weight holds NaN or infinity"):
        loading.load_model(source)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.mlp.up_proj.weight_scale_inv",
        "model.layers.2.mlp.up_proj.weight",
    ],
)
def test_weights_of_the_model_that_its_configuration_has_no_place_for_are_refused(parent_copy: Path, name: str) -> None:
    """A bias that is switched off, a scale of a low-bit layer, a block more than config.json counts."""
    tensors = load_file(parent_copy / "model.safetensors")
    save_file({**tensors, name: torch.ones(64)}, parent_copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=f"holds {re.escape(name)}, which the model of config.json has no place for"):
        loading.load_model(loading.resolve(str(parent_copy)))


def test_weights_beside_the_model_are_named(parent_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("hestia.loading.models.announce", said.append)
    tensors = load_file(parent_copy / "model.safetensors")
    more = {"v_head.weight": torch.ones(4), "v_head.bias": torch.ones(1)}
    save_file({**tensors, **more}, parent_copy / "model.safetensors", metadata={"format": "pt"})
    loading.load_model(loading.resolve(str(parent_copy)))
    assert len(said) == 1 and "v_head.bias and 1 more" in said[0]


@pytest.mark.parametrize("same", [True, False])
def test_a_head_of_its_own_is_known_from_the_configuration_on(parent_copy: Path, same: bool) -> None:
    """transformers ties a stored head only where it equals the embedding; plans and refusals must know which."""
    tensors = load_file(parent_copy / "model.safetensors")
    if same:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, parent_copy / "model.safetensors", metadata={"format": "pt"})
    edit_config(parent_copy, tie_word_embeddings=True)
    source = loading.resolve(str(parent_copy))
    config = loading.load_config(source)
    empty, full = loading.empty_model(source, config), loading.load_model(source)
    assert config.tie_word_embeddings is same
    assert [n for n, _ in empty.named_parameters()] == [n for n, _ in full.named_parameters()]


@pytest.mark.slow
def test_code_in_the_folder_is_run_only_when_asked_for(parent_copy: Path, tmp_path: Path) -> None:
    """A subprocess, because transformers keeps modules that it imported."""
    mark = tmp_path / "was run"
    (parent_copy / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n"
        f"open({str(mark)!r}, 'w').close()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n",
        encoding="utf-8",
    )
    edit_config(parent_copy, model_type="own", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    code = (
        "import sys; from hestia import loading, errors\n"
        "source = loading.resolve(sys.argv[1])\n"
        "try: loading.load_config(source)\n"
        "except errors.ConfigError as error: assert '--trust-remote-code' in str(error), error\n"
        "else: raise SystemExit('it was read')\n"
        "import pathlib; assert not pathlib.Path(sys.argv[2]).exists()\n"
        "assert loading.load_config(source, trust_remote_code=True).hidden_size == 64\n"
        "assert pathlib.Path(sys.argv[2]).exists()\n"
    )
    words = [sys.executable, "-c", code, str(parent_copy), str(mark)]
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(loading.configs.LARGEST))
def test_absurd_sizes_are_refused_and_dense_members_of_a_family_are_not(parent_copy: Path, name: str) -> None:
    edit_config(parent_copy, **{name: loading.configs.LARGEST[name] + 1})
    source = loading.resolve(str(parent_copy))
    with pytest.raises(
        ConfigError, match=f"config.json: {name} must lie between [01] and {loading.configs.LARGEST[name]}, got"
    ):
        loading.load_config(source)
    if "experts" in name:
        edit_config(parent_copy, **{name: 0})
        assert loading.load_config(source)


def test_a_configuration_of_more_weights_than_the_files_hold_is_refused_before_any_is_drawn(
    parent_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_config(parent_copy, intermediate_size=1 << 20)
    monkeypatch.setattr(
        loading.models.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("was drawn")
    )
    with pytest.raises(ConfigError, match=r"describes 402,\d+,\d+ weights, the safetensors files hold \d+,\d+"):
        loading.load_model(loading.resolve(str(parent_copy)))
