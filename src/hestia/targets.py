"""What each file format can hold: pure tables, read by the planner before training and by the exporters after it.

A storage type keeps ``block`` consecutive weights of one row under one scale. It holds a quantized tensor exactly when
the row is a whole number of blocks, no block straddles two scale groups, and the levels are among those it expresses.
Layouts and engine support were read in llama.cpp (0c1e57098), compressed-tensors 0.20 and mlx 0.32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError, PlanError, nearest
from .quant.grids import Grid
from .quant.grouping import GroupSize


@dataclass(frozen=True)
class StorageType:
    """One way to store a tensor: ``block`` weights in ``block_bytes`` bytes, scale included.

    Attributes:
        name: the format's own name, such as ``TQ2_0``.
        block: weights that share a stored scale; 0 where the format takes any group that divides the row.
        block_bytes: bytes per block; for ``block == 0`` they are counted by ``file_bytes``.
        levels: the sets of integer codes it can express, any one of which must hold the whole grid; None where it
            stores dense numbers. More than one where a sign or an offset of the format can be chosen.
        ggml: the tensor type id in a GGUF file; None outside GGUF.
        groups: group lengths that a format without blocks can write, longest first; a longer group is repeated.
        usual: the same of a format that can write any, but should write one of these where it can.
        bits: bits of a code in a format without blocks.
        numbers: numbers beside the codes of one group in such a format, in the dtype of the dense weight.
        extra: bytes beside the codes and groups of a tensor in such a format.
    """

    name: str
    block: int
    block_bytes: int
    levels: tuple[range, ...] | None
    ggml: int | None = None
    groups: tuple[int, ...] = ()
    usual: tuple[int, ...] = ()
    bits: int = 2
    numbers: int = 1
    extra: int = 0

    def refusal(self, grid: Grid, group_size: GroupSize, shape: tuple[int, int]) -> str | None:
        """Why this type cannot hold the tensor exactly, or None if it can."""
        columns = shape[1]
        if self.levels is not None and not any(set(grid.levels) <= set(levels) for levels in self.levels):
            return f"{self.name} cannot express the levels {grid.name}"
        if self.block:
            if columns % self.block:
                return f"{self.name} stores rows in blocks of {self.block}, which do not divide in_features={columns}"
            if isinstance(group_size, int) and group_size % self.block:
                return f"{self.name} has one scale for {self.block} weights, finer groups of {group_size} do not fit"
        elif self.groups and all(span(group_size, shape) % group for group in self.groups):
            allowed = ", ".join(map(str, self.groups))
            length = span(group_size, shape)
            return f"{self.name} has groups of {allowed}, none of which divides {length} consecutive weights"
        return None

    def stored_bytes(self, shape: tuple[int, int], group_size: GroupSize) -> int:
        """Bytes of the tensor alone in a file, scales and padding included."""
        return file_bytes([(self, group_size, shape)])[0]


def span(group_size: GroupSize, shape: tuple[int, int]) -> int:
    """Consecutive weights of a row that share a scale."""
    return group_size if isinstance(group_size, int) else shape[1]


def scale_group(kind: StorageType, tensors: Iterable[tuple[GroupSize, tuple[int, int]]]) -> int | None:
    """The one group length in which a file without blocks stores the scales of all ``tensors``, by repetition.

    With ``n`` the greatest common divisor of all group lengths (a row counts as its width): the longest of the type's
    lengths that divides ``n``; else None, one scale per row, if every tensor has that (or one in all), as in rows of 64
    and 172; else ``n`` itself.
    """
    lengths = {(span(size, shape), shape[1]) for size, shape in tensors}
    common = math.gcd(*(length for length, _ in lengths))
    fitting = next((group for group in kind.groups or kind.usual if common % group == 0), None)
    if fitting is None and any(length != columns for length, columns in lengths):
        return common
    return fitting


Stored = tuple[StorageType, GroupSize, tuple[int, int]]
"""A quantized tensor of a file: storage type, group size and shape."""


def file_bytes(tensors: Sequence[Stored], itemsize: int = 2) -> list[int]:
    """Bytes of each of the quantized ``tensors`` of one file, scales and padding included.

    Args:
        tensors: those of a type without blocks share one group length.
        itemsize: bytes of a number of the dense weight, in which formats without blocks write scales.
    """
    groups = {
        kind: scale_group(kind, ((size, shape) for other, size, shape in tensors if other == kind))
        for kind in {kind for kind, _, _ in tensors if not kind.block}
    }
    out = []
    for kind, _, (rows, columns) in tensors:
        if kind.block:
            out.append(rows * (columns // kind.block) * kind.block_bytes)
            continue
        words = rows * -(-columns * kind.bits // 32) * 4
        scales = rows * (columns // (groups[kind] or columns))
        out.append(words + scales * kind.numbers * itemsize + kind.extra)
    return out


F32 = StorageType("F32", 1, 4, None, ggml=0)
F16 = StorageType("F16", 1, 2, None, ggml=1)
BF16 = StorageType("BF16", 1, 2, None, ggml=30)
Q8_0 = StorageType("Q8_0", 32, 34, (range(-127, 128),), ggml=8)
Q1_0 = StorageType("Q1_0", 128, 18, (range(-1, 2, 2),), ggml=41)
TQ1_0 = StorageType("TQ1_0", 256, 54, (range(-1, 2),), ggml=34)
TQ2_0 = StorageType("TQ2_0", 256, 66, (range(-1, 2),), ggml=35)
Q2_0 = StorageType("Q2_0", 64, 18, (range(-1, 3), range(-2, 2)), ggml=42)
Q2_K = StorageType("Q2_K", 256, 84, (range(-1, 3), range(-2, 2), range(-3, 4, 2)), ggml=10)
Q3_K = StorageType("Q3_K", 256, 110, (range(-4, 4), range(-3, 5)), ggml=11)
Q4_0 = StorageType("Q4_0", 32, 18, (range(-8, 8), range(-7, 9)), ggml=2)
Q4_K = StorageType("Q4_K", 256, 144, (range(-8, 8), range(-15, 16, 2)), ggml=12)
_PACK = (256, 128, 64, 32)  # powers of two that GPU kernels have; 256 costs 1/16 bit per weight in bf16
PACK2 = StorageType("pack-quantized 2-bit", 0, 0, (range(-2, 2),), usual=_PACK, extra=16)
PACK4 = StorageType("pack-quantized 4-bit", 0, 0, (range(-8, 8),), usual=_PACK, bits=4, extra=16)
MLX2 = StorageType("mlx 2-bit affine", 0, 0, (range(-1, 3), range(-2, 2)), groups=(128, 64, 32), numbers=2)

_EXACT = (Q2_0, Q2_K, Q3_K, Q4_0, Q4_K, Q8_0, F16)  # what may stand in for another GGUF type, smallest first


@dataclass(frozen=True)
class Target:
    """A file format a user can ask for.

    Attributes:
        name: what the user types, ``gguf:tq2_0``.
        types: the storage type asked for, then the exact ones that may stand in for single tensors when
            fallback is allowed, best first.
        loads_in: engines that load the file, and their backends.
        caution: what to know before choosing it.
        cheapest: every tensor gets the smallest of ``types`` that holds it exactly; none of them is the target's own.
    """

    name: str
    types: tuple[StorageType, ...]
    loads_in: str
    caution: str = ""
    cheapest: bool = False

    @property
    def container(self) -> str:
        """``gguf``, ``hf`` or ``mlx``."""
        return self.name.split(":")[0]

    @property
    def dense(self) -> bool:
        """Whether it stores plain numbers: files to compare with, not low-bit ones."""
        return self.types[0].levels is None

    def storage(self, grid: Grid, group_size: GroupSize, shape: tuple[int, int], *, fallback: bool) -> StorageType:
        """The type that holds one tensor exactly.

        Raises:
            PlanError: none does, or only a fallback does and ``fallback`` is False; the message names what would.
        """
        if self.cheapest:
            held = [t for t in self.types if t.refusal(grid, group_size, shape) is None]
            if held:
                return min(held, key=lambda t: t.stored_bytes(shape, group_size))
        refusal = self.types[0].refusal(grid, group_size, shape)
        if refusal is None:
            return self.types[0]
        exact = [t for t in self.types[1:] if t.refusal(grid, group_size, shape) is None]
        if fallback and exact:
            return exact[0]
        hints = [f"--fallback stores it as {exact[0].name}"] if exact else []
        others = [
            t.name
            for t in TARGETS.values()
            if t.name != self.name
            and not (t.dense or t.cheapest)
            and t.types[0].refusal(grid, group_size, shape) is None
        ]
        if others:
            hints.append(f"--target {' or '.join(others)} would hold it")
        raise PlanError(f"{refusal}; {', '.join(hints) or 'no target holds it'}")

    def groups_held(self, grid: Grid, columns: int = 1024) -> tuple[GroupSize, ...]:
        """Which of the usual group sizes the target's own type holds exactly, in rows of ``columns``."""
        sizes: tuple[GroupSize, ...] = ("tensor", "row", 256, 128, 64, 32)
        types = self.types if self.cheapest else self.types[:1]
        return tuple(g for g in sizes if any(t.refusal(grid, g, (8, columns)) is None for t in types))


