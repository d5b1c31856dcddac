"""``hestia plan MODEL ... --out plan.json``: who gets what, and why; read it before spending a GPU-hour."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import click

from ..files import write_bytes
from .shared import (
    A_RUNS_OWN,
    JobCommand,
    config_option,
    job_options,
    json_option,
    options_from,
    output_file,
    require_model,
    show,
)

ASKED = (
    "recipe", "options", "target", "bits", "widths", "max_kl", "group_size", "skip", "fallback", "allow_partial",
    "sensitivity", "out", "trust_remote_code",
)  # fmt: skip


@click.command(name="plan", cls=JobCommand)
@click.argument("model", required=False)
@job_options(ASKED, out="the JSON file to write; default plan.json")
@config_option
@json_option
def command(model: str | None, config: str | None, as_json: bool, **typed: Any) -> None:
    """Plan MODEL: every weight accounted for, every tensor checked against the target. Reads no weights.

    Where bits are spent tensor by tensor (--bits 1.9, --max-kl), the curve of predicted KL against bits is shown and
    drawn beside the plan as .svg and .png.
    """
    from ..jobs import plan_model

    options = options_from(config, {"model": model, **typed}, A_RUNS_OWN)
    require_model(options)
    path = output_file(options.out or "plan.json", (".svg", ".png"))
    plan = plan_model(options)
    plan.save(path)
    text = f"{plan.table()}\n\nwritten to {path}"
    if plan.spending is not None:
        text = f"{plan.table()}\n\n{_drawn(plan.spending.to_json(), path)}"
    show(plan.to_json(), as_json, text)


def _drawn(spending: dict[str, Any], path: Path) -> str:
    """The curve in characters, and where it and the plan lie."""
    from ..report.pareto import terminal
    from ..report.plots import pareto

    chosen = (spending["bits"], spending["predicted_kl"])
    figures = (path.with_suffix(".svg"), path.with_suffix(".png"))
    for figure in figures:
        write_bytes(figure, pareto(spending["curve"], chosen, figure.suffix.removeprefix(".")))
    columns = shutil.get_terminal_size((100, 24)).columns
    return f"{terminal(spending['curve'], chosen, columns)}\n\nwritten to {path}, {figures[0]} and {figures[1]}"
