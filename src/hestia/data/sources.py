"""What ``--data`` names: files, saved data sets and hub ids; where they are, what is in them, line by line.

    name                                    kind
    a.txt                                   text     cut into documents by separator lines
    a.jsonl, a.json                         jsonl    one object a line: ``text`` or ``messages``
    a.txt.gz, .xz, .zst; a.jsonl.gz, ...             the same, packed
    a.parquet                               parquet  a ``text`` or a ``messages`` column
    folder, folder:split                    saved    written by ``Dataset.save_to_disk``
    owner/name[/CONFIG][@REVISION][:split]  hub      streamed by ``datasets``; split ``train`` unless named

What exists on disk always wins over the hub. A configuration has no slash in its name and a revision may have some, so
the configuration stands first.
"""

from __future__ import annotations

import difflib
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

from ..errors import ConfigError
from ..files import sha256

Kind = Literal["text", "jsonl", "parquet", "saved", "hub"]

_PACKED = (".gz", ".xz", ".zst")
_PLAIN: dict[str, Kind] = {".txt": "text", ".jsonl": "jsonl", ".json": "jsonl"}
_SUFFIXES: dict[str, Kind] = {
    **{plain + packed: kind for plain, kind in _PLAIN.items() for packed in ("", *_PACKED)},
    ".parquet": "parquet",
}
LONGEST_LINE = 1 << 24
"""Bytes of one line, at most: a longer one is hardly text, and a tokenizer takes a hundred times its size."""

MOST_UNPACKED = 200
"""Times its packed size that an archive may unpack to; text reaches ten."""

_SMALL = 1 << 24
"""Bytes that any archive may unpack to."""

_HUB_ID = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?:/(?P<config>\w[\w.+-]*))?(?:@(?P<revision>[^\s@:]+))?"
)
_SAVED_MARKS = ("dataset_dict.json", "dataset_info.json")


@dataclass(frozen=True)
class Source:
    """One thing to read.

    Attributes:
        given: what the user wrote.
        kind: how it is read.
        path: the file or folder; None for a hub id.
        split: part of a saved or hub data set; None where the user named none.
        name: of a hub data set, ``owner/name``.
        config: of a hub data set; None where the user named none.
        revision: of a hub data set, a branch, a tag or a commit; None where the user named none.
    """

    given: str
    kind: Kind
    path: Path | None
    split: str | None = None
    name: str = ""
    config: str | None = None
    revision: str | None = None


def resolve(given: str | Path) -> Source:
    """Find out what ``given`` names.

    Raises:
        ConfigError: nothing of that name, a kind of file that is not read, or a folder that is no saved data set.
    """
    text = str(given)
    path = Path(text)
    if path.is_file():
        return Source(text, _kind_of(path), path)
    if path.is_dir():
        return _saved(text, path, None)
    if path.exists():
        raise ConfigError(f"{text}: neither a regular file nor a folder; copy the text into a .txt file first")
    name, split = text, None
    if ":" in text:
        name, _, split = text.rpartition(":")
    if split and Path(name).is_dir():
        return _saved(text, Path(name), split)
    near = _near(path)
    hub = _HUB_ID.fullmatch(name)
    if hub and not _looks_like_a_file(Path(name)) and (split or not near):
        return Source(text, "hub", None, split, hub["name"], hub["config"], hub["revision"])
    where = path.parent if path.parent.is_dir() else None
    if near:
        hint = f"did you mean {path.parent / near}?"
    elif where is None:
        hint = f"the folder {path.parent} does not exist either"
    else:
        hint = f"the folder {where.resolve()} holds no such name"
    raise ConfigError(f"{text}: no such file or folder; {hint}")


