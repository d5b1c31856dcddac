"""The equation (torch only). Start in ``quantizer.py``; each symbol of it has a file of its own."""

from .codes import QuantizedTensor
from .estimators import STE, ClippedSTE, Estimator, Softmax
from .grids import BINARY, INT2, INT3, INT4, TERNARY, Grid
from .grouping import GroupSize
from .quantizer import Quantizer, fake_quantize
from .scales import TWN, AbsMax, AbsMean, Gaussian, LeastSquares, ScaleRule, snap
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
    "Estimator",
    "Gaussian",
    "Grid",
    "GroupSize",
    "LeastSquares",
    "QuantSpec",
    "QuantizedTensor",
    "Quantizer",
    "ScaleRule",
    "Softmax",
    "fake_quantize",
    "snap",
]
