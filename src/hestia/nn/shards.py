"""Sharded weights (FSDP2): a scale belongs to its whole group, so nothing is ever computed from one shard of it.

In ``forward`` a layer sees its full weight, because ``fully_shard`` gathers it; everything that looks at weights
outside of it (freezing, corrections, the logged share of saturated weights) goes through ``whole``, which all
processes must call together.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a ``DTensor``; found out without importing torch.distributed."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every process; any other tensor itself."""
    sharded: Any = tensor
    return sharded.full_tensor() if is_sharded(tensor) else tensor


def sharded_as(like: Tensor, tensor: Tensor) -> Tensor:
    """``tensor``, which is whole on every process, sharded as ``like`` is; itself where ``like`` is not."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    return distribute_tensor(tensor, sharded.device_mesh, sharded.placements, src_data_rank=None)
