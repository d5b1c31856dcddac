"""hestia: from a pretrained language model to a verified ternary one.

The public names, resolved on first use: ``import hestia`` itself loads nothing, listing the recipes needs torch alone,
and neither touches a GPU.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .curvature import Sensitivity, calibrate
    from .export.save import save
    from .export.verify import verify
    from .nn import QuantLinear, apply, freeze, restore
    from .options import Options
    from .pipeline import quantize
    from .planner import plan
    from .plans import Plan
    from .quant import QuantizedTensor, QuantSpec, fake_quantize
    from .recipes import Recipe
    from .training import Clock, HestiaTrainer, QATCallback, TrainConfig, load_latents

_HOMES = {
    "Clock": "training",
    "HestiaTrainer": "training",
    "Options": "options",
    "Plan": "plans",
    "QATCallback": "training",
    "QuantLinear": "nn",
    "QuantSpec": "quant",
    "QuantizedTensor": "quant",
    "Recipe": "recipes",
    "Sensitivity": "curvature",
    "TrainConfig": "training",
    "apply": "nn",
    "calibrate": "curvature",
    "fake_quantize": "quant",
    "freeze": "nn",
    "load_latents": "training",
    "plan": "planner",
    "quantize": "pipeline",
    "restore": "nn",
    "save": "export.save",
    "verify": "export.verify",
}

__all__ = [
    "Clock",
    "HestiaTrainer",
    "Options",
    "Plan",
    "QATCallback",
    "QuantLinear",
    "QuantSpec",
    "QuantizedTensor",
    "Recipe",
    "Sensitivity",
    "TrainConfig",
    "apply",
    "calibrate",
    "fake_quantize",
    "freeze",
    "load_latents",
    "plan",
    "quantize",
    "restore",
    "save",
    "verify",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'hestia' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
