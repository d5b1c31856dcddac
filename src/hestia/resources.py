"""Free memory and disk, as the system and the control group of a container say; and memory given back."""

from __future__ import annotations

import gc
import shutil
import sys
from pathlib import Path


def available_memory() -> int | None:
    """Bytes of main memory that a new process could use, within the control group; None where nobody says."""
    found = [n for n in (_meminfo(), _control_group()) if n is not None]
    return min(found) if found else None


def release() -> None:
    """Free what only reference cycles hold, and give a GPU's share of it back.

    A finished trainer is such a cycle, with its optimizer and teacher; the collector does not look at a GPU's memory.
    """
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def place_of(folder: Path) -> Path:
    """``folder``, or the nearest folder above it that exists."""
    return next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())


def free_disk(folder: Path) -> int:
    """Bytes free where ``folder`` is, or would be made."""
    return shutil.disk_usage(place_of(folder)).free


def _meminfo() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _control_group() -> int | None:
    root = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((root / f"memory.{name}").read_text()) for name in ("max", "current"))
        kept = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        return limit - used + int(kept.get("inactive_file", 0))  # the file cache is given back where it is needed
    except (OSError, ValueError):  # no version 2 control group, or "max": no limit
        return None
