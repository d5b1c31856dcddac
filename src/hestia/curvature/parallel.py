"""Calibration over several processes: every one takes each n-th sequence, and all end with the same table.

    torchrun --nproc-per-node 2 -m hestia calibrate MODEL --data PATH... --out sensitivity.json

Rows travel as fp64 matrices, never as pickled objects. Probes are keyed by a sequence's content, so which process drew
them does not matter: the table of two processes is the table of one, bit for bit where the kernels are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import distributed as dist

from ..errors import CalibrationError
from ..processes import running, world_size
from .estimators import Diagonals, Row


def gathered(mine: Mapping[int, Row], start: int, stop: int) -> list[Row]:
    """Rows ``start`` to ``stop - 1`` in order; row k comes from process (k - start) mod their number.

    Raises:
        CalibrationError: fewer sequences than processes at the start; nobody shall have measured nothing.
    """
    if not running():
        return [mine[k] for k in range(start, stop)]
    if start == 0 and stop < world_size():
        raise CalibrationError(f"{stop} sequences are too few for {world_size()} processes; give at least one each")
    here = dict.fromkeys((path, name) for row in mine.values() for path, found in row.items() for name in found)
    names = _all_names(list(here))
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


def _all_names(mine: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The (path, quantity) pairs that any process has, in the first one's order; they travel as JSON."""
    payload = torch.frombuffer(bytearray(json.dumps(mine).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([payload.numel()], dtype=torch.int64))
    padded = torch.full((max(int(size) for size in sizes),), ord(" "), dtype=torch.uint8)
    padded[: payload.numel()] = payload
    texts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(texts, padded)
    lists = [json.loads(bytes(text.tolist()).decode()) for text in texts]
    return list(dict.fromkeys((path, name) for found in lists for path, name in found))


def summed(diagonals: Diagonals) -> Diagonals:
    """The diagonals of all processes together, in place."""
    if running():
        for tensor in diagonals.state().values():
            dist.all_reduce(tensor)
        count = torch.tensor([diagonals.sequences], dtype=torch.int64)
        dist.all_reduce(count)
        diagonals.sequences = int(count)
    return diagonals
