"""A mark in a converted model's configuration, so that a checkpoint of its latent weights is not taken for a parent.

Trainers save what they train: the latent weights, and what a scale rule holds beside them, which transformers passes
over when it loads. Such a folder's config.json says ``"hestia_latents": {"name": RECIPE, ...}`` while the model is
converted; ``freeze`` and ``restore`` take it away.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import PlanError

KEY = "hestia_latents"


class _Converted(dict[str, Any]):
    """The mark of a model in memory: models that share a configuration object are not taken for files."""


def mark(model: nn.Module, recipe: Mapping[str, Any]) -> None:
    """Say in the model's configuration, if it has one, that it is converted."""
    config: Any = getattr(model, "config", None)
    if config is not None and not isinstance(config, Mapping):
        with contextlib.suppress(AttributeError, TypeError):  # one that takes no new key is no config.json either
            setattr(config, KEY, _Converted(recipe))


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
