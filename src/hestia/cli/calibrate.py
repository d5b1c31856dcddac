"""``hestia calibrate MODEL --data PATH... --out sensitivity.json``: which tensors matter."""

from __future__ import annotations

from typing import Any

import click

from .shared import DATA, MACHINE, job_options, json_option, options_from, output_file, show


@click.command(name="calibrate")
@click.argument("model")
@job_options((*DATA, *MACHINE, "calibrate", "estimator", "group_size", "skip", "out"))
@json_option
def command(model: str, as_json: bool, **typed: Any) -> None:
    """Measure which tensors of MODEL matter: curvature and predicted damage, with intervals."""
    from .. import progress
    from ..curvature import parallel
    from ..curvature.show import table
    from ..jobs import calibrate_model

    options = options_from(None, {"model": model, "allow_partial": True, **typed})
    path = output_file(options.out or "sensitivity.json")
    with parallel.joined() as first:
        if not first:
            progress.enable(False)
        sensitivity = calibrate_model(options)
    if first:
        sensitivity.save(path)
        show(sensitivity.to_json(), as_json, f"{table(sensitivity)}\n\nwritten to {path}")
