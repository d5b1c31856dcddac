"""What a teacher adds to a training step, and what it saves to keep freed memory, on the bundled 6M-parameter model.

    python benchmarks/speed/teacher.py

Forward, backward and AdamW on 4,096 tokens (16 blocks of 256) under bf16 autocast, one thread, arms in turns within a
process, as in training_step.py. The teacher is the parent, loss forward KL alone. Every arm is timed in processes with
the C library's defaults and in processes that keep freed memory, in alternation.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from training_step import RESULTS, compare, parent, step

import hestia
from hestia.files import write_json
from hestia.nn import knobs_of
from hestia.provenance import machine, versions
from hestia.training.distillation import Distillation
from hestia.training.teacher import HeadInput, Teacher

KEPT = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592", "MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_TOP_PAD_": "67108864",
}  # fmt: skip
SETTINGS: dict[str, dict[str, str]] = {"the C library's defaults": {}, "freed memory kept": KEPT}
KNOBS = {"bitnet_ste": 0.0, "hestia": 0.15, "hearth": 0.03}


def arms(ids: torch.Tensor) -> dict[str, Any]:
    """Name -> one optimizer step."""
    teacher = Teacher(parent(), bf16=True)
    distill = Distillation(weight=1.0)
    following = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100).flatten()

    def distilled(model: Any) -> torch.Tensor:
        with HeadInput(model.get_output_embeddings()) as spared:
            model(input_ids=ids)
            assert spared.kept is not None
            hidden = spared.kept.flatten(0, 1)
        head = model.get_output_embeddings().weight
        return distill.loss_through_head(hidden, head, following, teacher.answer(ids), dtype=torch.bfloat16)

    found = {}
    for recipe, temperature in KNOBS.items():
        for suffix, loss in (("", None), (" + teacher", distilled)):
            model = parent()
            hestia.apply(model, hestia.plan(model, recipe=recipe, target="gguf:tq2_0"))
            knobs_of(model).set(pressure=1.0, temperature=temperature)
            found[recipe + suffix] = step(model, ids, loss)
    return found


def child(rounds: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(json.dumps(compare(arms(torch.randint(0, 4096, (16, 256))), rounds, "bitnet_ste")))


def main() -> None:
    """Time the arms in both settings and write benchmarks/results/speed/teacher.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of a process")
    parser.add_argument("--processes", type=int, default=2, help="of each setting")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "teacher.json")
    given = parser.parse_args()
    if given.child:
        child(given.rounds)
        return
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in SETTINGS}
    for _ in range(given.processes):
        for name, variables in SETTINGS.items():
            command = [sys.executable, __file__, "--child", "--rounds", str(given.rounds)]
            env = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    seconds = {
        name: {
            arm: {key: statistics.fmean(run[arm][key] for run in runs) for key in ("median", "ratio")}
            | {"medians": [run[arm]["median"] for run in runs], "ratios": [run[arm]["ratio"] for run in runs]}
            for arm in runs[0]
        }
        for name, runs in found.items()
    }
    write_json(
        given.out,
        {
            "schema": 1,
            "what": __doc__,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": "python benchmarks/speed/teacher.py",
            "machine": machine(torch.device("cpu")),
            "versions": versions(),
            "rounds": given.rounds,
            "seconds": seconds,
        },
    )
    for name, rows in seconds.items():
        for arm, row in rows.items():
            print(f"{name:<26} {arm:<22} {1000 * row['median']:8.1f} ms   x {row['ratio']:.3f}")


if __name__ == "__main__":
    main()
