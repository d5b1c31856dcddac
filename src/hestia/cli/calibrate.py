"""``hestia calibrate MODEL --data PATH... --out sensitivity.json``: which tensors matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .shared import DATA, MACHINE, job_options, json_option, options_from, show


@click.command(name="calibrate")
@click.argument("model")
@job_options((*DATA, *MACHINE, "calibrate", "skip", "out"))
@json_option
def command(model: str, as_json: bool, **typed: Any) -> None:
    """Estimate the Gauss-Newton trace of every quantizable tensor of MODEL, with intervals."""
    from ..jobs import calibrate_model

    options = options_from(None, {"model": model, "allow_partial": True, **typed})
    sensitivity = calibrate_model(options)
    path = Path(options.out or "sensitivity.json")
    sensitivity.save(path)
    show(sensitivity.to_json(), as_json, f"{sensitivity.table()}\n\nwritten to {path}")
