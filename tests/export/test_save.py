"""save.py: from one's own training loop to a file, with the command line's own proof; and what is not handed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_runs import Invoke
from transformers import AutoTokenizer, LlamaForCausalLM

import hestia
from hestia.errors import ConfigError, ExportError
from hestia.export.frozen import FrozenModel


def frozen(parent: Path) -> tuple[Any, Any, hestia.Plan]:
    """A toy model, its codes and its plan, as a loop of one's own ends."""
    model = LlamaForCausalLM.from_pretrained(parent, dtype=torch.float32)
    plan = hestia.plan(model, target="gguf:q4_0", fallback=True)
    hestia.apply(model, plan)
    return model, hestia.freeze(model), plan


def test_what_is_saved_is_exported_and_verified(invoke: Invoke, parent_copy: Path, tmp_path: Path) -> None:
    record = json.loads((parent_copy / "config.json").read_text())
    (parent_copy / "config.json").write_text(json.dumps({**record, "dtype": "bfloat16"}))
    model, codes, plan = frozen(parent_copy)
    run = hestia.save(model, codes, tmp_path / "run", parent=str(parent_copy), plan=plan)
    held = FrozenModel(run)
    assert set(held.quantized) == set(codes)
    for path, tensor in codes.items():
        assert torch.equal(held.tensor(f"{path}.weight"), tensor.dense(torch.bfloat16)), path
    assert (run / "model" / "tokenizer.json").read_bytes() == (parent_copy / "tokenizer.json").read_bytes()
    file = tmp_path / "a.gguf"
    status, out, err = invoke("export", run, "--to", "gguf:q4_0", "--fallback", "--out", file)
    assert status == 0 and "codes equal" in out, err
    assert invoke("verify", file, "--against", run)[0] == 0
    status, out, _ = invoke("export", run, "--list")
    assert status == 0 and "this run:" in out


def test_what_is_not_frozen_or_not_whole_is_not_saved(
    parent_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, codes, plan = frozen(parent_copy)
    parent, run = str(parent_copy), tmp_path / "run"
    path = next(iter(codes))
    with torch.no_grad():
        model.get_parameter(f"{path}.weight")[0, 0] += 1.0
    with pytest.raises(ConfigError, match=f"{path}: the model's weight is not its codes times its scales"):
        hestia.save(model, codes, run, parent=parent)
    with torch.no_grad():
        model.get_parameter(f"{path}.weight")[0, 0] -= 1.0
        norm = model.get_parameter("model.norm.weight")
        before, norm[3] = float(norm[3]), torch.nan
        with pytest.raises(
            ConfigError, match=r"model\.norm\.weight holds NaN or infinity in the parent's dtype, float32"
        ):
            hestia.save(model, codes, run, parent=parent)
        norm[3] = before
    with monkeypatch.context() as patch:
        patch.setattr("hestia.export.save.is_sharded", lambda tensor: tensor.ndim == 1)
        with pytest.raises(ConfigError, match=r"layernorm\.weight is shared out between processes"):
            hestia.save(model, codes, run, parent=parent)
    hestia.apply(model, plan)
    with pytest.raises(ConfigError, match=r"is still quantized for training: codes = hestia\.freeze\(model\)"):
        hestia.save(model, codes, run, parent=parent)
    with pytest.raises(ConfigError, match="no such"):
        hestia.save(*frozen(parent_copy)[:2], run, parent=str(tmp_path / "nowhere"))
    assert not run.exists()
    run.mkdir()
    (run / "mine.txt").touch()
    with pytest.raises(ExportError, match="already exists and is not an empty folder"):
        hestia.save(*frozen(parent_copy)[:2], run, parent=parent)
    assert [p.name for p in run.iterdir()] == ["mine.txt"]


def test_added_words_go_along_with_their_tokenizer(parent_copy: Path, tmp_path: Path) -> None:
    """Chat training often adds some; the parent's tokenizer does not know them."""
    tokenizer = AutoTokenizer.from_pretrained(parent_copy)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    model = LlamaForCausalLM.from_pretrained(parent_copy, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer))
    hestia.apply(model, hestia.plan(model))
    codes = hestia.freeze(model)
    with pytest.raises(ConfigError, match=r"the model has [\d,]+ words, its parent [\d,]+: give save the tokenizer"):
        hestia.save(model, codes, tmp_path / "run", parent=str(parent_copy))
    assert not (tmp_path / "run").exists()
    run = hestia.save(model, codes, tmp_path / "run", parent=str(parent_copy), tokenizer=tokenizer)
    again = AutoTokenizer.from_pretrained(run / "model")
    ids = again("<|im_start|>a story<|im_end|>", add_special_tokens=False)["input_ids"]
    assert len(again) == len(tokenizer) == model.config.vocab_size
    assert ids[0] == len(tokenizer) - 2 and ids[-1] == len(tokenizer) - 1
    assert LlamaForCausalLM.from_pretrained(run / "model").config.vocab_size == len(tokenizer)


def test_what_a_trainer_switched_off_and_what_the_user_set_is_told_apart(parent_copy: Path, tmp_path: Path) -> None:
    model, codes, _ = frozen(parent_copy)
    model.config.use_cache = False  # by the Trainer
    model.generation_config.eos_token_id = [2, 7]  # by the user
    run = hestia.save(torch.compile(model, backend="eager"), codes, tmp_path / "run", parent=str(parent_copy))  # type: ignore[arg-type]
    assert json.loads((run / "model" / "config.json").read_text())["use_cache"] is True
    assert json.loads((run / "model" / "generation_config.json").read_text())["eos_token_id"] == [2, 7]
