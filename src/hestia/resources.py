"""Free memory and disk, as the system and the control group of a container say; and memory given back."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_SELF = Path("/proc/self/cgroup")


def available_memory() -> int | None:
    """Bytes of main memory that a new process could use, within the control group; None where nobody says."""
    found = [n for n in (_meminfo(), _control_group()) if n is not None]
    return min(found) if found else None


def release() -> None:
    """Free what only reference cycles hold, and give back what allocators keep of it, a GPU's and the C library's.

    A finished trainer is such a cycle, with its optimizer and teacher; the collector does not look at a GPU's memory.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
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
    """The least that this process's control group and those above it leave; version 2, or version 1's for memory."""
    found = [left for files in _VERSIONS for folder in _own_groups(files) if (left := _left(folder, files)) is not None]
    return min(found) if found else None


@dataclass(frozen=True)
class _Version:
    """Where one version of control groups keeps its memory numbers."""

    root: Path
    controller: str
    limit: str
    used: str
    cache: str


_VERSIONS = (
    _Version(Path("/sys/fs/cgroup"), "", "memory.max", "memory.current", "inactive_file"),
    _Version(
        Path("/sys/fs/cgroup/memory"),
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def _own_groups(version: _Version) -> list[Path]:
    """The folders of this process's group and of all above it; the root where the system does not say."""
    own = PurePosixPath("/")
    try:
        for line in _SELF.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if version.controller in controllers.split(","):
                own = PurePosixPath(path)
    except (OSError, ValueError):
        pass
    inside = [part for part in own.parts if part not in ("/", "..")]
    return [version.root.joinpath(*inside[:n]) for n in range(len(inside), -1, -1)]


def _left(folder: Path, version: _Version) -> int | None:
    try:
        limit, used = (int((folder / name).read_text()) for name in (version.limit, version.used))
        kept = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or "max": no limit
        return None
    return limit - used + int(kept.get(version.cache, 0))  # the file cache is given back where it is needed
