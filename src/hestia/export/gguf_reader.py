"""A reader of GGUF files of our own, from the specification alone: it shares no code with the writer.

Layout (version 3, little-endian): magic, version, counts; keys with typed values; tensor names, shapes, types and
offsets; padding; the tensors' bytes, each at a multiple of ``ALIGNMENT``. Every count and length is checked against the
bytes that are there before anything is read or allocated, and a damaged file ends in one VerifyError. ``read`` parses
the header; ``check_structure`` then holds every tensor to its type's block, to its place and to the file's length.
llama.cpp ends the process on some files that fail this, so whatever runs a file asks here first.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, VerifyError

Bytes = npt.NDArray[np.uint8]  # not imported from packing: an engine's child process must not load torch

ALIGNMENT = 32

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TYPE_NAMES = ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "str", "array", "u64", "i64", "f64")
_STRING, _ARRAY = 8, 9
_MOST_ITEMS = 1 << 24  # of one array: sixty times the largest vocabulary
_MOST_TENSORS = 1 << 16
_LONGEST_NAME = 63  # llama.cpp's limit
_NAME = re.compile(r"[A-Za-z0-9_.\-]+")

BLOCKS = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4),
    27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18), 42: ("Q2_0", 64, 18),
}  # fmt: skip
"""Tensor type id -> name, weights per block, bytes per block."""

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

    @property
    def type_name(self) -> str:
        """The name of its type; ``type 99`` for one that is not known."""
        return BLOCKS[self.type_id][0] if self.type_id in BLOCKS else f"type {self.type_id}"

    @property
    def bytes(self) -> int:
        """Bytes of its data; only after ``check_structure``."""
        _, block, block_bytes = BLOCKS[self.type_id]
        return math.prod(self.shape) // block * block_bytes


@dataclass(frozen=True)
class File:
    """A parsed header over all bytes of the file; ``infos_end`` and ``data_start`` enclose the padding between."""

    data: Bytes
    metadata: list[tuple[str, Raw]]
    tensors: list[Info]
    infos_end: int
    data_start: int

    def text(self, key: str) -> str | None:
        """The string stored under ``key``; None where there is none."""
        raw = dict(self.metadata).get(key)
        return raw.items[0].decode("utf-8", "replace") if raw is not None and raw.type == "str" else None

    def integer(self, key: str) -> int | None:
        """The 32-bit number stored under ``key``; None where there is none."""
        raw = dict(self.metadata).get(key)
        return int(struct.unpack("<I", raw.items[0])[0]) if raw is not None and raw.type == "u32" else None

    def flag(self, key: str) -> bool:
        """Whether a bool is stored under ``key`` and true."""
        raw = dict(self.metadata).get(key)
        return raw is not None and raw.type == "bool" and raw.items[0] != b"\0"

    def stored(self, info: Info) -> Bytes:
        """The bytes of one tensor."""
        start = self.data_start + info.offset
        return self.data[start : start + info.bytes]


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
            if count > _MOST_ITEMS:
                raise VerifyError(f"{self.path}: damaged: {what} claims {count} items")
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
        raise ConfigError(f"{path}: no such file" if not path.is_dir() else f"{path}: is a folder, not a .gguf file")
    data = np.asarray(np.memmap(path, np.uint8, "r")) if path.stat().st_size else np.zeros(0, np.uint8)
    return parse(path, data)


def parse(path: Path, data: Bytes) -> File:
    """``read`` for bytes that are at hand; ``path`` is only named in messages.

    Raises:
        VerifyError: as ``read``.
    """
    cursor = _Cursor(path, data)
    if cursor.take(4, "magic") != b"GGUF":
        raise VerifyError(f"{path}: not a GGUF file: it begins with {bytes(data[:4])!r}")
    version = cursor.number(4, "version")
    if version != 3:
        raise VerifyError(f"{path}: GGUF version {version}, hestia writes version 3")
    tensors, keys = cursor.number(8, "number of tensors"), cursor.number(8, "number of keys")
    if tensors > _MOST_TENSORS or keys > _MOST_TENSORS:
        raise VerifyError(f"{path}: damaged: the header claims {tensors} tensors and {keys} keys")
    metadata: list[tuple[str, Raw]] = []
    for index in range(keys):
        key = cursor.string(f"key {index}").decode("utf-8", "backslashreplace")
        metadata.append((key, cursor.value(shown(key))))
    infos: list[Info] = []
    for index in range(tensors):
        name = cursor.string(f"name of tensor {index}").decode("utf-8", "backslashreplace")
        label = shown(name)
        dimensions = cursor.number(4, f"number of dimensions of {label}")
        if dimensions > 4:
            raise VerifyError(f"{path}: damaged: {label} has {dimensions} dimensions")
        shape = tuple(cursor.number(8, f"dimensions of {label}") for _ in range(dimensions))[::-1]
        infos.append(Info(name, shape, cursor.number(4, f"type of {label}"), cursor.number(8, f"offset of {label}")))
    return File(data, metadata, infos, cursor.position, aligned(cursor.position))


def shown(name: str) -> str:
    """A key or tensor name for a message: as it is if it is plain, else quoted, escaped and cut."""
    return name if _NAME.fullmatch(name) and len(name) <= _LONGEST_NAME else ascii(name[:_LONGEST_NAME])


def check_structure(path: Path, file: File) -> None:
    """Hold every tensor to the format: one name each, a known type, whole blocks, in place, none overlapping.

    Raises:
        VerifyError: the first rule that is broken, with the tensor's name.
    """
    keys = [key for key, _ in file.metadata]
    double = next((key for key in keys if keys.count(key) > 1), None) if len(set(keys)) < len(keys) else None
    if double is not None:
        raise VerifyError(f"{path}: damaged: the key {shown(double)} occurs twice")
    alignment = file.integer("general.alignment")
    if alignment not in (None, ALIGNMENT):
        raise VerifyError(f"{path}: general.alignment is {alignment}, hestia reads files aligned to {ALIGNMENT} bytes")
    if not file.tensors:
        raise VerifyError(f"{path}: holds no tensors")
    if not file.text("general.architecture"):
        raise VerifyError(f"{path}: general.architecture is missing: not a model")
    names: set[str] = set()
    end = 0
    for info in sorted(file.tensors, key=lambda i: i.offset):
        where = f"{path}: damaged: {shown(info.name)}"
        if not _NAME.fullmatch(info.name) or len(info.name) > _LONGEST_NAME:
            raise VerifyError(f"{where} is not a tensor's name (letters, digits, '.', '_', '-', at most 63)")
        if info.name in names:
            raise VerifyError(f"{where} occurs twice")
        names.add(info.name)
        if info.type_id not in BLOCKS:
            raise VerifyError(f"{where} has the unknown type {info.type_id}")
        name, block, _ = BLOCKS[info.type_id]
        if not info.shape or min(info.shape) < 1 or math.prod(info.shape) >= 2**62:
            raise VerifyError(f"{where} has the impossible shape {list(info.shape)}")
        if info.shape[-1] % block:
            raise VerifyError(f"{where} has rows of {info.shape[-1]}, {name} stores blocks of {block}")
        if info.offset % ALIGNMENT:
            raise VerifyError(f"{where} begins at {info.offset}, which is no multiple of {ALIGNMENT}")
        if info.offset < end:
            raise VerifyError(f"{where} begins at {info.offset}, inside the tensor before it")
        end = info.offset + info.bytes
        if file.data_start + end > len(file.data):
            raise VerifyError(
                f"{path}: truncated or damaged: {info.name} needs bytes {file.data_start + info.offset} to "
                f"{file.data_start + end}, the file has {len(file.data)}"
            )


def open_checked(path: Path) -> File:
    """``read`` and ``check_structure``: what must pass before a file is given to an engine.

    Raises:
        ConfigError: no such file.
        VerifyError: damaged, truncated, or no model.
    """
    file = read(path)
    check_structure(path, file)
    return file


def aligned(position: int) -> int:
    """The next multiple of ``ALIGNMENT`` at or after ``position``."""
    return -(-position // ALIGNMENT) * ALIGNMENT
