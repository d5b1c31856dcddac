"""The one truth after freezing: integer levels and snapped scales."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .grids import Grid
from .grouping import GroupSize, group_shape

PIECE = 1 << 21
"""Codes that are counted at a time."""


@dataclass(frozen=True)
class QuantizedTensor:
    """A frozen weight ``[O, I]``: ``weight = codes * scales`` over groups, exact in fp32.

    Attributes:
        codes: int8 ``[O, I]``, levels of the grid (before its power-of-two unit, which the scales carry).
        scales: fp32 ``[R, G]``, one a group; ``[1, 1]`` for a whole tensor; every one exact in fp16 and bf16.
        group_size: consecutive inputs that share a scale, "row" or "tensor".
    """

    codes: Tensor
    scales: Tensor
    group_size: GroupSize

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.codes.shape[0], self.codes.shape[1]

    def grid(self) -> Grid:
        """The integers that occur, as a grid; 0 and 1 with them where only one does, which is none."""
        seen = np.zeros(256, np.int64)
        for part in self.codes.split(max(1, PIECE // max(1, self.shape[1]))):
            seen += np.bincount(part.numpy().reshape(-1).view(np.uint8), minlength=256)
        levels = {int(v) for v in np.flatnonzero(seen).astype(np.uint8).view(np.int8)}
        return Grid(tuple(sorted(levels if len(levels) > 1 else levels | {0, 1})))

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``codes * scales`` as a matrix ``[O, I]``, multiplied in fp32 and then cast."""
        grouped = self.codes.reshape(group_shape(self.shape, self.group_size)).to(torch.float32)
        return (grouped * self.scales.unsqueeze(-1)).reshape(self.shape).to(dtype)

    def rows(self, index: Tensor | slice) -> Tensor:
        """Some rows of ``dense()``, without making the others; nobody else holds what is returned."""
        scales = self.scales.expand(self.shape[0], -1)[index]
        codes = self.codes[index].to(torch.float32)
        grouped = codes.view(*scales.shape, codes.shape[1] // scales.shape[1])
        return grouped.mul_(scales.unsqueeze(-1)).view_as(codes)

    def block_scales(self, block: int) -> Tensor:
        """The scale of every ``block`` consecutive inputs, ``[O, I/block]``; repeats, never rounds.

        Raises:
            ValueError: a block that would straddle two groups, or that does not divide the row.
        """
        rows, columns = self.shape
        _, _, group = group_shape(self.shape, self.group_size)
        if columns % block or (group % block and self.group_size != "tensor"):
            raise ValueError(f"blocks of {block} straddle groups of {self.group_size} in rows of {columns}")
        repeats = (columns if self.group_size == "tensor" else group) // block
        return self.scales.expand(rows, -1).repeat_interleave(repeats, dim=1)
