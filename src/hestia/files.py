"""Artefacts on disk: JSON with a schema number, tensors as safetensors, written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_TEXT = 1 << 31
"""Bytes of a JSON or YAML file that is read; a larger one is no artefact of ours."""

TEMPORARY = re.compile(r"\..+\.tmp")
"""Names of what is being written, or was when its process ended."""

_ASIDE = re.compile(r"\.(?P<name>.+)\.\d+\.aside\.tmp")
"""Names of folders that others were about to replace."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends well, and vanishes when it does not.

    The bytes are flushed to the disk before the rename, so a crash leaves the old file or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that takes its place when the block ends well, or else vanishes.

    An earlier folder is set aside and deleted when the new one stands; ``sweep`` puts it back where none does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    aside = path.with_name(f".{path.name}.{os.getpid()}.aside.tmp")
    if not path.exists() and aside.exists():  # of a process of this number that was killed between the two renames
        os.replace(aside, path)
    for left in (temporary, aside):
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for entry in (*temporary.rglob("*"), temporary):
            flush(entry)
        if path.exists():
            os.replace(path, aside)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        if not path.exists() and aside.exists():
            os.replace(aside, path)
        for left in (temporary, aside):
            shutil.rmtree(left, ignore_errors=True)


def flush(path: Path) -> None:
    """Have the system put a file, or the names in a folder, on the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Remove what processes that ended while writing into ``folder`` left there; nobody may be writing now."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        aside = _ASIDE.fullmatch(path.name)
        if aside is not None and not (folder / aside["name"]).exists() and not path.is_symlink():
            os.replace(path, folder / aside["name"])
        if TEMPORARY.fullmatch(path.name) and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def require_writable(path: Path) -> None:
    """Check, before hours of work, that ``path`` could be created.

    Raises:
        ConfigError: a file stands where a folder is needed, or the folder may not be written to.
    """
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise ConfigError(f"{path} cannot be written: {folder} is a file, not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{path} cannot be written: no permission to write into {folder}")


def require_regular(path: Path) -> None:
    """Check that ``path`` is a file with an end: no pipe, socket or device, which could be waited for for ever.

    Raises:
        ConfigError: it is there and is something else; nothing was opened.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise ConfigError(f"{path}: expected a regular file, got {kind}")


def require_inside(folder: Path) -> None:
    """Check that nothing in ``folder`` is a symbolic link to a place outside of it: what is written stays inside.

    Raises:
        ConfigError: a link that leads out, or nowhere; it is named.
    """
    home = folder.resolve()
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            if path.is_symlink() and not path.resolve().is_relative_to(home):
                raise ConfigError(
                    f"{path}: a symbolic link out of the run's folder, to {path.readlink()}; hestia writes inside "
                    "the run alone: remove the link, or put the whole run where it points to"
                )


def save_file(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it could not be written; with the system's own error number, which safetensors hides in its message.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file as write

    try:
        write(dict(tensors), path, None if metadata is None else dict(metadata))
    except SafetensorError as error:
        raise as_os_error(error, path) from None
    make_readable(path)


def make_readable(path: Path) -> None:
    """Give a file the rights of any other new one: safetensors makes files that only their owner may read."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def as_os_error(error: Exception, path: Path) -> OSError:
    """The system's error inside another library's message, such as ``... (os error 28)``."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    number = int(found.group(1)) if found else errno.EIO
    return OSError(number, os.strerror(number) if found else str(error), str(path))


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write ``record`` atomically as strict JSON: NaN and infinities become null."""
    write_text(path, json.dumps(finite(record), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_text(path: Path) -> str:
    """The UTF-8 text of a small file.

    Raises:
        ConfigError: it is missing, no regular file, too large, not UTF-8, or cannot be read.
    """
    require_regular(path)
    try:
        size = path.stat().st_size
        if size > LARGEST_TEXT:
            raise ConfigError(f"{path}: {size:,} bytes are too many; hestia reads {LARGEST_TEXT:,} at most here")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def read_json(path: Path, *, schema: int | None = None) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        ConfigError: the file is missing, is not a JSON object, or carries another schema number than ``schema``.
    """
    text = read_text(path)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:  # no JSON; a number of thousands of digits; nested too deep
        raise ConfigError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(record, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(record).__name__}")
    if schema is not None and record.get("schema") != schema:
        raise ConfigError(f"{path}: schema {record.get('schema')!r}, this version reads schema {schema}")
    return record


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sha256_of_files(folder: Path) -> dict[str, str]:
    """Path within ``folder`` -> SHA-256 of every file there, in the order of the paths' bytes."""
    files = {f.relative_to(folder).as_posix(): f for f in folder.rglob("*") if f.is_file() and not f.is_symlink()}
    return {name: sha256(files[name]) for name in sorted(files, key=os.fsencode)}


def sha256_of_listing(hashes: Mapping[str, str]) -> str:
    r"""One hash for ``sha256_of_files``: what this prints inside the folder.

    find . -type f | LC_ALL=C sort | xargs -d '\n' sha256sum | sha256sum
    """
    return hashlib.sha256(b"".join(os.fsencode(f"{hashes[name]}  ./{name}\n") for name in hashes)).hexdigest()


def finite(value: Any) -> Any:
    """``value`` as strict JSON can hold it: NaN and infinities become null, tuples lists, keys text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value
