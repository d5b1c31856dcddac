"""The frozen model as a Hugging Face folder: compressed-tensors ``pack-quantized``, two or four bits per weight.

``AutoModelForCausalLM.from_pretrained(PATH)`` loads it (with compressed-tensors installed), and so do vLLM and, with
scales in groups, llama.cpp's converter. For a quantized linear ``X`` of shape ``[O, I]`` the tensor ``X.weight``
becomes

    X.weight_packed  int32 [O, ceil(I / 16)]   code + 2, sixteen consecutive inputs a word, least significant bits
                                               first, the last word of a row filled with zero bits; at four bits
                                               code + 8, eight a word: for servers that have no two-bit kernel
    X.weight_scale   [O, I / G] or [O, 1]      in the dtype of the dense weight; loaders multiply in this dtype
    X.weight_shape   int64 [2]                 O, I

and every other tensor and file is the parent's, byte for byte. The layout was read in compressed-tensors 0.20, whose
own unpacking is the second opinion in the tests; nothing of it is called here.

The whole model has one config group, because llama.cpp's converter and transformers' ``dequantize=True`` take no
more. ``choose_scheme`` picks it: ``group`` with the scales repeated wherever a common group length divides every row,
since that is what most engines load, else ``channel``, one scale per row, which llama.cpp's converter refuses (groups
of a smaller common factor would be several times as large, and no GPU kernel has them).

This file and ``loading`` are the doors to transformers.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ..errors import ExportError, VerifyError
from ..files import replacing_folder, sha256_of_files, sha256_of_listing, write_text
from ..targets import PACK2, PACK4, scale_group
from . import require_free
from .frozen import FrozenModel

ROW_SCALES = "its rows share no factor of 32, so each has one scale: llama.cpp's converter does not load this folder"
_SHARD_BYTES = 4_000_000_000
_READER_SWITCH = "HF_DEACTIVATE_ASYNC_LOAD"
"""Environment variable of transformers: "1" reads tensors one after another."""
_DTYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}


@dataclass(frozen=True)
class Scheme:
    """How the scales of all quantized tensors are laid out.

    Attributes:
        strategy: "group" (``[O, I / group_size]``) or "channel" (``[O, 1]``).
        group_size: consecutive inputs a stored scale serves; None for "channel".
        bits: of a code.
    """

    strategy: str
    group_size: int | None = None
    bits: int = 2

    def columns(self, in_features: int) -> int:
        """Stored scales per row."""
        return 1 if self.group_size is None else in_features // self.group_size


def export_hf(frozen: FrozenModel, path: Path, *, bits: int = 2, max_shard_bytes: int = _SHARD_BYTES) -> dict[str, Any]:
    """Write the frozen model as a compressed-tensors folder; the folder appears whole or not at all.

    One tensor at a time is in memory, whatever the size of the model.

    Args:
        frozen: the run's frozen model.
        path: the folder to create; an empty one may be there.
        bits: of a code: 2, or 4 for ``hf:int4``.
        max_shard_bytes: split the weights into files of about this size.

    Returns:
        ``{"target", "path", "bytes", "sha256", "quantized_bytes", "files"}``: bytes of the whole folder and of the
        quantized tensors alone (scales and shapes included), and the SHA-256 of every file; ``sha256`` is that of
        their listing (``files.sha256_of_listing``). With one scale per row, ``caution`` says which engine does not take
        that.

    Raises:
        ExportError: the folder is not empty, or the format cannot hold a tensor exactly; nothing was written.
    """
    scheme = choose_scheme(frozen, bits)
    config = {**frozen.config, "quantization_config": quantization_config(frozen, scheme)}
    name = "hf" if bits == 2 else "hf:int4"
    record = write_folder(name, path, frozen, _entries(frozen, scheme), config, max_shard_bytes=max_shard_bytes)
    return record if scheme.strategy == "group" else {**record, "caution": ROW_SCALES}


def write_folder(
    target: str,
    path: Path,
    frozen: FrozenModel,
    entries: list[Entry],
    config: dict[str, Any],
    *,
    file_format: str = "pt",
    max_shard_bytes: int = _SHARD_BYTES,
) -> dict[str, Any]:
    """Write tensors, config.json and the parent's other files; the folder appears whole or not at all.

    Raises:
        ExportError: the folder is not empty; nothing was written.
    """
    require_free(path)
    with replacing_folder(path) as temporary:
        _write_shards(temporary, entries, max_shard_bytes, file_format)
        write_text(temporary / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        for source in companions(frozen.folder):
            copy = temporary / source.relative_to(frozen.folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
        if path.exists():
            path.rmdir()  # an empty one; what was put there meanwhile is not replaced
    hashes = sha256_of_files(path)
    return {
        "target": target,
        "path": str(path),
        "bytes": sum((path / name).stat().st_size for name in hashes),
        "sha256": sha256_of_listing(hashes),
        "quantized_bytes": sum(e.nbytes for e in entries if e.packed),
        "files": hashes,
    }


def companions(folder: Path) -> list[Path]:
    """The files beside the weights and config.json: tokenizer, chat template, generation config, licence."""

    written = (".safetensors", ".safetensors.index.json")
    files = (f for f in folder.rglob("*") if f.is_file() and not f.name.endswith(written))
    return sorted(f for f in files if f != folder / "config.json")


# --- the scheme and the configuration ------------------------------------------------------------------------------


def choose_scheme(frozen: FrozenModel, bits: int = 2) -> Scheme:
    """One scheme that stores every scale of the model exactly, by repetition and never by rounding: ``scale_group``."""
    kind = PACK2 if bits == 2 else PACK4
    group = scale_group(kind, ((codes.group_size, codes.shape) for codes in map(frozen.codes, frozen.quantized)))
    return Scheme("channel" if group is None else "group", group, bits)


def quantization_config(frozen: FrozenModel, scheme: Scheme) -> dict[str, Any]:
    """The ``quantization_config`` of config.json.

    The one config group targets every ``Linear``; ``ignore`` names each linear that was kept, in the model's order.

    Raises:
        ExportError: a quantized module is not an ``nn.Linear``, or transformers cannot build the model without remote
            code.
    """
    if frozen.config.get("quantization_config"):
        raise ExportError(f"{frozen.folder / 'config.json'}: the model is already quantized by another method")
    linears = _linears(frozen.folder)
    for name in frozen.quantized:
        if name not in linears:
            raise ExportError(f"{name}: not an nn.Linear of this architecture, pack-quantized stores no other kind")
    weights: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": True,
        "strategy": scheme.strategy,
        "group_size": scheme.group_size,
        "dynamic": False,
        "observer": "minmax",
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    quantized = set(frozen.quantized)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [name for name in linears if name not in quantized],
    }


def _linears(folder: Path) -> list[str]:
    """The module paths of all ``nn.Linear`` of the architecture; no weight is allocated."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ExportError(f"{folder}: transformers cannot build this model without remote code ({error})") from None
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


