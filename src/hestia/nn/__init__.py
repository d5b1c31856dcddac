"""Model surgery: what becomes low-bit (``select``), how it trains (``linear``, ``knobs``), in and out (``convert``)."""

from .convert import apply, freeze, quantized_modules, restore
from .knobs import Knobs, knobs_of
from .latents import refuse_latents, refuse_others
from .linear import QuantLinear
from .select import Selection, select, unwrapped

__all__ = [
    "Knobs",
    "QuantLinear",
    "Selection",
    "apply",
    "freeze",
    "knobs_of",
    "quantized_modules",
    "refuse_latents",
    "refuse_others",
    "restore",
    "select",
    "unwrapped",
]
