"""GGUF: one file with weights, tokenizer and settings, for llama.cpp and everything built on it.

``gguf_layout`` says what the file of a frozen model must hold; here that is written, tensor by tensor and piece by
piece; ``gguf_check`` reads a file back with a parser of its own and compares. Quantized tensors keep their codes and
scales. Kept ones keep every number, unless ``head`` asks for f16, bf16 or q8_0, which round, and then say so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .. import progress
from ..errors import ExportError
from ..files import replacing, sha256
from ..targets import F16, StorageType, Target, head_type
from .frozen import FrozenModel
from .gguf_layout import PLACEHOLDER, Entry, Layout, Parent, dense, layout_of, payload, stored_values
from .gguf_writer import write


def export_gguf(
    frozen: FrozenModel,
    target: Target,
    path: Path,
    *,
    fallback: bool = False,
    head: str = "auto",
    parent: Parent | None = None,
) -> dict[str, Any]:
    """Write one GGUF file, atomically and piece by piece.

    Args:
        frozen: the frozen model.
        target: one of the ``gguf:`` targets.
        path: the file to write.
        fallback: store tensors that the target's first type cannot hold as its next exact type.
        head: how embedding and head are stored: ``auto`` (exact), ``f32``, ``bf16``, ``f16`` or ``q8_0``.
        parent: what the file tells of the model that was quantized.

    Returns:
        ``{"target", "path", "bytes", "sha256", "quantized_bytes", "tensors": {name: type}, "head", "file_sha256"}``;
        ``quantized_bytes`` are those of the quantized tensors, scales included; ``head`` says what became of embedding
        and head, and whether that is exact; ``file_sha256`` is the hash that the file carries of itself.

    Raises:
        ExportError: ``path`` is a folder, or llama.cpp has no exact counterpart for an architecture, setting or
            tokenizer; it is named.
        PlanError: a tensor that the target cannot hold; it is named, with what could hold it.
    """
    if path.is_dir():
        raise ExportError(f"{path}: is a folder, a GGUF model is one file; write to {path / 'model.gguf'}")
    layout = layout_of(frozen, target, fallback=fallback, head=head_type(head), parent=parent)
    kept = head_record(frozen, layout, head)
    entries = progress.track(layout.entries, "writing GGUF", total=len(layout.entries))
    with replacing(path) as temporary:
        digest = write(
            temporary,
            layout.metadata,
            layout.entries,
            [_type_id(entry.storage) for entry in layout.entries],
            (payload(frozen, entry) for entry in entries),
            digest_key="hestia.file_sha256",
            placeholder=PLACEHOLDER,
        )
    return {
        "target": target.name,
        "path": str(path),
        "bytes": path.stat().st_size,
        "sha256": sha256(path),
        "quantized_bytes": sum(entry.bytes for entry in layout.entries if entry.path is not None),
        "tensors": {entry.name: entry.storage.name for entry in layout.entries},
        "head": kept,
        "file_sha256": digest,
    }


def head_record(frozen: FrozenModel, layout: Layout, head: str) -> dict[str, Any]:
    """How embedding and head are stored, and what that changed.

    Returns:
        ``{"option", "exact", "tensors": {name: {"type", "relative_error", "largest_error"}}}``; the relative error is
        ``|stored - frozen| / |frozen|`` in the Euclidean norm, 0 where storage is exact.
    """
    tensors: dict[str, dict[str, Any]] = {}
    for entry in layout.entries:
        if entry.path is not None or entry.name not in ("token_embd.weight", "output.weight"):
            continue
        relative, largest = _rounding(frozen, entry) if _may_round(entry) else (0.0, 0.0)
        tensors[entry.name] = {"type": entry.storage.name, "relative_error": relative, "largest_error": largest}
    return {"option": head, "exact": all(t["largest_error"] == 0 for t in tensors.values()), "tensors": tensors}


def _may_round(entry: Entry) -> bool:
    return entry.storage.name in ("F16", "BF16", "Q8_0")


def _rounding(frozen: FrozenModel, entry: Entry) -> tuple[float, float]:
    """Relative and largest error of a kept tensor as stored."""
    error = power = largest = 0.0
    for rows in entry.pieces():
        index = np.arange(entry.shape[0])[rows]
        wanted = dense(frozen, entry, index)
        difference = np.abs(stored_values(frozen, entry, index).numpy() - wanted)
        if entry.storage is F16 and not np.isfinite(difference).all():
            raise ExportError(f"{entry.source}: F16 cannot hold its largest numbers; use --head auto")
        error += float(np.square(difference, dtype=np.float64).sum())
        power += float(np.square(wanted, dtype=np.float64).sum())
        largest = max(largest, float(difference.max(initial=0.0)))
    return (error / power) ** 0.5 if power else 0.0, largest


def _type_id(storage: StorageType) -> int:
    assert storage.ggml is not None
    return storage.ggml
