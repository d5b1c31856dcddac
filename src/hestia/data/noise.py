"""Noise on the tokens that a teacher and its student read.

    x'_i = x_i with probability 1 - share, else uniform over the vocabulary        labels stay those of the text

A teacher has an answer to any input, also to one that no text holds. Uniform tokens take the student through the
embeddings and contexts that the training text leaves out; tokens drawn from the text itself do not (docs/log.md).
A pure function of the seed and the example, as the order of the data is.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .order import keys

_STREAM = 0x6E6F697365  # "noise": apart from the order of the blocks, which has the same seed


def noisy(ids: Tensor, share: float, vocabulary: int, seed: int, example: int) -> Tensor:
    """``ids``, int64 ``[T]``, with about ``share`` of them drawn anew from 0..``vocabulary`` - 1.

    >>> noisy(torch.arange(4), 0.0, 100, seed=0, example=0).tolist()
    [0, 1, 2, 3]
    """
    words = keys(2 * len(ids), seed ^ _STREAM, example)
    chosen = (words[: len(ids)] >> np.uint64(11)) * 2.0**-53 < share
    drawn = (words[len(ids) :] % np.uint64(vocabulary)).astype(np.int64)
    return torch.where(torch.from_numpy(chosen), torch.from_numpy(drawn), ids)
