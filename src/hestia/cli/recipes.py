"""``hestia recipes [show NAME]``: what methods there are."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigError
from .shared import json_option, show

if TYPE_CHECKING:
    from ..recipes import Recipe


@click.command(name="recipes")
@click.argument("what", nargs=-1)
@json_option
def command(what: tuple[str, ...], as_json: bool) -> None:
    """List the recipes; `hestia recipes show NAME` prints one's equation, source and options."""
    from .. import recipes

    if not what:
        told = {name: about(recipes.get(name)) for name in recipes.names()}
        show(told, as_json, "\n".join(f"{name:<20} {one['about'].splitlines()[0]}" for name, one in told.items()))
        return
    if len(what) != 2 or what[0] != "show":
        raise ConfigError("write `hestia recipes`, or `hestia recipes show NAME`")
    one = about(recipes.get(what[1]))
    lines = [one["about"], "", f"widths: {', '.join(f'{w:g}' for w in one['widths'])} bits"]
    show(one, as_json, "\n".join([*lines, *(f"--option {key}={value}" for key, value in one["options"].items())]))


def about(recipe: Recipe) -> dict[str, Any]:
    """What there is to know of a recipe: its equation and source, widths in bits, options with their defaults."""
    return {
        "about": inspect.cleandoc(sys.modules[type(recipe).__module__].__doc__ or ""),
        "widths": list(recipe.widths),
        "options": {option.name: getattr(recipe, option.name) for option in dataclasses.fields(recipe)},
    }
