"""mlx.py: the folder decodes to the frozen model, every change of it is found, and mlx-lm computes the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from frozen_runs import freeze, llama, qwen2
from safetensors.torch import load_file, save_file

from hestia.errors import ExportError, VerifyError
from hestia.export import mlx_engine
from hestia.export.mlx import export_mlx, group_size
from hestia.export.mlx_check import check_mlx
from hestia.export.verify import detect_target, verify
from hestia.quant import INT2, Grid, QuantSpec

SPECS = {
    "rows": QuantSpec(),
    "int2, groups of 32": QuantSpec(group_size=32, grid=INT2),
    "tensor": QuantSpec(group_size="tensor"),
}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_q_scale_plus_bias_is_the_frozen_weight(tmp_path: Path, spec: str, dtype: torch.dtype) -> None:
    frozen = freeze(qwen2(), tmp_path / "run", SPECS[spec], dtype)
    record = export_mlx(frozen, tmp_path / "out")
    assert check_mlx(tmp_path / "out", frozen) == []
    assert detect_target(tmp_path / "out", frozen.run) == "mlx"
    group = 32 if "32" in spec else 64
    assert group_size(frozen) == group
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"] == {"group_size": group, "bits": 2, "mode": "affine"}
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name in frozen.quantized:
        words = stored[f"{name}.weight"].view(torch.int32).long() & 0xFFFFFFFF
        q = (words.unsqueeze(-1) >> (2 * torch.arange(16))) & 3
        q = q.reshape(words.shape[0], -1, group).float()
        dense = q * stored[f"{name}.scales"].float().unsqueeze(-1) + stored[f"{name}.biases"].float().unsqueeze(-1)
        assert torch.equal(dense.reshape(words.shape[0], -1), frozen.codes(name).dense()), name
    assert torch.equal(stored["model.embed_tokens.weight"], frozen.tensor("model.embed_tokens.weight"))
    assert record["bytes"] == sum(f.stat().st_size for f in (tmp_path / "out").iterdir() if f.is_file()) + sum(
        f.stat().st_size for f in (tmp_path / "out").glob("*/*")
    )


def test_changes_are_found_and_named(tmp_path: Path) -> None:
    frozen = freeze(llama(), tmp_path / "run")
    out = tmp_path / "out"
    export_mlx(frozen, out)
    good = (out / "model.safetensors").read_bytes()
    name = frozen.quantized[2]

    def lines(change: Callable[[dict[str, torch.Tensor]], object]) -> list[str]:
        (out / "model.safetensors").write_bytes(good)
        tensors = load_file(out / "model.safetensors")
        change(tensors)
        save_file(tensors, out / "model.safetensors", metadata={"format": "mlx"})
        return check_mlx(out, frozen)

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{name}.weight"].view(torch.int32)[3, 1] ^= 1 << 4

    assert [f"{name}.weight: code [3, 18]" in line for line in lines(flip)] == [True]
    assert [f"{name}.scales: the scale of" in x for x in lines(lambda t: t[f"{name}.scales"].mul_(2))] == [True]
    assert [f"{name}.biases: the bias of" in x for x in lines(lambda t: t[f"{name}.biases"].mul_(2))] == [True]
    assert lines(lambda t: t.pop(f"{name}.biases")) == [f"{name}.biases: missing"]
    assert ["model.norm.weight" in x for x in lines(lambda t: t["model.norm.weight"].add_(1))] == [True]
    (out / "model.safetensors").write_bytes(good[:-5])
    with pytest.raises(VerifyError, match="damaged or cut short"):
        check_mlx(out, frozen)


def test_what_mlx_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    rows_of_172 = freeze(llama(172), tmp_path / "a")
    with pytest.raises(ExportError, match="MLX has groups of 128, 64, 32, none divides 172"):
        export_mlx(rows_of_172, tmp_path / "out")
    wide = freeze(llama(), tmp_path / "b", QuantSpec(grid=Grid((-3, -1, 1, 3))))
    with pytest.raises(ValueError, match="mlx 2-bit affine cannot express"):
        export_mlx(wide, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not mlx_engine.available(), reason="mlx-lm is not installed")
@pytest.mark.parametrize("spec", SPECS)
def test_mlx_lm_computes_what_the_frozen_model_computes(tmp_path: Path, spec: str) -> None:
    frozen = freeze(qwen2(), tmp_path / "run", SPECS[spec], torch.bfloat16)
    export_mlx(frozen, tmp_path / "out")
    result = verify(tmp_path / "out", frozen.run)
    assert result.ok, result.differences
    assert result.engine is not None and result.engine.startswith("mlx-lm ")
    assert result.max_abs_logit_diff is not None and result.max_abs_logit_diff < 1e-4
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(VerifyError, match="mlx-lm failed"):
        mlx_engine.logits(tmp_path / "out", [[1, 2]])


def test_a_tensor_of_zeros_has_its_place(tmp_path: Path) -> None:
    model = qwen2()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    frozen = freeze(model, tmp_path / "run")
    assert not frozen.codes("model.layers.0.mlp.up_proj").codes.any()
    export_mlx(frozen, tmp_path / "out")
    assert check_mlx(tmp_path / "out", frozen) == []
