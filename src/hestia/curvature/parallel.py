"""Several processes, started by torchrun or accelerate: what they share, and calibration over them.

    torchrun --nproc-per-node 2 -m hestia calibrate MODEL --data PATH... --out sensitivity.json

Every process takes each n-th sequence, and all end with the same table.

Rows travel as fp64 matrices, never as pickled objects. Probes are keyed by a sequence's content, so which process drew
them does not matter: the table of two processes is the table of one, bit for bit where the kernels are.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch import distributed as dist

from ..errors import CalibrationError
from .estimators import Diagonals, Row


@contextlib.contextmanager
def joined() -> Iterator[bool]:
    """Join the processes that torchrun started, over gloo, for as long as the block runs; yields whether to speak.

    Alone, or where the caller has joined them already, nothing is started or ended. All processes compute; only
    the first shall write and print.

    Raises:
        CalibrationError: the processes cannot reach each other.
    """
    wanted = int(os.environ.get("WORLD_SIZE", "1")) > 1 and dist.is_available() and not dist.is_initialized()
    if not wanted:
        yield rank() == 0
        return
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    except (RuntimeError, ValueError) as error:
        raise CalibrationError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the processes cannot reach each other ({error}); start "
            "them with torchrun, or unset WORLD_SIZE"
        ) from None
    try:
        yield rank() == 0
    finally:
        leave()


def leave() -> None:
    """End the group when the shared work is done: a loader of packed models would wait for processes that left."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _running() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's number; 0 alone."""
    return dist.get_rank() if _running() else 0


def world_size() -> int:
    """How many processes share the work; 1 alone."""
    return dist.get_world_size() if _running() else 1


def first() -> bool:
    """Whether this process writes files and speaks: the only one, or number 0."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process is here; nothing alone."""
    if _running():
        dist.barrier()


def largest(value: int) -> int:
    """The largest ``value`` of all processes; the value itself alone."""
    if not _running():
        return value
    found = torch.tensor([value])
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def added(values: Tensor) -> Tensor:
    """``values`` summed over all processes, in place of each other's; on the CPU, fp64 or int64."""
    if _running():
        dist.all_reduce(values)
    return values


def gathered(mine: Mapping[int, Row], start: int, stop: int) -> list[Row]:
    """Rows ``start`` to ``stop - 1`` in order; row k comes from process (k - start) mod their number.

    Raises:
        CalibrationError: fewer sequences than processes at the start; nobody shall have measured nothing.
    """
    if not _running():
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
    if _running():
        for tensor in diagonals.state().values():
            dist.all_reduce(tensor)
        count = torch.tensor([diagonals.sequences], dtype=torch.int64)
        dist.all_reduce(count)
        diagonals.sequences = int(count)
    return diagonals
