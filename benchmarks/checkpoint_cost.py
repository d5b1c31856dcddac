"""What share of a run's time do its checkpoints take, at the default interval, on the bundled 6M model?

    python benchmarks/checkpoint_cost.py [--steps 15] [--results FILE]

A run of the main job's training at its default settings (2M tokens: 300 steps of 13 blocks of 512 tokens, a checkpoint
every fifth of them) takes ten minutes and more, so a shorter piece of it is trained, with as many checkpoints, and
every step and every checkpoint is timed: flush to the disk and hashes included. The share is

    checkpoints of a default run x median seconds a checkpoint / (its steps x median seconds per step + the same)

with one thread, and with the step's processor seconds where they are fewer than those on the clock: on a busy machine
steps look slow, and checkpoints cheap beside them. The piece's own share is given too. Exit status 1 above 2 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

import hestia
from hestia import loading
from hestia.data import Blocks, prepare
from hestia.files import write_json
from hestia.options import Options, count
from hestia.provenance import machine, versions
from hestia.settings import LARGEST_DEFAULT_BATCH
from hestia.tiny import model_path, text_path
from hestia.training import HestiaTrainer, TrainConfig, checkpoints

RESULTS = Path(__file__).parent / "results" / "running" / "checkpoint_cost.json"
LENGTH = 512
TOKENS = count(Options().tokens, "tokens")
BATCH = min(LARGEST_DEFAULT_BATCH, TOKENS // (300 * LENGTH))
DEFAULT_STEPS = TOKENS // (BATCH * LENGTH)
CHECKPOINTS = 5
"""Of a run: one every fifth of its steps."""

MOST = 0.02


class Watch(TrainerCallback):
    """Seconds of every step, from its begin to its end: on the clock, and of this process."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.processor: list[float] = []
        self._begun = 0.0, 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._begun = time.perf_counter(), time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._begun[0])
        self.processor.append(time.process_time() - self._begun[1])


class Timed(HestiaTrainer):
    """A trainer that keeps how long each of its checkpoints took."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.saves: list[float] = []
        super().__init__(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        started = time.perf_counter()
        super()._save_checkpoint(*args, **kwargs)
        self.saves.append(time.perf_counter() - started)


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:  # where runs are written, not on a disk in memory
        work, watch, total = train(Path(folder), arguments.steps)
        newest = checkpoints.newest(Path(folder) / "checkpoints")
        assert newest is not None
        size = sum(path.stat().st_size for path in newest.iterdir())
    clock, processor = statistics.median(watch.seconds), statistics.median(watch.processor)
    step, save = min(clock, processor), statistics.median(work.saves)
    record = {
        "schema": 1, "command": "python benchmarks/checkpoint_cost.py", "model": "books-6m (bundled)",
        "batch_size": BATCH, "seq_len": LENGTH, "bytes_a_checkpoint": size, "default_steps": DEFAULT_STEPS,
        "default_interval": DEFAULT_STEPS // CHECKPOINTS, "seconds_a_step": clock,
        "processor_seconds_a_step": processor, "seconds_a_checkpoint": save,
        "share": CHECKPOINTS * save / (DEFAULT_STEPS * step + CHECKPOINTS * save),
        "piece": {
            "steps": len(watch.seconds), "checkpoints": work.saves, "seconds": total, "share": sum(work.saves) / total,
        },
        "versions": versions(), "machine": machine(torch.device("cpu")),
    }  # fmt: skip
    write_json(arguments.results, record)
    shown = ("seconds_a_step", "processor_seconds_a_step", "seconds_a_checkpoint", "bytes_a_checkpoint", "share")
    print(json.dumps({name: record[name] for name in shown}))
    return 0 if record["share"] <= MOST else 1


def train(folder: Path, count_of_steps: int) -> tuple[Timed, Watch, float]:
    """(trainer, its steps' seconds, seconds in all) of a piece of the default run."""
    source = loading.resolve(str(model_path()))
    model: Any = loading.load_model(source)
    blocks = tokens(source)
    plan = hestia.plan(model, "hestia", "gguf:tq2_0")
    hestia.apply(model, plan)
    watch = Watch()
    work = Timed(
        model,
        plan=plan,
        config=TrainConfig(
            steps=count_of_steps, batch_size=BATCH, learning_rate=2e-3, save_every=max(1, count_of_steps // CHECKPOINTS)
        ),
        train=blocks,
        tuning=blocks[:8],
        folder=folder,
        callbacks=[watch],
    )
    started = time.perf_counter()
    work.fit()
    return work, watch, time.perf_counter() - started


def tokens(source: loading.Source) -> Blocks:
    """Blocks of the bundled text."""
    tokenizer = loading.load_tokenizer(source)
    text = prepare([text_path("train")], None, tokenizer, seq_len=LENGTH, max_train_tokens=400_000)
    return text.train


if __name__ == "__main__":
    sys.exit(main())
