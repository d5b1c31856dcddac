"""Several processes of one run, started by torchrun or accelerate: who is who, and what they share.

All of them compute; the first alone writes files and speaks. Alone, every function here is its trivial self.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor
from torch import distributed as dist

from .errors import ConfigError


@contextlib.contextmanager
def joined() -> Iterator[bool]:
    """Join the processes that torchrun started, over gloo, for as long as the block runs; yields whether to speak.

    Alone, or where the caller has joined them already, nothing is started or ended. All processes compute; only
    the first shall write and print.

    Raises:
        ConfigError: the processes cannot reach each other, or WORLD_SIZE is no number.
    """
    wanted = _started() > 1 and dist.is_available() and not dist.is_initialized()
    if not wanted:
        yield rank() == 0
        return
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the processes cannot reach each other ({error}); start "
            "them with torchrun, or unset WORLD_SIZE"
        ) from None
    try:
        yield rank() == 0
    finally:
        leave()


def require_joined() -> None:
    """Check that processes which torchrun started have joined: each would do the whole work, in the other's files.

    Raises:
        ConfigError: they have not.
    """
    if _started() > 1 and not running():
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the processes have not joined; do this within "
            "`with hestia.processes.joined():`, or unset WORLD_SIZE"
        )


def _started() -> int:
    """How many processes torchrun says that it started."""
    text = os.environ.get("WORLD_SIZE", "1")
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"WORLD_SIZE is {text!r}, which is no number of processes; unset it") from None


def leave() -> None:
    """End the group, whoever joined it: a loader of packed models would wait for processes that have left the work."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def running() -> bool:
    """Whether there is more than this one."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's number; 0 alone."""
    return dist.get_rank() if running() else 0


def world_size() -> int:
    """How many processes share the work; 1 alone."""
    return dist.get_world_size() if running() else 1


def first() -> bool:
    """Whether this process writes files and speaks: the only one, or number 0."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process is here; nothing alone."""
    if running():
        dist.barrier()


def largest(value: int) -> int:
    """The largest ``value`` of all processes; the value itself alone."""
    if not running():
        return value
    found = torch.tensor([value])
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def added(values: Tensor) -> Tensor:
    """``values`` summed over all processes, in place of each other's; on the CPU, fp64 or int64."""
    if running():
        dist.all_reduce(values)
    return values
