"""The equation (torch only). Start in ``relax.py`` and ``quantizer.py``; each symbol of it has a file of its own."""

from .codes import QuantizedTensor
from .corrections import Correction, Pull
from .estimators import STE, ClippedSTE, DampedFourier, Estimator, Softmax, Tanh, Trust
from .grids import BINARY, INT2, INT3, INT4, TERNARY, Grid
from .grouping import GroupSize
from .held import HeldRule
from .importance import Saliency, WeightedRule
from .learned import LearnedLevel, LearnedRule, LearnedStep, StretchedElastic
from .quantizer import Quantizer, fake_quantize
from .scales import TWN, AbsMax, AbsMean, FittedLevel, Gaussian, LeastSquares, RootMeanSquare, ScaleRule, snap
from .shifts import DeadZone, OutputShift
from .spec import QuantSpec

__all__ = [
    "BINARY",
    "INT2",
    "INT3",
    "INT4",
    "STE",
    "TERNARY",
    "TWN",
    "AbsMax",
    "AbsMean",
    "ClippedSTE",
    "Correction",
    "DampedFourier",
    "DeadZone",
    "Estimator",
    "FittedLevel",
    "Gaussian",
    "Grid",
    "GroupSize",
    "HeldRule",
    "LearnedLevel",
    "LearnedRule",
    "LearnedStep",
    "LeastSquares",
    "OutputShift",
    "Pull",
    "QuantSpec",
    "QuantizedTensor",
    "Quantizer",
    "RootMeanSquare",
    "Saliency",
    "ScaleRule",
    "Softmax",
    "StretchedElastic",
    "Tanh",
    "Trust",
    "WeightedRule",
    "fake_quantize",
    "snap",
]
