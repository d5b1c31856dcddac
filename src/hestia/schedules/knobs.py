"""The schedule of a run: pressure and base temperature at every t = step / total.

    lambda(t) = min(1, t / rho)
    tau(t)    = end + (tau0 - end) * decay(t; hold)        decay: half a cosine, or a line, from t = hold
    tau_i(t)  = tau(t) * factor_i                          factor_i = exp(alpha (s_i - c)), fixed in the plan

Source: Wang et al. 2026 (Hestia, arXiv:2601.20745), eq. 10, 14 and 15, where hold = rho and end = 0.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..errors import ConfigError, nearest
from .curves import cosine, linear, ramp

PAPER_TEMPERATURE = 0.3
FITTED_TEMPERATURE = 0.351
"""argmin over tau of E[(Q_tau(z) - z)^2] for Gaussian weights scaled to E|z| = 1; the published code starts there."""


@dataclass(frozen=True, kw_only=True)
class KnobSchedule:
    """Pressure and temperature over training.

    Args:
        rho: share of the run over which pressure rises from 0 to 1; 0 starts fully quantized.
        temperature: tau0; 0 is hard rounding from the first step.
        hold: share of the run before the temperature falls; None means rho.
        decay: "cosine" or "linear".
        end_temperature: tau at t = 1.

    Raises:
        ConfigError: a share outside [0, 1], a temperature that is negative, infinite or ends above its start, or an
            unknown decay.
    """

    rho: float = 0.2
    temperature: float = PAPER_TEMPERATURE
    hold: float | None = None
    decay: Literal["cosine", "linear"] = "cosine"
    end_temperature: float = 0.0

    def __post_init__(self) -> None:
        for name, share in (("rho", self.rho), ("hold", self.hold)):
            if share is not None and not 0.0 <= share <= 1.0:
                raise ConfigError(f"{name} is a share of the run in [0, 1], got {share}")
        if not 0.0 <= self.end_temperature <= self.temperature < math.inf:
            raise ConfigError(
                f"temperatures must be finite and satisfy 0 <= end_temperature <= temperature, "
                f"got temperature={self.temperature}, end_temperature={self.end_temperature}"
            )
        if self.decay not in ("cosine", "linear"):
            raise ConfigError(f"unknown decay {self.decay!r}: {nearest(str(self.decay), ('cosine', 'linear'))}")

    def pressure(self, t: float) -> float:
        """lambda(t), 0 to 1."""
        return ramp(t, self.rho)

    def base_temperature(self, t: float) -> float:
        """tau(t) before any tensor's factor."""
        curve = cosine if self.decay == "cosine" else linear
        share = curve(t, self.rho if self.hold is None else self.hold)
        return self.end_temperature + (self.temperature - self.end_temperature) * share

    def to_json(self) -> dict[str, Any]:
        """A JSON object; ``KnobSchedule(**record)`` is its inverse."""
        return asdict(self)
