"""The real command line in a process of its own, without the seconds that a fresh interpreter takes to import it."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from hestia.cli.main import main


def start(arguments: list[str | Path], log: Path, before: Callable[[], object] | None = None) -> int:
    """Fork a process that calls ``before`` and then runs the command, its output in ``log``; the process's number."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        if before is not None:
            before()
        status = main([str(argument) for argument in arguments])
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        os._exit(status)


def finish(child: int) -> int:
    """Wait for it; its exit status, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(arguments: list[str | Path], log: Path, before: Callable[[], object] | None = None) -> tuple[int, str]:
    """(exit status, everything it printed)."""
    status = finish(start(arguments, log, before))
    return status, log.read_text(encoding="utf-8", errors="replace")
