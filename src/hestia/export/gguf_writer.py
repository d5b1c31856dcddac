"""Writes GGUF files of version 3, piece by piece: no tensor is ever held whole.

    header      magic "GGUF", version 3, number of tensors, number of keys
    metadata    key, type, value
    tensors     name, dimensions (innermost first), type id, offset into the data
    data        each tensor at a multiple of ``ALIGNMENT`` bytes, zeros between them

Source: the GGUF specification (ggml repository).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from .gguf_tokenizer import Value
from .packing import Bytes

ALIGNMENT = 32

_TYPES = {"u32": 4, "i32": 5, "f32": 6, "bool": 7, "str": 8}
_FORMATS = {"u32": "<I", "i32": "<i", "f32": "<f", "bool": "<B"}
_ARRAY = 9


class Tensor(Protocol):
    """What the header says about one tensor."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def bytes(self) -> int: ...


def aligned(position: int) -> int:
    """The next multiple of ``ALIGNMENT`` at or after ``position``."""
    return -(-position // ALIGNMENT) * ALIGNMENT


def write(
    path: Path,
    metadata: Mapping[str, Value],
    tensors: Sequence[Tensor],
    type_ids: Sequence[int],
    payloads: Iterable[Iterator[Bytes]],
    *,
    digest_key: str,
    placeholder: str,
) -> str:
    """Write a file and put its own SHA-256 into it.

    Args:
        path: the file.
        metadata: keys in their order; ``digest_key`` holds ``placeholder``.
        tensors: in file order.
        type_ids: the tensor type of each.
        payloads: the bytes of each, in pieces.
        digest_key: the key that receives the hash.
        placeholder: what stands there while the hash is computed.

    Returns:
        The hash: SHA-256 of the file with ``placeholder`` in place of these digits.
    """
    header, place = _header(metadata, tensors, type_ids, digest_key)
    digest = hashlib.sha256(header)
    with open(path, "wb") as handle:
        handle.write(header)
        for tensor, pieces in zip(tensors, payloads, strict=True):
            written = 0
            for piece in pieces:
                data = np.ascontiguousarray(piece).data
                handle.write(data)
                digest.update(data)
                written += piece.size
            assert written == tensor.bytes, tensor.name
            gap = bytes(aligned(written) - written)
            handle.write(gap)
            digest.update(gap)
        text = digest.hexdigest()
        assert len(text) == len(placeholder)
        handle.seek(place)
        handle.write(text.encode())
    return text


def item_bytes(kind: str, item: object) -> bytes:
    """One metadata value, without the length that stands before a string."""
    return str(item).encode() if kind == "str" else struct.pack(_FORMATS[kind], item)


def _header(
    metadata: Mapping[str, Value], tensors: Sequence[Tensor], type_ids: Sequence[int], digest_key: str
) -> tuple[bytes, int]:
    """Everything before the data, padded, and where the digest's text stands."""
    out = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    place = 0
    for key, value in metadata.items():
        out += _string(key)
        kind = value.kind.removesuffix("[]")
        if value.kind.endswith("[]"):
            out += struct.pack("<IIQ", _ARRAY, _TYPES[kind], len(value.value))
            out += b"".join(_string(item) if kind == "str" else item_bytes(kind, item) for item in value.value)
        else:
            out += struct.pack("<I", _TYPES[kind])
            place = len(out) + 8 if key == digest_key else place
            out += _string(value.value) if kind == "str" else item_bytes(kind, value.value)
    offset = 0
    for tensor, type_id in zip(tensors, type_ids, strict=True):
        out += _string(tensor.name) + struct.pack("<I", len(tensor.shape))
        out += struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape)) + struct.pack("<IQ", type_id, offset)
        offset = aligned(offset + tensor.bytes)
    out += bytes(aligned(len(out)) - len(out))
    assert place
    return bytes(out), place


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
