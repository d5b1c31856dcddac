"""One process a run's folder: a lock that says who holds it, and that dies with its process.

    RUN/.lock      {"pid": 4711, "host": "node7", "since": "2026-01-31T12:00:00+00:00"} while a process works there

The lock is the system's (``flock``), so a kill -9 or a power cut releases it; the text is for people. Text without a
lock was left by a process that died, and the next one takes over.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .errors import BusyError
from .progress import announce

LOCK_FILE = ".lock"

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What some network file systems answer (Lustre without flock, some NFS)."""

try:
    import fcntl as _fcntl
except ImportError:  # not a POSIX system: there is no lock that dies with its process, so there is none
    _system: Any = None
else:
    _system = _fcntl


@contextlib.contextmanager
def locked(folder: Path, *, wait: float = 0.0) -> Iterator[None]:
    """Hold ``folder``, which exists, for as long as the block runs.

    Args:
        folder: a run's folder.
        wait: seconds to wait for another process before giving up.

    Raises:
        BusyError: another process holds it; its number, host and since when are named. Nothing was written.
    """
    if _system is None:
        yield
        return
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        if not _acquire(descriptor, folder, time.monotonic() + wait):
            yield
            return
        before = _holder(descriptor)
        if before:
            announce(f"{folder}: taking over from {before}: that one was killed")
        me = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        _write(descriptor, json.dumps(me) + "\n")
        try:
            yield
        finally:
            _write(descriptor, "")
    finally:
        os.close(descriptor)  # releases the lock


def _acquire(descriptor: int, folder: Path, until: float) -> bool:
    """Whether the lock is held now; False where the file system has none."""
    while True:
        try:
            _system.flock(descriptor, _system.LOCK_EX | _system.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in _NO_LOCKS:
                announce(f"{folder}: this file system has no locks; nothing keeps a second process out of it")
                return False
            if not isinstance(error, BlockingIOError):
                raise
            if time.monotonic() >= until:
                holder = _holder(descriptor) or "another process"
                raise BusyError(
                    f"{folder}: in use by {holder}; wait for it, stop it, or choose another --out"
                ) from None
            time.sleep(0.05)


def _holder(descriptor: int) -> str:
    """Who wrote the lock's text, in words; empty where nobody did."""
    text = os.pread(descriptor, 4096, 0).decode("utf-8", "replace").strip()
    if not text:
        return ""
    try:
        record = json.loads(text)
        return f"process {int(record['pid'])} on {record['host']}, since {record['since']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "another process"


def _write(descriptor: int, text: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)
