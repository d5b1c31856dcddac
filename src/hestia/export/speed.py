"""How fast GGUF files run in llama.cpp, side by side, and how fast memory lets them.

Files are measured in turn, round after round, so that whatever else the machine does falls on all of them; of every
file the best round counts. Writing a token reads every weight once, but of the embedding one row (all of it where it is
the head too), so

    bound = bandwidth / bytes read a token

with the bandwidth of one sum of products over an array much larger than the caches, on as many threads.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import progress
from .gguf_reader import open_checked
from .llama_session import Session, usable_cpus

_PROBE = """
import time, numpy as np
a = np.ones(1 << 28, np.float32)
best = 0.0
for _ in range(6):
    start = time.perf_counter()
    np.dot(a, a)
    best = max(best, a.nbytes / (time.perf_counter() - start))
print(best)
"""


def compare_speed(
    paths: Sequence[Path],
    *,
    prompt_tokens: int = 128,
    tokens: int = 32,
    rounds: int = 3,
    threads: int | None = None,
    gpu_layers: int = 0,
) -> dict[str, Any]:
    """Decode and prompt speed of several files; ``threads`` and ``gpu_layers`` as in ``Session``.

    Returns:
        ``{"threads", "gpu_layers", "bandwidth_gb_per_s", "files": [{"name", "bytes", "bytes_per_token", "types", tokens
        per second of "decode", "prompt" and "bound", "share_of_bound", "times_first", "rounds"}]}``; with layers on a
        GPU, whose memory is not measured, and where this machine's could not be, bandwidth, bound and share are None.

    Raises:
        ConfigError: no such file.
        VerifyError: a damaged file.
        ExportError: llama-cpp-python is not installed or failed.
    """
    read = {path: bytes_per_token(path) for path in paths}
    threads = threads or usable_cpus()
    speeds: dict[Path, list[tuple[float, float]]] = {path: [] for path in paths}
    bandwidth = 0.0
    turns = [(round_, path) for round_ in range(rounds) for path in paths]
    for round_, path in progress.track(turns, "measuring", total=len(turns)):
        if path == paths[0] and not gpu_layers:
            bandwidth = max(bandwidth, read_bandwidth(threads) or 0.0)
        context = prompt_tokens + tokens + 8
        with Session(path, context=context, threads=threads, gpu_layers=gpu_layers) as session:
            session.bench(min(8, prompt_tokens), 2)  # touches every page of the file
            speed = session.bench(prompt_tokens, tokens)
        speeds[path].append((speed.tokens_per_second, speed.prompt_tokens / speed.prompt_seconds))
        del round_
    files: list[dict[str, Any]] = []
    first = max(decode for decode, _ in speeds[paths[0]])
    for path in paths:
        decode, prompt = (max(values) for values in zip(*speeds[path], strict=True))
        bound = bandwidth / read[path] or None
        files.append(
            {
                "name": path.name,
                "bytes": path.stat().st_size,
                "bytes_per_token": read[path],
                "types": _types(path),
                "decode_tokens_per_second": decode,
                "prompt_tokens_per_second": prompt,
                "bound_tokens_per_second": bound,
                "share_of_bound": None if bound is None else decode / bound,
                "times_first": decode / first,
                "rounds": [{"decode": d, "prompt": p} for d, p in speeds[path]],
            }
        )
    return {
        "schema": 1,
        "prompt_tokens": prompt_tokens,
        "tokens": tokens,
        "threads": threads,
        "gpu_layers": gpu_layers,
        "bandwidth_gb_per_s": bandwidth / 1e9 or None,
        "files": files,
    }


def bytes_per_token(path: Path) -> int:
    """Bytes of weights that writing one token reads."""
    file = open_checked(path)
    sizes = {info.name: info.bytes for info in file.tensors}
    if "output.weight" in sizes:
        sizes.pop("token_embd.weight", None)
    return sum(sizes.values())


def read_bandwidth(threads: int) -> float | None:
    """Bytes per second that ``threads`` threads read from memory, in a process of its own; None where it failed.

    It takes 1 GiB, which a small container may not have.
    """
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, str(threads))}
    done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=False, env=environment)
    return float(done.stdout) if done.returncode == 0 else None


def _types(path: Path) -> dict[str, int]:
    counts: dict[str, int] = {}
    for info in open_checked(path).tensors:
        counts[info.type_name] = counts.get(info.type_name, 0) + 1
    return counts
