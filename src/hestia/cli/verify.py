"""``hestia verify PATH --against RUN``: is the file the model that was trained?"""

from __future__ import annotations

from pathlib import Path

import click

from .shared import json_option, show


@click.command(name="verify")
@click.argument("path")
@click.option("--against", "run", required=True, metavar="RUN", help="the run that the file comes from")
@click.option("--target", help="the file's format, where it cannot be told from the run")
@click.option("--no-engine", is_flag=True, help="compare the bytes alone, run nothing")
@json_option
def command(path: str, run: str, target: str | None, no_engine: bool, as_json: bool) -> None:
    """Compare every tensor, all metadata and the tokenizer of PATH with the frozen model of RUN, then run both."""
    from ..export.verify import require_ok, verify

    result = verify(Path(path), Path(run), target=target, engine=not no_engine)
    lines = [f"{path}: {result.target}, codes equal: {'yes' if result.codes_equal else 'NO'}"]
    if result.engine:
        lines.append(f"{result.engine}: largest logit difference {result.max_abs_logit_diff:.2g}, KL {result.kl:.2g}")
    lines += [*result.notes, *result.differences[:10]]
    show({"path": path, **result.to_json()}, as_json, "\n".join(lines))
    require_ok(result)
