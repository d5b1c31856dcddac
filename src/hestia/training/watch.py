"""What a run reports without stopping: loss spikes, and tensors whose codes collapsed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..nn import quantized_modules
from ..quant import QuantizedTensor

WINDOW = 16
SHARE = 0.2


class SpikeWatch:
    """Tells a loss that jumps from one that wanders.

    A step is a spike when its loss lies above every one of the last ``WINDOW`` steps, by more than ``SHARE`` of the
    highest of them. The trainer shows it no step before the pressure is 1: a loss to the parent begins at 0.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def add(self, loss: float) -> float | None:
        """Take one step's loss; the highest of the window before it if this is a spike, else None."""
        highest = max(self._recent, default=loss)
        spike = len(self._recent) == WINDOW and loss - highest > SHARE * abs(highest)
        self._recent.append(loss)
        return highest if spike else None

    @property
    def memory(self) -> list[float]:
        """The window, for a checkpoint."""
        return list(self._recent)

    @memory.setter
    def memory(self, losses: Iterable[float]) -> None:
        self._recent = deque((float(loss) for loss in losses), maxlen=WINDOW)


@torch.no_grad()
def collapse_of(codes: Tensor) -> str | None:
    """``all zero``, ``none negative`` or ``none positive``; None for codes that use both signs.

    >>> collapse_of(torch.tensor([[0, 0]])), collapse_of(torch.tensor([[1, 0]])), collapse_of(torch.tensor([[-1, 1]]))
    ('all zero', 'none negative', None)
    """
    low, high = int(codes.min()), int(codes.max())
    if low == high == 0:
        return "all zero"
    return "none negative" if low >= 0 else "none positive" if high <= 0 else None


def collapsed(codes: Mapping[str, QuantizedTensor]) -> dict[str, str]:
    """Module path -> how its codes collapsed, of those that did."""
    found = {path: collapse_of(tensor.codes) for path, tensor in codes.items()}
    return {path: how for path, how in found.items() if how is not None}


def collapsed_layers(model: nn.Module) -> dict[str, str]:
    """The same of a model in training, by the codes it would freeze to now; in memory are one layer's at a time."""
    found = {path: collapse_of(layer.codes().codes) for path, layer in quantized_modules(model)}
    return {path: how for path, how in found.items() if how is not None}


@torch.no_grad()
def saturated_share(model: nn.Module, below: float = 0.1) -> float:
    """Share of quantized weights with (1 - lambda) + lambda gain under ``below``: they hardly learn any more."""
    stuck = total = 0.0
    for _, module in quantized_modules(model):
        total += module.weight.numel()
        gain = module.gain()
        if gain is not None:
            pressure = module.knobs.pressure
            stuck += float(((1.0 - pressure) + pressure * gain < below).sum())
    return stuck / max(1.0, total)
