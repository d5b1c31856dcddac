"""The compressed-tensors folder: transformers loads it, compressed-tensors unpacks it, and both find our numbers."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from frozen_runs import freeze, llama, qwen2
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import hestia
from hestia import export
from hestia.errors import ConfigError, ExportError
from hestia.export import huggingface
from hestia.export.frozen import FrozenModel, save_codes
from hestia.export.huggingface import Scheme, choose_scheme, export_hf, load, logits, pack_codes
from hestia.export.huggingface_check import check_hf
from hestia.export.mlx import export_mlx
from hestia.export.verify import detect_target
from hestia.pipeline import digest
from hestia.quant import INT2, Grid, QuantSpec

IDS = torch.arange(24).reshape(2, 12) * 3


def stored(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


# --- packing -------------------------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**31 - 1), st.sampled_from([2, 4]))
def test_packed_words_are_those_of_compressed_tensors(rows: int, columns: int, seed: int, bits: int) -> None:
    half = 2 ** (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-half, half, (rows, columns), generator=generator, dtype=torch.int8)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.int32 and packed.shape == (rows, -(-columns * bits // 32))
    assert torch.equal(packed, pack_to_int32(codes, bits))
    assert torch.equal(unpack_from_int32(packed, bits, codes.shape), codes)


def test_first_input_is_least_significant_and_the_tail_is_zero_bits() -> None:
    codes = torch.full((1, 17), -2, dtype=torch.int8)
    codes[0, 0], codes[0, 15], codes[0, 16] = -1, 1, 0
    assert pack_codes(codes).tolist() == [[1 + (3 << 30) - 2**32, 2]]


# --- the folder ----------------------------------------------------------------------------------------------------

CASES = {
    "tied llama, rows": (llama, {}, Scheme("group", 64)),
    "qwen2 with biases, bf16": (qwen2, {"dtype": torch.bfloat16}, Scheme("group", 64)),
    "fp16, one scale per tensor": (
        llama,
        {"dtype": torch.float16, "spec": QuantSpec(group_size="tensor")},
        Scheme("group", 64),
    ),
    "groups of 32, four levels": (qwen2, {"spec": QuantSpec(group_size=32, grid=INT2)}, Scheme("group", 32)),
    "rows of 64 and 172, bf16": (lambda: llama(172), {"dtype": torch.bfloat16}, Scheme("channel")),
    "groups of 16 beside rows": (llama, {"fixed": {"q_proj": QuantSpec(group_size=16)}}, Scheme("group", 16)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plan_counts_the_bytes_of_its_files(tmp_path: Path, dtype: torch.dtype) -> None:
    """Rows of 192 and 512: groups of 64 for all, scales in the parent's dtype."""
    model = llama(512, hidden_size=192).to(dtype)
    model.config.dtype = dtype
    plan = hestia.plan(model, "round_to_nearest", ["hf", "hf:int4", "mlx"])
    run = freeze(model, tmp_path / "run", dtype=dtype)
    records = [export_hf(run, tmp_path / "2"), export_hf(run, tmp_path / "4", bits=4), export_mlx(run, tmp_path / "m")]
    assert [8 * r["quantized_bytes"] / plan.quantized_weights for r in records] == [
        plan.bits_per_weight(r["target"]) for r in records
    ]
    assert hestia.Plan.from_json(plan.to_json()).bits_per_weight("hf") == plan.bits_per_weight("hf")


@pytest.mark.parametrize("case", CASES)
def test_reloaded_model_is_the_frozen_model(tmp_path: Path, case: str) -> None:
    make, options, scheme = CASES[case]
    frozen = freeze(make(), tmp_path / "run", **options)
    assert choose_scheme(frozen) == scheme
    out = tmp_path / "out"
    record = export_hf(frozen, out)
    assert ("llama.cpp's converter does not load" in record.get("caution", "")) == (scheme.strategy == "channel")

    assert torch.equal(logits(load(frozen.folder), IDS), logits(load(out), IDS))
    model = AutoModelForCausalLM.from_pretrained(out)
    model(IDS)  # compressed-tensors unpacks at the first forward
    for name in frozen.quantized:
        weight = model.get_submodule(name).weight
        assert weight.dtype == frozen.dtype
        assert torch.equal(weight, frozen.codes(name).dense(frozen.dtype)), name
    for name in frozen.names():
        assert torch.equal(model.get_parameter(name), frozen.tensor(name)), name


def test_four_bits_for_servers_without_a_two_bit_kernel(tmp_path: Path) -> None:
    frozen = freeze(qwen2(), tmp_path / "run", QuantSpec(group_size=32, grid=INT2), torch.bfloat16)
    out = tmp_path / "out"
    record = export_hf(frozen, out, bits=4)
    assert record["target"] == "hf:int4"
    assert check_hf(out, frozen, bits=4) == []
    assert any("num_bits is 4, expected 2" in line for line in check_hf(out, frozen))
    assert detect_target(out, frozen.run) == "hf:int4"
    assert torch.equal(logits(load(frozen.folder), IDS), logits(load(out), IDS))
    weights = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    assert weights["weights"]["num_bits"] == 4