def fingerprint(source: Source) -> list[dict[str, Any]]:
    """What pins the content of a source: path, bytes and SHA-256 of each file; commit and part of a hub data set.

    Raises:
        ConfigError: a file cannot be read, or the hub not be reached.
    """
    if source.kind == "hub":
        from . import tables  # imported late: it brings in `datasets`, which plain text does not need

        return [tables.hub_fingerprint(source.name, source.split, config=source.config, revision=source.revision)]
    assert source.path is not None
    files = sorted(p for p in source.path.rglob("*") if p.is_file()) if source.path.is_dir() else [source.path]
    try:
        return [{"path": str(file), "bytes": file.stat().st_size, "sha256": sha256(file)} for file in files]
    except OSError as error:
        raise ConfigError(f"{source.given}: cannot be read ({error})") from None


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file, unpacked if its name says so: (1-based number, line without its line break).

    Both ``\\n`` and ``\\r\\n`` end a line; a byte-order mark at the start is dropped. One line is in memory at a time.

    Raises:
        ConfigError: unreadable, damaged archive, invalid UTF-8, a NUL byte, a line without end, or an archive that
            unpacks without end; the byte position is given.
    """
    offset = 0
    packed = path.suffix.lower() in _PACKED
    unpacked = " of the unpacked text" if packed else ""
    try:
        most = max(_SMALL, MOST_UNPACKED * path.stat().st_size) if packed else None
        with _open(path) as handle:
            for number, raw in enumerate(iter(lambda: handle.readline(LONGEST_LINE + 1), b""), start=1):
                if len(raw) > LONGEST_LINE:
                    raise ConfigError(
                        f"{path}: line {number} is longer than {LONGEST_LINE >> 20} MiB, at byte {offset}{unpacked}; "
                        "break the text into lines"
                    )
                if most is not None and offset > most:
                    raise ConfigError(
                        f"{path}: unpacks to more than {MOST_UNPACKED} times its size, as no text does; unpack it "
                        "yourself if you trust it, and name the unpacked file"
                    )
                nul = raw.find(b"\0")
                if nul >= 0:
                    raise ConfigError(
                        f"{path}: line {number} holds a NUL byte at byte {offset + nul}{unpacked}; "
                        f"this is no UTF-8 text (a binary file, or UTF-16?); convert it to UTF-8"
                    )
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    # The codec counts from behind a byte-order mark, so take the position from the bytes themselves.
                    at = offset + _first_bad_byte(raw, error.start)
                    raise ConfigError(
                        f"{path}: line {number} is not UTF-8: bad byte at byte {at}{unpacked} ({error.reason}); "
                        f"convert the file, for example with: iconv -f latin1 -t utf-8"
                    ) from None
                offset += len(raw)
                yield number, line.removesuffix("\n").removesuffix("\r")
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        what = "cannot be read" if getattr(error, "errno", None) else "a damaged or truncated archive"
        raise ConfigError(f"{path}: {what} ({error})") from None


def _open(path: Path) -> IO[bytes]:
    kind = path.suffix.lower()
    if kind == ".gz":
        return cast("IO[bytes]", gzip.open(path, "rb"))
    if kind == ".xz":
        return cast("IO[bytes]", lzma.open(path, "rb"))
    if kind == ".zst":
        import pyarrow  # imported late: other text does not need it

        return cast("IO[bytes]", io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd")))
    return open(path, "rb")


def _first_bad_byte(raw: bytes, fallback: int) -> int:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return fallback


def _kind_of(path: Path) -> Kind:
    for suffix, kind in _SUFFIXES.items():
        if path.name.lower().endswith(suffix):
            return kind
    raise ConfigError(
        f"{path}: unknown kind of file; read are {', '.join(_SUFFIXES)} (rename plain UTF-8 text to .txt)"
    )


def _looks_like_a_file(path: Path) -> bool:
    """Whether a name that is not on disk was meant as a path: a known suffix, or a folder that exists."""
    known = any(path.name.lower().endswith(suffix) for suffix in _SUFFIXES)
    return known or (len(path.parts) > 1 and Path(path.parts[0]).is_dir())


def _near(path: Path) -> str | None:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return None
    close = difflib.get_close_matches(path.name, names, n=1)
    return close[0] if close else None


def _saved(given: str, path: Path, split: str | None) -> Source:
    if not any((path / mark).is_file() for mark in _SAVED_MARKS):
        raise ConfigError(
            f"{given}: a folder, but not a saved data set (no {' or '.join(_SAVED_MARKS)}); "
            f"name the files in it, for example {path}/*.txt"
        )
    return Source(given, "saved", path, split)
