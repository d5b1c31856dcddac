"""lambda(t), tau(t): the moving knobs as pure functions of t in [0, 1] (standard library only)."""

from .curves import cosine, linear, ramp
from .knobs import KnobSchedule
from .learning_rate import LearningRateSchedule

__all__ = ["KnobSchedule", "LearningRateSchedule", "cosine", "linear", "ramp"]
