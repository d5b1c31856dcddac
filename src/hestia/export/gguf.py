"""GGUF: one file with weights, tokenizer and settings, for llama.cpp and everything built on it.

    header      magic "GGUF", version 3, number of tensors, number of keys
    metadata    key, type, value; in the order of ``_Layout.metadata``
    tensors     name, dimensions (innermost first), type id, offset into the data
    data        each tensor at a multiple of 32 bytes, zeros between them

``_layout`` says what the file of a frozen model must hold, and where from. ``export_gguf`` writes that; ``check_gguf``
reads a file back with a parser of its own, decodes every block and compares with the frozen model. Nothing is rounded:
quantized tensors keep their codes and scales, one-dimensional ones become F32, and any other becomes F16 if every
number of it survives that, else F32.

Three things differ from the Hugging Face folder, all undone by the check:

- llama (and mistral) rows of q and k: llama.cpp rotates neighbours (2i, 2i + 1), transformers rotates (i, i + d/2), so
  the rows of each head are interleaved. Scales belong to rows and move with them.
- gemma norms: transformers multiplies by 1 + w, llama.cpp by the stored weight, so 1 + w (in fp32) is stored.
- a sliding window becomes the context length: up to there full attention is the same thing, exactly.

Source: the GGUF specification (ggml repository), llama.cpp 0c1e57098 (conversion/, src/models/).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf as gguf_py
import numpy as np
import torch

from .. import progress
from ..errors import ExportError, PlanError, VerifyError, nearest
from ..files import replacing
from ..quant.codes import QuantizedTensor
from ..quant.grids import Grid
from ..targets import F16, F32, LLAMA_CPP_BIASES, TARGETS, StorageType, Target
from ..targets import target as target_by_name
from .frozen import FrozenModel
from .gguf_reader import FORMATS, File, Raw, aligned, read
from .gguf_tokenizer import Value, tokenizer_metadata
from .packing import PACKINGS, Bytes, codes_digest

FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "TQ1_0": 36, "TQ2_0": 37, "Q2_0": 41}


@dataclass(frozen=True)
class _Family:
    """How llama.cpp wants one ``model_type``."""

    arch: str
    optional: frozenset[str] = frozenset()
    required: frozenset[str] = frozenset()
    permuted: bool = False
    norm_shift: float = 0.0
    activation: str = "silu"
    own_head_size: bool = True


_BIASES = {kind: frozenset(f"{layer}.bias" for layer in layers) for kind, layers in LLAMA_CPP_BIASES.items()}
_BLOCK = frozenset(
    f"{x}.weight"
    for x in (
        *("input_layernorm", "post_attention_layernorm"),
        *(f"self_attn.{x}_proj" for x in "qkvo"),
        *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
    )
)
_FAMILIES = {
    "llama": _Family("llama", _BIASES["llama"], _BLOCK, permuted=True),
    "mistral": _Family("llama", frozenset(), _BLOCK, permuted=True),
    "qwen2": _Family("qwen2", _BIASES["qwen2"], _BLOCK, own_head_size=False),
    "qwen3": _Family("qwen3", _BIASES["qwen3"], _BLOCK | {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}),
    "gemma": _Family("gemma", frozenset(), _BLOCK, norm_shift=1.0, activation="gelu_pytorch_tanh"),
}


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file.

    Attributes:
        name: in the file.
        source: in the Hugging Face folder; empty for ``rope_freqs``.
        shape: outermost dimension first.
        storage: how it is stored.
        path: module path of a quantized tensor that keeps its codes; None for dense ones.
        heads: attention heads whose rows are interleaved; 0 leaves the rows alone.
        shift: added in fp32.
        values: the numbers themselves, for ``rope_freqs``.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    storage: StorageType
    path: str | None = None
    heads: int = 0
    shift: float = 0.0
    values: tuple[float, ...] = ()

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) // self.storage.block * self.storage.block_bytes


@dataclass(frozen=True)
class _Layout:
    """All that a GGUF file of one frozen model must hold, in file order."""

    arch: str
    metadata: dict[str, Value]
    entries: list[_Entry]

    def offsets(self) -> list[int]:
        """Start of every tensor in the data section, and the section's length at the end."""
        out = [0]
        for entry in self.entries:
            out.append(aligned(out[-1] + entry.bytes))
        return out


