"""``hestia compare RUN...``: runs side by side."""

from __future__ import annotations

from pathlib import Path

import click

from .shared import json_option, show


@click.command(name="compare")
@click.argument("runs", nargs=-1, required=True)
@json_option
def command(runs: tuple[str, ...], as_json: bool) -> None:
    """The headline numbers of several RUNs in one table."""
    from ..files import read_json
    from ..report.records import RunRecord
    from ..report.tables import compare

    table = compare([RunRecord.load(Path(run)) for run in runs])
    show({run: read_json(Path(run) / "report.json") for run in runs} if as_json else {}, as_json, table)
