"""Do two processes on two cores keep up with one process on two threads?

    python benchmarks/scale_out.py [--steps 12] [--rounds 3]

The bundled 6M model trains by `HestiaTrainer` on 16 blocks of 256 tokens per step under bf16 autocast: once in one
process with two threads, once in two processes of one thread each (gloo). The arms take turns, each in fresh processes;
tokens per second are counted after the first two steps, medians over the rounds. Promised: a ratio of 0.8.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "running" / "scale_out.json"
PROMISED = 0.8
WARM = 2


def child(folder: Path, steps: int, threads: int) -> None:
    """One process of an arm: train, and leave the log."""
    import torch
    from transformers import TrainerCallback

    import hestia
    from hestia import loading, processes
    from hestia.data import Blocks
    from hestia.tiny import model_path
    from hestia.training import HestiaTrainer, TrainConfig

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with processes.joined() as first:
        model = loading.load_model(loading.resolve(str(model_path())))
        plan = hestia.plan(model, "hestia", "gguf:q2_0")
        hestia.apply(model, plan)
        ids = torch.randint(0, 4096, (64, 256))
        blocks = Blocks(ids, torch.ones_like(ids, dtype=torch.bool))
        config = TrainConfig(steps=steps, batch_size=16, learning_rate=1e-4, log_every=0)
        clock = clock_class()()
        callbacks: list[TrainerCallback] = [clock]
        HestiaTrainer(
            model, plan=plan, config=config, train=blocks, tuning=blocks, folder=folder, callbacks=callbacks
        ).fit()
    if first:
        tokens = (steps - WARM) * 16 * 256
        print(json.dumps(tokens / (clock.ended - clock.started)))


def clock_class() -> type:
    """A callback that notes when step ``WARM`` and the last one ended; made late: transformers is slow to load."""
    import time

    from transformers import TrainerCallback

    class Noting(TrainerCallback):
        started = ended = 0.0

        def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
            self.ended = time.perf_counter()
            if state.global_step == WARM:  # type: ignore[attr-defined]
                self.started = self.ended

    return Noting


def arm(world: int, threads: int, steps: int) -> float:
    """Tokens per second of one arm."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--child", folder, str(steps), str(threads)]
        started = []
        for rank in range(world):
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **{k: str(v) for k, v in places.items()}}
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **(shared if world > 1 else {})}
            started.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
        ended = [process.communicate() for process in started]
    for process, (_, error) in zip(started, ended, strict=True):
        if process.returncode:
            raise RuntimeError(error)
    return float(ended[0][0].splitlines()[-1])


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    import torch

    from hestia.files import write_json
    from hestia.provenance import machine, versions

    rows: dict[str, list[float]] = {"one process, two threads": [], "two processes, one thread each": []}
    for _ in range(given.rounds):
        for name, world, threads in zip(rows, (1, 2), (2, 1), strict=True):
            rows[name].append(arm(world, threads, given.steps))
            print(f"{name:<32} {rows[name][-1]:8.0f} tokens/s", flush=True)
    one, two = (statistics.median(values) for values in rows.values())
    print(f"two processes reach {two / one:.2f} of one process with two threads; promised {PROMISED}")
    record = {
        "schema": 1,
        "what": __doc__,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["python", "benchmarks/scale_out.py", *sys.argv[1:]],
        "load_average": os.getloadavg()[0],
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
        "tokens_per_second": rows,
        "ratio": two / one,
    }
    write_json(given.out, record)
    return int(two / one < PROMISED)


if __name__ == "__main__":
    sys.exit(main())
