"""Run one row of the comparison again and hold it against the committed one; `make bench-smoke`.

    python benchmarks/experiments/smoke.py

Parent and text are the bundled ones. Exit status 1 where settings, text or parent differ, or where a loss differs by
more than ``TOLERANCE``: another processor rounds bf16 sums in another order, and training carries that on.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import run
from stages import HERE, RESULTS

from hestia import tiny
from hestia.files import read_json

ARM, ROW = "bitnet_ste", "bitnet_ste/final-40k-seed1.json"
TOLERANCE = 0.02  # nats per token
MUST_EQUAL = ("schema", "name", "config", "parent", "texts", "tokens", "quantized_weights")
MUST_BE_CLOSE = ("valid_nll", "nll", "kl_to_parent")


def differences(mine: dict[str, Any], committed: dict[str, Any]) -> list[str]:
    """What keeps a repeated result from being the committed one; empty where nothing does."""
    found = [f"{key} differs" for key in MUST_EQUAL if mine.get(key) != committed.get(key)]
    plan, before = mine.get("plan", {}), committed["plan"]  # a plan may say more than it did, and nothing else
    if {key: plan.get(key) for key in before} != before:
        found.append("plan differs")
    for key in MUST_BE_CLOSE:
        a, b = mine.get(key), committed.get(key)
        if a is None or b is None or not abs(a - b) <= TOLERANCE:
            found.append(f"{key} is {a}, the committed row has {b}; they may differ by {TOLERANCE}")
    return found


def main() -> int:
    """Repeat, compare, say so."""
    committed = read_json(RESULTS / "stage_smoke" / ROW)
    with tempfile.TemporaryDirectory() as folder:
        arguments = [str(HERE / "smoke.yaml"), "--only", ARM, "--models", str(tiny.model_path().parent)]
        arguments += ["--work", str(Path(folder) / "work"), "--results", str(Path(folder) / "results")]
        if status := run.main(arguments):
            return status
        mine = read_json(Path(folder) / "results" / ROW)
    for key in MUST_BE_CLOSE:
        print(
            f"{key:<14} {mine[key]:.5f}  committed {committed[key]:.5f}  difference {mine[key] - committed[key]:+.1e}"
        )
    found = differences(mine, committed)
    print("\n".join(found) or "the row is reproduced")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
