"""Which tensors matter: estimate the curvature of the loss, tensor by tensor, and turn it into scores.

calibration   model + weights + text -> Sensitivity
estimators/   one a file: gnb (default), fisher, kl, hutchinson, hutchpp, xtrace, eigen
stopping      when there are enough sequences
table         the artefact, sensitivity.json
intervals     how far to trust it
scores        trace -> s_i -> temperature factor (Hestia, eq. 13 and 15)
"""

from .calibration import calibrate
from .estimators import CurvatureEstimator, Forward
from .scores import hestia_scores, temperature_factors
from .stopping import Stopping
from .table import Sensitivity, TensorSensitivity

__all__ = [
    "CurvatureEstimator",
    "Forward",
    "Sensitivity",
    "Stopping",
    "TensorSensitivity",
    "calibrate",
    "hestia_scores",
    "temperature_factors",
]
