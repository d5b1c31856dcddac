"""The stream of training examples: which block a step reads is a pure function of the seed and the step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data import Blocks, epoch_order
from ..data.noise import noisy


class BlockStream(Dataset[dict[str, Tensor]]):
    """Example i of a run: epoch i // n, position i % n of that epoch's order. A pure function of seed and i.

    Args:
        blocks: n blocks.
        examples: of the run.
        seed: of the order and the noise.
        noise: share of the tokens that are replaced; the labels are not.
        vocabulary: tokens to replace them by.
    """

    def __init__(self, blocks: Blocks, examples: int, seed: int, *, noise: float = 0.0, vocabulary: int = 0) -> None:
        self.blocks, self.examples, self.seed = blocks, examples, seed
        self.noise, self.vocabulary = noise, vocabulary
        self._epoch: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        epoch, position = divmod(index, len(self.blocks))
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, epoch_order(len(self.blocks), self.seed, epoch))
        row = int(self._epoch[1][position])
        ids = self.blocks.input_ids[row].long()
        labels = torch.where(self.blocks.loss_mask[row], ids, -100)
        labels[0] = -100  # nothing predicts it, and not every Trainer leaves it out of the number it divides by
        if self.noise:
            ids = noisy(ids, self.noise, self.vocabulary, self.seed, index)
        return {"input_ids": ids, "labels": labels}


def stack(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of examples, key by key: [blocks, tokens]."""
    return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}
