"""Exact bit layouts of GGUF's low-bit blocks: codes and scales in, bytes out, and back without any loss.

A block covers ``block`` consecutive weights of one row and holds one fp16 scale d (the K types a second, dmin, and
small integer factors of both, the same for the whole block here):

    type    block  bytes  fields                     weight
    Q1_0    128    18     d qs[16]                   +d or -d       1 bit, eight consecutive weights a byte, low first
    TQ1_0   256    54     qs[48] qh[4] d             (t - 1) d      five base-3 digits a byte
    TQ2_0   256    66     qs[64] d                   (q - 1) d      2 bits, four planes of 32 weights a byte row
    Q2_0     64    18     d qs[16]                   (q - 1) d      2 bits, four consecutive weights a byte
    Q2_K    256    84     scales[16] qs[64] d dmin   (a q - b) d    the planes of TQ2_0; a and b two nibbles a byte
    Q3_K    256   110     hmask[32] qs[64] scales[12] d   (q - 4) d   low two bits as TQ2_0, the third in hmask
    Q4_0     32    18     d qs[16]                   (q - 8) d      4 bits, first half of the block in the low nibbles
    Q4_K    256   144     d dmin scales[12] qs[128]  (a q - b) d    4 bits, 32 weights low, the next 32 high
    Q8_0     32    34     d qs[32]                   q d            a signed byte per weight

A tensor's codes decide which of the equivalent spellings is written, so bytes are a function of the tensor: Q2_0, Q3_K
and Q4_0 blocks with a code that only the mirrored range has store -q with d = -s; the K types take the first (a, b)
of their table that holds every code of the tensor.

Nothing here rounds, but ``round_q8_0``, which says so. A general quantizer would (gguf's own Q4_0 chooses
d = max / -8, which turns s into 7/8 s); the packers store the codes that were trained, with d = s, or refuse.

Layouts: ggml-common.h and ggml-quants.c of llama.cpp at 0c1e57098; TQ1_0 and TQ2_0 from its pull request 8151.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import ExportError
from ..targets import Q1_0, Q2_0, Q2_K, Q3_K, Q4_0, Q4_K, Q8_0, TQ1_0, TQ2_0, StorageType

Bytes = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.int8]
Scales = npt.NDArray[np.float32]

_POWERS_OF_3 = (1, 3, 9, 27, 81)
_SHIFTS = np.array([0, 2, 4, 6], np.uint8)
_Q2_K_FORMS = ((1, 1), (1, 2), (2, 3))  # (a, b): codes -1..2, -2..1, and -3 -1 1 3
_Q4_K_FORMS = ((1, 8), (2, 15))  # codes -8..7, and the odd ones from -15 to 15
_Q3_K_ONE = bytes([0x11] * 8 + [0xAA] * 4)  # sixteen 6-bit factors 33, of which the engine takes 32


def pack_q1_0(codes_OI: npt.ArrayLike, scales_OB: npt.ArrayLike) -> Bytes:
    """Q1_0 rows ``[O, I / 128 * 18]`` of codes -1 and 1 and one scale per block; weight j is bit j % 8 of byte j / 8.

    Raises:
        ExportError: a code or a scale that the type cannot hold, or shapes that do not fit.
    """
    codes, d = _checked(Q1_0, codes_OI, scales_OB)
    return _rows(d, np.packbits(codes > 0, axis=-1, bitorder="little"))


def unpack_q1_0(rows: Bytes) -> tuple[Codes, Scales]:
    """Codes ``[O, I]`` and block scales ``[O, I / 128]`` of Q1_0 rows."""
    blocks = _blocks(Q1_0, rows)
    bits = np.unpackbits(blocks[..., 2:], axis=-1, bitorder="little")
    return _codes(bits * np.uint8(2), offset=1), _scales(blocks[..., :2])


def pack_tq1_0(codes_OI: npt.ArrayLike, scales_OB: npt.ArrayLike) -> Bytes:
    """TQ1_0 rows ``[O, I / 256 * 54]`` of codes in {-1, 0, 1} and one scale per block.

    A byte holds the fraction 0.t0 t1 t2 t3 t4 in base 3, rounded up: ``ceil(256 v / 243)``, so that multiplying by 3
    shifts the next digit out. Bytes 0-31 hold weights n*32 + j (n = 0..4), bytes 32-47 weights 160 + n*16 + j, and
    the four of qh weights 240 + n*4 + j (n = 0..3, fifth digit 0).

    Raises:
        ExportError: a code or a scale that the type cannot hold, or shapes that do not fit.
    """
    codes, d = _checked(TQ1_0, codes_OI, scales_OB)
    u = _unsigned(codes, 1)
    return _rows(_trits(u[..., :160], 5), _trits(u[..., 160:240], 5), _trits(u[..., 240:], 4), d)


def unpack_tq1_0(rows: Bytes) -> tuple[Codes, Scales]:
    """Codes ``[O, I]`` and block scales ``[O, I / 256]`` of TQ1_0 rows."""
    blocks = _blocks(TQ1_0, rows)
    u = [_untrits(blocks[..., a:b], n) for a, b, n in ((0, 32, 5), (32, 48, 5), (48, 52, 4))]
    return _codes(np.concatenate(u, axis=-1), offset=1), _scales(blocks[..., 52:])


def pack_tq2_0(codes_OI: npt.ArrayLike, scales_OB: npt.ArrayLike) -> Bytes:
    """TQ2_0 rows ``[O, I / 256 * 66]`` of codes in {-1, 0, 1} and one scale per block.

    In each half of 128 weights byte j (0..31) holds weights j, j + 32, j + 64, j + 96 in bits 0-1, 2-3, 4-5, 6-7.

    Raises:
        ExportError: a code or a scale that the type cannot hold, or shapes that do not fit.
    """
    codes, d = _checked(TQ2_0, codes_OI, scales_OB)
    return _rows(_planes(_unsigned(codes, 1)), d)


def unpack_tq2_0(rows: Bytes) -> tuple[Codes, Scales]:
    """Codes ``[O, I]`` and block scales ``[O, I / 256]`` of TQ2_0 rows."""
    blocks = _blocks(TQ2_0, rows)
    return _codes(_unplanes(blocks[..., :64]), offset=1), _scales(blocks[..., 64:])


def pack_q2_0(codes_OI: npt.ArrayLike, scales_OB: npt.ArrayLike) -> Bytes:
    """Q2_0 rows ``[O, I / 64 * 18]`` of codes in -1..2, or -2..1 as -q and -s; four weights a byte, low first.

    Raises:
        ExportError: a code or a scale that the type cannot hold, or shapes that do not fit.
    """
    codes, d = _mirrored(Q2_0, *_checked(Q2_0, codes_OI, scales_OB))
    fours = _unsigned(codes, 1).reshape(*codes.shape[:2], 16, 4)
    return _rows(d, _crumbs(*(fours[..., n] for n in range(4))))


def unpack_q2_0(rows: Bytes) -> tuple[Codes, Scales]:
    """Codes ``[O, I]`` and block scales ``[O, I / 64]`` of Q2_0 rows; a negative stored scale mirrors its codes."""
    blocks = _blocks(Q2_0, rows)
    u = ((blocks[..., 2:, None] >> _SHIFTS) & np.uint8(3)).reshape(*blocks.shape[:2], 64)
    return _unmirrored(_codes(u, offset=1), _scales(blocks[..., :2]))


def pack_q2_k(codes_OI: npt.ArrayLike, scales_OB: npt.ArrayLike) -> Bytes:
    """Q2_K rows ``[O, I / 256 * 84]`` with d = dmin = s and sixteen equal bytes a | b << 4, so that w = (a q - b) s.

    Raises:
        ExportError: a code or a scale that the type cannot hold, or shapes that do not fit.
    """
    codes, d = _checked(Q2_K, codes_OI, scales_OB)
    a, b = _form(Q2_K, _Q2_K_FORMS, codes)
    factors = np.full((*codes.shape[:2], 16), a | b << 4, np.uint8)
    return _rows(factors, _planes(((codes.astype(np.int16) + b) // a).astype(np.uint8)), d, d)


def unpack_q2_k(rows: Bytes) -> tuple[Codes, Scales]:
    """Codes ``[O, I]`` and block scales ``[O, I / 256]`` of Q2_K rows whose sixteen factors and two scales agree.

    Raises:
        ExportError: a block that is not of that kind: its weights are no multiples of one scale.
    """
    blocks = _blocks(Q2_K, rows)
    factor, q = blocks[..., :1].astype(np.int16), _unplanes(blocks[..., 16:80]).astype(np.int16)
    if (blocks[..., :16] != blocks[..., :1]).any() or (blocks[..., 80:82] != blocks[..., 82:84]).any():
        raise ExportError("a Q2_K block has more than one scale, so it was not written by hestia")
    return _flat((factor & 15) * q - (factor >> 4)), _scales(blocks[..., 80:82])


def pack_q3_k(codes_OI: npt.ArrayLike, scales_OB: npt.ArrayLike) -> Bytes:
    """Q3_K rows ``[O, I / 256 * 110]`` of codes in -4..3, or -3..4 as -q and -s, with every small factor 1.

    Raises:
        ExportError: a code or a scale that the type cannot hold, or shapes that do not fit.
    """
    codes, d = _mirrored(Q3_K, *_checked(Q3_K, codes_OI, scales_OB))
    u = _unsigned(codes, 4)
    eighths = (u >> np.uint8(2)).reshape(*u.shape[:2], 8, 32)  # bit n of hmask[j] belongs to weight 32 n + j
    hmask = np.bitwise_or.reduce(eighths << np.arange(8, dtype=np.uint8)[:, None], axis=-2)
    ones = np.broadcast_to(np.frombuffer(_Q3_K_ONE, np.uint8), (*u.shape[:2], 12))
    return _rows(hmask, _planes(u & np.uint8(3)), ones, d)


def unpack_q3_k(rows: Bytes) -> tuple[Codes, Scales]:
    """Codes ``[O, I]`` and block scales ``[O, I / 256]`` of Q3_K rows whose small factors are all 1.

    Raises:
        ExportError: a block with other factors.
    """
    blocks = _blocks(Q3_K, rows)
    if (blocks[..., 96:108] != np.frombuffer(_Q3_K_ONE, np.uint8)).any():
        raise ExportError("a Q3_K block has factors other than 1, so it was not written by hestia")
    high = (blocks[..., None, :32] >> np.arange(8, dtype=np.uint8)[:, None]) & np.uint8(1)
    u = _unplanes(blocks[..., 32:96]) | high.reshape(*blocks.shape[:2], 256) << np.uint8(2)
    return _unmirrored(_codes(u, offset=4), _scales(blocks[..., 108:]))


def pack_q4_0(codes_OI: npt.ArrayLike, scales_OB: npt.ArrayLike) -> Bytes:
    """Q4_0 rows ``[O, I / 32 * 18]`` of codes in -8..7, or -7..8 as -q and -s: d = s and q = c + 8, no rounding.

    Raises:
        ExportError: a code or a scale that the type cannot hold, or shapes that do not fit.
    """
    codes, d = _mirrored(Q4_0, *_checked(Q4_0, codes_OI, scales_OB))
    u = _unsigned(codes, 8)
    return _rows(d, u[..., :16] | (u[..., 16:] << np.uint8(4)))


def unpack_q4_0(rows: Bytes) -> tuple[Codes, Scales]:
    """Codes ``[O, I]`` and block scales ``[O, I / 32]`` of Q4_0 rows; a negative stored scale mirrors its codes."""
    blocks = _blocks(Q4_0, rows)
    qs = blocks[..., 2:]
    u = np.concatenate([qs & np.uint8(15), qs >> np.uint8(4)], axis=-1)
    return _unmirrored(_codes(u, offset=8), _scales(blocks[..., :2]))


def pack_q4_k(codes_OI: npt.ArrayLike, scales_OB: npt.ArrayLike) -> Bytes:
    """Q4_K rows ``[O, I / 256 * 144]`` with d = dmin = s and the same factors a, b in all eight sub-blocks.

    Raises:
        ExportError: a code or a scale that the type cannot hold, or shapes that do not fit.
    """
    codes, d = _checked(Q4_K, codes_OI, scales_OB)
    a, b = _form(Q4_K, _Q4_K_FORMS, codes)
    # six-bit factors of sub-blocks 0-3 in bytes 0-3 (a) and 4-7 (b), low nibbles of those of 4-7 in bytes 8-11
    factors = np.broadcast_to(np.array([a] * 4 + [b] * 4 + [a | b << 4] * 4, np.uint8), (*codes.shape[:2], 12))
    q = ((codes.astype(np.int16) + b) // a).astype(np.uint8).reshape(*codes.shape[:2], 4, 2, 32)
    return _rows(d, d, factors, q[..., 0, :] | q[..., 1, :] << np.uint8(4))


def unpack_q4_k(rows: Bytes) -> tuple[Codes, Scales]:
    """Codes ``[O, I]`` and block scales ``[O, I / 256]`` of Q4_K rows as ``pack_q4_k`` writes them.

    Raises:
        ExportError: a block with two scales, or with factors that differ between its sub-blocks.
    """
    blocks = _blocks(Q4_K, rows)
    a, b = blocks[..., 4:5], blocks[..., 8:9]
    expected = np.concatenate([a.repeat(4, -1), b.repeat(4, -1), (a | b << np.uint8(4)).repeat(4, -1)], axis=-1)
    if (blocks[..., 4:16] != expected).any() or (blocks[..., :2] != blocks[..., 2:4]).any() or ((a | b) > 15).any():
        raise ExportError("a Q4_K block has more than one scale, so it was not written by hestia")
    qs = blocks[..., 16:].reshape(*blocks.shape[:2], 4, 1, 32)
    q = np.concatenate([qs & np.uint8(15), qs >> np.uint8(4)], axis=-2).reshape(*blocks.shape[:2], 256)
    return _flat(a.astype(np.int16) * q - b), _scales(blocks[..., :2])


def pack_q8_0(codes_OI: npt.ArrayLike, scales_OB: npt.ArrayLike) -> Bytes:
    """Q8_0 rows ``[O, I / 32 * 34]`` of codes in -127..127 and one scale per block.

    Raises:
        ExportError: a code or a scale that the type cannot hold, or shapes that do not fit.
    """
    codes, d = _checked(Q8_0, codes_OI, scales_OB)
    return _rows(d, codes.view(np.uint8))


def unpack_q8_0(rows: Bytes) -> tuple[Codes, Scales]:
    """Codes ``[O, I]`` and block scales ``[O, I / 32]`` of Q8_0 rows."""
    blocks = _blocks(Q8_0, rows)
    return _flat(blocks[..., 2:].view(np.int8)), _scales(blocks[..., :2])


def round_q8_0(values_OI: npt.NDArray[np.float32]) -> tuple[Codes, Scales]:
    """The nearest Q8_0 numbers: codes ``[O, I]`` and scales ``[O, I / 32]``.

        d = fp16(max|x| / 127),   q = rint(x / d)

    This rounds, unlike everything else here: it is for embeddings and heads, on request.

    Raises:
        ExportError: rows that are no multiple of 32, or numbers beyond fp16.
    """
    rows, columns = values_OI.shape
    if columns % 32:
        raise ExportError(f"Q8_0 stores rows in blocks of 32, which do not divide {columns}")
    blocks = values_OI.reshape(rows, columns // 32, 32)
    with np.errstate(over="ignore"):
        d = (np.abs(blocks).max(axis=-1, keepdims=True) / 127).astype(np.float16).astype(np.float32)
    if not np.isfinite(d).all():
        raise ExportError("Q8_0 stores scales as fp16, which cannot hold the largest of these numbers")
    q = np.rint(blocks / np.where(d > 0, d, 1)).clip(-127, 127)
    return np.where(d > 0, q, 0).astype(np.int8).reshape(rows, columns), d[..., 0]


@dataclass(frozen=True)
class Packing:
    """A storage type and the two functions that are each other's inverse on it."""

    storage: StorageType
    pack: Callable[[npt.ArrayLike, npt.ArrayLike], Bytes]
    unpack: Callable[[Bytes], tuple[Codes, Scales]]


