"""Exact bit layouts of GGUF's low-bit blocks: codes and scales in, bytes out, and back without any loss.

A block covers ``block`` consecutive weights of one row and holds one fp16 scale d:

    type    block  bytes  fields          weight
    TQ1_0   256    54     qs[48] qh[4] d  (t - 1) d    five base-3 digits a byte
    TQ2_0   256    66     qs[64] d        (q - 1) d    2 bits, four planes of 32 weights a byte row
    Q2_0     64    18     d qs[16]        (q - 1) d    2 bits, four consecutive weights a byte
    Q4_0     32    18     d qs[16]        (q - 8) d    4 bits, first half of the block in the low nibbles

Nothing here rounds. A general quantizer would (gguf's own Q4_0 chooses d = max / -8, which turns s into 7/8 s); these
functions store the codes that were trained, with d = s, or refuse.

Layouts: ggml-common.h and ggml-quants.c of llama.cpp at 0c1e57098; TQ1_0 and TQ2_0 from its pull request 8151.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import ExportError
from ..targets import Q2_0, Q4_0, TQ1_0, TQ2_0, StorageType
from .frozen import FrozenModel

Bytes = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.int8]
Scales = npt.NDArray[np.float32]

_POWERS_OF_3 = (1, 3, 9, 27, 81)


def pack_tq1_0(codes_OI: npt.ArrayLike, scales_OB: npt.ArrayLike) -> Bytes:
    """TQ1_0 rows ``[O, I / 256 * 54]`` of codes in {-1, 0, 1} and one scale a block.

    A byte holds the fraction 0.t0 t1 t2 t3 t4 in base 3, rounded up: ``ceil(256 v / 243)``, so that multiplying by 3
    shifts the next digit out. Bytes 0-31 hold weights n*32 + j (n = 0..4), bytes 32-47 weights 160 + n*16 + j, and
    the four of qh weights 240 + n*4 + j (n = 0..3, fifth digit 0).

    Raises:
        ExportError: a code or a scale that the type cannot hold, or shapes that do not fit.
    """
    u, d = _checked(TQ1_0, codes_OI, scales_OB, offset=1)
    parts = [_trits(u[..., :160], 5), _trits(u[..., 160:240], 5), _trits(u[..., 240:], 4)]
    return _rows(*parts, d)


def unpack_tq1_0(rows: Bytes) -> tuple[Codes, Scales]:
    """Codes ``[O, I]`` and block scales ``[O, I / 256]`` of TQ1_0 rows."""
    blocks = _blocks(TQ1_0, rows)
    u = [_untrits(blocks[..., a:b], n) for a, b, n in ((0, 32, 5), (32, 48, 5), (48, 52, 4))]
    return _codes(np.concatenate(u, axis=-1), offset=1), _scales(blocks[..., 52:])


def pack_tq2_0(codes_OI: npt.ArrayLike, scales_OB: npt.ArrayLike) -> Bytes:
    """TQ2_0 rows ``[O, I / 256 * 66]`` of codes in {-1, 0, 1} and one scale a block.

    In each half of 128 weights byte j (0..31) holds weights j, j + 32, j + 64, j + 96 in bits 0-1, 2-3, 4-5, 6-7.

    Raises:
        ExportError: a code or a scale that the type cannot hold, or shapes that do not fit.
    """
    u, d = _checked(TQ2_0, codes_OI, scales_OB, offset=1)
    planes = u.reshape(*u.shape[:2], 2, 4, 32)
    return _rows(_crumbs(*(planes[..., n, :] for n in range(4))), d)


def unpack_tq2_0(rows: Bytes) -> tuple[Codes, Scales]:
    """Codes ``[O, I]`` and block scales ``[O, I / 256]`` of TQ2_0 rows."""
    blocks = _blocks(TQ2_0, rows)
    qs = blocks[..., :64].reshape(*blocks.shape[:2], 2, 1, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(4, 1)
    return _codes((qs >> shifts) & np.uint8(3), offset=1), _scales(blocks[..., 64:])


def pack_q2_0(codes_OI: npt.ArrayLike, scales_OB: npt.ArrayLike) -> Bytes:
    """Q2_0 rows ``[O, I / 64 * 18]`` of codes in {-1, 0, 1, 2} and one scale a block; four weights a byte, low first.

    Raises:
        ExportError: a code or a scale that the type cannot hold, or shapes that do not fit.
    """
    u, d = _checked(Q2_0, codes_OI, scales_OB, offset=1)
    fours = u.reshape(*u.shape[:2], 16, 4)
    return _rows(d, _crumbs(*(fours[..., n] for n in range(4))))


def unpack_q2_0(rows: Bytes) -> tuple[Codes, Scales]:
    """Codes ``[O, I]`` and block scales ``[O, I / 64]`` of Q2_0 rows."""
    blocks = _blocks(Q2_0, rows)
    shifts = np.array([0, 2, 4, 6], np.uint8)
    return _codes((blocks[..., 2:, None] >> shifts) & np.uint8(3), offset=1), _scales(blocks[..., :2])


def pack_q4_0(codes_OI: npt.ArrayLike, scales_OB: npt.ArrayLike) -> Bytes:
    """Q4_0 rows ``[O, I / 32 * 18]`` of codes in [-8, 7] and one scale a block: d = s and q = c + 8, no rounding.

    Raises:
        ExportError: a code or a scale that the type cannot hold, or shapes that do not fit.
    """
    u, d = _checked(Q4_0, codes_OI, scales_OB, offset=8)
    return _rows(d, u[..., :16] | (u[..., 16:] << np.uint8(4)))


def unpack_q4_0(rows: Bytes) -> tuple[Codes, Scales]:
    """Codes ``[O, I]`` and block scales ``[O, I / 32]`` of Q4_0 rows."""
    blocks = _blocks(Q4_0, rows)
    qs = blocks[..., 2:]
    return _codes(np.concatenate([qs & np.uint8(15), qs >> np.uint8(4)], axis=-1), offset=8), _scales(blocks[..., :2])


@dataclass(frozen=True)
class Packing:
    """A storage type and the two functions that are each other's inverse on it."""

    storage: StorageType
    pack: Callable[[npt.ArrayLike, npt.ArrayLike], Bytes]
    unpack: Callable[[Bytes], tuple[Codes, Scales]]


