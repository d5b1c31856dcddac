"""SIGKILL at random moments, also while a checkpoint is being written: every resume is exact.

Five kills of a process of its own each, as many as a test may take time for; ``benchmarks/kills.py`` has fifty of the
whole main job.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import toy_models
from safetensors.torch import load_file
from toy_training import converted, log_rows, trainer

from hestia import digests
from hestia.training import checkpoints

STEPS, EVERY = 24, 3


def run(folder: Path, **config: Any) -> None:
    """Train a toy from its newest checkpoint to the end, evaluating now and then."""
    model, plan = converted(toy_models.tied_llama)
    options = {"steps": STEPS, "save_every": EVERY, "eval_every": 8, **config}
    trainer(folder, model, plan, **options).fit(checkpoints.newest(folder / "checkpoints"))


def start(folder: Path) -> int:
    """The same in a forked process; its number."""
    child = os.fork()
    if not child:
        status = 1
        try:
            run(folder)
            status = 0
        finally:
            os._exit(status)
    return child


def ended(folder: Path) -> dict[str, Any]:
    """Hashes of every tensor of the last checkpoint, and the losses of every step."""
    last = folder / "checkpoints" / checkpoints.folder_name(STEPS)
    found: dict[str, Any] = {}
    for part in ("model", "optimizer", "random"):
        tensors = load_file(last / f"{part}.safetensors")
        found |= {f"{part}: {name}": digests.of_tensors({name: tensor}) for name, tensor in tensors.items()}
    losses = {(row["step"], key): row[key] for row in log_rows(folder) for key in ("loss", "hard_loss") if key in row}
    return {**found, "losses": losses}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], float]:
    """How a run ends that is never killed, and the seconds it takes."""
    folder = tmp_path_factory.mktemp("whole")
    started = time.perf_counter()
    os.waitpid(start(folder), 0)
    return ended(folder), time.perf_counter() - started


@pytest.mark.parametrize("seed", range(5))
def test_a_run_killed_at_a_random_moment_ends_bit_for_bit_the_same(
    seed: int, whole: tuple[dict[str, Any], float], tmp_path: Path
) -> None:
    draw = random.Random(seed)
    child = start(tmp_path)
    if seed % 2:
        time.sleep(draw.uniform(0.1, 0.9) * whole[1])
    else:  # while a checkpoint is being written
        unfinished = tmp_path / "checkpoints" / f".step-{EVERY * draw.randrange(1, STEPS // EVERY):06d}.tmp"
        while not unfinished.is_dir() and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.0002)
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        pass  # a slow machine: it had ended already, and there is nothing left to resume
    newest = checkpoints.newest(tmp_path / "checkpoints")
    kept = 0 if newest is None else int(newest.name.removeprefix("step-"))
    log = tmp_path / "log.jsonl"
    rows = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    assert len([row for row in rows if '"loss"' in row]) <= kept + EVERY  # nothing lost beyond one interval
    assert os.waitstatus_to_exitcode(os.waitpid(start(tmp_path), 0)[1]) == 0
    assert ended(tmp_path) == whole[0]
