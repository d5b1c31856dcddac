"""The schedule of a run: pressure and base temperature at every t = step / total.

    lambda(t) = min(1, t / rho)
    tau(t)    = end + (tau0 - end) * decay(t; hold)        decay: half a cosine, or a line, from t = hold
    r(t)      = residual * ramp(t; residual_warmup) * half a cosine from there to 0 at t = 1      added: r(t) w
    tau_i(t)  = tau(t) * factor_i                          factor_i = exp(alpha (s_i - c)), fixed in the plan

With ``hard_from`` the temperature ends at that share of the run instead of at 1 and is 0 from there on: hard forward.

Source: Wang et al. 2026 (Hestia, arXiv:2601.20745), eq. 10, 14 and 15, where hold = rho and end = 0; the residual is
that of Sherry's Arenas (arXiv:2601.07892).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..errors import ConfigError, nearest
from .curves import cosine, linear, ramp

PAPER_TEMPERATURE = 0.3


@dataclass(frozen=True, kw_only=True)
class KnobSchedule:
    """Pressure and temperature over training.

    Args:
        rho: share of the run over which pressure rises from 0 to 1; 0 starts fully quantized.
        temperature: tau0; 0 is hard rounding from the first step.
        hold: share of the run before the temperature falls; None means rho.
        decay: "cosine" or "linear".
        end_temperature: tau at t = 1, unless the temperature is held to the end (``hold``, or ``rho``, of 1).
        hard_from: share of the run after which tau is 0; the curve is squeezed into what comes before. None: never.
        residual: peak of a multiple of the latent weight that is added to w_hat, apart from the pressure.
        residual_warmup: share of the run over which the residual rises; under 1, so that it can fall again.

    Raises:
        ConfigError: a share outside [0, 1], a temperature that is negative, infinite or ends above its start, a hard
            part that begins before the temperature may fall, a negative residual or one that rises to the end, or an
            unknown decay.
    """

    rho: float = 0.2
    temperature: float = PAPER_TEMPERATURE
    hold: float | None = None
    decay: Literal["cosine", "linear"] = "cosine"
    end_temperature: float = 0.0
    hard_from: float | None = None
    residual: float = 0.0
    residual_warmup: float = 0.1

    def __post_init__(self) -> None:
        shares = {
            "rho": self.rho,
            "hold": self.hold,
            "hard_from": self.hard_from,
            "residual_warmup": self.residual_warmup,
        }
        for name, share in shares.items():
            if share is not None and not 0.0 <= share <= 1.0:
                raise ConfigError(f"{name} is a share of the run in [0, 1], got {share}")
        if not 0.0 <= self.end_temperature <= self.temperature < math.inf:
            raise ConfigError(
                f"temperatures must be finite and satisfy 0 <= end_temperature <= temperature, "
                f"got temperature={self.temperature}, end_temperature={self.end_temperature}"
            )
        held = self.rho if self.hold is None else self.hold
        if self.hard_from is not None and self.hard_from <= held:
            raise ConfigError(
                f"hard_from={self.hard_from} must come after hold={held}, where the temperature starts falling"
            )
        if not 0.0 <= self.residual < math.inf:
            raise ConfigError(f"residual must be 0 or a positive number, got {self.residual}")
        if self.residual and self.residual_warmup >= 1.0:
            raise ConfigError(
                f"residual_warmup must be under 1: the residual falls after it, got {self.residual_warmup}"
            )
        if self.decay not in ("cosine", "linear"):
            raise ConfigError(f"unknown decay {self.decay!r}: {nearest(str(self.decay), ('cosine', 'linear'))}")

    def pressure(self, t: float) -> float:
        """lambda(t), 0 to 1."""
        return ramp(t, self.rho)

    def base_temperature(self, t: float) -> float:
        """tau(t) before any tensor's factor; tau0 at t = 1 too where the temperature is held to the end."""
        curve = cosine if self.decay == "cosine" else linear
        held = self.rho if self.hold is None else self.hold
        if self.hard_from is not None:
            if t >= self.hard_from:
                return 0.0
            t, held = t / self.hard_from, held / self.hard_from
        share = curve(t, held)
        return self.end_temperature + (self.temperature - self.end_temperature) * share

    def residual_share(self, t: float) -> float:
        """r(t), the multiple of the latent weight that is added; 0 at t = 1."""
        return self.residual * ramp(t, self.residual_warmup) * cosine(t, self.residual_warmup)

    def at(self, t: float) -> dict[str, float]:
        """Every knob at t, as ``Knobs.set`` takes them; the residual only where there is one."""
        moving = {"pressure": self.pressure(t), "temperature": self.base_temperature(t)}
        return {**moving, "residual": self.residual_share(t)} if self.residual else moving

    def to_json(self) -> dict[str, Any]:
        """A JSON object; ``KnobSchedule(**record)`` is its inverse. Options at their defaults that came later than the
        first plans have no key."""
        later = {"hard_from": None, "residual": 0.0, "residual_warmup": 0.1}
        return {k: v for k, v in asdict(self).items() if k not in later or v != later[k]}
