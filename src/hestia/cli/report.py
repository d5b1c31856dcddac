"""``hestia report RUN``: the pages of a run, again."""

from __future__ import annotations

from pathlib import Path

import click

from .quantize import summary


@click.command(name="report")
@click.argument("run")
def command(run: str) -> None:
    """Write report.html and README.md of RUN from its JSON, and print the table."""
    from ..report.html import write_report
    from ..report.model_card import write_model_card

    folder = Path(run)
    write_report(folder)
    write_model_card(folder)
    click.echo(summary(folder))
