"""Rows of samples as matrices and back: what lies on the disk, and what travels between processes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .estimators import Row

Name = tuple[str, str]
"""Module path and quantity: what a column of the matrices holds."""


def names_of(rows: Iterable[Row]) -> list[Name]:
    """The (path, quantity) pairs of the rows, each once, in the order in which they come."""
    return list(dict.fromkeys((path, name) for row in rows for path, found in row.items() for name in found))


def to_matrices(rows: Sequence[Row], names: Sequence[Name]) -> tuple[Tensor, Tensor]:
    """Samples, fp64 ``[K, names]``, and which of them there are, bool ``[K, names]``: a NaN may be a sample too."""
    samples = torch.zeros(len(rows), len(names), dtype=torch.float64)
    present = torch.zeros(len(rows), len(names), dtype=torch.bool)
    for k, row in enumerate(rows):
        for j, (path, name) in enumerate(names):
            if name in row.get(path, {}):
                samples[k, j], present[k, j] = row[path][name], True
    return samples, present


def from_matrices(samples: Tensor, present: Tensor, names: Sequence[Name]) -> list[Row]:
    """The inverse of ``to_matrices``."""
    rows: list[Row] = []
    for numbers, there in zip(samples.tolist(), present.tolist(), strict=True):
        row: Row = {}
        for (path, name), sample, is_there in zip(names, numbers, there, strict=True):
            if is_there:
                row.setdefault(path, {})[name] = sample
        rows.append(row)
    return rows
