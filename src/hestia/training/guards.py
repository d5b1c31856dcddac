"""Guards: what stops a run, and what it says."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import GuardError, HestiaError


class Interrupted(HestiaError):  # noqa: N818 - it is not a failure
    """Ctrl-C or SIGTERM: the run was saved and can be resumed."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


def first_bad(tensors: list[tuple[str, Tensor | None]]) -> tuple[str, str] | None:
    """Name and kind ("NaN" or "infinity") of the first tensor that is not finite."""
    for name, tensor in tensors:
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            return name, "NaN" if bool(torch.isnan(tensor).any()) else "infinity"
    return None


def check_loss(loss: Tensor, model: nn.Module, step: int, last_checkpoint: str | None) -> None:
    """Stop before a bad loss reaches the optimizer.

    Raises:
        GuardError: the loss is NaN or infinite; the first bad weight, if any, is named.
    """
    if bool(torch.isfinite(loss).all()):
        return
    culprit = first_bad(list(model.named_parameters()))
    where = f"the first bad weight is {culprit[0]} ({culprit[1]})" if culprit else "all weights are still finite"
    raise GuardError(f"step {step}: the loss is {float(loss):g}; {where}. {_advice(last_checkpoint)}")


def check_gradients(norm: float | Tensor | None, model: nn.Module, step: int, last_checkpoint: str | None) -> None:
    """Stop before bad gradients reach the weights.

    Raises:
        GuardError: the gradient norm is NaN or infinite; the first bad gradient is named.
    """
    if norm is None or bool(torch.isfinite(torch.as_tensor(norm)).all()):
        return
    culprit = first_bad([(name, parameter.grad) for name, parameter in model.named_parameters()])
    where = f"the first bad one is that of {culprit[0]} ({culprit[1]})" if culprit else "their norm overflowed"
    raise GuardError(f"step {step}: gradients are not finite; {where}. {_advice(last_checkpoint)}")


def _advice(last_checkpoint: str | None) -> str:
    kept = f"The last good checkpoint is {last_checkpoint}" if last_checkpoint else "No checkpoint was written yet"
    return f"{kept}. Try a lower --lr, in another --out."


class StopSignals:
    """Turns the first Ctrl-C or SIGTERM into a request to save and stop after the current step; the second one kills.

    ``requested`` is the exit status to leave with (130 or 143), or None.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._previous: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = 128 + number
        signal.signal(number, self._previous[number] or signal.SIG_DFL)

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._request)
            except ValueError:  # not the main thread: the application owns the signals
                break
        return self

    def __exit__(self, *exc: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous or signal.SIG_DFL)
