"""``hestia demo``: the bundled model and text, the whole way, a few minutes on two CPU cores."""

from __future__ import annotations

from pathlib import Path

import click

from .quantize import summary
from .shared import json_option, show


@click.command(name="demo")
@click.option("--out", default="demo", show_default=True, help="folder for the two runs; must not exist")
@click.option("--tokens", default="120k", show_default=True, help="tokens to train each recipe on")
@click.option("--threads", type=int, help="CPU threads")
@json_option
def command(out: str, tokens: str, threads: int | None, as_json: bool) -> None:
    """Make the bundled 6M-parameter model ternary by two recipes and compare them with rounding."""
    from ..demo import demo

    record = demo(Path(out), tokens=tokens, threads=threads)
    show(record, as_json, summary(Path(out) / "hearth"))
