"""What a quantized layer holds besides weight and bias: a learned scale or an importance, under ``_hestia.``.

    PATH._hestia.scale        Parameter [R * G], one a group; hestia's optimizer does not decay what is one-dimensional,
                              a Trainer of one's own goes by names, and does
    PATH._hestia.importance   buffer [O, I], detached; the clock copies the optimizer's second moment into it

Both are in the state dict, hence in checkpoints, and leave with the layer at ``freeze`` and ``restore``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from ..quant import Quantizer


def not_narrowed(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``fn`` as ``nn.Module._apply`` takes it, without what a cast to bf16 or fp16 would do to fp32 numbers."""

    def move(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        narrowed = moved.is_floating_point() and moved.dtype.itemsize < 4 <= tensor.dtype.itemsize
        return tensor.to(moved.device) if narrowed else moved

    return move


class Held(nn.Module):
    """The tensor that a quantizer's scale rule holds between steps.

    Args:
        quantizer: says what is held, and what it starts from.
        weight: latent weight ``[O, I]``; bf16 and fp16 start in fp32.
    """

    def __init__(self, quantizer: Quantizer, weight: Tensor) -> None:
        super().__init__()
        start = quantizer.start(weight.to(torch.promote_types(weight.dtype, torch.float32)))
        assert start is not None
        self.learned = quantizer.spec.learns
        if self.learned:
            self.scale = nn.Parameter(start)
        else:
            self.register_buffer("importance", start)

    @property
    def tensor(self) -> Tensor:
        """The held tensor."""
        return self.scale if self.learned else self.importance  # type: ignore[return-value]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(not_narrowed(fn), recurse)

    @torch.no_grad()
    def restart(self, quantizer: Quantizer, weight: Tensor) -> None:
        """Fill it anew from the weight, in place: after a model born on the meta device got its weights."""
        start = quantizer.start(weight)
        assert start is not None
        self.tensor.copy_(start)
