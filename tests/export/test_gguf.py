"""gguf.py: what is written decodes to the frozen model, and nothing else passes the check."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hestia.errors import ConfigError, ExportError, PlanError, VerifyError
from hestia.export import gguf as exporter
from hestia.export.digest import codes_digest
from hestia.export.frozen import FrozenModel, save_codes
from hestia.export.gguf import export_gguf
from hestia.export.gguf_check import check_gguf, file_target
from hestia.export.gguf_reader import read
from hestia.quant import AbsMean, GroupSize, QuantizedTensor, Quantizer, QuantSpec
from hestia.targets import target

torch.set_num_threads(1)

TEXT = "the cat sat on the mat. the other cat, the 3 cats and the hat: it's a 12345 test\n\n  of the theme "


def byte_level() -> dict[str, Any]:
    """A byte-level BPE tokenizer.json with a few merges, as GPT-2 writes it."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT] * 4, vocab_size=300, min_frequency=2, special_tokens=["<|end|>"])
    return json.loads(tokenizer.to_str())


def byte_fallback() -> dict[str, Any]:
    """A SentencePiece-style BPE tokenizer.json: spaces as "▁", byte fallback, BOS in front."""
    from tokenizers import SentencePieceBPETokenizer

    trained = SentencePieceBPETokenizer()
    trained.train_from_iterator([TEXT] * 4, vocab_size=80, min_frequency=2, special_tokens=[])
    record = json.loads(trained.to_str())
    specials = ["<unk>", "<s>", "</s>"]
    pieces = [*specials, *(f"<0x{b:02X}>" for b in range(256)), *record["model"]["vocab"]]
    record["model"] |= {
        "vocab": {piece: index for index, piece in enumerate(dict.fromkeys(pieces))},
        "unk_token": "<unk>",
        "fuse_unk": True,
        "byte_fallback": True,
    }
    record["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    record["pre_tokenizer"] = None
    shown = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    record["decoder"] = {"type": "Sequence", "decoders": [shown, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    record["added_tokens"] = [{"id": i, "content": c, "special": True, **flags} for i, c in enumerate(specials)]
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    one, two = ({"Sequence": {"id": x, "type_id": 0}} for x in "AB")
    record["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, one],
        "pair": [bos, one, two],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    return record


def make_run(
    run: Path,
    model_type: str = "llama",
    *,
    hidden: int = 64,
    width: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    vocabulary: int = 384,
    group_size: GroupSize = "row",
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    tokenizer: Callable[[], dict[str, Any]] = byte_level,
    **config: Any,
) -> FrozenModel:
    """A frozen model of toy size with random weights, written by hand."""
    gemma = model_type == "gemma"
    head = int(config.get("head_dim") or hidden // heads)
    rng = torch.Generator().manual_seed(hidden + heads)

    def normal(*shape: int, scale: float = 0.05, mean: float = 0.0) -> torch.Tensor:
        return (mean + scale * torch.randn(*shape, generator=rng)).to(dtype)

    tensors = {
        "model.embed_tokens.weight": normal(vocabulary, hidden, scale=hidden**-0.5),
        "model.norm.weight": normal(hidden, mean=0.0 if gemma else 1.0),
    }
    if not tied:
        tensors["lm_head.weight"] = normal(vocabulary, hidden, scale=hidden**-0.5).half().to(dtype)
    shapes = {
        "self_attn.q_proj": (heads * head, hidden),
        "self_attn.k_proj": (kv_heads * head, hidden),
        "self_attn.v_proj": (kv_heads * head, hidden),
        "self_attn.o_proj": (hidden, heads * head),
        "mlp.gate_proj": (width, hidden),
        "mlp.up_proj": (width, hidden),
        "mlp.down_proj": (hidden, width),
    }
    codes: dict[str, QuantizedTensor] = {}
    quantizer = Quantizer(QuantSpec(group_size=group_size, scale=AbsMean()))
    for block in range(2):
        stem = f"model.layers.{block}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{stem}{name}.weight"] = normal(hidden, mean=0.0 if gemma else 1.0)
        for name, shape in shapes.items():
            codes[stem + name] = quantizer.codes(normal(*shape, scale=2.0 / math.sqrt(shape[1])))
            tensors[f"{stem}{name}.weight"] = codes[stem + name].dense(dtype)
            if model_type == "qwen2" and name[10:] in ("q_proj", "k_proj", "v_proj"):
                tensors[f"{stem}{name}.bias"] = normal(shape[0], scale=0.3)
        if model_type == "qwen3":
            for name in ("q_norm", "k_norm"):
                tensors[f"{stem}self_attn.{name}.weight"] = normal(head, mean=1.0)
    record = {
        "model_type": model_type,
        "architectures": [f"{model_type.capitalize()}ForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "hidden_act": "gelu_pytorch_tanh" if gemma else "silu",
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "dtype": str(dtype).removeprefix("torch."),
        **config,
    }
    folder = run / "model"
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(record))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer()))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ 'é \\n' }}"}))
    save_codes(run / "codes.safetensors", codes)
    return FrozenModel(run)