@pytest.mark.parametrize("case", ["groups of 32, four levels", "rows of 64 and 172, bf16"])
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_dequantizing_at_load_gives_the_frozen_model(tmp_path: Path, case: str) -> None:
    make, options, _ = CASES[case]
    frozen = freeze(make(), tmp_path / "run", **options)
    export_hf(frozen, tmp_path / "out")
    # this route takes the first config group for every layer, one reason why there is only one
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    for name in frozen.names():
        assert torch.equal(model.get_parameter(name), frozen.tensor(name)), name


@pytest.mark.parametrize("case", ["qwen2 with biases, bf16", "rows of 64 and 172, bf16"])
def test_second_opinion_unpacks_our_codes_and_the_rest_is_copied(tmp_path: Path, case: str) -> None:
    make, options, scheme = CASES[case]
    frozen = freeze(make(), tmp_path / "run", **options)
    out = tmp_path / "out"
    export_hf(frozen, out)
    tensors = stored(out)
    for name in frozen.quantized:
        truth = frozen.codes(name)
        shape = tensors.pop(f"{name}.weight_shape")
        codes = unpack_from_int32(tensors.pop(f"{name}.weight_packed"), 2, torch.Size(shape.tolist()))
        scale = tensors.pop(f"{name}.weight_scale")
        assert torch.equal(codes, truth.codes)
        assert scale.dtype == frozen.dtype and scale.shape[1] == (1 if scheme.group_size is None else shape[1] // 64)
        assert torch.equal(scale.float(), truth.scales.expand_as(scale))
    for name, tensor in tensors.items():
        assert torch.equal(tensor.view(torch.uint8), frozen.tensor(name).view(torch.uint8))
    assert tensors.keys() == set(frozen.names()) - {f"{name}.weight" for name in frozen.quantized}


def test_config_names_every_kept_linear_and_files_are_copied(tmp_path: Path) -> None:
    frozen = freeze(qwen2(), tmp_path / "run")
    # one linear that is kept: its codes are taken out of the run
    kept, *rest = frozen.quantized
    save_codes(frozen.run / "codes.safetensors", {name: frozen.codes(name) for name in rest})
    frozen = FrozenModel(frozen.run)
    out = tmp_path / "out"
    export_hf(frozen, out)
    config = json.loads((out / "config.json").read_text())
    assert config.pop("quantization_config")["ignore"] == [kept, "lm_head"]
    assert config == frozen.config
    assert torch.equal(logits(load(frozen.folder), IDS), logits(load(out), IDS))
    copied = {f.relative_to(out).as_posix() for f in out.rglob("*") if f.is_file()}
    assert copied >= {"tokenizer.json", "chat_template.jinja", "additional_chat_templates/tool.jinja"}
    for name in copied - {"config.json", "model.safetensors"}:
        assert (out / name).read_bytes() == (frozen.folder / name).read_bytes()


def test_shards_have_an_index_load_and_are_aligned(tmp_path: Path) -> None:
    frozen = freeze(llama(172), tmp_path / "run", dtype=torch.bfloat16)
    out = tmp_path / "out"
    export_hf(frozen, out, max_shard_bytes=13_000)
    files = sorted(f.name for f in out.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored(out).values())
    assert set(index["weight_map"].values()) == set(files)
    for file in out.glob("*.safetensors"):
        raw = file.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        del header["__metadata__"]
        # one tensor may be larger than the limit, two together not
        assert len(header) == 1 or len(raw) - 8 - length <= 13_000
        widths = {"I64": 8, "I32": 4, "BF16": 2}
        for name, entry in header.items():
            assert (8 + length + entry["data_offsets"][0]) % widths[entry["dtype"]] == 0, name
    assert torch.equal(logits(load(frozen.folder), IDS), logits(load(out), IDS))


def test_record_counts_the_bytes(tmp_path: Path) -> None:
    frozen = freeze(llama(), tmp_path / "run", dtype=torch.bfloat16)
    out = tmp_path / "out"
    record = export.export_model(frozen, "hf", out)
    files = sorted(f.relative_to(out).as_posix() for f in out.rglob("*") if f.is_file())
    assert record["target"] == "hf" and record["path"] == str(out)
    assert record["bytes"] == sum((out / f).stat().st_size for f in files)
    weights = sum(frozen.codes(name).codes.numel() for name in frozen.quantized)
    assert record["quantized_bytes"] == weights // 4 + weights // 64 * 2 + 16 * len(frozen.quantized)
    command = r"find . -type f | LC_ALL=C sort | xargs -d '\n' sha256sum | sha256sum"
    printed = subprocess.run(["sh", "-c", command], cwd=out, capture_output=True, text=True, check=True).stdout
    assert "additional_chat_templates/tool.jinja" in files
    assert record["sha256"] == printed.split()[0] == digest(out)
    with safe_open(out / "model.safetensors", framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}


# --- refusals ------------------------------------------------------------------------------------------------------


def test_levels_that_two_bits_cannot_hold_are_refused_by_name(tmp_path: Path) -> None:
    wide = QuantSpec(grid=Grid((-1, 0, 1, 2)))
    frozen = freeze(llama(), tmp_path / "run", fixed={"1.mlp.up_proj": wide})
    with pytest.raises(ExportError, match=r"model\.layers\.1\.mlp\.up_proj: levels -1\.\.2.*-2\.\.1"):
        export_hf(frozen, tmp_path / "out")
    assert [f.name for f in tmp_path.iterdir()] == ["run"]


def test_run_whose_halves_disagree_is_refused_by_name(tmp_path: Path) -> None:
    frozen = freeze(llama(), tmp_path / "run", dtype=torch.bfloat16)
    codes = {name: frozen.codes(name) for name in frozen.quantized}
    name = frozen.quantized[5]
    changed = codes[name].codes.clone()
    changed[3, 4] = -changed[3, 4] if changed[3, 4] else 1
    other = dataclasses.replace(codes[name], codes=changed)
    save_codes(frozen.run / "codes.safetensors", {**codes, name: other})
    with pytest.raises(ExportError, match=rf"{name}: the dense weight .* is not codes \* scales"):
        export_hf(FrozenModel(frozen.run), tmp_path / "out")
    unsnapped = dataclasses.replace(codes[name], scales=codes[name].scales * 1.001)
    save_codes(frozen.run / "codes.safetensors", {**codes, name: unsnapped})
    with pytest.raises(ExportError, match=rf"{name}: a scale is not exact in torch.bfloat16"):
        export_hf(FrozenModel(frozen.run), tmp_path / "out")
    save_codes(
        frozen.run / "codes.safetensors", {**codes, "lm_foot": dataclasses.replace(other, scales=other.scales.clone())}
    )
    with pytest.raises(ExportError, match="lm_foot: not an nn"):
        export_hf(FrozenModel(frozen.run), tmp_path / "out")


def test_taken_path_is_refused_and_an_empty_folder_is_used(tmp_path: Path) -> None:
    frozen = freeze(llama(), tmp_path / "run")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "precious.txt").write_text("keep me")
    with pytest.raises(ExportError, match="not an empty folder"):
        export_hf(frozen, taken)
    with pytest.raises(ExportError, match="not an empty folder"):
        export_hf(frozen, taken / "precious.txt")
    assert [f.name for f in taken.iterdir()] == ["precious.txt"]
    (tmp_path / "empty").mkdir()
    export_hf(frozen, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_failure_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = freeze(llama(), tmp_path / "run")
    written = 0

    def full(handle: object, entry: object) -> None:
        nonlocal written
        written += 1
        if written > 5:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface, "_write_tensor", full)
    with pytest.raises(OSError, match="No space left"):
        export_hf(frozen, tmp_path / "out")
    assert [f.name for f in tmp_path.iterdir()] == ["run"]


