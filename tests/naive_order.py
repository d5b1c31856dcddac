"""Which blocks a step reads, as docs and resumed runs rely on it: a second opinion on ``BlockStream``."""

from __future__ import annotations

import torch
from torch import Tensor

from hestia.data import epoch_order


def batch_indices(blocks: int, batch_size: int, seed: int, step: int) -> Tensor:
    """The blocks of batch ``step``, int64 [batch_size]: items step*batch_size... of epoch 0, 1, 2, ... in a row.

    An epoch's remainder opens the batch that the next epoch fills up; nothing is dropped.
    """
    epoch, at = divmod(step * batch_size, blocks)
    parts: list[Tensor] = []
    missing = batch_size
    while missing:
        part = epoch_order(blocks, seed, epoch)[at : at + missing]
        parts.append(part)
        missing -= len(part)
        epoch, at = epoch + 1, 0
    return torch.cat(parts)
