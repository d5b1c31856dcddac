"""What a record needs to be believed: the command, the versions and the machine."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("hestia-lm", "torch", "transformers", "accelerate", "safetensors", "gguf", "compressed-tensors", "numpy")


def command_line() -> list[str]:
    """The command as typed; a Python call is named as such."""
    program = Path(sys.argv[0]).name
    return ["hestia", *sys.argv[1:]] if program in ("hestia", "__main__.py") else ["python", program]


def versions() -> dict[str, str]:
    """Python and the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in (*_PACKAGES, "llama-cpp-python", "lm-eval"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, threads and device, as far as they can be read."""
    record: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
    }
    if device.type == "cuda":
        record["gpu"] = torch.cuda.get_device_name(device)
    return record


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
