"""Recipes: one method, one file, discovered and never listed.

``names()`` and ``get(name)`` are all that the rest of hestia uses.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from importlib.metadata import entry_points
from typing import Any

from ..errors import ConfigError
from .base import GRIDS, Recipe

ENTRY_POINTS = "hestia.recipes"


@functools.cache
def _discover() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except ImportError as error:
            raise ConfigError(f"the recipe {entry.name!r} of another package cannot be imported: {error}") from None


def names() -> list[str]:
    """The names of all recipes, third-party ones included."""
    _discover()
    return Recipe.names()


def get(name: str, **options: Any) -> Recipe:
    """The recipe called ``name`` with its options.

    Raises:
        ConfigError: no such recipe or option; the nearest name is given.
    """
    _discover()
    return Recipe.make(name, **options)


__all__ = ["GRIDS", "Recipe", "get", "names"]
