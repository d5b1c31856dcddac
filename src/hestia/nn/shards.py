"""Sharded weights (FSDP2): a scale belongs to its whole group, so nothing is ever computed from one shard of it.

In ``forward`` a layer sees its full weight, because ``fully_shard`` gathers it; everything that looks at weights
outside of it (freezing, corrections, the logged share of saturated weights) goes through ``whole``, which all
processes must call together.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_shared(tensor: Tensor) -> bool:
    """Whether this is a ``DTensor``; found out without importing torch.distributed."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that processes share, on each of them; any other tensor itself."""
    sharded: Any = tensor
    return sharded.full_tensor() if is_shared(tensor) else tensor


def shared_as(like: Tensor, tensor: Tensor) -> Tensor:
    """``tensor``, which is whole on every process, shared out as ``like`` is; itself where ``like`` is not shared."""
    if not is_shared(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    return distribute_tensor(tensor, sharded.device_mesh, sharded.placements, src_data_rank=None)