WIDE = {"hidden": 256, "width": 512}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"tied": False, "tokenizer": byte_fallback},
    "mistral": {"sliding_window": 40, "head_dim": 128, "dtype": torch.bfloat16},
    "qwen2": {"group_size": 256},
    "qwen3": {"group_size": "tensor", "head_dim": 128},
    "gemma": {"head_dim": 64},
}


def dense_in_file_order(frozen: FrozenModel, path: str, heads: int) -> np.ndarray:
    """The weight as llama.cpp wants it, by the formula of its converter."""
    w = frozen.codes(path).dense()
    if heads:
        w = w.reshape(heads, 2, w.shape[0] // heads // 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
    return w.numpy()


@pytest.mark.parametrize(
    ("model_type", "target_name"),
    [("llama", "gguf:tq1_0"), ("llama", "gguf:q4_0"), *((kind, "gguf:tq2_0") for kind in KINDS)],
)
def test_the_gguf_package_reads_the_frozen_model(tmp_path: Path, model_type: str, target_name: str) -> None:
    frozen = make_run(tmp_path / "run", model_type, **WIDE, **KINDS[model_type])
    path = tmp_path / "model.gguf"
    record = export_gguf(frozen, target(target_name), path)
    assert check_gguf(path, frozen, target_name) == []
    assert record["bytes"] == path.stat().st_size
    assert file_target(path) == target_name
    weights, main = sum(frozen.codes(p).codes.numel() for p in frozen.quantized), target(target_name).types[0]
    assert record["quantized_bytes"] == weights // main.block * main.block_bytes

    reader = gguf.GGUFReader(path)
    tensors = {t.name: t for t in reader.tensors}
    assert {n: t.tensor_type.name for n, t in tensors.items()} == record["tensors"]
    arch = "llama" if model_type == "mistral" else model_type
    permuted = {"self_attn.q_proj": 4, "self_attn.k_proj": 2} if arch == "llama" else {}
    for hf, ours in (("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"), ("mlp.down_proj", "ffn_down")):
        stored = tensors[f"blk.1.{ours}.weight"]
        assert stored.tensor_type.name == target_name[5:].upper()
        decoded = gguf.dequantize(stored.data, stored.tensor_type)
        expected = dense_in_file_order(frozen, f"model.layers.1.{hf}", permuted.get(hf, 0))
        assert np.array_equal(decoded, expected)
    embedding = tensors["token_embd.weight"]
    source = frozen.tensor("model.embed_tokens.weight").float().numpy()
    assert np.array_equal(gguf.dequantize(embedding.data, embedding.tensor_type), source)
    norm = frozen.tensor("model.norm.weight").float() + (1.0 if model_type == "gemma" else 0.0)
    assert np.array_equal(tensors["output_norm.weight"].data, norm.numpy())
    assert ("output.weight" in tensors) == (model_type == "llama")
    if model_type == "qwen2":
        bias = frozen.tensor("model.layers.0.self_attn.q_proj.bias").numpy()
        assert np.array_equal(tensors["blk.0.attn_q.bias"].data, bias)

    fields = {k: f.contents() for k, f in reader.fields.items()}
    assert fields["general.architecture"] == arch
    assert fields["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{target_name[5:].upper()}"]
    assert fields[f"{arch}.context_length"] == (40 if model_type == "mistral" else 128)
    assert fields[f"{arch}.attention.head_count_kv"] == 2
    head = frozen.config.get("head_dim", 64)
    assert fields.get(f"{arch}.attention.key_length") == (head if head != 64 else None)
    assert fields[f"{arch}.rope.dimension_count"] == head
    assert fields[f"{arch}.vocab_size"] == 384 == len(fields["tokenizer.ggml.tokens"])
    assert fields["tokenizer.chat_template"] == "{{ 'é \\n' }}"
    assert fields["hestia.codes_sha256"] == codes_digest(frozen)


def test_kept_matrices_are_f16_only_where_that_is_exact(tmp_path: Path) -> None:
    frozen = make_run(tmp_path / "run", tied=False)
    tensors = export_gguf(frozen, target("gguf:q2_0"), tmp_path / "a.gguf")["tensors"]
    assert tensors["token_embd.weight"] == "F32"
    assert tensors["output.weight"] == "F16"
    assert tensors["output_norm.weight"] == "F32"
    assert check_gguf(tmp_path / "a.gguf", frozen, "gguf:q2_0") == []


def test_rows_that_do_not_fit_are_refused_by_name_or_fall_back(tmp_path: Path) -> None:
    frozen = make_run(tmp_path / "run", hidden=64, width=172)
    with pytest.raises(ExportError, match="is a folder"):
        export_gguf(frozen, target("gguf:tq2_0"), tmp_path, fallback=True)
    path = tmp_path / "exports" / "a.gguf"
    with pytest.raises(PlanError, match=r"model\.layers\.0\..*blocks of 256.*--fallback stores it as"):
        export_gguf(frozen, target("gguf:tq2_0"), path)
    assert not path.parent.exists()
    tensors = export_gguf(frozen, target("gguf:tq2_0"), path, fallback=True)["tensors"]
    assert tensors["blk.0.attn_q.weight"] == "Q2_0"
    assert tensors["blk.0.ffn_down.weight"] == "F16"
    assert check_gguf(path, frozen, "gguf:tq2_0") == []
    assert any("type id" in line for line in check_gguf(path, frozen, "gguf:q4_0"))


def small(tmp_path: Path) -> tuple[FrozenModel, Path, bytes]:
    """A small file with every kind of content: padding, rope_freqs, F16, F32, Q2_0 and permuted rows."""
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    frozen = make_run(tmp_path / "run", width=64, heads=8, tied=False, tokenizer=byte_fallback, rope_parameters=scaling)
    path = tmp_path / "model.gguf"
    export_gguf(frozen, target("gguf:q2_0"), path)
    assert check_gguf(path, frozen, "gguf:q2_0") == []
    return frozen, path, path.read_bytes()


def found(path: Path, frozen: FrozenModel) -> list[str]:
    try:
        return check_gguf(path, frozen, "gguf:q2_0")
    except VerifyError as error:
        return [str(error)]


def test_without_the_digest_every_bit_of_a_tensor_is_still_found_and_named(tmp_path: Path) -> None:
    frozen, path, good = small(tmp_path)
    rng = np.random.default_rng(1)
    for name, (offset, size) in places_of_tensors(path).items():
        if name.startswith("blk.1"):
            continue  # the first block has one of each kind
        for place in (offset, offset + size - 1, int(rng.integers(offset, offset + size))):
            damaged = bytearray(good)
            damaged[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            assert any(name in line for line in check_gguf(path, frozen, "gguf:q2_0", digest=False)), (name, place)


@pytest.mark.slow
def test_without_the_digest_every_bit_of_two_whole_tensors_is_found(tmp_path: Path) -> None:
    frozen, path, good = small(tmp_path)
    places = places_of_tensors(path)
    for name in ("blk.0.attn_k.weight", "blk.0.attn_norm.weight"):
        offset, size = places[name]
        for place in range(offset, offset + min(size, 60)):
            for bit in range(8):
                damaged = bytearray(good)
                damaged[place] ^= 1 << bit
                path.write_bytes(damaged)
                assert any(name in line for line in check_gguf(path, frozen, "gguf:q2_0", digest=False)), (name, place)


def test_every_flipped_bit_is_found_and_named(tmp_path: Path) -> None:
    frozen, path, good = small(tmp_path)
    infos = places_of_tensors(path)
    rng = np.random.default_rng(0)
    start = min(offset for offset, _ in infos.values())
    places: list[tuple[int, str]] = [(int(p), "") for p in rng.integers(0, start, 60)]
    for name, (offset, size) in infos.items():
        inside = {offset, offset + size - 1, int(rng.integers(offset, offset + size))}
        places += [(p, name) for p in sorted(inside)[: 3 if "attn_q" in name or "." not in name[4:7] else 1]]
    first, size = infos["rope_freqs.weight"]
    assert (first + size) % 32  # so that there is padding behind it
    places += [(first + size, "padding"), (first + size + 15, "padding"), (start - 1, "")]
    for position, name in places:
        damaged = bytearray(good)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        lines = found(path, frozen)
        assert lines, f"byte {position} ({name}) was not read"
        assert any(name in line for line in lines), (position, name, lines)


def places_of_tensors(path: Path) -> dict[str, tuple[int, int]]:
    """First byte and length of every tensor of a file (the gguf package cannot read Q2_0)."""
    file = read(path)
    sizes = {0: (1, 4), 1: (1, 2), 30: (1, 2), 42: (64, 18)}
    lengths = {i.name: math.prod(i.shape) // sizes[i.type_id][0] * sizes[i.type_id][1] for i in file.tensors}
    return {i.name: (file.data_start + i.offset, lengths[i.name]) for i in file.tensors}


def test_a_difference_names_the_row_and_column_of_the_frozen_model(tmp_path: Path) -> None:
    frozen, path, _ = small(tmp_path)
    name = "model.layers.1.self_attn.q_proj"
    codes = load_file(tmp_path / "run" / "codes.safetensors")
    tensors = {p: frozen.codes(p) for p in frozen.quantized}
    changed = codes[f"{name}.codes"].clone()
    changed[5, 7] = -1 if changed[5, 7] > -1 else 0
    other = tmp_path / "other"
    (other / "model").mkdir(parents=True)
    for file in (tmp_path / "run" / "model").iterdir():
        (other / "model" / file.name).write_bytes(file.read_bytes())
    save_codes(other / "codes.safetensors", tensors | {name: QuantizedTensor(changed, tensors[name].scales, "row")})
    lines = check_gguf(path, FrozenModel(other), "gguf:q2_0")
    assert any(line.startswith("hestia.codes_sha256") for line in lines)
    (line,) = [line for line in lines if "attn_q" in line]
    assert f"blk.1.attn_q.weight ({name}.weight): code" in line
    assert f"at [5, 7], the frozen model has {int(changed[5, 7])} (1 of 4096 differ)" in line
    assert len(lines) == 2


def test_a_byte_that_decodes_alike_is_still_a_difference(tmp_path: Path) -> None:
    frozen = make_run(tmp_path / "run", **WIDE)
    path = tmp_path / "a.gguf"
    export_gguf(frozen, target("gguf:tq1_0"), path)
    (info,) = [t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.attn_v.weight"]
    data = bytearray(path.read_bytes())
    block = bytes(data[info.data_offset : info.data_offset + 54])
    from hestia.export.packing import unpack_tq1_0

    for byte in range(52):  # some of the 256 byte values have no string of five digits of their own
        for value in range(256):
            other = bytearray(block)
            other[byte] = value
            rows = [np.frombuffer(bytes(b), np.uint8)[None] for b in (block, other)]
            if value != block[byte] and np.array_equal(unpack_tq1_0(rows[0])[0], unpack_tq1_0(rows[1])[0]):
                data[info.data_offset + byte] = value
                path.write_bytes(data)
                (line,) = check_gguf(path, frozen, "gguf:tq1_0")
                assert "blk.0.attn_v.weight" in line
                assert "not the canonical one" in line
                return
    pytest.fail("no such byte in this block")


def test_damaged_files_are_refused_with_the_place(tmp_path: Path) -> None:
    frozen, path, good = small(tmp_path)
    for length in (0, 3, 10, 23, 30, 200, 5000, len(good) // 2, len(good) - 33):
        path.write_bytes(good[:length])
        with pytest.raises(VerifyError, match="truncated"):
            check_gguf(path, frozen, "gguf:q2_0")
    path.write_bytes(b"GGML" + good[4:])
    with pytest.raises(VerifyError, match="not a GGUF file"):
        check_gguf(path, frozen, "gguf:q2_0")
    path.write_bytes(good[:4] + b"\x02" + good[5:])
    with pytest.raises(VerifyError, match="version 2"):
        check_gguf(path, frozen, "gguf:q2_0")
    path.write_bytes(good + b"\x00")
    (line,) = check_gguf(path, frozen, "gguf:q2_0")
    assert "length" in line
    name = b"output_norm.weight"
    offset = good.index(name) + len(name) + 4 + 8 + 4
    path.write_bytes(good[:offset] + (2**40).to_bytes(8, "little") + good[offset + 8 :])
    with pytest.raises(VerifyError, match=r"output_norm\.weight needs bytes"):
        check_gguf(path, frozen, "gguf:q2_0")
    with pytest.raises(ConfigError, match="no such file"):
        check_gguf(tmp_path / "none.gguf", frozen, "gguf:q2_0")


@pytest.mark.parametrize(
    ("model_type", "config", "message"),
    [
        ("gpt_neox", {}, "model_type 'gpt_neox' has no GGUF export"),
        ("gpt_neox", {}, "allowed: gemma, gemma2, gemma3_text, llama, mistral, qwen2, qwen3, smollm3"),
        ("llama", {"hidden_act": "relu"}, "silu, the model relu"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope type 'yarn'"),
        (
            "qwen2",
            {"rope_scaling": {"type": "llama3", "factor": 2.0}},
            "rope type 'llama3' has no GGUF export for qwen2",
        ),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("qwen3", {"attention_bias": True}, r"attention_bias; llama.cpp loads no bias of self_attn\.o_proj for qwen3"),
        ("mistral", {"mlp_bias": True}, r"mlp_bias; llama.cpp loads no bias of mlp\.gate_proj for mistral"),
        ("qwen2", {"head_dim": 32}, "head_dim x heads"),
        ("llama", {"num_hidden_layers": 3}, r"lacks model\.layers\.2"),
        ("llama", {"num_hidden_layers": 1}, r"has model\.layers\.1.* no place"),
        ("llama", {"tie_word_embeddings": False}, r"lacks lm_head\.weight"),
    ],
)
def test_models_without_an_exact_counterpart_are_refused(
    tmp_path: Path, model_type: str, config: dict[str, Any], message: str
) -> None:
    frozen = make_run(tmp_path / "run", model_type, **config)
    with pytest.raises(ExportError, match=message):
        export_gguf(frozen, target("gguf:q2_0"), tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = make_run(tmp_path / "run")
    path = tmp_path / "out" / "a.gguf"
    written = exporter.payload

    def fails(frozen: FrozenModel, entry: Any) -> Any:
        if entry.name.startswith("blk.1"):
            raise OSError(28, "No space left on device")
        return written(frozen, entry)

    monkeypatch.setattr(exporter, "payload", fails)
    with pytest.raises(OSError, match="No space"):
        export_gguf(frozen, target("gguf:q2_0"), path)
    assert list(path.parent.iterdir()) == []


def test_the_digest_depends_on_every_code_and_scale(tmp_path: Path) -> None:
    frozen = make_run(tmp_path / "run", group_size=32)
    before = codes_digest(frozen)
    name = frozen.quantized[3]
    tensors = {p: frozen.codes(p) for p in frozen.quantized}
    digests = {before}
    for change in ("codes", "scales", "order"):
        other = {k: QuantizedTensor(t.codes.clone(), t.scales.clone(), t.group_size) for k, t in tensors.items()}
        if change == "codes":
            other[name].codes[-1, -1] = 1 - other[name].codes[-1, -1].clamp(0, 1)
        elif change == "scales":
            other[name].scales[-1, -1] *= 2
        else:
            other = dict(reversed(other.items()))
        save_codes(tmp_path / "run" / "codes.safetensors", other)
        digests.add(codes_digest(FrozenModel(tmp_path / "run")))
    assert len(digests) == 3


def test_a_head_with_numbers_that_fp16_has_not_is_refused(tmp_path: Path) -> None:
    frozen = make_run(tmp_path / "run")
    path = frozen.folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][3, 5] = 1e5
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"model\.embed_tokens\.weight: F16 cannot hold .*; use --head auto"):
        export_gguf(FrozenModel(tmp_path / "run"), target("gguf:q2_0"), tmp_path / "a.gguf", head="f16")
    assert not (tmp_path / "a.gguf").exists()
    export_gguf(FrozenModel(tmp_path / "run"), target("gguf:q2_0"), tmp_path / "a.gguf")
