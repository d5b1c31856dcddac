"""How well do short pilots predict the best learning rate of a whole run?

    python benchmarks/pilot.py --models DIR --data DIR [--only NAME]

For every model and recipe: the hard loss on the tuning blocks after whole runs of several lengths (schedules
included), at several peak rates, one seed. A result that is there already is left alone; each file grows by one row at
a time, so that an interrupted call takes up where it stopped.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from real_inputs import inputs

from hestia import progress
from hestia.errors import GuardError
from hestia.files import read_json, write_json
from hestia.pipeline import Workspace
from hestia.pipeline.fitting import trial
from hestia.pipeline.planning import plan_without_curvature
from hestia.provenance import machine, versions
from hestia.training import pilot

RESULTS = Path(__file__).parent / "results" / "pilot"
SHARES = (0.04, 0.12, 0.36, 1.0)
"""Lengths as shares of the run."""

HOPELESS = 0.2
"""Nats behind the best rate of one length at which the next, longer one leaves a rate out."""


def main() -> None:
    """Measure what has no result yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    progress.enable()
    for name, options in inputs(arguments.models, arguments.data, Path("runs") / "pilot").items():
        if arguments.only in name:
            measure(name, Workspace(options))


def measure(name: str, work: Workspace) -> None:
    """All lengths and rates of one model and recipe, into one file."""
    path = RESULTS / f"{name}.json"
    record = read_json(path) if path.is_file() else {
        "schema": 1, "name": name, "command": "python benchmarks/pilot.py", "recipe": work.options.recipe,
        "steps": work.steps, "batch_size": work.batch_size, "seq_len": work.seq_len, "tuning_blocks": len(work.tuning),
        "seed": work.options.seed, "versions": versions(), "machine": machine(torch.device("cpu")), "rows": [],
    }  # fmt: skip
    plan = plan_without_curvature(work, None)
    width = int(work.config.hidden_size)
    done = {(row["steps"], row["learning_rate"]) for row in record["rows"]}
    for share in SHARES:
        steps = max(12, round(share * work.steps))
        for rate in _worth_trying(_rates(width), record["rows"], steps):
            if (steps, rate) in done:
                continue
            started = time.perf_counter()
            try:
                loss = trial(work, plan, rate, steps)
            except GuardError:
                loss = math.inf
            row = {"steps": steps, "learning_rate": rate, "hard_loss": loss, "seconds": time.perf_counter() - started}
            record["rows"].append(row)
            write_json(path, record)
            progress.announce(f"{name}: {row}")


def _worth_trying(rates: list[float], rows: list[dict[str, Any]], steps: int) -> list[float]:
    shorter = [row for row in rows if row["steps"] < steps]
    if not shorter:
        return rates
    longest = max(row["steps"] for row in shorter)
    found = ((row["learning_rate"], row["hard_loss"]) for row in shorter if row["steps"] == longest)
    losses = {rate: math.inf if loss is None else loss for rate, loss in found}  # a run that diverged is kept as null
    return [rate for rate in losses if losses[rate] <= min(losses.values()) + HOPELESS]


def _rates(width: int) -> list[float]:
    """The pilot's four rates and those half-way between them."""
    four = pilot.rates(width)
    between = [float(f"{math.sqrt(a * b):.1e}") for a, b in zip(four, four[1:], strict=False)]
    return sorted([*four, *between], reverse=True)


if __name__ == "__main__":
    main()
