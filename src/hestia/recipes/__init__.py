"""Recipes: one method, one file, discovered and never listed.

``names()`` and ``get(name)`` are all that the rest of hestia uses.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import Any

from ..quant.family import load_packages
from .base import GRIDS, Recipe


@functools.cache
def _discover() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def names() -> list[str]:
    """The names of all recipes, third-party ones included.

    Raises:
        ConfigError: a package that lists one cannot be imported.
    """
    _discover()
    load_packages()
    return Recipe.names()


def get(name: str, **options: Any) -> Recipe:
    """The recipe called ``name`` with its options.

    Raises:
        ConfigError: no such recipe or option; the nearest name is given.
    """
    _discover()
    return Recipe.make(name, **options)


__all__ = ["GRIDS", "Recipe", "get", "names"]
