"""Random numbers that depend on what they are for: neither order nor batch, process nor device changes a draw."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def key(ids: Tensor, seed: int) -> int:
    """A generator seed from a sequence's content, so that neither order nor batch nor rank changes its draws."""
    content = ids.to("cpu", torch.int64).numpy().astype("<i8").tobytes()
    return int.from_bytes(hashlib.sha256(f"{seed}:".encode() + content).digest()[:7], "little")


def generator(ids: Tensor, seed: int, path: str) -> torch.Generator:
    """Random numbers for one tensor and sequence, from their names and content alone; on the CPU."""
    digest = hashlib.sha256(f"{key(ids, seed)}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def signs(rows: int, columns: int, draws: torch.Generator, device: torch.device) -> Tensor:
    """Fair signs, int64 ``[rows, columns]``; drawn on the CPU, 32 a word, so that every device sees the same."""
    words = torch.randint(0, 2**32, (rows, -(-columns // 32)), generator=draws).to(device)
    bits = (words[:, :, None] >> torch.arange(32, device=device)) & 1
    return bits.flatten(1)[:, :columns] * 2 - 1


def rademacher(like: Tensor, draws: torch.Generator) -> Tensor:
    """Independent fair signs in the shape, dtype and place of ``like``."""
    return signs(1, like.numel(), draws, like.device).view(like.shape).to(like)
