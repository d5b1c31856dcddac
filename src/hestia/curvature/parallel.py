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
from .rows import Name, from_matrices, names_of, to_matrices


def gathered(mine: Mapping[int, Row], start: int, stop: int) -> list[Row]:
    """Rows ``start`` to ``stop - 1`` in order; row k comes from process (k - start) mod their number.

    Raises:
        CalibrationError: fewer sequences than processes at the start; nobody shall have measured nothing.
    """
    if not running():
        return [mine[k] for k in range(start, stop)]
    if start == 0 and stop < world_size():
        raise CalibrationError(f"{stop} sequences are too few for {world_size()} processes; give at least one each")
    names = _all_names(names_of(mine.values()))
    here, there = to_matrices([mine.get(k, {}) for k in range(start, stop)], names)
    table = torch.stack([here, there.double()])
    tables = [torch.empty_like(table) for _ in range(world_size())]
    dist.all_gather(tables, table)
    samples, present = torch.stack([tables[k % world_size()][:, k] for k in range(stop - start)], dim=1)
    return from_matrices(samples, present, names)


def _all_names(mine: list[Name]) -> list[Name]:
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
