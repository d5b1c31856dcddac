"""What this machine can do: arithmetic and bandwidth by a short probe, free memory and disk as the system says."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..errors import ConfigError
from ..resources import available_memory

PROBE_WIDTH = {"cpu": 1024, "cuda": 8192}
"""Width of the matrices that are multiplied; on a GPU small ones time the launch."""

PROBE_BYTES = 1 << 27

FP32_SHARE = 1 / 8
"""FLOP/s in fp32 over a given number in bf16: between 1/16 (A100, H100) and 1/2 (GPUs for games)."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine as far as a run's cost depends on it.

    Attributes:
        flops: of matrix products in the training precision, per second and process.
        exact: the same in fp32, in which a run calibrates and scores.
        bandwidth: bytes read and written a second.
        memory: bytes a process may use; None: unknown.
        disk: bytes free where the run is written; None: unknown.
        source: where the speeds come from, in words.
    """

    flops: float
    exact: float
    bandwidth: float
    memory: int | None
    disk: int | None
    source: str

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


def probe(device: torch.device, *, bf16: bool) -> tuple[float, float, float]:
    """(FLOP/s, FLOP/s in fp32, bytes/s): products of square matrices, and sums of vectors larger than any cache."""
    exact = _products(device, torch.float32)
    flops = _products(device, torch.bfloat16) if bf16 else exact
    x, y = (torch.ones(PROBE_BYTES // 12, device=device) for _ in range(2))
    out = torch.empty_like(x)
    sums = _best(lambda: torch.add(x, y, out=out), device)
    return flops, exact, 3.0 * 4.0 * x.numel() / sums


def _products(device: torch.device, dtype: torch.dtype) -> float:
    width = PROBE_WIDTH.get(device.type, PROBE_WIDTH["cpu"])
    a, b = (torch.ones(width, width, dtype=dtype, device=device) for _ in range(2))
    return 2.0 * width**3 / _best(lambda: torch.mm(a, b), device)


def _best(work: Callable[[], object], device: torch.device, rounds: int = 7) -> float:
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def memory_of(device: torch.device) -> int | None:
    """Bytes that a new process could use on ``device``: of the GPU, or of main memory; None where nobody can say."""
    if device.type == "cpu":
        return available_memory()
    return int(torch.cuda.mem_get_info(device)[0]) if torch.cuda.is_available() else None


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_BINARY = {"KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40}


def quantity(text: str, name: str) -> float:
    """A number with a unit as people write it, of bytes or operations a second.

    >>> quantity("24GiB", "memory"), quantity("80G", "memory"), quantity("300T", "flops"), quantity("1e12", "flops")
    (25769803776.0, 80000000000.0, 300000000000000.0, 1000000000000.0)

    Raises:
        ConfigError: not a positive number with such a unit.
    """
    bare = text.strip().upper().removesuffix("/S").removesuffix("FLOP").removesuffix("B")
    for suffix, factor in (*_BINARY.items(), *reversed(_UNITS.items())):
        if bare.endswith(suffix):
            try:
                value = float(bare.removesuffix(suffix)) * factor
            except ValueError:
                break
            if 0.0 < value < 1e30:
                return value
            break
    raise ConfigError(f"--{name} must be a positive number such as 24GiB, 80G or 1e12, got {text!r}")
