"""Artefacts are written whole or not at all, and JSON is strict."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch

from hestia import files
from hestia.errors import ConfigError


def test_a_block_that_raises_keeps_the_old_file_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(RuntimeError), files.replacing(path) as temporary:
        temporary.write_text("half", encoding="utf-8")
        raise RuntimeError
    assert path.read_text(encoding="utf-8") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_block_that_ends_well_replaces_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    files.write_text(path, "one")
    files.write_text(path, "zwei ä")
    assert path.read_bytes() == "zwei ä".encode()
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with files.replacing_folder(folder) as temporary:
        (temporary / "a").write_text("1", encoding="utf-8")
    with pytest.raises(KeyboardInterrupt), files.replacing_folder(folder) as temporary:
        (temporary / "a").write_text("2", encoding="utf-8")
        raise KeyboardInterrupt
    assert (folder / "a").read_text(encoding="utf-8") == "1"
    with files.replacing_folder(folder) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "b").write_text("3", encoding="utf-8")
    assert sorted(p.name for p in folder.rglob("*")) == ["b", "sub"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"schema": 1})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_json(path, {"schema": 2})
    assert files.read_json(path) == {"schema": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_json_is_strict(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    record = {"nan": math.nan, "inf": [1.0, -math.inf, (math.inf,)], "text": "ä", "deep": {"x": math.nan, "y": 0.1}}
    files.write_json(path, record)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    read = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert read == {"nan": None, "inf": [1.0, None, [None]], "text": "ä", "deep": {"x": None, "y": 0.1}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "expected a JSON object, got list"),
        (b"{", "not a readable JSON file"),
        (b"\xff\xfe", "cannot be read as UTF-8 text"),
        (b'{"schema": 2}', "schema 2, this version reads schema 1"),
        (b"{}", "schema None, this version reads schema 1"),
    ],
)
def test_what_is_not_ours_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"a\.json: {message}"):
        files.read_json(path, schema=1)
    with pytest.raises(ConfigError, match="no such file"):
        files.read_json(tmp_path / "none.json")


def test_the_hash_of_a_file_read_in_pieces(tmp_path: Path) -> None:
    content = bytes(range(256)) * 9000
    (tmp_path / "a").write_bytes(content)
    assert files.sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()


LISTING = r"find . -type f | LC_ALL=C sort | xargs -d '\n' sha256sum | sha256sum"


def test_the_hash_of_a_folder_is_what_its_shell_command_prints(tmp_path: Path) -> None:
    names = ("b", "B", "a b.json", "a/z", "a-b", "sub/deep/é.txt", "sub/_x", ".hidden/y")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    (tmp_path / "empty").mkdir()
    hashes = files.sha256_of_files(tmp_path)
    assert set(hashes) == set(names) and hashes["B"] == hashlib.sha256(b"B").hexdigest()
    assert LISTING in (files.sha256_of_listing.__doc__ or "")
    printed = subprocess.run(["sh", "-c", LISTING], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert files.sha256_of_listing(hashes) == printed.split()[0]


@pytest.mark.parametrize(
    ("said", "number"),
    [("Error while serializing: I/O error: No space left on device (os error 28)", errno.ENOSPC), ("odd", errno.EIO)],
)
def test_the_systems_error_is_read_out_of_a_librarys_words(tmp_path: Path, said: str, number: int) -> None:
    error = files.as_os_error(RuntimeError(said), tmp_path / "x")
    assert (error.errno, error.filename) == (number, str(tmp_path / "x"))


def test_a_safetensors_file_that_cannot_be_written_is_the_systems_error(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        files.save_file({"a": torch.zeros(3)}, tmp_path / "no folder" / "a.safetensors")
    assert caught.value.errno == errno.ENOENT


def test_only_files_with_an_end_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a pipe"), (Path("/dev/zero"), "a pipe"), (tmp_path, "a folder")):
        with pytest.raises(ConfigError, match=f"expected a regular file, got {kind}"):
            files.read_json(path)
    with open(tmp_path / "large.json", "wb") as handle:
        handle.truncate(files.LARGEST_TEXT + 1)  # a hole: it takes no room
    with pytest.raises(ConfigError, match="bytes are too many"):
        files.read_json(tmp_path / "large.json")


def test_a_folder_that_was_set_aside_comes_back_where_no_other_stands(tmp_path: Path) -> None:
    """A process that is killed between the two renames leaves nothing under the name itself."""
    folder, aside = tmp_path / "model", tmp_path / ".model.123.aside.tmp"
    new = tmp_path / ".model.123.tmp"
    for place, content in ((aside, "old"), (new, "new")):
        place.mkdir()
        (place / "a").write_text(content, encoding="utf-8")
    files.sweep(tmp_path)
    assert (folder / "a").read_text(encoding="utf-8") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    aside.mkdir()
    files.sweep(tmp_path)
    assert (folder / "a").read_text(encoding="utf-8") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_an_earlier_folder_comes_back_where_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    with files.replacing_folder(folder) as temporary:
        (temporary / "a").write_text("1", encoding="utf-8")
    rename = os.replace

    def failing(source: Path, target: Path) -> None:
        if Path(target) == folder and "aside" not in Path(source).name:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(KeyboardInterrupt), files.replacing_folder(folder) as temporary:
        (temporary / "a").write_text("2", encoding="utf-8")
    assert (folder / "a").read_text(encoding="utf-8") == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
