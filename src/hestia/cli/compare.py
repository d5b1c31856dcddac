"""``hestia compare RUN...``: runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..options import Options, load_config
from .shared import json_option, show

if TYPE_CHECKING:
    from ..evaluation import Comparison


@click.command(name="compare")
@click.argument("runs", nargs=-1, required=True)
@json_option
def command(runs: tuple[str, ...], as_json: bool) -> None:
    """The headline numbers of several RUNs in one table.

    Runs from one parent on the same held-out blocks are also compared with the first RUN, with 95 % intervals of the
    paired difference: over stretches of the held-out text always, over seeds where two settings (run.yaml but for the
    seed) were run with the same two or more seeds.
    """
    from ..evaluation.comparison import compare_runs, pairable, scored_run
    from ..files import read_json
    from ..report.records import RunRecord
    from ..report.tables import compare

    folders = [Path(run) for run in runs]
    table = compare([RunRecord.load(folder) for folder in folders])
    reports = {run: read_json(Path(run) / "report.json") for run in runs}
    scored = [
        scored_run(run, reports[run], read_json(folder / "scores.json"), told(folder))
        for run, folder in zip(runs, folders, strict=True)
        if (folder / "scores.json").is_file()
    ]
    found = compare_runs(scored)
    apart = [run.name for run in scored[1:] if not pairable(scored[0], run)]
    lines = [table, *differences(found)]
    if apart:
        lines.append(f"not paired with {scored[0].name} (another parent or other blocks): {', '.join(apart)}")
    record = {**reports, "differences": [comparison.to_json() for comparison in found]} if as_json else {}
    show(record, as_json, "\n".join(lines))


def told(folder: Path) -> dict[str, Any] | None:
    """The options of a run's run.yaml, defaults filled in; None where it is gone."""
    path = folder / "run.yaml"
    return asdict(Options(**load_config(path))) if path.is_file() else None


def differences(found: Sequence[Comparison]) -> list[str]:
    """A line a comparison: the difference in nats per token, its interval, and whether it may be claimed."""
    from ..evaluation.comparison import SEEDS_TO_CLAIM
    from ..report.tables import printable

    lines: list[str] = []
    for comparison in found:
        d = comparison.difference
        pair = f"{comparison.name} - {comparison.reference}"
        if comparison.over == "seeds":
            pair = f"the methods of {pair}"
        text = f"{pair}: {d.mean:+.4f} [{d.low:+.4f}, {d.high:+.4f}] nats per token"
        over = f"95 % over {d.n} {'stretches of text' if comparison.over == 'blocks' else 'seeds'}"
        if comparison.adjusted_p is not None:
            over += f", Holm p {comparison.adjusted_p:.2g}"
        verdict = "no difference can be claimed"
        if comparison.claimed:
            verdict = "better" if d.mean < 0 else "worse"
        elif comparison.over == "seeds" and d.n < SEEDS_TO_CLAIM:
            verdict += f", which takes {SEEDS_TO_CLAIM} seeds of both"
        lines.append(printable(f"{text} ({over}): {verdict}"))
    return ["", *lines] if lines else []
