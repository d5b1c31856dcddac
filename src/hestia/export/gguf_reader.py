"""A reader of GGUF files of our own, from the specification alone: it shares no code with the writer.

Layout (version 3, little-endian): magic, version, counts; keys with typed values; tensor names, shapes, types and
offsets; padding; the tensors' bytes, each at a multiple of ``ALIGNMENT``. Every count and length is checked against the
bytes that are there before anything is read or allocated, and a damaged file ends in one VerifyError.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import ConfigError, VerifyError
from .packing import Bytes

ALIGNMENT = 32

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TYPE_NAMES = ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "str", "array", "u64", "i64", "f64")
_STRING, _ARRAY = 8, 9
FORMATS = {"u32": "<I", "i32": "<i", "f32": "<f", "bool": "<B"}


@dataclass(frozen=True)
class Raw:
    """A metadata value as stored: its type, and the bytes of each item."""

    type: str
    items: list[bytes]

    def __str__(self) -> str:
        return self.show(0) if self.items and not self.type.endswith("[]") else f"{len(self.items)} items"

    def show(self, index: int) -> str:
        """Item ``index`` for a message: text, a number, or its bytes."""
        base, item = self.type.removesuffix("[]"), self.items[index]
        if base == "str":
            text = item.decode("utf-8", "backslashreplace")
            return repr(text if len(text) <= 60 else text[:60] + "...")
        return repr(struct.unpack(FORMATS[base], item)[0]) if base in FORMATS else f"{base} 0x{item.hex()}"


@dataclass(frozen=True)
class Info:
    """A tensor as the header describes it: shape outermost first, offset from the start of the data."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


@dataclass(frozen=True)
class File:
    """A parsed header over all bytes of the file; ``infos_end`` and ``data_start`` enclose the padding between."""

    data: Bytes
    metadata: list[tuple[str, Raw]]
    tensors: list[Info]
    infos_end: int
    data_start: int


class _Cursor:
    """Reads little-endian fields off the front of a file and refuses to run past its end."""

    def __init__(self, path: Path, data: Bytes) -> None:
        self.path, self.data, self.position = path, data, 0

    def take(self, length: int, what: str) -> bytes:
        stop = self.position + length
        if stop > len(self.data):
            raise VerifyError(
                f"{self.path}: truncated or damaged: {what} needs bytes {self.position} to {stop}, "
                f"the file has {len(self.data)}"
            )
        piece = self.data[self.position : stop].tobytes()
        self.position = stop
        return piece

    def number(self, size: int, what: str) -> int:
        return int.from_bytes(self.take(size, what), "little")

    def string(self, what: str) -> bytes:
        return self.take(self.number(8, f"length of {what}"), what)

    def value(self, what: str) -> Raw:
        kind = self.number(4, f"type of {what}")
        if kind == _ARRAY:
            kind = self.number(4, f"item type of {what}")
            count = self.number(8, f"length of {what}")
            if kind in _SIZES:
                size = _SIZES[kind]
                block = self.take(count * size, what)
                return Raw(f"{_TYPE_NAMES[kind]}[]", [block[i : i + size] for i in range(0, len(block), size)])
            if kind == _STRING:
                return Raw("str[]", [self.string(f"{what}[{i}]") for i in range(count)])
        elif kind in _SIZES:
            return Raw(_TYPE_NAMES[kind], [self.take(_SIZES[kind], what)])
        elif kind == _STRING:
            return Raw("str", [self.string(what)])
        raise VerifyError(f"{self.path}: damaged: {what} has value type {kind}")


def read(path: Path) -> File:
    """Parse the header of a GGUF file; the tensors' bytes stay on disk until they are asked for.

    Raises:
        ConfigError: no such file.
        VerifyError: not a GGUF file of version 3, damaged or truncated.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    data = np.asarray(np.memmap(path, np.uint8, "r")) if path.stat().st_size else np.zeros(0, np.uint8)
    cursor = _Cursor(path, data)
    if cursor.take(4, "magic") != b"GGUF":
        raise VerifyError(f"{path}: not a GGUF file: it begins with {bytes(data[:4])!r}")
    version = cursor.number(4, "version")
    if version != 3:
        raise VerifyError(f"{path}: GGUF version {version}, hestia writes version 3")
    tensors, keys = cursor.number(8, "number of tensors"), cursor.number(8, "number of keys")
    metadata: list[tuple[str, Raw]] = []
    for index in range(keys):
        key = cursor.string(f"key {index}").decode("utf-8", "backslashreplace")
        metadata.append((key, cursor.value(key)))
    infos: list[Info] = []
    for index in range(tensors):
        name = cursor.string(f"name of tensor {index}").decode("utf-8", "backslashreplace")
        dimensions = cursor.number(4, f"number of dimensions of {name}")
        if dimensions > 4:
            raise VerifyError(f"{path}: damaged: {name} has {dimensions} dimensions")
        shape = tuple(cursor.number(8, f"dimensions of {name}") for _ in range(dimensions))[::-1]
        infos.append(Info(name, shape, cursor.number(4, f"type of {name}"), cursor.number(8, f"offset of {name}")))
    return File(data, metadata, infos, cursor.position, aligned(cursor.position))


def aligned(position: int) -> int:
    """The next multiple of ``ALIGNMENT`` at or after ``position``."""
    return -(-position // ALIGNMENT) * ALIGNMENT
