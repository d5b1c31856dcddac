"""How sensitivity is measured: one estimator a file, all filling the same table of samples (see ``base``)."""

from .base import Candidates, CurvatureEstimator, Diagonals, Forward, Problem, Row, quantity
from .fisher import Fisher
from .gnb import GaussNewton
from .kl import DirectKL

__all__ = [
    "Candidates",
    "CurvatureEstimator",
    "Diagonals",
    "DirectKL",
    "Fisher",
    "Forward",
    "GaussNewton",
    "Problem",
    "Row",
    "quantity",
]
