"""``hestia calibrate MODEL --data PATH... --out sensitivity.json``: which tensors matter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .shared import (
    A_RUNS_OWN,
    DATA,
    MACHINE,
    JobCommand,
    config_option,
    job_options,
    json_option,
    options_from,
    output_file,
    require_model,
    show,
)

if TYPE_CHECKING:
    from ..curvature import Sensitivity


@click.command(name="calibrate", cls=JobCommand)
@click.argument("model", required=False)
@job_options(
    (*DATA, *MACHINE, "calibrate", "estimator", "group_size", "skip", "out"),
    out="the JSON file to write; default sensitivity.json",
)
@config_option
@json_option
def command(model: str | None, config: str | None, as_json: bool, **typed: Any) -> None:
    """Measure which tensors of MODEL matter: curvature and predicted damage, with intervals."""
    from .. import processes, progress
    from ..curvature.show import table
    from ..files import write_text
    from ..jobs import calibrate_model

    options = options_from(config, {"model": model, **typed}, A_RUNS_OWN)
    require_model(options)
    path = output_file(options.out or "sensitivity.json", (".safetensors", ".svg"))
    kept = path.with_suffix(".partial.safetensors")  # a calibration that was killed goes on from there
    with processes.joined() as first:
        if not first:
            progress.enable(False)
        sensitivity = calibrate_model(options, kept)
    if not first:
        return
    sensitivity.save(path)
    kept.unlink(missing_ok=True)
    written = str(path)
    drawing = heat_map_of(sensitivity)
    if drawing is not None:
        write_text(path.with_suffix(".svg"), drawing)
        written += f", heat map in {path.with_suffix('.svg')}"
    show(sensitivity.to_json(), as_json, f"{table(sensitivity)}\n\nwritten to {written}")


def heat_map_of(sensitivity: Sensitivity) -> str | None:
    """Layer by projection as an SVG: the damage, or the primary quantity where there is none; None without layers."""
    from ..curvature.damage import damages
    from ..curvature.show import reference_label
    from ..report.heatmap import draw, heat_map
    from ..report.sensitivity import Trace

    label = reference_label(sensitivity)
    read = damages(sensitivity, label) if label is not None else None
    title = f"KL of {label} in nats per token, one tensor at a time" if read is not None else sensitivity.primary
    values = sensitivity.values if read is None else read[0]
    heat = heat_map([Trace(path=path, trace=value) for path, value in values.items()])
    return None if heat is None else draw(heat, f"{title} ({sensitivity.estimator})")
