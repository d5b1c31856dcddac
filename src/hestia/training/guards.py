"""Guards: what stops a run, and what it says.

A bad loss or gradient stops the run before it reaches a weight. A bad weight, scale or temperature stops it before it
reaches a checkpoint, so that the last checkpoint is always a good one.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import ConfigError, GuardError, HestiaError
from ..nn import knobs_of, quantized_modules
from ..quant.grouping import to_groups


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


@torch.no_grad()
def bad_state(model: nn.Module) -> str | None:
    """What of a model is not finite, the first thing found: weights, then knobs, buffers and scales; None if all is."""
    culprit = first_bad(list(model.named_parameters()))
    if culprit is not None:
        return f"the first bad weight is {culprit[0]} ({culprit[1]})"
    for name, value in _knobs(model):
        if not math.isfinite(value):
            return f"the {name} is {value}"
    culprit = first_bad([(name, buffer) for name, buffer in model.named_buffers() if buffer.is_floating_point()])
    if culprit is not None:
        return f"the first bad buffer is {culprit[0]} ({culprit[1]})"
    for path, layer in quantized_modules(model):
        weight = layer.weight.detach()
        step, level = layer.quantizer.scales(to_groups(weight.float(), layer.quantizer.spec.group_size), layer.held)
        if (bad := first_bad([(path, step), (path, level)])) is not None:
            return f"the first bad scale is that of {path} ({bad[1]})"
    return None


def _knobs(model: nn.Module) -> Iterator[tuple[str, float]]:
    """The moving knobs by name, and every layer's temperature; nothing for a model without any."""
    try:
        values = knobs_of(model).values
    except ConfigError:
        return
    yield from values.items()
    for path, layer in quantized_modules(model):
        yield f"temperature of {path}", values["temperature"] * layer.temperature_factor


def check_loss(loss: Tensor, model: nn.Module, step: int, last_checkpoint: str | None) -> None:
    """Stop before a bad loss reaches the optimizer.

    Raises:
        GuardError: the loss is NaN or infinite; the first bad weight, knob or scale, if any, is named.
    """
    if bool(torch.isfinite(loss).all()):
        return
    where = bad_state(model) or "all weights are still finite"
    raise GuardError(f"step {step}: the loss is {float(loss):g}; {where}. {_advice(last_checkpoint)}")


def check_state(model: nn.Module, step: int, last_checkpoint: str | None) -> None:
    """Stop before a bad weight, scale or temperature is saved or frozen.

    Raises:
        GuardError: one is NaN or infinite; it is named.
    """
    found = bad_state(model)
    if found is not None:
        raise GuardError(f"step {step}: the model is not finite; {found}. {_advice(last_checkpoint)}")


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
    """Turns the first Ctrl-C, SIGTERM or SIGHUP into a request to save and stop after this step; the second one kills.

    SIGHUP comes when a terminal or its connection goes; under nohup it is ignored, and stays so. ``requested`` is the
    exit status to leave with (129, 130 or 143), or None.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._previous: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = 128 + number
        signal.signal(number, self._previous[number] or signal.SIG_DFL)

    def __enter__(self) -> Self:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        for number in numbers:
            try:
                self._previous[number] = signal.signal(number, self._request)
            except ValueError:  # not the main thread: the application owns the signals
                break
        return self

    def __exit__(self, *exc: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous or signal.SIG_DFL)
