"""Start a script once, or in two processes that talk over gloo, as torchrun would."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import hestia

SOURCE = str(Path(hestia.__file__).parents[1])
TESTS = str(Path(__file__).parents[1])


def environment(rank: int = 0, world: int = 1, port: int = 0) -> dict[str, str]:
    """What a process of ``world`` sees; alone nothing is added."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    more = {"MASTER_ADDR": "127.0.0.1", **{k: str(v) for k, v in places.items()}}
    path = os.pathsep.join([SOURCE, TESTS, str(Path(TESTS) / "training")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(more if world > 1 else {})}


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(world: int, script: Path, *arguments: object) -> list[str]:
    """Run ``script`` in ``world`` processes; what each printed. All must end well."""
    port = free_port()
    command = [sys.executable, str(script), *map(str, arguments)]
    started = [
        subprocess.Popen(
            command,
            env=environment(rank, world, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        ended = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, error) in zip(started, ended, strict=True):
        assert process.returncode == 0, error[-3000:]
    return [out for out, _ in ended]