def export_gguf(frozen: FrozenModel, target: Target, path: Path, *, fallback: bool = False) -> dict[str, Any]:
    """Write one GGUF file, atomically and tensor by tensor.

    Args:
        frozen: the frozen model.
        target: one of the ``gguf:`` targets.
        path: the file to write.
        fallback: store tensors that the target's first type cannot hold as its next exact type.

    Returns:
        ``{"target", "path", "bytes", "quantized_bytes", "tensors": {name: type}}``; ``quantized_bytes`` are those of
        the quantized tensors, scales included.

    Raises:
        ExportError: ``path`` is a folder, or llama.cpp has no exact counterpart for an architecture, setting or
            tokenizer; it is named.
        PlanError: a tensor that the target cannot hold; it is named, with what could hold it.
    """
    if path.is_dir():
        raise ExportError(f"{path}: is a folder, a GGUF model is one file; write to {path / 'model.gguf'}")
    layout = _layout(frozen, target, fallback=fallback)
    with replacing(path) as temporary:
        writer = gguf_py.GGUFWriter(temporary, layout.arch)
        try:
            for key, value in layout.metadata.items():
                if key != "general.architecture":  # the writer has put it in already
                    writer.add_key_value(key, value.value, *_gguf_types(value))
            for entry in layout.entries:
                # A dtype other than uint8 makes the writer take shape and type id as they are: it does not know 42.
                type_id: Any = entry.storage.ggml
                writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.bytes, type_id)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for entry in progress.track(layout.entries, "writing GGUF", total=len(layout.entries)):
                writer.write_tensor_data(_payload(frozen, entry))
        finally:
            writer.close()
    return {
        "target": target.name,
        "path": str(path),
        "bytes": path.stat().st_size,
        "quantized_bytes": sum(entry.bytes for entry in layout.entries if entry.path is not None),
        "tensors": {entry.name: entry.storage.name for entry in layout.entries},
    }


def check_gguf(path: Path, frozen: FrozenModel, target_name: str) -> list[str]:
    """Every way in which the file differs from what ``frozen`` demands; an empty list means equal.

    The file is read by a parser of its own; codes and scales are decoded and compared bit for bit after undoing the row
    order, then the bytes themselves (a byte of TQ1_0 has more values than meanings). Keys, types, order, offsets and
    the zeros between tensors are compared too, so that no bit of the file goes unread.

    Raises:
        ConfigError: no such file, or an unknown target.
        VerifyError: not a GGUF file, truncated, or a tensor that reaches beyond the end; the part is named.
    """
    chosen = target_by_name(target_name)
    file = read(path)
    layout = _layout(frozen, chosen, fallback=True)
    differences = list(_compare_metadata(file, layout))
    offsets = layout.offsets()
    end = file.data_start + offsets[-1]
    found = {info.name: info for info in file.tensors}
    expected = {entry.name for entry in layout.entries}
    differences += [f"{info.name}: not a tensor of this model" for info in file.tensors if info.name not in expected]
    if len(file.tensors) != len(found):
        differences.append("tensor names: some name occurs twice")
    if [i.name for i in file.tensors if i.name in expected] != [e.name for e in layout.entries if e.name in found]:
        differences.append("tensor order: not that of the model")
    for entry, offset in progress.track(zip(layout.entries, offsets, strict=False), "checking", len(layout.entries)):
        info = found.get(entry.name)
        if info is None:
            differences.append(f"{entry.name}: missing from the file")
            continue
        differences += [
            f"{entry.name}: {what} {got}, expected {wanted}"
            for what, got, wanted in (
                ("dimensions", info.shape, entry.shape),
                ("type id", info.type_id, entry.storage.ggml),
                ("offset", info.offset, offset),
            )
            if got != wanted
        ]
        start = file.data_start + info.offset
        comparable = (info.shape, info.type_id) == (entry.shape, entry.storage.ggml)
        stop = start + (entry.bytes if comparable else 1)
        if stop > len(file.data):
            raise VerifyError(
                f"{path}: truncated or damaged: {entry.name} needs bytes {start} to {stop}, "
                f"the file has {len(file.data)}"
            )
        if comparable:
            differences += _compare_tensor(file.data[start:stop], frozen, entry)
    gaps = [(file.infos_end, file.data_start)]
    starts = zip(layout.entries, offsets, offsets[1:], strict=False)
    gaps += [(file.data_start + o + entry.bytes, file.data_start + following) for entry, o, following in starts]
    for start, stop in gaps:
        nonzero = np.flatnonzero(file.data[start:stop])
        if nonzero.size:
            differences.append(f"padding: byte {start + int(nonzero[0])} of the file is not zero")
    if len(file.data) != end:
        differences.append(f"length: the file has {len(file.data)} bytes, expected {end}")
    return differences


