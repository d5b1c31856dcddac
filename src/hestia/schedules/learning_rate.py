"""The learning rate over training: warm-up, constant, decay (WSD), as a factor on the peak rate.

    factor(t) = t / warmup                                 t < warmup
              = 1                                          until 1 - decay
              = 1 + (final - 1) (t - 1 + decay) / decay    after it

With ``second_stage`` the constant part drops to ``second_factor`` at that share of the run (BitNet's two stages).
Source: the shape of Wang et al. 2026 (arXiv:2601.20745): warm-up 5 %, last 10 % down to 0.1.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LearningRateSchedule:
    """Shares of the run, each in [0, 1].

    Raises:
        ConfigError: a share outside [0, 1], warm-up and decay that overlap, or a second stage that begins in one of
            them.
    """

    warmup: float = 0.05
    decay: float = 0.1
    final: float = 0.1
    second_stage: float | None = None
    second_factor: float = 0.5

    def __post_init__(self) -> None:
        for name in ("warmup", "decay", "final", "second_factor"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.second_stage is not None and not 0.0 <= self.second_stage <= 1.0:
            raise ConfigError(f"second_stage is a share of the run in [0, 1], got {self.second_stage}")
        if self.warmup + self.decay > 1.0:
            raise ConfigError(f"warm-up ({self.warmup}) and decay ({self.decay}) overlap")
        constant_until = 1.0 - self.decay
        if self.second_stage is not None and not self.warmup <= self.second_stage <= constant_until:
            raise ConfigError(
                f"--second-stage {self.second_stage:g} lies outside the constant part of the schedule: write a share "
                f"between the warm-up's end ({self.warmup:g}) and the decay's start ({constant_until:g})"
            )

    def factor(self, t: float) -> float:
        """Factor on the peak learning rate at t in [0, 1]."""
        if t < self.warmup:
            return t / self.warmup
        level = self.second_factor if self.second_stage is not None and t >= self.second_stage else 1.0
        start = 1.0 - self.decay
        if t <= start or self.decay == 0.0:
            return level
        return level * (1.0 + (self.final - 1.0) * (min(t, 1.0) - start) / self.decay)
