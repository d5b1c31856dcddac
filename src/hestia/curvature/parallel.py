"""Calibration over several processes: every one takes each n-th sequence, and all end with the same table.

Rows travel as fp64 matrices, never as pickled objects. Probes are keyed by a sequence's content, so which process drew
them does not matter: the table of two processes is the table of one, bit for bit where the kernels are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import distributed as dist

from ..errors import CalibrationError
from .estimators import Diagonals, Row


def _running() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's number; 0 alone."""
    return dist.get_rank() if _running() else 0


def world_size() -> int:
    """How many processes share the work; 1 alone."""
    return dist.get_world_size() if _running() else 1


def gathered(mine: Mapping[int, Row], start: int, stop: int) -> list[Row]:
    """Rows ``start`` to ``stop - 1`` in order, from all processes.

    Raises:
        CalibrationError: fewer rows than processes, or processes that measured different things.
    """
    if not _running():
        return [mine[k] for k in range(start, stop)]
    if stop - start < world_size():
        raise CalibrationError(
            f"{stop - start} sequences are too few for {world_size()} processes; give at least one each"
        )
    names = sorted({(path, name) for row in mine.values() for path, samples in row.items() for name in samples})
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([len(names)], dtype=torch.int64))
    if any(int(size) != len(names) for size in sizes):
        raise CalibrationError("the processes measured different tensors; run calibration in one process to see why")
    # [0] the samples, [1] whether there is one: a NaN may be a sample too, and the reader shall see it
    table = torch.zeros(2, stop - start, len(names), dtype=torch.float64)
    for k, row in mine.items():
        for j, (path, name) in enumerate(names):
            if name in row.get(path, {}):
                table[0, k - start, j], table[1, k - start, j] = row[path][name], 1.0
    tables = [torch.empty_like(table) for _ in range(world_size())]
    dist.all_gather(tables, table)
    rows: list[Row] = []
    for k in range(stop - start):
        samples, present = tables[k % world_size()][:, k].tolist()
        row = {}
        for (path, name), sample, there in zip(names, samples, present, strict=True):
            if there:
                row.setdefault(path, {})[name] = sample
        rows.append(row)
    return rows


def summed(diagonals: Diagonals) -> Diagonals:
    """The diagonals of all processes together, in place."""
    if _running():
        for tensor in diagonals.state().values():
            dist.all_reduce(tensor)
        count = torch.tensor([diagonals.sequences], dtype=torch.int64)
        dist.all_reduce(count)
        diagonals.sequences = int(count)
    return diagonals
