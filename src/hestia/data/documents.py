"""Documents: one text or one chat each, whatever the file they came in."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .sources import Source, lines, resolve

AUTO = "auto"
_END_MARK = re.compile(r"<\|end\w*\|>")


@dataclass(frozen=True)
class Document:
    """One text, or one chat; the other is None.

    Attributes:
        text: the text, without line breaks at its ends.
        messages: the turns of a chat, each with a ``role``.
        source: file and line (or row) it came from.
    """

    text: str | None
    messages: tuple[Mapping[str, Any], ...] | None
    source: str

    @property
    def digest(self) -> str:
        """SHA-256 of the content; documents with equal digests are identical."""
        content = self.text if self.messages is None else json.dumps(self.messages, sort_keys=True, default=str)
        assert content is not None
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def characters(self) -> int:
        """Characters of the text, or of all turns."""
        if self.text is not None:
            return len(self.text)
        return sum(len(str(message.get("content", ""))) for message in self.messages or ())


@dataclass
class Reading:
    """How sources are read.

    Attributes:
        separator: the line that cuts a .txt into documents; ``auto`` is any end mark.
        column: what counts of a row; None: ``messages``, else ``text``.
        separators: the separator lines that were met.
    """

    separator: str = AUTO
    column: str | None = None
    separators: set[str] = field(default_factory=set)


@dataclass
class Extent:
    """How far a source is read.

    Attributes:
        characters: it ends with the document that reaches so many.
        rows: of a hub data set, read so far.
        whole: whether all of it was read.
    """

    characters: int
    rows: int = 0
    whole: bool = False


def read_documents(
    sources: Sequence[str | Path], *, separator: str = AUTO, column: str | None = None
) -> Iterator[Document]:
    """The documents of all ``sources``, in order; documents without any text are left out.

    A .txt file is cut at every line that equals ``separator``; with ``auto`` at every line that is exactly an end mark
    such as ``<|endofdoc|>`` (``<\\|end\\w*\\|>``). Without such a line the file is one document. Of a row counts
    ``column``; where none is named, ``messages``, which makes it a chat, before ``text``.

    Raises:
        ConfigError: a source is missing, empty, not UTF-8, holds a NUL, a bad JSON line, or a row without
            what counts; file and line are given.
    """
    how = Reading(separator, column)
    for source in [resolve(given) for given in sources]:
        yield from documents_of(source, how)


def documents_of(source: Source, how: Reading, extent: Extent | None = None) -> Iterator[Document]:
    """The documents of one source, as far as ``extent`` goes.

    Raises:
        ConfigError: as ``read_documents``.
    """
    if "\n" in how.separator or "\r" in how.separator:
        raise ConfigError(
            f"separator {how.separator!r}: a separator is one whole line, without line breaks ('' cuts at empty lines)"
        )
    empty, characters = True, 0
    for document in _read(source, how, extent):
        if document.messages is not None or (document.text and not document.text.isspace()):
            empty = False
            yield document
            characters += document.characters
            if extent is not None and characters >= extent.characters:
                return
    if empty:
        raise ConfigError(f"{source.given}: holds no text; give a file with text in it")
    if extent is not None:
        extent.whole = True


def _read(source: Source, how: Reading, extent: Extent | None) -> Iterator[Document]:
    if source.kind == "text":
        assert source.path is not None
        yield from _cut(source.path, how)
        return
    if source.kind == "jsonl":
        assert source.path is not None
        yield from (_from_row(row, how.column, f"{source.path}:{number}") for number, row in _json_rows(source.path))
        return
    from . import tables  # imported late: it brings in `datasets`, which plain text does not need

    if source.kind == "hub":
        rows = tables.hub_rows(
            source.name, source.split, config=source.config, revision=source.revision, column=how.column
        )
    elif source.kind == "parquet":
        assert source.path is not None
        rows = tables.parquet_rows(source.path, how.column)
    else:
        assert source.path is not None
        rows = tables.saved_rows(source.path, source.split, how.column)
    for number, row in rows:
        if extent is not None:
            extent.rows = number
        yield _from_row(row, how.column, f"{source.given}, row {number}")


def _cut(path: Path, how: Reading) -> Iterator[Document]:
    held: list[str] = []
    start = 1
    for number, line in lines(path):
        if line == how.separator if how.separator != AUTO else _is_end_mark(line):
            how.separators.add(line)
            yield Document("\n".join(held).strip("\n"), None, f"{path}:{start}")
            held = []
            start = number + 1
        else:
            held.append(line)
    yield Document("\n".join(held).strip("\n"), None, f"{path}:{start}")


def _is_end_mark(line: str) -> bool:
    return line.startswith("<|end") and _END_MARK.fullmatch(line) is not None


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in lines(path):
        if not line or line.isspace():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{path}:{number}: not JSON ({error.msg} at column {error.colno}); each line must be one JSON object"
            ) from None
        except (RecursionError, ValueError) as error:  # nested too deep; an integer of thousands of digits
            raise ConfigError(f"{path}:{number}: JSON that cannot be read ({error})") from None


def _from_row(row: Any, column: str | None, where: str) -> Document:
    if not isinstance(row, Mapping):
        wanted = "'text' or 'messages'" if column is None else repr(column)
        raise ConfigError(f"{where}: expected an object with {wanted}, got {type(row).__name__}")
    messages = row.get("messages") if column in (None, "messages") else None
    if messages is not None:
        return Document(None, _checked_messages(messages, where), where)
    key = column or "text"
    text = row.get(key)
    if isinstance(text, str):
        return Document(checked_text(text, where).strip("\r\n"), None, where)
    if key in row:
        raise ConfigError(f"{where}: {key!r} must be a string, got {'null' if text is None else type(text).__name__}")
    missing = "neither 'text' nor 'messages'" if column is None else f"no {column!r}"
    raise ConfigError(
        f"{where}: {missing}; the keys are {', '.join(map(repr, row)) or 'none'}: name the one that is meant with "
        "--text-column"
    )


def _checked_messages(messages: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ConfigError(f"{where}: 'messages' must be a list of at least one turn, got {messages!r:.60}")
    for position, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ConfigError(
                f"{where}: messages[{position}] must be an object with 'role' and 'content', got {message!r:.60}"
            )
    # Columns of a table hold every key any row has; a key without value is the same as no key.
    return tuple({k: v for k, v in message.items() if v is not None} for message in messages)


def checked_text(text: str, where: str) -> str:
    """``text`` itself.

    Raises:
        ConfigError: it holds a NUL, or half of a surrogate pair, which no tokenizer can read.
    """
    nul = text.find("\0")
    if nul >= 0:
        raise ConfigError(f"{where}: holds a NUL at character {nul}; remove it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: is not valid Unicode at character {error.start} ({error.reason})") from None
    return text
