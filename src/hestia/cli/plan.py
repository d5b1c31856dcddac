"""``hestia plan MODEL ... --out plan.json``: who gets what, and why; read it before spending a GPU-hour."""

from __future__ import annotations

from typing import Any

import click

from .shared import job_options, json_option, options_from, output_file, show

PLANNING = (
    "recipe", "options", "target", "bits", "group_size", "skip", "fallback", "allow_partial", "sensitivity", "out",
    "trust_remote_code",
)  # fmt: skip


@click.command(name="plan")
@click.argument("model")
@job_options(PLANNING)
@json_option
def command(model: str, as_json: bool, **typed: Any) -> None:
    """Plan MODEL: every weight accounted for, every tensor checked against the target. Reads no weights."""
    from ..jobs import plan_model

    options = options_from(None, {"model": model, **typed})
    path = output_file(options.out or "plan.json")
    plan = plan_model(options)
    plan.save(path)
    show(plan.to_json(), as_json, f"{plan.table()}\n\nwritten to {path}")
