"""What the GGUF file of a frozen model must hold, and where from: read by the exporter and by the check.

    quantized tensors   their codes and scales, in the target's type or another exact one
    embedding and head  the smallest dense type that keeps every number (F16, BF16, else F32), or what ``--head`` says:
                        f16, bf16 and q8_0 may round, and then the export says so
    vectors             F32
    other matrices      as the embedding under ``auto``

Rows of q and k are interleaved where llama.cpp wants that; scales belong to rows and move with them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gguf as gguf_py
import numpy as np
import torch

from ..errors import ExportError, PlanError
from ..targets import BF16, F16, F32, StorageType, Target
from .digest import codes_digest
from .frozen import FrozenModel
from .gguf_families import Shape, shape_of
from .gguf_tokenizer import Value, tokenizer_metadata
from .gguf_writer import aligned, item_bytes
from .packing import PACKINGS, Bytes, round_q8_0

FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q2_K": 10, "Q3_K": 11, "Q4_K": 15, "BF16": 32,
    "TQ1_0": 36, "TQ2_0": 37, "Q1_0": 40, "Q2_0": 41,
}  # fmt: skip
PLACEHOLDER = "0" * 64
"""Stands in ``hestia.file_sha256`` while that hash is computed."""

PIECE = 1 << 21
"""Weights handled at a time: what bounds the memory of an export."""


DESCRIPTION = {
    "general.name": "str", "general.basename": "str", "general.size_label": "str", "general.license": "str",
    "general.base_model.count": "u32", "general.base_model.0.name": "str",
    "general.base_model.0.organization": "str", "general.base_model.0.repo_url": "str",
}  # fmt: skip
"""Keys that tell people of the parent, and their types: no number depends on them, and a file may lack them."""


@dataclass(frozen=True)
class Parent:
    """The model that was quantized, as a file tells of it.

    Attributes:
        name: of its folder or repository.
        hub_id: owner/name; None for a local folder.
        license: None where it is not known.
    """

    name: str
    hub_id: str | None = None
    license: str | None = None


@dataclass(frozen=True)
class Entry:
    """One tensor of the file.

    Attributes:
        name: in the file.
        source: in the Hugging Face folder; empty for ``rope_freqs``.
        shape: outermost dimension first.
        storage: how it is stored.
        path: module path of a quantized tensor; None for others.
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
        """Bytes in the file."""
        return math.prod(self.shape) // self.storage.block * self.storage.block_bytes

    @property
    def packed(self) -> bool:
        """Whether it is stored as integer codes and scales."""
        return self.storage.name in PACKINGS

    def pieces(self) -> Iterator[slice]:
        """Ranges of rows, in file order, of about ``PIECE`` weights."""
        rows = max(1, PIECE // max(1, math.prod(self.shape[1:])))
        for start in range(0, self.shape[0], rows):
            yield slice(start, min(start + rows, self.shape[0]))

    def order(self) -> np.ndarray:
        """The row of the frozen model that stands in each row of the file: within a head 0, d/2, 1, d/2 + 1, ..."""
        rows = np.arange(self.shape[0])
        if self.heads == 0:
            return rows
        return rows.reshape(self.heads, 2, self.shape[0] // self.heads // 2).swapaxes(1, 2).reshape(-1)


@dataclass(frozen=True)
class Layout:
    """All that a GGUF file of one frozen model must hold, in file order."""

    metadata: dict[str, Value]
    entries: list[Entry]

    def offsets(self) -> list[int]:
        """Start of every tensor in the data section, and the section's length at the end."""
        out = [0]
        for entry in self.entries:
            out.append(aligned(out[-1] + entry.bytes))
        return out

    def storage_of(self) -> dict[str, StorageType]:
        """Module path -> how its weight is stored, for linear modules and the embedding."""
        out = {e.source.removesuffix(".weight"): e.storage for e in self.entries if e.source.endswith(".weight")}
        out.setdefault("lm_head", out["model.embed_tokens"])
        return out


def layout_of(
    frozen: FrozenModel,
    target: Target,
    *,
    fallback: bool = False,
    head: StorageType | None = None,
    parent: Parent | None = None,
) -> Layout:
    """What the file must hold.

    Args:
        frozen: the frozen model.
        target: one of the ``gguf:`` targets.
        fallback: store tensors that the target's first type cannot hold as its next exact type.
        head: storage of embedding and head; None for the smallest exact one.
        parent: what the file tells of the model that was quantized; None where nobody knows.

    Raises:
        ExportError: llama.cpp has no exact counterpart for an architecture, setting or tokenizer; it is named.
        PlanError: a tensor that the target cannot hold; it is named, with what could hold it.
    """
    config = frozen.config
    if target.container != "gguf":
        raise ExportError(f"{target.name} is no GGUF target")
    shape = shape_of(frozen.folder / "config.json", config)
    head = F32 if head is None and target.types[0] is F32 else head
    entries = list(_entries(frozen, target, shape, head, fallback=fallback))
    rows = next(e.shape[0] for e in entries if e.name == "token_embd.weight")
    metadata = {**shape.metadata, f"{shape.family.arch}.vocab_size": Value("u32", rows)}
    if shape.rope_factors:
        entries.insert(0, Entry("rope_freqs.weight", "", (len(shape.rope_factors),), F32, values=shape.rope_factors))
    weights: dict[str, int] = {}
    for entry in entries:
        if entry.path is not None:
            weights[entry.storage.name] = weights.get(entry.storage.name, 0) + math.prod(entry.shape)
    main = max(weights, key=lambda name: weights[name])
    general = {
        "general.architecture": Value("str", shape.family.arch),
        **_description(entries, parent or Parent(f"{config['model_type']} {main} by hestia"), known=parent is not None),
        "general.file_type": Value("u32", FILE_TYPES[main]),
        "general.quantization_version": Value("u32", 2),
        "hestia.target": Value("str", target.name),
        "hestia.run": Value("str", frozen.run.resolve().name),
        "hestia.codes_sha256": Value("str", codes_digest(frozen)),
        "hestia.quantized": Value("str", _claims(frozen, entries)),
        "hestia.file_sha256": Value("str", PLACEHOLDER),
    }
    tokenizer = tokenizer_metadata(frozen.folder, config, rows)
    return Layout({**general, **metadata, **tokenizer, **_generation(frozen)}, entries)


def _description(entries: list[Entry], parent: Parent, *, known: bool) -> dict[str, Value]:
    """Name, size, licence and origin as llama.cpp's converter writes them."""
    weights = sum(math.prod(entry.shape) for entry in entries if entry.source)
    _, _, basename, _, _, size = gguf_py.Metadata.get_model_id_components(parent.name, weights)
    texts = {
        "general.name": parent.name,
        "general.basename": basename,
        "general.size_label": size or gguf_py.size_label(weights, weights, 0, 0),
        "general.license": parent.license,
    }
    out = {key: Value("str", text) for key, text in texts.items() if text}
    if not known:
        return out
    out["general.base_model.count"] = Value("u32", 1)
    out["general.base_model.0.name"] = Value("str", parent.name)
    if parent.hub_id is not None:
        out["general.base_model.0.organization"] = Value("str", parent.hub_id.split("/")[0])
        out["general.base_model.0.repo_url"] = Value("str", f"https://huggingface.co/{parent.hub_id}")
    return out


def _claims(frozen: FrozenModel, entries: list[Entry]) -> str:
    """What is needed to compute the codes' hash from the file alone: tensor -> module path, group size, heads."""
    claims = {e.name: [e.path, frozen.codes(e.path).group_size, e.heads] for e in entries if e.path is not None}
    return json.dumps(claims, separators=(",", ":"))


def _generation(frozen: FrozenModel) -> dict[str, Value]:
    """generation_config.json byte for byte, and the sampling settings that llama.cpp reads from the file."""
    file = frozen.folder / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        text = file.read_bytes().decode()
        settings = json.loads(text)
    except ValueError as error:
        raise ExportError(f"{file}: not JSON ({error})") from None
    out: dict[str, Value] = {"hestia.generation_config": Value("str", text)}
    names = {"top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
    names |= {"temperature": "temp", "repetition_penalty": "penalty_repeat"}
    for key, name in names.items():
        number: Any = settings.get(key)
        if not settings.get("do_sample") or isinstance(number, bool) or not isinstance(number, int | float):
            continue
        if not math.isfinite(number):  # the whole file lies beside, as text
            continue
        if key == "top_k":
            if number == int(number) and abs(number) < 2**31:
                out[f"general.sampling.{name}"] = Value("i32", int(number))
        elif abs(number) < 1e38:  # what fp32 holds
            out[f"general.sampling.{name}"] = Value("f32", float(number))
    return out


def _entries(
    frozen: FrozenModel, target: Target, shape: Shape, head: StorageType | None, *, fallback: bool
) -> Iterator[Entry]:
    family = shape.family
    names = gguf_py.get_tensor_name_map(getattr(gguf_py.MODEL_ARCH, family.arch.upper()), shape.blocks)
    present = set(frozen.names())
    wanted = ["model.embed_tokens.weight"]
    for block in range(shape.blocks):
        stem = f"model.layers.{block}."
        wanted += sorted(stem + x for x in family.required)
        wanted += sorted(stem + x for x in family.optional if stem + x in present)
    wanted.append("model.norm.weight")
    if not shape.tied:
        wanted.append("lm_head.weight")
    elif family.tied or "lm_head" not in frozen.quantized:
        present.discard("lm_head.weight")
    missing = [name for name in wanted if name not in present]
    extra = sorted(present - set(wanted) - {n for n in present if n.endswith("rotary_emb.inv_freq")})
    extra += [path for path in frozen.quantized if f"{path}.weight" not in wanted]
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has {extra[0]}, for which llama.cpp has no place"
        raise ExportError(f"{frozen.folder}: not a {family.arch} model as llama.cpp knows it: it {what}")
    for source in wanted:
        name = names.get_name(source, (".weight", ".bias"))
        assert name is not None, source
        turned = {"q_proj": shape.heads, "k_proj": shape.kv_heads} if family.permuted else {}
        rotated = turned.get(source.split(".")[-2], 0)
        path = source.removesuffix(".weight")
        if path in frozen.quantized:
            yield _quantized(frozen, target, name, path, rotated, fallback=fallback)
            continue
        tensor = frozen.tensor(source)
        shift = family.norm_shift if source.endswith("norm.weight") else 0.0
        storage = F32
        if tensor.ndim > 1:
            chosen = head if source in ("model.embed_tokens.weight", "lm_head.weight") else None
            storage = chosen or _smallest_exact(tensor)
            if tensor.shape[1] % storage.block:
                raise ExportError(
                    f"{path}: {storage.name} stores rows in blocks of {storage.block}, which do not divide "
                    f"{tensor.shape[1]}; use --head auto or f16"
                )
        yield Entry(name, source, tuple(tensor.shape), storage, heads=rotated, shift=shift)


def _quantized(frozen: FrozenModel, target: Target, name: str, path: str, heads: int, *, fallback: bool) -> Entry:
    tensor = frozen.codes(path)
    try:
        storage = target.storage(tensor.grid(), tensor.group_size, tensor.shape, fallback=fallback)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None
    if storage is F16:
        storage = _smallest_exact(tensor.dense())
    return Entry(name, f"{path}.weight", tensor.shape, storage, path=path, heads=heads)


def _smallest_exact(tensor: torch.Tensor) -> StorageType:
    """F16 where that keeps every number, else BF16 where that does, else F32."""
    rows = max(1, PIECE // max(1, tensor[0].numel()))  # in pieces: an embedding is the largest tensor of a model
    for storage, dtype in ((F16, torch.float16), (BF16, torch.bfloat16)):
        if all(bool((part.to(dtype).to(part.dtype) == part).all()) for part in tensor.split(rows)):
            return storage
    return F32


# --- contents ------------------------------------------------------------------------------------------------------


def payload(frozen: FrozenModel, entry: Entry) -> Iterator[Bytes]:
    """The bytes of one tensor as the file stores them, piece by piece.

    Raises:
        ExportError: its storage type cannot hold it exactly; the tensor is named.
    """
    order = entry.order()
    for rows in entry.pieces():
        if entry.packed:
            codes, scales = codes_and_scales(frozen, entry, order[rows])
            try:
                packed = PACKINGS[entry.storage.name].pack(codes, scales)
            except ExportError as error:
                raise ExportError(f"{entry.path or entry.source}: {error}") from None
            yield packed.reshape(-1)
        else:
            yield encode(dense(frozen, entry, order[rows]), entry.storage).reshape(-1)


def codes_and_scales(frozen: FrozenModel, entry: Entry, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and block scales of some rows of the frozen model, as a packed entry must hold them.

    Raises:
        ExportError: an embedding or head that Q8_0 cannot round to; the tensor is named.
    """
    if entry.path is None:
        try:
            return round_q8_0(dense(frozen, entry, rows))
        except ExportError as error:
            raise ExportError(f"{entry.source}: {error}") from None
    tensor = frozen.codes(entry.path)
    index = torch.from_numpy(rows)
    return tensor.codes[index].numpy(), tensor.block_scales(entry.storage.block)[index].numpy()


def dense(frozen: FrozenModel, entry: Entry, rows: np.ndarray) -> np.ndarray:
    """Some rows of a tensor in fp32, before any rounding by its storage type."""
    if entry.values:
        return np.array(entry.values, np.float32)[rows]
    index = torch.from_numpy(rows)
    if entry.path is not None:
        return frozen.codes(entry.path).rows(index).numpy()
    values = frozen.tensor(entry.source)[index].float()
    return (values + entry.shift if entry.shift else values).numpy()


def encode(values: np.ndarray, storage: StorageType) -> Bytes:
    """fp32 numbers as the bytes of a dense type, to the nearest."""
    if storage is BF16:
        return torch.from_numpy(values).to(torch.bfloat16).view(torch.uint8).numpy()
    with np.errstate(over="ignore"):
        stored = values.astype("<f2" if storage is F16 else "<f4", copy=False)
    return np.ascontiguousarray(stored).view(np.uint8)


def decode(stored: Bytes, storage: StorageType, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of ``encode``, in fp32."""
    if storage is BF16:
        bits = stored.view("<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(shape)
    return stored.view("<f2" if storage is F16 else "<f4").reshape(shape).astype(np.float32)


def stored_values(frozen: FrozenModel, entry: Entry, rows: np.ndarray) -> torch.Tensor:
    """Some rows of a kept tensor in fp32 as the file holds them: rounded where its type rounds."""
    if entry.packed:
        codes, scales = codes_and_scales(frozen, entry, rows)
        return torch.from_numpy(codes * np.repeat(scales, entry.storage.block, axis=1))
    values = dense(frozen, entry, rows)
    return torch.from_numpy(decode(encode(values, entry.storage), entry.storage, values.shape))


def metadata_bytes(value: Value) -> list[bytes]:
    """The items of a metadata value as the file stores them."""
    base = value.kind.removesuffix("[]")
    items = value.value if value.kind.endswith("[]") else [value.value]
    return [item_bytes(base, item) for item in items]
