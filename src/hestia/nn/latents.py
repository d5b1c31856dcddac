"""A mark in a converted model's configuration, so that a checkpoint of its latent weights is not taken for a parent.

Trainers save what they train: the latent weights, and what a scale rule holds beside them, which transformers passes
over when it loads. While the model is converted such a folder's config.json says ``"hestia_latents": {"name": RECIPE,
..., "quantizers": HASH}``; ``freeze`` and ``restore`` take it away.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ConfigError, PlanError
from ..files import read_json
from .linear import QuantLinear

KEY = "hestia_latents"


class _Converted(dict[str, Any]):
    """The mark of a model in memory: models that share a configuration object are not taken for files."""


def mark(model: nn.Module, recipe: Mapping[str, Any]) -> None:
    """Say in the model's configuration, if it has one, that it is converted, and by what."""
    config: Any = getattr(model, "config", None)
    if config is not None and not isinstance(config, Mapping):
        with contextlib.suppress(AttributeError, TypeError):  # one that takes no new key is no config.json either
            setattr(config, KEY, _Converted({**recipe, "quantizers": _quantizers(model)}))


def unmark(model: nn.Module) -> None:
    """Take the mark away."""
    config: Any = getattr(model, "config", None)
    if KEY in getattr(config, "__dict__", {}):
        delattr(config, KEY)


def refuse_latents(model: nn.Module) -> None:
    """Refuse a model that was loaded from a checkpoint of latent weights.

    Raises:
        PlanError: it was; how to load such a checkpoint is said.
    """
    found = getattr(getattr(model, "config", None), KEY, None)
    if found is not None and not isinstance(found, _Converted):
        raise PlanError(
            "these are latent weights, saved while a model was converted, and no parent: load the parent, "
            "hestia.apply(model, plan), then hestia.load_latents(model, FOLDER)"
        )


def refuse_others(model: nn.Module, folder: Path) -> None:
    """Refuse latent weights that another plan's quantizers trained, whose names and shapes may be the same.

    Args:
        model: converted.
        folder: of the checkpoint; one without config.json cannot tell.

    Raises:
        ConfigError: they are.
    """
    path = folder / "config.json"
    theirs = read_json(path).get(KEY) if path.is_file() else None
    if isinstance(theirs, Mapping) and theirs.get("quantizers") not in (None, _quantizers(model)):
        raise ConfigError(
            f"{folder}: saved of a model that was converted by another plan (recipe {theirs.get('name')!r}; other "
            "bits, groups or layers than here, or another recipe); apply that plan, then load"
        )


def _quantizers(model: nn.Module) -> str:
    """Hash of the quantizer of every linear layer, or none, in the model's order: wrappers change paths."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    specs = [layer.quantizer.spec.to_json() if isinstance(layer, QuantLinear) else None for layer in linears]
    return hashlib.sha256(json.dumps(specs, sort_keys=True).encode()).hexdigest()[:16]