PACKINGS: dict[str, Packing] = {
    p.storage.name: p
    for p in (
        Packing(Q1_0, pack_q1_0, unpack_q1_0),
        Packing(TQ1_0, pack_tq1_0, unpack_tq1_0),
        Packing(TQ2_0, pack_tq2_0, unpack_tq2_0),
        Packing(Q2_0, pack_q2_0, unpack_q2_0),
        Packing(Q2_K, pack_q2_k, unpack_q2_k),
        Packing(Q3_K, pack_q3_k, unpack_q3_k),
        Packing(Q4_0, pack_q4_0, unpack_q4_0),
        Packing(Q4_K, pack_q4_k, unpack_q4_k),
        Packing(Q8_0, pack_q8_0, unpack_q8_0),
    )
}


def _checked(storage: StorageType, codes_OI: npt.ArrayLike, scales_OB: npt.ArrayLike) -> tuple[Codes, Bytes]:
    """Codes ``[O, B, block]`` and fp16 scale bytes ``[O, B, 2]``, if the type can hold both exactly."""
    codes, scales = np.asarray(codes_OI), np.asarray(scales_OB, dtype=np.float32)
    if codes.dtype != np.int8 or codes.ndim != 2 or codes.shape[1] % storage.block:
        raise ExportError(
            f"{storage.name} takes int8 codes [O, I] with I divisible by {storage.block}, "
            f"got {codes.dtype} {list(codes.shape)}"
        )
    rows, blocks = codes.shape[0], codes.shape[1] // storage.block
    if scales.shape != (rows, blocks):
        raise ExportError(f"{storage.name} needs block scales of shape {[rows, blocks]}, got {list(scales.shape)}")
    assert storage.levels is not None
    low, high = min(s[0] for s in storage.levels), max(s[-1] for s in storage.levels)
    allowed = np.zeros(256, bool)
    for levels in storage.levels:
        allowed[np.array(levels).astype(np.int8).view(np.uint8)] = True
    held = allowed[codes.view(np.uint8)]
    if not held.all():
        row, column = np.argwhere(~held)[0]
        raise ExportError(
            f"{storage.name} holds codes from {low} to {high}, got {codes[row, column]} at row {row}, column {column}"
        )
    with np.errstate(over="ignore"):
        halves = scales.astype("<f2")
    exact = np.isfinite(halves) & (halves.astype(np.float32) == scales) & ~np.signbit(scales)
    if not exact.all():
        row, block = (int(i) for i in np.argwhere(np.logical_not(exact))[0])
        raise ExportError(
            f"{storage.name} stores scales as fp16, which cannot hold {scales[row, block]!r} (row {row}, block "
            f"{block}) exactly; freeze the model with hestia, which snaps every scale to a number that fp16 holds"
        )
    return codes.reshape(rows, blocks, storage.block), np.ascontiguousarray(halves).view(np.uint8).reshape(
        rows, blocks, 2
    )


