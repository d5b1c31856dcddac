"""How sensitivity is measured: one estimator a file, all filling the same table of samples (see ``base``)."""

from .base import Candidates, CurvatureEstimator, Diagonals, Forward, Problem, Row, quantity
from .eigen import Eigen
from .fisher import Fisher
from .gnb import GaussNewton
from .hutchinson import Hutchinson
from .hutchpp import HutchPlusPlus
from .kl import DirectKL
from .xtrace import XTrace

__all__ = [
    "Candidates",
    "CurvatureEstimator",
    "Diagonals",
    "DirectKL",
    "Eigen",
    "Fisher",
    "Forward",
    "GaussNewton",
    "HutchPlusPlus",
    "Hutchinson",
    "Problem",
    "Row",
    "XTrace",
    "quantity",
]
