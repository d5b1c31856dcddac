"""The lock on a run's folder: one process at a time, named, and gone with its process."""

from __future__ import annotations

import errno
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from hestia import lock
from hestia.errors import BusyError
from hestia.lock import LOCK_FILE, locked


def holder(folder: Path) -> int:
    """A child process that holds the folder until it is killed; its number."""
    child = os.fork()
    if not child:
        with locked(folder):
            time.sleep(60)
        os._exit(0)
    until = time.monotonic() + 20
    while not ((folder / LOCK_FILE).is_file() and (folder / LOCK_FILE).read_text(encoding="utf-8").strip()):
        assert time.monotonic() < until
        time.sleep(0.005)
    return child


def test_it_says_who_holds_the_folder_and_dies_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(lock, "announce", said.append)
    child = holder(tmp_path)
    try:
        with pytest.raises(BusyError) as caught, locked(tmp_path):
            pass
        message = str(caught.value)
        assert f"process {child} on {socket.gethostname()}, since 20" in message
        assert ": in use by " in message
        assert caught.value.exit_status == 2
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with locked(tmp_path):
        assert f'"pid": {os.getpid()}' in (tmp_path / LOCK_FILE).read_text(encoding="utf-8")
    assert len(said) == 1
    assert f"taking over from process {child} on " in said[0]
    with locked(tmp_path):  # who left properly left nothing to take over
        pass
    assert len(said) == 1
    assert (tmp_path / LOCK_FILE).read_bytes() == b""


def test_a_file_system_without_locks_is_named_and_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(lock, "announce", said.append)

    def refuse(code: int) -> None:
        def flock(descriptor: int, what: int) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(lock._system, "flock", flock)

    refuse(errno.ENOLCK)
    ran = False
    with locked(tmp_path):
        ran = True
    assert ran and len(said) == 1 and "no locks" in said[0]
    refuse(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"), locked(tmp_path):
        pass


def test_whoever_waits_gets_it_when_it_is_free(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        with locked(tmp_path):
            (tmp_path / "held").touch()
            time.sleep(0.3)
            (tmp_path / "left").touch()
        os._exit(0)
    while not (tmp_path / "held").exists():
        time.sleep(0.005)
    with locked(tmp_path, wait=20.0):
        assert (tmp_path / "left").exists(), "taken while the other process had it"
    assert os.waitpid(child, 0)[1] == 0


def test_a_text_that_is_none_names_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(lock, "announce", said.append)
    (tmp_path / LOCK_FILE).write_bytes(b"\xff[" * 3000)
    with locked(tmp_path):
        pass
    assert said == [f"{tmp_path}: taking over from another process: that one was killed"]


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("years of work", encoding="utf-8")
    (tmp_path / LOCK_FILE).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError), locked(tmp_path):
        pass
    assert (tmp_path / "precious").read_text(encoding="utf-8") == "years of work"
