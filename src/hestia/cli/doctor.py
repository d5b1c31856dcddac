"""``hestia doctor``: is this machine fit for a run?"""

from __future__ import annotations

from pathlib import Path

import click

from .shared import json_option, show


@click.command(name="doctor")
@click.option("--out", default=".", show_default=True, help="folder where runs would be written")
@json_option
def command(out: str, as_json: bool) -> int:
    """Versions, device, memory, disk, engines and a self-test of seconds; says what to do about each problem."""
    from ..doctor import Check, examine

    checks: list[Check] = []
    for check in examine(Path(out)):
        checks.append(check)
        if not as_json:
            click.echo(line(check))
    problems = sum(check.status == "problem" for check in checks)
    verdict = f"{problems} problem{'s' if problems != 1 else ''} found" if problems else "fit for a run"
    show({"ok": not problems, "checks": [check.to_json() for check in checks]}, as_json, f"\n{verdict}")
    return 1 if problems else 0


def line(check: object) -> str:
    """One finding as text; what to do stands on a line of its own."""
    from ..doctor import Check

    assert isinstance(check, Check)
    mark = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}[check.status]
    text = f"{mark}  {check.name:<22} {check.found}"
    return f"{text}\n{'':<33}{check.advice}" if check.advice else text
