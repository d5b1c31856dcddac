"""The moving knobs of a model: pressure and base temperature, in one module, written by one clock.

They are 0-d fp32 buffers so that a compiled graph reads them as inputs and is never rebuilt, and non-persistent so that
state-dict keys do not change. Python floats beside them are the truth: every cast, move or ``to_empty`` refills the
buffers from those, so no dtype cast can round a knob and no meta device can lose it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import ConfigError


class Knobs(nn.Module):
    """``pressure`` (lambda, 0 to 1) and ``temperature`` (tau before any tensor's factor) of one model.

    ``residual``, the multiple of the latent weight that is added, is there only where the schedule has one. ``moved``
    says whether they are where they should be: a clock has moved them, or the schedule asks for no move.
    """

    pressure: Tensor
    temperature: Tensor
    residual: Tensor | None

    def __init__(self, pressure: float = 1.0, temperature: float = 0.0, residual: float | None = None) -> None:
        super().__init__()
        self._values = {"pressure": pressure, "temperature": temperature}
        self.moved = False
        self.register_buffer("residual", None, persistent=False)
        if residual is not None:
            self._values["residual"] = residual
        for name, value in self._values.items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32), persistent=False)

    @torch.no_grad()
    def set(self, *, pressure: float, temperature: float, residual: float = 0.0) -> None:
        """Move the knobs, in place."""
        before, self._values = self._values, {"pressure": pressure, "temperature": temperature}
        self.pressure.fill_(pressure)
        self.temperature.fill_(temperature)
        if self.residual is not None:
            self._values["residual"] = residual
            self.residual.fill_(residual)
        self.moved = self.moved or self._values != before

    @property
    def values(self) -> dict[str, float]:
        """``{"pressure": ..., "temperature": ...}``, and the residual if any; exact, no device is synchronised."""
        return dict(self._values)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for name, value in self._values.items():
            device = self._buffers[name].device  # type: ignore[union-attr]
            self._buffers[name] = torch.full((), value, dtype=torch.float32, device=device)
        return self

    def extra_repr(self) -> str:
        """Shown in ``print(model)``."""
        return ", ".join(f"{name}={value:g}" for name, value in self._values.items())


def knobs_of(model: nn.Module) -> Knobs:
    """The model's one ``Knobs``.

    Raises:
        ConfigError: the model was not converted by ``hestia.apply``.
    """
    found: dict[int, Any] = {id(m): m for m in model.modules() if isinstance(m, Knobs)}
    if len(found) != 1:
        raise ConfigError(f"expected a model converted by hestia.apply (one Knobs module), found {len(found)}")
    return next(iter(found.values()))
