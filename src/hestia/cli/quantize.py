"""``hestia quantize MODEL --data PATH... --out RUN``: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .shared import JobCommand, config_option, job_options, json_option, options_from, resume_option, show


@click.command(name="quantize", cls=JobCommand)
@click.argument("model", required=False)
@job_options()
@config_option
@resume_option
@json_option
def command(model: str | None, config: str | None, resume: bool, as_json: bool, **typed: Any) -> None:
    """Calibrate, plan, train, freeze, export, verify, evaluate and report, from MODEL (a folder or hub id) to --out."""
    from .. import processes, progress
    from ..pipeline import quantize

    options = options_from(config, {"model": model, **typed})
    with processes.joined() as first:
        if not first:
            progress.enable(False)
        record = quantize(options, resume=resume)
    if first:
        show(record, as_json, summary(Path(options.out)))


def summary(run: Path) -> str:
    """The honest table and where everything lies."""
    from ..report.records import RunRecord
    from ..report.tables import headline, printable
    from ..report.wording import FAR, verdict

    record = RunRecord.load(run)
    lines = [headline(record), ""]
    for export in record.exports:
        check = export.verify
        verified = "verified" if check is not None and check.codes_equal else "NOT VERIFIED"
        if check is not None and check.codes_equal and not check.engine:
            verified = "; ".join(("its bytes verified", *check.notes))
        lines.append(f"{export.target}: {run / export.path}  ({verified})")
    lines += [printable(f"{name}: NOT WRITTEN ({why})") for name, why in record.refused.items()]
    lines += [caution for caution in verdict(record).cautions if caution.startswith(FAR)]
    lines.append(f"report: {run / 'report.html'}")
    return "\n".join(lines)
