"""The order of the data: a pure function of the seed and the step, the same on every machine and for every resume.

Item i of n gets a 64-bit key mixed from (seed, stream, i) by splitmix64 (Steele, Lea and Flood 2014, "Fast splittable
pseudorandom number generators"); sorting the keys gives the permutation. No library's generator is involved, so no
library's next version changes the order.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def permutation(count: int, seed: int, stream: int) -> NDArray[np.int64]:
    """A permutation of 0..count-1, int64 [count], fixed by (seed, stream)."""
    return np.argsort(keys(count, seed, stream), kind="stable").astype(np.int64)


def keys(count: int, seed: int, stream: int) -> NDArray[np.uint64]:
    """64 random bits for each of 0..count-1, uint64 [count], fixed by (seed, stream)."""
    start = _mix_int(_mix_int(seed & _WORD) ^ (stream & _WORD))
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return _mix(steps + np.uint64(start))


def epoch_order(blocks: int, seed: int, epoch: int) -> Tensor:
    """The order of the blocks in one epoch, int64 [blocks]: a permutation fixed by seed and epoch.

    >>> epoch_order(5, seed=0, epoch=0).tolist() == epoch_order(5, seed=0, epoch=0).tolist()
    True
    """
    return torch.from_numpy(permutation(blocks, seed, epoch))


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _mix_int(word: int) -> int:
    return int(_mix(np.asarray([(word + _GOLDEN) & _WORD], dtype=np.uint64))[0])
