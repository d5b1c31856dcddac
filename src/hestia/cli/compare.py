"""``hestia compare RUN...``: runs side by side."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(name="compare")
@click.argument("runs", nargs=-1, required=True)
def command(runs: tuple[str, ...]) -> None:
    """The headline numbers of several RUNs in one table."""
    from ..report.records import RunRecord
    from ..report.tables import compare

    click.echo(compare([RunRecord.load(Path(run)) for run in runs]))