def _gguf(first: StorageType, loads_in: str, caution: str = "") -> Target:
    return Target(f"gguf:{first.name.lower()}", (first, *(t for t in _EXACT if t is not first)), loads_in, caution)


TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        Target(
            "hf",
            (PACK2,),
            "transformers (with compressed-tensors), vLLM (CUDA), llama.cpp's converter",
            "the converter does not take rows that share no factor of 32",
        ),
        Target(
            "hf:int4",
            (PACK4,),
            "transformers (with compressed-tensors), vLLM and SGLang (CUDA), llama.cpp's converter",
            "twice the bytes of hf; for servers without a 2-bit kernel",
        ),
        _gguf(TQ2_0, "llama.cpp: CPU, Metal, Vulkan", "no CUDA kernel: those layers run on the CPU"),
        _gguf(TQ1_0, "llama.cpp: CPU, Vulkan", "smallest file, slower than TQ2_0"),
        _gguf(Q2_0, "llama.cpp: CPU, CUDA, Metal, Vulkan, SYCL", "scalar and slow on x86 CPUs"),
        _gguf(
            Q2_K, "llama.cpp: CPU, CUDA, Metal, Vulkan, SYCL, OpenCL, WebGPU", "the twin of TQ2_0 for GPUs and browsers"
        ),
        _gguf(Q3_K, "llama.cpp: CPU, CUDA, Metal, Vulkan, SYCL, OpenCL, WebGPU"),
        _gguf(Q4_0, "llama.cpp: all backends"),
        _gguf(Q4_K, "llama.cpp: CPU, CUDA, Metal, Vulkan, SYCL, OpenCL, WebGPU"),
        _gguf(Q1_0, "llama.cpp: CPU, CUDA, Metal, Vulkan, SYCL, WebGPU", "binary models only"),
        Target("gguf:f16", (F16, F32), "llama.cpp: all backends", "not low-bit: to compare with"),
        Target("gguf:f32", (F32,), "llama.cpp: all backends", "not low-bit: to compare with"),
        Target("mlx", (MLX2,), "mlx-lm: Apple GPUs, CPU"),
    )
}

