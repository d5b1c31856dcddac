"""``hestia report RUN``: the pages of a run, again."""

from __future__ import annotations

from pathlib import Path

import click

from ..files import read_json
from .quantize import summary
from .shared import json_option, show


@click.command(name="report")
@click.argument("run")
@json_option
def command(run: str, as_json: bool) -> None:
    """Write report.html and README.md of RUN from its JSON, and print the table."""
    from ..report.html import write_report
    from ..report.model_card import write_model_card

    folder = Path(run)
    write_report(folder)
    write_model_card(folder)
    show(read_json(folder / "report.json"), as_json, summary(folder))