# --- the tensors ---------------------------------------------------------------------------------------------------


def pack_codes(codes_OI: Tensor, bits: int = 2) -> Tensor:
    """``32 / bits`` codes a word: int8 ``[O, I]`` to int32 ``[O, ceil(I * bits / 32)]``.

        word[o, k] = sum over j of (code[o, n k + j] + 2**(bits - 1)) * 2**(bits j),   n = 32 / bits, missing codes 0

    >>> pack_codes(torch.tensor([[-2, -1, 0, 1]], dtype=torch.int8))
    tensor([[228]], dtype=torch.int32)
    """
    rows, columns = codes_OI.shape
    words, a_byte = -(-columns * bits // 32), 8 // bits
    unsigned = torch.zeros(rows, words * 4 * a_byte, dtype=torch.uint8)
    unsigned[:, :columns] = (codes_OI + 2 ** (bits - 1)).to(torch.uint8)
    parts = unsigned.reshape(rows, words * 4, a_byte)
    packed = parts[..., 0].clone()
    for place in range(1, a_byte):
        packed |= parts[..., place] << bits * place
    return packed.view(torch.int32)  # four bytes per word, the first the least significant


@dataclass(frozen=True)
class Entry:
    """One tensor to be written: known by shape before ``read`` touches its data."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    packed: bool = False  # part of a quantized weight

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def _entries(frozen: FrozenModel, scheme: Scheme) -> list[Entry]:
    """Every tensor of the file, in the order of the dense one; data is read when an entry is written."""
    quantized = {f"{name}.weight": name for name in frozen.quantized}
    names = set(frozen.names())
    for tensor, name in quantized.items():
        if tensor not in names:
            raise ExportError(f"{name}: {frozen.run} has codes but no tensor {tensor!r} for it")
    entries: list[Entry] = []
    for name in frozen.names():
        if name in quantized:
            entries += _packed_entries(frozen, quantized[name], scheme)
            continue
        dense = frozen.tensor(name)
        if dense.dtype not in _DTYPE_NAMES:
            raise ExportError(f"{name}: dtype {dense.dtype} is not supported, convert the parent to bf16 first")
        entries.append(Entry(name, dense.dtype, tuple(dense.shape), lambda name=name: frozen.tensor(name)))
    return entries


def _packed_entries(frozen: FrozenModel, path: str, scheme: Scheme) -> Iterator[Entry]:
    """The three tensors of one quantized linear, after checking that two bits and the scale's dtype are exact."""
    weight, dense = frozen.codes(path), frozen.tensor(f"{path}.weight")
    dtype, (rows, columns) = dense.dtype, weight.shape
    low, high = int(weight.codes.min()), int(weight.codes.max())
    lowest, highest = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
    if low < lowest or high > highest:
        raise ExportError(f"{path}: levels {low}..{high}, {scheme.bits} signed bits hold {lowest}..{highest}")
    if not torch.equal(weight.scales.to(dtype).float(), weight.scales):
        raise ExportError(f"{path}: a scale is not exact in {dtype}; freeze the model again to snap the scales")
    if dense.shape != weight.codes.shape or not torch.equal(weight.dense(dtype), dense):
        raise ExportError(f"{path}: the dense weight in {frozen.folder} is not codes * scales; freeze the model again")

    def words() -> Tensor:
        return pack_codes(frozen.codes(path).codes, scheme.bits)

    def scales() -> Tensor:
        return frozen.codes(path).block_scales(scheme.group_size or columns).to(dtype)

    def shape() -> Tensor:
        return torch.tensor([rows, columns])

    yield Entry(f"{path}.weight_packed", torch.int32, (rows, -(-columns * scheme.bits // 32)), words, packed=True)
    yield Entry(f"{path}.weight_scale", dtype, (rows, scheme.columns(columns)), scales, packed=True)
    yield Entry(f"{path}.weight_shape", torch.int64, (2,), shape, packed=True)


# --- safetensors, streamed -----------------------------------------------------------------------------------------


def _write_shards(folder: Path, entries: list[Entry], max_bytes: int, file_format: str) -> None:
    """model.safetensors, or numbered shards of at most ``max_bytes`` (unless one tensor is larger) and their index."""
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(e.nbytes for e in shards[-1]) + entry.nbytes > max_bytes:
            shards.append([])
        shards[-1].append(entry)
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shards[0], {"format": file_format})
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard, {"format": file_format})
        weight_map.update({entry.name: name for entry in shard})
    index = {"metadata": {"total_size": sum(e.nbytes for e in entries)}, "weight_map": weight_map}
    write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def write_safetensors(path: Path, entries: list[Entry], metadata: dict[str, str]) -> None:
    """One safetensors file: an eight-byte length, a JSON header, then the tensors' bytes without gaps.

    The library's own writer wants all tensors of a file in memory at once. Wide numbers come first and the header is
    padded to eight bytes, so every tensor is aligned to its own width when the file is mapped.
    """
    ordered = sorted(entries, key=lambda e: -e.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for entry in ordered:
        end = offset + entry.nbytes
        header[entry.name] = {
            "dtype": _DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as handle:
        handle.write(len(text).to_bytes(8, "little"))
        handle.write(text)
        for entry in ordered:
            _write_tensor(handle, entry)
        handle.flush()
        os.fsync(handle.fileno())


def _write_tensor(handle: BinaryIO, entry: Entry) -> None:
    tensor = entry.read()
    assert tensor.dtype == entry.dtype and tuple(tensor.shape) == entry.shape, entry.name
    handle.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


# --- and back ------------------------------------------------------------------------------------------------------


def load(folder: Path) -> Any:
    """A Hugging Face folder, dense or packed, as any user would load it: in fp32, ready to be called.

    Tensor after tensor: the threads that transformers would read with hold a third more memory, and none the same.

    Args:
        folder: what ``AutoModelForCausalLM.from_pretrained`` takes; no remote code, nothing is downloaded.

    Raises:
        VerifyError: transformers cannot load it.
    """
    try:
        with _without_reader_threads(), contextlib.redirect_stderr(io.StringIO()):  # compressed-tensors draws bars
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, trust_remote_code=False, local_files_only=True
            )
            return model.eval()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise VerifyError(f"{folder}: transformers cannot load it ({_first_line(error)})") from None


@contextlib.contextmanager
def _without_reader_threads() -> Iterator[None]:
    before = os.environ.get(_READER_SWITCH)
    os.environ[_READER_SWITCH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_READER_SWITCH]
        else:
            os.environ[_READER_SWITCH] = before


@torch.no_grad()
def logits(model: Any, token_ids: Tensor) -> Tensor:
    """Logits ``[B, T, V]`` in fp32 of a loaded model.

    Args:
        model: from ``load``.
        token_ids: int64 ``[B, T]``.

    Raises:
        VerifyError: transformers cannot run it.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return model(input_ids=token_ids).logits.float()
    except (ValueError, KeyError, RuntimeError, IndexError) as error:
        raise VerifyError(f"transformers cannot run the model ({_first_line(error)})") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