HEAD_TYPES: dict[str, StorageType | None] = {"auto": None, "f32": F32, "f16": F16, "bf16": BF16, "q8_0": Q8_0}
"""How a GGUF file may store embeddings and head; None: the smallest dense type that keeps every number."""

_QKV = frozenset(f"self_attn.{x}_proj" for x in "qkv")
_ALL = _QKV | {"self_attn.o_proj"} | {f"mlp.{x}_proj" for x in ("gate", "up", "down")}
BIASES: dict[str, dict[str, frozenset[str]]] = {
    "llama.cpp": {"llama": _ALL, "qwen2": _QKV, "qwen3": _QKV},
    "mlx-lm": {"llama": _ALL, "smollm3": _ALL, "qwen2": _QKV},
}
"""Engine -> ``model_type`` -> the linear layers of a block whose bias it loads if the file has one; none elsewhere."""


_GGUF_TYPES = sorted(
    {t.name: t for chosen in TARGETS.values() for t in chosen.types if t.ggml is not None}.values(),
    key=lambda t: t.block_bytes / t.block,
)
TARGETS["gguf:mixed"] = Target(
    "gguf:mixed",
    tuple(_GGUF_TYPES),
    "llama.cpp, wherever it runs every type in the file",
    cheapest=True,
)


def is_gguf(name: str) -> bool:
    """Whether the target of this name is one .gguf file; the others are folders."""
    return name.startswith("gguf:")


