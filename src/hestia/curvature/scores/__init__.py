"""From samples to a number per tensor: how much would quantizing it hurt? One score a file, each with its paper."""

from .baq import BAQ
from .base import Evidence, Score
from .delta_loss import DeltaLoss
from .direct import DirectKL
from .eigen import Eigen
from .hestia import HestiaScore, hestia_scores
from .lieq import LieQ
from .omega import Omega
from .quadratic import Quadratic

__all__ = [
    "BAQ",
    "DeltaLoss",
    "DirectKL",
    "Eigen",
    "Evidence",
    "HestiaScore",
    "LieQ",
    "Omega",
    "Quadratic",
    "Score",
    "hestia_scores",
]
