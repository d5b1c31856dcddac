"""Which tensors matter: estimate the curvature of the loss, tensor by tensor, and turn it into scores.

calibration   model + weights + text -> Sensitivity
estimators/   one a file: gnb (default), fisher, kl, hutchinson, hutchpp, xtrace, eigen
stopping      when there are enough sequences
partial       what a calibration that was killed had measured; parallel: over several processes; rows: both as matrices
sensitivity   the artefact, sensitivity.json
intervals     how far to trust it
show          the table for people
scores/       samples -> how much quantizing a tensor hurts, one a file; inputs: what layers are fed, for some of them
damage        the scores that are nats per token
allocation/   damages -> a width for every tensor
temperatures  s_i -> temperature factor (Hestia, eq. 15)
"""

from .calibration import calibrate
from .estimators import CurvatureEstimator, Forward
from .scores import hestia_scores
from .sensitivity import Sensitivity, TensorSensitivity
from .stopping import Stopping
from .temperatures import temperature_factors

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
