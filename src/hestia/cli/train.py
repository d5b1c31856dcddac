"""``hestia train MODEL --plan plan.json --data PATH... --out RUN``: the main job by a plan made beforehand."""

from __future__ import annotations

from typing import Any

import click

from ..errors import ConfigError
from ..options import PLANNING
from .quantize import run
from .shared import JobCommand, config_option, dry_run_option, job_options, json_option, options_from, resume_option


@click.command(name="train", cls=JobCommand)
@click.argument("model", required=False)
@click.option("--plan", metavar="FILE", help="plan.json, from `hestia plan`; here or in --config")
@job_options(leave_out=(*PLANNING, "plan"))
@config_option
@resume_option
@dry_run_option
@json_option
def command(model: str | None, config: str | None, resume: bool, dry_run: bool, as_json: bool, **typed: Any) -> None:
    """Train MODEL by a plan, freeze it, export it to the plan's targets, and report."""
    options = options_from(config, {"model": model, **typed})
    if options.plan is None:
        raise ConfigError("--plan is missing; `hestia plan` makes one, and `hestia quantize` makes its own")
    run(options, resume=resume, dry_run=dry_run, as_json=as_json)