# --- what the file must hold -----------------------------------------------------------------------------------------


def file_target(path: Path) -> str:
    """The target that a GGUF file says it is: ``gguf:tq2_0``, from its ``general.file_type``.

    Raises:
        ConfigError: no such file.
        VerifyError: damaged, or of a type that hestia does not write.
    """
    raw = dict(read(path).metadata).get("general.file_type")
    number = struct.unpack("<I", raw.items[0])[0] if raw is not None and raw.type == "u32" else None
    for name, file_type in FILE_TYPES.items():
        for target in TARGETS.values():
            if file_type == number and target.types[0].name == name:
                return target.name
    raise VerifyError(f"{path}: general.file_type is {number}, which hestia does not write")


def _layout(frozen: FrozenModel, target: Target, *, fallback: bool) -> _Layout:
    config = frozen.config
    model_type = config.get("model_type")
    where = frozen.folder / "config.json"
    if target.container != "gguf":
        raise ExportError(f"{target.name} is no GGUF target")
    family = _FAMILIES.get(str(model_type))
    if family is None:
        raise ExportError(
            f"{where}: model_type {model_type!r} has no GGUF export: {nearest(str(model_type), _FAMILIES)}"
        )
    activation = config.get("hidden_activation") or config.get("hidden_act")
    if activation != family.activation:
        raise ExportError(f"{where}: {model_type} in llama.cpp uses {family.activation}, the model {activation}")
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        kv_heads = int(config.get("num_key_value_heads") or heads)
        head_size = int(config.get("head_dim") or hidden // heads)
        scaling, factors = _rope(where, config, family, head_size)
        context = int(config["max_position_embeddings"])
        window = config.get("sliding_window")
        if window and config.get("use_sliding_window", model_type == "mistral"):
            context = min(context, int(window))
        if head_size * heads != hidden and not family.own_head_size:
            raise ExportError(f"{where}: {model_type} in llama.cpp needs head_dim x heads = hidden_size")
        arch = family.arch
        metadata = {
            f"{arch}.context_length": Value("u32", context),
            f"{arch}.embedding_length": Value("u32", hidden),
            f"{arch}.block_count": Value("u32", int(config["num_hidden_layers"])),
            f"{arch}.feed_forward_length": Value("u32", int(config["intermediate_size"])),
            f"{arch}.attention.head_count": Value("u32", heads),
            f"{arch}.attention.head_count_kv": Value("u32", kv_heads),
            f"{arch}.attention.layer_norm_rms_epsilon": Value("f32", float(config["rms_norm_eps"])),
            f"{arch}.rope.dimension_count": Value("u32", head_size),
            **{f"{arch}.rope.{key}": value for key, value in scaling.items()},
        }
    except KeyError as error:
        raise ExportError(f"{where}: missing key {error}") from None
    if head_size * heads != hidden:
        metadata |= {f"{arch}.attention.{x}_length": Value("u32", head_size) for x in ("key", "value")}
    entries = list(_entries(frozen, target, family, heads, kv_heads, fallback=fallback))
    rows = next(e.shape[0] for e in entries if e.name == "token_embd.weight")
    metadata[f"{arch}.vocab_size"] = Value("u32", rows)
    if factors:
        entries.insert(0, _Entry("rope_freqs.weight", "", (len(factors),), F32, values=factors))
    weights: dict[str, int] = {}
    for entry in entries:
        if entry.source.removesuffix(".weight") in frozen.quantized:
            weights[entry.storage.name] = weights.get(entry.storage.name, 0) + math.prod(entry.shape)
    main = max(weights, key=lambda name: weights[name])
    general = {
        "general.architecture": Value("str", arch),
        "general.name": Value("str", f"{model_type} {main} by hestia"),
        "general.file_type": Value("u32", FILE_TYPES[main]),
        "general.quantization_version": Value("u32", 2),
        "hestia.codes_sha256": Value("str", codes_digest(frozen)),
    }
    return _Layout(arch, {**general, **metadata, **tokenizer_metadata(frozen.folder, config, rows)}, entries)


def _rope(
    where: Path, config: dict[str, Any], family: _Family, head_size: int
) -> tuple[dict[str, Value], tuple[float, ...]]:
    """The ``rope.*`` keys, and the divisors of the frequencies that Llama 3's scaling needs (none otherwise)."""
    rope = config.get("rope_parameters")
    if rope is None:
        rope = {**(config.get("rope_scaling") or {}), "rope_theta": config.get("rope_theta", 10000.0)}
    if any(isinstance(value, dict) for value in rope.values()):
        raise ExportError(f"{where}: rope_parameters that differ by layer type have no GGUF export yet")
    if (rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ExportError(f"{where}: partial_rotary_factor has no GGUF export for {family.arch}")
    keys = {"freq_base": Value("f32", float(rope["rope_theta"]))}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return keys, ()
    if kind == "linear":
        keys |= {"scaling.type": Value("str", "linear"), "scaling.factor": Value("f32", float(rope["factor"]))}
        return keys, ()
    if kind == "llama3" and family.arch == "llama":
        low, high, factor = (float(rope[k]) for k in ("low_freq_factor", "high_freq_factor", "factor"))
        length = float(rope["original_max_position_embeddings"])
        divisors: list[float] = []
        for i in range(0, head_size, 2):
            turns = length / (2.0 * math.pi * float(rope["rope_theta"]) ** (i / head_size))
            smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
            divisors.append(1.0 / ((1.0 - smooth) / factor + smooth))
        return keys, tuple(divisors)
    raise ExportError(f"{where}: rope type {kind!r} has no GGUF export for {family.arch}: default, linear or llama3")


def _entries(
    frozen: FrozenModel, target: Target, family: _Family, heads: int, kv_heads: int, *, fallback: bool
) -> Iterator[_Entry]:
    blocks = int(frozen.config["num_hidden_layers"])
    names = gguf_py.get_tensor_name_map(getattr(gguf_py.MODEL_ARCH, family.arch.upper()), blocks)
    present = set(frozen.names())
    wanted = ["model.embed_tokens.weight"]
    for block in range(blocks):
        stem = f"model.layers.{block}."
        wanted += sorted(stem + x for x in family.required)
        wanted += sorted(stem + x for x in family.optional if stem + x in present)
    wanted.append("model.norm.weight")
    tied = frozen.config.get("tie_word_embeddings", family.arch == "gemma")
    if not tied:
        wanted.append("lm_head.weight")
    elif family.arch == "gemma" or "lm_head" not in frozen.quantized:
        present.discard("lm_head.weight")
    missing = [name for name in wanted if name not in present]
    extra = sorted(present - set(wanted) - {n for n in present if n.endswith("rotary_emb.inv_freq")})
    extra += [path for path in frozen.quantized if f"{path}.weight" not in wanted]
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has {extra[0]}, for which llama.cpp has no place"
        raise ExportError(f"{frozen.folder}: not a {family.arch} model as llama.cpp knows it: it {what}")
    if family.arch == "gemma" and not tied:
        raise ExportError(f"{frozen.folder}: gemma in llama.cpp has tied embeddings, this model has a head of its own")
    for source in wanted:
        name = names.get_name(source, (".weight", ".bias"))
        assert name is not None, source
        turned = {"q_proj": heads, "k_proj": kv_heads} if family.permuted else {}
        rotated = turned.get(source.split(".")[-2], 0)
        path = source.removesuffix(".weight")
        if path in frozen.quantized:
            yield _quantized(frozen, target, name, path, rotated, fallback=fallback)
            continue
        tensor = frozen.tensor(source)
        shift = family.norm_shift if source.endswith("norm.weight") else 0.0
        storage = F16 if tensor.ndim > 1 and _exact_in_half(tensor) else F32
        yield _Entry(name, source, tuple(tensor.shape), storage, heads=rotated, shift=shift)


def _quantized(frozen: FrozenModel, target: Target, name: str, path: str, heads: int, *, fallback: bool) -> _Entry:
    tensor = frozen.codes(path)
    counts = np.bincount(tensor.codes.numpy().reshape(-1).view(np.uint8), minlength=256)
    levels = {int(v) for v in np.flatnonzero(counts).astype(np.uint8).view(np.int8)}
    grid = Grid(tuple(sorted(levels if len(levels) > 1 else levels | {0, 1})))
    try:
        storage = target.storage(grid, tensor.group_size, tensor.shape, fallback=fallback)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None
    if storage.name in PACKINGS:
        return _Entry(name, f"{path}.weight", tensor.shape, storage, path=path, heads=heads)
    if storage is F16 and not _exact_in_half(tensor.dense()):
        storage = F32
    return _Entry(name, f"{path}.weight", tensor.shape, storage, path=path, heads=heads)


def _exact_in_half(tensor: torch.Tensor) -> bool:
    rows = max(1, (1 << 22) // max(1, tensor[0].numel()))  # in pieces: an embedding is the largest tensor of a model
    return all(bool((part.half().to(part.dtype) == part).all()) for part in tensor.split(rows))


def _payload(frozen: FrozenModel, entry: _Entry) -> Bytes:
    """The bytes of one tensor, as the file stores them."""
    order = _interleaved(entry.shape[0], entry.heads)
    packing = PACKINGS.get(entry.storage.name)
    if packing is not None:
        codes, scales = _codes_and_scales(frozen, entry)
        try:
            return packing.pack(codes[order], scales[order]).reshape(-1)
        except ExportError as error:
            raise ExportError(f"{entry.path}: {error}") from None
    values = _dense(frozen, entry)[order]
    stored = values.astype("<f2" if entry.storage is F16 else "<f4", copy=False)
    return np.ascontiguousarray(stored).reshape(-1).view(np.uint8)


def _codes_and_scales(frozen: FrozenModel, entry: _Entry) -> tuple[np.ndarray, np.ndarray]:
    assert entry.path is not None
    tensor: QuantizedTensor = frozen.codes(entry.path)
    return tensor.codes.numpy(), tensor.block_scales(entry.storage.block).numpy()


def _dense(frozen: FrozenModel, entry: _Entry) -> np.ndarray:
    """The numbers of a dense tensor in fp32, rows as in the Hugging Face folder."""
    if entry.values:
        return np.array(entry.values, np.float32)
    if entry.path is not None:
        return frozen.codes(entry.path).dense().numpy()
    return (
        (frozen.tensor(entry.source).float() + entry.shift if entry.shift else frozen.tensor(entry.source))
        .float()
        .numpy()
    )


def _interleaved(rows: int, heads: int) -> Any:
    """Row indices in file order: within each head 0, d/2, 1, d/2 + 1, ... (all rows as they are for 0 heads)."""
    if heads == 0:
        return slice(None)
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


_GGUF_TYPES = {
    "u32": gguf_py.GGUFValueType.UINT32,
    "i32": gguf_py.GGUFValueType.INT32,
    "f32": gguf_py.GGUFValueType.FLOAT32,
    "bool": gguf_py.GGUFValueType.BOOL,
    "str": gguf_py.GGUFValueType.STRING,
}


def _gguf_types(value: Value) -> tuple[gguf_py.GGUFValueType, gguf_py.GGUFValueType | None]:
    if value.kind.endswith("[]"):
        return gguf_py.GGUFValueType.ARRAY, _GGUF_TYPES[value.kind[:-2]]
    return _GGUF_TYPES[value.kind], None


# --- comparing a file with the frozen model -----------------------------------------------------------------------


def _expected_raw(value: Value) -> Raw:
    base = value.kind.removesuffix("[]")
    items = value.value if value.kind.endswith("[]") else [value.value]
    if base == "str":
        return Raw(value.kind, [item.encode() for item in items])
    return Raw(value.kind, [struct.pack(FORMATS[base], item) for item in items])


def _compare_metadata(file: File, layout: _Layout) -> Iterator[str]:
    found = dict(file.metadata)
    if len(found) != len(file.metadata):
        yield "metadata: some key occurs twice"
    for key in found:
        if key not in layout.metadata:
            yield f"{key}: not a key of this model"
    if [k for k in found if k in layout.metadata] != [k for k in layout.metadata if k in found]:
        yield "metadata: keys are not in their order"
    for key, value in layout.metadata.items():
        raw, expected = found.get(key), _expected_raw(value)
        if raw is None:
            yield f"{key}: missing from the file"
        elif raw.type != expected.type:
            yield f"{key}: type {raw.type}, expected {expected.type}"
        elif raw != expected:
            if len(raw.items) != len(expected.items):
                yield f"{key}: {len(raw.items)} items, expected {len(expected.items)}"
            pairs = enumerate(zip(raw.items, expected.items, strict=False))
            first = next((i for i, (a, b) in pairs if a != b), None)
            if first is not None:
                place = f"{key}[{first}]" if value.kind.endswith("[]") else key
                yield f"{place}: {raw.show(first)}, expected {expected.show(first)}"


def _compare_tensor(stored: Bytes, frozen: FrozenModel, entry: _Entry) -> Iterator[str]:
    """First difference in codes, scales or numbers, in the rows and columns of the frozen model; else in bytes."""
    label = f"{entry.name} ({entry.source})" if entry.source else entry.name
    rows = entry.shape[0]
    undo: Any = slice(None)
    if entry.heads:
        undo = np.arange(rows).reshape(entry.heads, rows // entry.heads // 2, 2).swapaxes(1, 2).reshape(-1)
    packing = PACKINGS.get(entry.storage.name)
    if packing is not None:
        codes, scales = packing.unpack(stored.reshape(rows, -1))
        pairs = zip(("code", "scale"), (codes[undo], scales[undo]), _codes_and_scales(frozen, entry), strict=True)
    else:
        numbers = stored.view("<f2" if entry.storage is F16 else "<f4").reshape(entry.shape)[undo]
        pairs = [("number", numbers.astype(np.float32), _dense(frozen, entry))]
    clean = True
    for what, got, wanted in pairs:
        bits = np.uint8 if got.dtype == np.int8 else np.uint32
        different = np.ascontiguousarray(got).view(bits) != np.ascontiguousarray(wanted).view(bits)
        if different.any():
            clean = False
            at = tuple(int(i) for i in np.argwhere(different)[0])
            yield (
                f"{label}: {what} {got[at]} at {list(at)}, the frozen model has {wanted[at]} "
                f"({int(different.sum())} of {different.size} differ)"
            )
    if clean and packing is not None:
        different = np.flatnonzero(stored != _payload(frozen, entry))
        if different.size:
            yield f"{label}: byte {int(different[0])} is not the canonical one, though it decodes to the same numbers"
