"""Bytes on disk: every file format for one plan, and the folder of a run.

Quantized tensors are counted by the storage types that the exporters use; what is kept is stored in the parent's dtype
(GGUF: vectors in fp32). Text beside the weights (tokenizer, configuration) is a guess from the size of the vocabulary,
unless the model's folder has the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .. import loading
from ..errors import PlanError
from ..plans import LayerPlan, Plan
from ..quant.grouping import group_shape
from ..targets import F32, TARGETS, Stored, Target, file_bytes, head_type
from ..training import checkpoints
from .memory import Sizes

TEXT_BYTES = {"hf": 60, "mlx": 60, "gguf": 40}
"""Bytes of tokenizer a vocabulary entry."""


@dataclass(frozen=True)
class FileSize:
    """One file format.

    Attributes:
        target: its name.
        bytes: of the file or folder; None where it cannot hold the plan.
        bits_per_weight: of the whole model.
        refusal: why not; empty where it can.
    """

    target: str
    bytes: int | None
    bits_per_weight: float | None
    refusal: str = ""

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a plan leaves as it is: numbers in matrices, embeddings and head apart, and in vectors."""

    matrices: int
    head: int
    vectors: int


def file_sizes(
    plan: Plan,
    kept: Kept,
    dtype: torch.dtype,
    *,
    vocabulary: int,
    folder: Path | None,
    head: str,
    fallback: bool,
    refused: Mapping[str, str],
) -> list[FileSize]:
    """One row per target, dense formats included; ``refused`` says which cannot hold such a model, and why."""
    total = plan.quantized_weights + kept.matrices + kept.head + kept.vectors
    rows = []
    for chosen in TARGETS.values():
        if chosen.name in refused:
            rows.append(FileSize(chosen.name, None, None, refused[chosen.name].split(";")[0]))
            continue
        try:
            size = _quantized(chosen, plan.layers, dtype, fallback=fallback)
        except PlanError as error:
            rows.append(FileSize(chosen.name, None, None, str(error).split(";")[0]))
            continue
        size += _kept(chosen, kept, dtype, head) + _text(chosen, vocabulary, folder)
        rows.append(FileSize(chosen.name, size, 8.0 * size / total))
    return rows


def _quantized(target: Target, layers: Mapping[str, LayerPlan], dtype: torch.dtype, *, fallback: bool) -> int:
    tensors: list[Stored] = [
        (
            target.storage(layer.spec.grid, layer.spec.group_size, layer.shape, fallback=fallback),
            layer.spec.group_size,
            layer.shape,
        )
        for layer in layers.values()
    ]
    return sum(file_bytes(tensors, dtype.itemsize))


def _groups(layer: LayerPlan) -> int:
    rows, groups, _ = group_shape(layer.shape, layer.spec.group_size)
    return rows * groups


def _kept(target: Target, kept: Kept, dtype: torch.dtype, head: str) -> int:
    if target.container != "gguf":
        return (kept.matrices + kept.head + kept.vectors) * dtype.itemsize
    chosen = head_type(head) or (F32 if target.types[0] is F32 else None)
    of_head = kept.head * dtype.itemsize if chosen is None else kept.head // chosen.block * chosen.block_bytes
    return kept.matrices * dtype.itemsize + of_head + 4 * kept.vectors


def _text(target: Target, vocabulary: int, folder: Path | None) -> int:
    beside = sum(file.stat().st_size for file in loading.copied(folder)) if folder is not None else 0
    if target.container == "gguf" or not beside:
        return TEXT_BYTES[target.container] * vocabulary
    return beside


def run_folder(plan: Plan, kept: Kept, dtype: torch.dtype, sizes: Sizes, exports: Mapping[str, int]) -> dict[str, int]:
    """What a run's folder holds at most, while it trains and after."""
    total = plan.quantized_weights + kept.matrices + kept.head + kept.vectors
    return {
        "text": sizes.text,
        "checkpoints": checkpoints.space(total, sizes.trained, sizes.importance) if plan.trains else 0,
        "frozen model": total * dtype.itemsize,
        "codes": plan.quantized_weights + 4 * sum(map(_groups, plan.layers.values())),
        **{f"export {name}": size for name, size in exports.items()},
    }