def _form(storage: StorageType, forms: tuple[tuple[int, int], ...], codes: Codes) -> tuple[int, int]:
    """The first (a, b) of a K type such that every code is a q - b."""
    assert storage.levels is not None
    present = (
        np.flatnonzero(np.bincount(codes.reshape(-1).view(np.uint8), minlength=256)).astype(np.uint8).view(np.int8)
    )
    for form, levels in zip(forms, storage.levels, strict=True):
        if set(present.tolist()) <= set(levels):
            return form
    spelled = " or ".join(f"{levels[0]}..{levels[-1]} by {levels.step}" for levels in storage.levels)
    raise ExportError(f"{storage.name} holds codes {spelled} in one tensor, got {sorted(present.tolist())}")


def _mirrored(storage: StorageType, codes: Codes, d: Bytes) -> tuple[Codes, Bytes]:
    """Codes and scale bytes with the sign of both changed in every block that only the mirrored range holds."""
    assert storage.levels is not None
    low, high = storage.levels[0][0], storage.levels[0][-1]
    flip = np.asarray(((codes < low) | (codes > high)).any(axis=-1))
    if not flip.any():
        return codes, d
    codes, d = np.where(flip[..., None], -codes, codes), d.copy()
    if (codes < low).any() or (codes > high).any():
        raise ExportError(f"{storage.name} holds codes {low}..{high} or {-high}..{-low} in one block, got both ends")
    d[..., 1] ^= np.where(flip, 0x80, 0).astype(np.uint8)
    return codes, d