def target(name: str) -> Target:
    """The target called ``name``.

    Raises:
        ConfigError: there is none; the nearest name is given.
    """
    if name not in TARGETS:
        raise ConfigError(f"unknown target {name!r}: {nearest(name, TARGETS)}")
    return TARGETS[name]


def head_type(name: str) -> StorageType | None:
    """The storage type of embeddings and head called ``name``; None for ``auto``.

    Raises:
        ConfigError: there is none; the nearest name is given.
    """
    if name not in HEAD_TYPES:
        raise ConfigError(f"unknown head type {name!r}: {nearest(name, HEAD_TYPES)}")
    return HEAD_TYPES[name]


def matrix(
    layers: Sequence[tuple[str, Grid, GroupSize, tuple[int, int]]] = (), *, fallback: bool = False, itemsize: int = 2
) -> list[dict[str, Any]]:
    """One row a target: what it holds, where it runs, and whether the given tensors fit.

    Args:
        layers: path, grid, group size and shape of every quantized tensor of a run; none for the table alone.
        fallback: let single tensors use the target's other exact types.
        itemsize: see ``file_bytes``.

    Returns:
        ``{"target", "type", "groups", "engines", "caution", "bits_per_weight", "fits"}``; bits are those of the given
        tensors if they fit, else of rows of 1024; ``fits`` is None without tensors, True, or the reason why not.
    """
    rows: list[dict[str, Any]] = []
    for chosen in TARGETS.values():
        first = chosen.types[0]
        if chosen.cheapest:
            first = chosen.storage(Grid((-1, 0, 1)), "row", (1024, 1024), fallback=True)
        levels = first.levels or (range(-128, 128),)
        grid = Grid((-1, 1)) if first is Q1_0 else Grid((-1, 0, 1))
        fits: bool | str | None = None
        bits = 8.0 * first.stored_bytes((1024, 1024), 128) / 2**20
        try:
            stored: list[Stored] = [
                (chosen.storage(g, size, shape, fallback=fallback), size, shape) for _, g, size, shape in layers
            ]
            if stored:
                fits = True
                weights = sum(shape[0] * shape[1] for _, _, shape in stored)
                bits = 8.0 * sum(file_bytes(stored, itemsize)) / weights
        except PlanError as error:
            fits = str(error).split(";")[0]
        rows.append(
            {
                "target": chosen.name,
                "type": "smallest exact" if chosen.cheapest else first.name,
                "groups": list(chosen.groups_held(grid)),
                "levels": " or ".join(map(_spelled, levels)) if first.levels and not chosen.cheapest else "any",
                "engines": chosen.loads_in,
                "caution": chosen.caution,
                "bits_per_weight": bits,
                "fits": fits,
            }
        )
    return rows


def _spelled(levels: range) -> str:
    return f"{levels[0]}..{levels[-1]}" + (f" by {levels.step}" if levels.step > 1 else "")
