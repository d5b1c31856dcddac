"""Scoring by several processes: each takes every n-th block, and all end with the same ``Score``.

Sums of blocks travel in fp64 and are added in the order of the blocks, so the numbers are those of one process wherever
the model computes a block alike in every batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import processes
from ..data import Blocks
from ..errors import ConfigError, GuardError
from .scoring import Logits, Score, score


def shared_score(
    logits: Logits,
    blocks: Blocks,
    *,
    parent: Logits | None = None,
    description: str = "evaluating",
) -> Score:
    """``score``, called by every process with the same blocks; alone it is ``score`` itself.

    Raises:
        ConfigError, GuardError: as ``score``, on all processes together; the one with bad blocks says what is wrong.
    """
    world = processes.world_size()
    if world == 1:
        return score(logits, blocks, parent=parent, description=description)
    count = len(blocks)
    mine = range(processes.rank(), count, world)
    sums = torch.zeros(4, count, dtype=torch.float64)  # NLL and KL of a block, its tokens, and where the two agree
    share = blocks[processes.rank() :: world]
    found, failure = None, None
    if bool(share.with_target.any()):
        try:
            found = score(logits, share, parent=parent, description=description)
        except (ConfigError, GuardError) as error:
            failure = error
    _raise_together(failure)
    if found is not None:
        rows = torch.tensor(mine)
        tokens = found.block_tokens.double()
        sums[0, rows] = _sum(found.block_nll, tokens)
        sums[2, rows] = tokens
        if found.block_kl is not None and found.top1_agreement is not None:
            sums[1, rows] = _sum(found.block_kl, tokens)
            sums[3, rows[0]] = found.top1_agreement * found.tokens
    nll, kl, tokens, agree = processes.added(sums)
    total = int(tokens.sum())
    if total == 0:
        return score(logits, blocks, parent=parent)  # says what is wrong
    return Score(
        nll=float(nll.sum()) / total,
        tokens=total,
        block_nll=nll / tokens,
        block_tokens=tokens.long(),
        kl_to_parent=None if parent is None else float(kl.sum()) / total,
        top1_agreement=None if parent is None else round(float(agree.sum())) / total,
        block_kl=None if parent is None else kl / tokens,
    )


def _raise_together(failure: ConfigError | GuardError | None) -> None:
    """Stop all processes where one has failed: left alone, the others would wait for its numbers."""
    status = processes.largest(0 if failure is None else failure.exit_status)
    if status:
        kind = GuardError if status == GuardError.exit_status else ConfigError
        raise failure if isinstance(failure, kind) else kind("another process could not score its blocks; it says why")


def _sum(mean: Tensor, tokens: Tensor) -> Tensor:
    return torch.where(tokens > 0, mean * tokens, 0.0)