def test_what_a_killed_process_of_the_same_number_left_is_in_nobodys_way(tmp_path: Path) -> None:
    """In a container every process may be number 1."""
    frozen = freeze(llama(), tmp_path / "run")
    for name, write in (("hf", export_hf), ("mlx", export_mlx)):
        left = tmp_path / f".{name}.{os.getpid()}.tmp"
        left.mkdir()
        (left / "half").write_bytes(b"half")
        assert "half" not in write(frozen, tmp_path / name)["files"]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["hf", "mlx", "run"]


def test_what_is_put_into_the_empty_folder_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen, out = freeze(llama(), tmp_path / "run"), tmp_path / "out"
    out.mkdir()
    shards = huggingface._write_shards

    def written(*arguments: object) -> None:
        shards(*arguments)  # type: ignore[arg-type]
        (out / "precious.txt").write_text("keep me")

    monkeypatch.setattr(huggingface, "_write_shards", written)
    with pytest.raises(OSError, match="not empty"):
        export_hf(frozen, out)
    assert [f.name for f in out.iterdir()] == ["precious.txt"]


def test_unknown_target_and_already_quantized_model_are_refused(tmp_path: Path) -> None:
    frozen = freeze(llama(), tmp_path / "run")
    with pytest.raises(ConfigError, match="unknown target 'hff'"):
        export.export_model(frozen, "hff", tmp_path / "out")
    frozen.config["quantization_config"] = {"quant_method": "gptq"}
    with pytest.raises(ExportError, match="already quantized"):
        export_hf(frozen, tmp_path / "out")


def test_model_that_needs_remote_code_is_refused(tmp_path: Path) -> None:
    frozen = freeze(llama(), tmp_path / "run")
    config = {**frozen.config, "model_type": "homemade", "auto_map": {"AutoConfig": "homemade.HomemadeConfig"}}
    (frozen.folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="without remote code"):
        export_hf(FrozenModel(frozen.run), tmp_path / "out")
    assert [f.name for f in tmp_path.iterdir()] == ["run"]
