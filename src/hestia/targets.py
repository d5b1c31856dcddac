"""What each file format can hold: pure tables, read by the planner before training and by the exporters after it.

A storage type keeps ``block`` consecutive weights of one row under one scale. It holds a quantized tensor exactly when
the row is a whole number of blocks, no block straddles two scale groups, and every code is one of its levels.
Layouts and engine support were read in llama.cpp (0c1e57098) and compressed-tensors 0.20.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ConfigError, PlanError, nearest
from .quant.grids import Grid
from .quant.grouping import GroupSize


@dataclass(frozen=True)
class StorageType:
    """One way to store a tensor: ``block`` weights in ``block_bytes`` bytes, scale included.

    Attributes:
        name: the format's own name, such as ``TQ2_0``.
        block: weights that share a stored scale; 0 where the format takes any group that divides the row.
        block_bytes: bytes a block; for ``block == 0`` bits are counted by ``stored_bytes``.
        codes: the integer codes it can express (lowest, highest); None where it stores dense numbers.
        ggml: the tensor type id in a GGUF file; None outside GGUF.
    """

    name: str
    block: int
    block_bytes: int
    codes: tuple[int, int] | None
    ggml: int | None = None
    without_zero: bool = False

    def refusal(self, grid: Grid, group_size: GroupSize, shape: tuple[int, int]) -> str | None:
        """Why this type cannot hold the tensor exactly, or None if it can."""
        columns = shape[1]
        if self.codes is not None:
            low, high = self.codes
            if grid.levels[0] < low or grid.levels[-1] > high or (self.without_zero and 0 in grid.levels):
                return f"{self.name} cannot express the levels {grid.name}"
        if self.block:
            if columns % self.block:
                return f"{self.name} stores rows in blocks of {self.block}, which do not divide in_features={columns}"
            if isinstance(group_size, int) and group_size % self.block:
                return f"{self.name} has one scale for {self.block} weights, finer groups of {group_size} do not fit"
        return None

    def stored_bytes(self, shape: tuple[int, int], group_size: GroupSize) -> int:
        """Bytes of the tensor in the file, scales and padding included."""
        rows, columns = shape
        if self.block:
            return rows * (columns // self.block) * self.block_bytes
        group = group_size if isinstance(group_size, int) else columns
        words = rows * ((columns + 15) // 16) * 4
        return words + rows * (columns // group) * 2 + 16


F32 = StorageType("F32", 1, 4, None, ggml=0)
F16 = StorageType("F16", 1, 2, None, ggml=1)
Q4_0 = StorageType("Q4_0", 32, 18, (-8, 7), ggml=2)
TQ1_0 = StorageType("TQ1_0", 256, 54, (-1, 1), ggml=34)
TQ2_0 = StorageType("TQ2_0", 256, 66, (-1, 1), ggml=35)
Q2_0 = StorageType("Q2_0", 64, 18, (-1, 2), ggml=42)
PACK2 = StorageType("pack-quantized 2-bit", 0, 0, (-2, 1))


@dataclass(frozen=True)
class Target:
    """A file format a user can ask for.

    Attributes:
        name: what the user types, ``gguf:tq2_0``.
        types: the storage type asked for, then the exact ones that may stand in for single tensors when
            fallback is allowed, best first.
        loads_in: engines that load the file.
        cheapest: every tensor gets the smallest of ``types`` that holds it exactly; none of them is the target's own.
    """

    name: str
    types: tuple[StorageType, ...]
    loads_in: str
    cheapest: bool = False

    @property
    def container(self) -> str:
        """``gguf`` or ``hf``."""
        return self.name.split(":")[0]

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
            if t.name != self.name and not t.cheapest and t.types[0].refusal(grid, group_size, shape) is None
        ]
        if others:
            hints.append(f"--target {' or '.join(others)} would hold it")
        raise PlanError(f"{refusal}; {', '.join(hints) or 'no target holds it'}")


TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        Target("hf", (PACK2,), "transformers (with compressed-tensors), vLLM, llama.cpp's converter"),
        Target("gguf:tq2_0", (TQ2_0, Q2_0, Q4_0, F16), "llama.cpp (CPU, Metal, Vulkan)"),
        Target("gguf:tq1_0", (TQ1_0, Q2_0, Q4_0, F16), "llama.cpp (CPU, Vulkan)"),
        Target("gguf:q2_0", (Q2_0, Q4_0, F16), "llama.cpp (CUDA, Metal, Vulkan, SYCL; scalar and slow on x86 CPUs)"),
        Target("gguf:q4_0", (Q4_0, F16), "llama.cpp (all backends)"),
    )
}


_GGUF_TYPES = {t.name: t for chosen in TARGETS.values() for t in chosen.types if t.ggml is not None}
TARGETS["gguf:mixed"] = Target(
    "gguf:mixed",
    tuple(sorted(_GGUF_TYPES.values(), key=lambda t: t.block_bytes / t.block)),
    "llama.cpp, wherever it runs every type in the file",
    cheapest=True,
)


def target(name: str) -> Target:
    """The target called ``name``.

    Raises:
        ConfigError: there is none; the nearest name is given.
    """
    if name not in TARGETS:
        raise ConfigError(f"unknown target {name!r}: {nearest(name, TARGETS)}")
    return TARGETS[name]
