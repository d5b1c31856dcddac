"""Every recipe: the frozen model is the exported file is the reloaded model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conformance import Case, disturb, logits
from transformers import AutoModelForCausalLM

import hestia
from hestia.export import export_model
from hestia.export.frozen import FrozenModel, save_codes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_freeze_equals_export_equals_reload(case: Case, tmp_path: Path, dtype: torch.dtype) -> None:
    model, plan = case.converted(dtype=dtype, t=1.0)
    disturb(model)
    model.eval()
    with torch.no_grad():
        hard = logits(model)
        codes = hestia.freeze(model)
        frozen = logits(model)
    assert torch.equal(frozen, hard)
    for path, tensor in codes.items():  # exact: the parent's dtype holds every product of code and scale
        assert torch.equal(tensor.dense(dtype).float(), tensor.dense()), path
    if plan.targets != ("hf",):
        return  # two bits cannot hold it; GGUF files of such widths are reloaded in tests/export
    run = tmp_path / "run"
    model.save_pretrained(run / "model")
    save_codes(run / "codes.safetensors", codes)
    export_model(FrozenModel(run), "hf", tmp_path / "hf")

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").eval()
    with torch.no_grad():
        assert torch.equal(logits(reloaded), frozen)
    for path, tensor in codes.items():
        weight = reloaded.get_parameter(f"{path}.weight")  # unpacked by the forward pass above
        assert weight.dtype == dtype and torch.equal(weight, tensor.dense(dtype)), path
    assert reloaded.get_parameter("lm_head.weight") is reloaded.get_parameter("model.embed_tokens.weight")
    for name, parameter in model.named_parameters():
        assert torch.equal(reloaded.get_parameter(name), parameter), name
