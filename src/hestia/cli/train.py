"""``hestia train MODEL --plan plan.json --data PATH... --out RUN``: the main job by a plan made beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .quantize import summary
from .shared import config_option, job_options, json_option, options_from, resume_option, show

PLANNED = (
    "recipe",
    "options",
    "bits",
    "group_size",
    "skip",
    "fallback",
    "allow_partial",
    "calibrate",
    "sensitivity",
    "target",
)


@click.command(name="train")
@click.argument("model")
@click.option("--plan", "plan_file", required=True, metavar="FILE", help="plan.json, from `hestia plan`")
@job_options(leave_out=PLANNED)
@config_option
@resume_option
@json_option
def command(model: str, plan_file: str, config: str | None, resume: bool, as_json: bool, **typed: Any) -> None:
    """Train MODEL by a plan, freeze it, export it to the plan's targets, and report."""
    from .. import processes, progress
    from ..pipeline import quantize
    from ..plans import Plan

    plan = Plan.load(Path(plan_file))
    options = options_from(config, {"model": model, "target": plan.targets, "recipe": plan.recipe["name"], **typed})
    with processes.joined() as first:
        if not first:
            progress.enable(False)
        record = quantize(options, resume=resume, plan=plan)
    if first:
        show(record, as_json, summary(Path(options.out)))
