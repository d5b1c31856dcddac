"""Which tensors matter: estimate the curvature of the loss, tensor by tensor, and turn it into scores.

calibration   model + weights + text -> Sensitivity; the table of estimators
gnb           the default estimator: Gauss-Newton trace, one backward pass a sequence for all tensors
table         the artefact, sensitivity.json
intervals     how far to trust it
scores        trace -> s_i -> temperature factor (Hestia, eq. 13 and 15)
"""

from .calibration import ESTIMATORS, Estimator, Forward, calibrate
from .scores import hestia_scores, temperature_factors
from .table import Sensitivity, TensorSensitivity

__all__ = [
    "ESTIMATORS",
    "Estimator",
    "Forward",
    "Sensitivity",
    "TensorSensitivity",
    "calibrate",
    "hestia_scores",
    "temperature_factors",
]