def _unmirrored(codes: Codes, scales: Scales) -> tuple[Codes, Scales]:
    negative = np.signbit(scales)
    if not negative.any():
        return codes, scales
    blocks = codes.reshape(*scales.shape, codes.shape[1] // scales.shape[1])
    return np.where(negative[..., None], -blocks, blocks).reshape(codes.shape), np.abs(scales)


def _unsigned(codes: Codes, offset: int) -> Bytes:
    return (codes.astype(np.int16) + offset).astype(np.uint8)


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
    return _flat(u.astype(np.int16) - offset)


def _flat(codes: npt.NDArray[np.integer]) -> Codes:
    return np.ascontiguousarray(codes.reshape(codes.shape[0], codes[0].size).astype(np.int8))


def _scales(d: Bytes) -> Scales:
    return np.ascontiguousarray(d).view("<f2")[..., 0].astype(np.float32)


def _planes(u: Bytes) -> Bytes:
    """Two-bit numbers ``[O, B, 256]`` as ``[O, B, 64]``: byte j of a half holds weights j, j + 32, j + 64, j + 96."""
    planes = u.reshape(*u.shape[:2], 2, 4, 32)
    return _crumbs(*(planes[..., n, :] for n in range(4))).reshape(*u.shape[:2], 64)


def _unplanes(qs: Bytes) -> Bytes:
    halves = qs.reshape(*qs.shape[:2], 2, 1, 32)
    return ((halves >> _SHIFTS.reshape(4, 1)) & np.uint8(3)).reshape(*qs.shape[:2], 256)


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
