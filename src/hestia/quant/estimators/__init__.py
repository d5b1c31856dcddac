"""Q_tau, the estimators: the value of rounding and its gradient, one file a family.

A recipe picks one by class; a plan's JSON picks one by name (``Estimator.make``).
"""

from .base import Estimator
from .fourier import DampedFourier
from .softmax import Softmax
from .ste import STE, ClippedSTE, Trust
from .tanh import Tanh

__all__ = ["STE", "ClippedSTE", "DampedFourier", "Estimator", "Softmax", "Tanh", "Trust"]
