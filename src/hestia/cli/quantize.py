"""``hestia quantize MODEL --data PATH... --out RUN``: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..options import Options
from .shared import (
    JobCommand,
    config_option,
    dry_run_option,
    job_options,
    json_option,
    options_from,
    resume_option,
    show,
)


@click.command(name="quantize", cls=JobCommand)
@click.argument("model", required=False)
@job_options()
@config_option
@resume_option
@dry_run_option
@json_option
def command(model: str | None, config: str | None, resume: bool, dry_run: bool, as_json: bool, **typed: Any) -> None:
    """Calibrate, plan, train, freeze, export, verify, evaluate and report, from MODEL (a folder or hub id) to --out."""
    run(options_from(config, {"model": model, **typed}), resume=resume, dry_run=dry_run, as_json=as_json)


def run(options: Options, *, resume: bool, dry_run: bool, as_json: bool) -> None:
    """The whole job, or what it would be; the first of several processes says so."""
    from .. import processes, progress
    from ..pipeline import check, quantize

    with processes.joined() as first:
        if not first:
            progress.enable(False)
        record = (check if dry_run else quantize)(options, resume=resume)
    if first:
        show(record, as_json, intent(record) if dry_run else summary(Path(options.out)))


def intent(record: dict[str, Any]) -> str:
    """What a run would do, for people."""
    tensors, weights, blocks = record["tensors"], record["weights"], record["blocks"]
    teacher, rate = record["teacher"], record["learning_rate"]
    who = "its parent" if teacher and teacher["model"] == "parent" else teacher and teacher["model"]
    taught = f", taught by {who} ({teacher['divergence']})" if teacher else ""
    lines = [
        f"{record['model']} by {record['recipe']['name']}{taught}, on {record['device']} in {record['precision']}",
        f"{tensors['quantized']} tensors of {weights['quantized']:,} weights become low-bit, {tensors['kept']} of "
        f"{weights['kept']:,} are kept",
        *(
            f"{name}: {'bits by damage' if bits is None else f'{bits:.2f} bits'} per quantized weight"
            for name, bits in record["bits_per_weight"].items()
        ),
    ]
    if record["calibration_sequences"]:
        lines.append(f"curvature from at most {record['calibration_sequences']} sequences decides the plan")
    if record["steps"]:
        tokens = record["steps"] * record["batch_size"] * record["seq_len"]
        lines.append(
            f"{record['steps']:,} steps of {record['batch_size']} blocks of {record['seq_len']} tokens: {tokens:,} "
            f"tokens, from {blocks['train']:,} blocks; learning rate {'found by a pilot' if rate is None else rate}"
        )
    return "\n".join(
        [
            *lines,
            f"scored on {blocks['scored']:,} of {blocks['held_out']:,} held-out blocks",
            f"nothing was written; without --dry-run it goes to {record['out']}",
        ]
    )


def summary(run: Path) -> str:
    """The honest table and where everything lies."""
    from ..report.records import RunRecord
    from ..report.tables import headline, printable
    from ..report.wording import far_from_parent

    record = RunRecord.load(run)
    lines = [headline(record), ""]
    for export in record.exports:
        check = export.verify
        verified = "verified" if check is not None and check.codes_equal else "NOT VERIFIED"
        if check is not None and check.codes_equal and not check.engine:
            verified = "; ".join(("its bytes verified", *check.notes))
        where = f"{export.path}, outside of the run" if export.outside else run / export.path
        lines.append(f"{export.target}: {where}  ({verified})")
        lines += [printable(export.head)] if export.head and check is not None and check.engine else []
    lines += [printable(f"{name}: NOT WRITTEN ({why})") for name, why in record.refused.items()]
    lines += far_from_parent(record)
    lines.append(f"report: {run / 'report.html'}")
    return "\n".join(lines)