PACKINGS: dict[str, Packing] = {
    p.storage.name: p
    for p in (
        Packing(TQ1_0, pack_tq1_0, unpack_tq1_0),
        Packing(TQ2_0, pack_tq2_0, unpack_tq2_0),
        Packing(Q2_0, pack_q2_0, unpack_q2_0),
        Packing(Q4_0, pack_q4_0, unpack_q4_0),
    )
}


def codes_digest(frozen: FrozenModel) -> str:
    """SHA-256 of every code and scale: what all exports of one frozen model have in common.

    Over module paths in alphabetical order: the path in UTF-8, a zero byte, the codes as int8 and the scales as
    little-endian fp32, both row by row.
    """
    digest = hashlib.sha256()
    for path in sorted(frozen.quantized):
        tensor = frozen.codes(path)
        digest.update(path.encode() + b"\0")
        digest.update(np.ascontiguousarray(tensor.codes.numpy()).data)
        digest.update(np.ascontiguousarray(tensor.scales.numpy().astype("<f4")).data)
    return digest.hexdigest()


def _checked(
    storage: StorageType, codes_OI: npt.ArrayLike, scales_OB: npt.ArrayLike, *, offset: int
) -> tuple[Bytes, Bytes]:
    """Unsigned codes ``[O, B, block]`` and fp16 scale bytes ``[O, B, 2]``, if the type can hold both exactly."""
    codes, scales = np.asarray(codes_OI), np.asarray(scales_OB, dtype=np.float32)
    if codes.dtype != np.int8 or codes.ndim != 2 or codes.shape[1] % storage.block:
        raise ExportError(
            f"{storage.name} takes int8 codes [O, I] with I divisible by {storage.block}, "
            f"got {codes.dtype} {list(codes.shape)}"
        )
    rows, blocks = codes.shape[0], codes.shape[1] // storage.block
    if scales.shape != (rows, blocks):
        raise ExportError(f"{storage.name} needs block scales of shape {[rows, blocks]}, got {list(scales.shape)}")
    assert storage.codes is not None
    low, high = storage.codes
    if codes.size and (codes.min() < low or codes.max() > high):
        row, column = np.argwhere((codes < low) | (codes > high))[0]
        raise ExportError(
            f"{storage.name} holds codes from {low} to {high}, got {codes[row, column]} at row {row}, column {column}"
        )
    with np.errstate(over="ignore"):
        halves = scales.astype("<f2")
    inexact = ~(np.isfinite(halves) & (halves.astype(np.float32) == scales))
    if inexact.any():
        row, block = np.argwhere(inexact)[0]
        raise ExportError(
            f"{storage.name} stores scales as fp16, which cannot hold {scales[row, block]!r} (row {row}, block "
            f"{block}) exactly; freeze the model with hestia, which snaps every scale to a number that fp16 holds"
        )
    u = (codes.astype(np.int16) + offset).astype(np.uint8).reshape(rows, blocks, storage.block)
    return u, np.ascontiguousarray(halves).view(np.uint8).reshape(rows, blocks, 2)


def _rows(*fields: Bytes) -> Bytes:
    """The fields ``[O, B, ...]`` of every block side by side, as rows of bytes ``[O, row_bytes]``."""
    rows, blocks = fields[0].shape[:2]
    block = np.concatenate([field.reshape(rows, blocks, field[0, 0].size) for field in fields], axis=-1)
    return np.ascontiguousarray(block.reshape(rows, blocks * block.shape[-1]))


def _blocks(storage: StorageType, rows: Bytes) -> Bytes:
    if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] % storage.block_bytes:
        raise ExportError(
            f"{storage.name} rows are whole blocks of {storage.block_bytes} bytes, got {rows.dtype} {list(rows.shape)}"
        )
    return rows.reshape(rows.shape[0], rows.shape[1] // storage.block_bytes, storage.block_bytes)


def _codes(u: Bytes, *, offset: int) -> Codes:
    return (u.reshape(u.shape[0], u[0].size).astype(np.int16) - offset).astype(np.int8)


def _scales(d: Bytes) -> Scales:
    return np.ascontiguousarray(d).view("<f2")[..., 0].astype(np.float32)


def _crumbs(x0: Bytes, x1: Bytes, x2: Bytes, x3: Bytes) -> Bytes:
    return x0 | (x1 << np.uint8(2)) | (x2 << np.uint8(4)) | (x3 << np.uint8(6))


def _trits(u: Bytes, digits: int) -> Bytes:
    planes = u.reshape(*u.shape[:2], digits, u.shape[2] // digits).astype(np.uint16)
    weights = np.array(_POWERS_OF_3[::-1][:digits], np.uint16)
    v = np.einsum("obnj,n->obj", planes, weights)
    return ((v * 256 + 242) // 243).astype(np.uint8)


def _untrits(qs: Bytes, digits: int) -> Bytes:
    shifted = (qs[..., None, :].astype(np.uint16) * np.array(_POWERS_OF_3[:digits]).reshape(-1, 1)) & 255
    return (shifted * 3 >> 8).astype(np.uint8).reshape(*qs.shape[:2], digits * qs.shape[2])
