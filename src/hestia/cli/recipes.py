"""``hestia recipes [show NAME]``: what methods there are."""

from __future__ import annotations

import dataclasses
import inspect
import sys

import click

from ..errors import ConfigError


@click.command(name="recipes")
@click.argument("what", nargs=-1)
def command(what: tuple[str, ...]) -> None:
    """List the recipes; `hestia recipes show NAME` prints one's equation, source and options."""
    from .. import recipes

    if not what:
        for name in recipes.names():
            module = sys.modules[type(recipes.get(name)).__module__]
            click.echo(f"{name:<20} {(module.__doc__ or '').strip().splitlines()[0]}")
        return
    if len(what) != 2 or what[0] != "show":
        raise ConfigError("write `hestia recipes`, or `hestia recipes show NAME`")
    recipe = recipes.get(what[1])
    click.echo(inspect.cleandoc(sys.modules[type(recipe).__module__].__doc__ or ""))
    click.echo(f"\nwidths: {', '.join(f'{w:g}' for w in recipe.widths)} bits")
    for option in dataclasses.fields(recipe):
        click.echo(f"--option {option.name}={getattr(recipe, option.name)}")
