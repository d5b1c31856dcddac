"""Rows of parquet files, saved data sets and the hub: the one file that imports ``datasets``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetBuilder, DatasetDict, IterableDataset
from datasets.exceptions import DatasetsError
from datasets.packaged_modules.cache.cache import Cache
from huggingface_hub.errors import HfHubHTTPError

from ..errors import ConfigError, nearest

COLUMNS = ("messages", "text")
_DEFAULT_SPLIT = "train"
_ROWS = 1024
_SHOWN = 30
"""Configurations that a message names, at most."""

_CLIENT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]  # of the hub library's HTTP client, whichever it is
_UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, DatasetsError, pa.ArrowException, _CLIENT_ERROR)
"""What a hub data set may raise."""


def parquet_rows(path: Path, column: str | None = None) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(1-based row, {column: value}) of a parquet file, a batch in memory at a time; no column named: ``COLUMNS``.

    Raises:
        ConfigError: damaged, or no such column is there.
    """
    try:
        with pq.ParquetFile(path) as table:
            columns = _columns(str(path), table.schema_arrow.names, column)
            row = 0
            for batch in table.iter_batches(batch_size=_ROWS, columns=columns):
                for record in batch.to_pylist():
                    row += 1
                    yield row, record
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{path}: not a readable parquet file ({error})") from None


def saved_rows(path: Path, split: str | None, column: str | None = None) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows of a folder written by ``save_to_disk``; of a ``DatasetDict``, those of ``split`` (``train`` if None).

    Raises:
        ConfigError: damaged, no such split, or no such column is there.
    """
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise ConfigError(f"{path}: not a readable saved data set ({error})") from None
    if isinstance(loaded, DatasetDict):
        name = split or _DEFAULT_SPLIT
        if name not in loaded:
            raise ConfigError(f"{path}: no split {name!r}: {nearest(name, map(str, loaded))}; write {path}:SPLIT")
        loaded = loaded[name]
    elif split is not None:
        raise ConfigError(f"{path}: this saved data set has no splits; leave out ':{split}'")
    yield from _rows(str(path), loaded, column)


def hub_rows(
    name: str,
    split: str | None,
    *,
    config: str | None = None,
    revision: str | None = None,
    column: str | None = None,
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows of a hub data set in its own order; only what is read is downloaded.

    Raises:
        ConfigError: not found, offline, no such configuration or split, or no such column is there.
    """
    builder = _builder(name, config, revision)
    wanted = split or _DEFAULT_SPLIT
    try:
        loaded = builder.as_streaming_dataset(split=wanted)
    except _UNREADABLE as error:
        hint = f"; write {name}:SPLIT" if "Bad split" in str(error) else ""
        raise ConfigError(f"{name}: split {wanted!r} could not be loaded ({error}){hint}") from None
    if not isinstance(loaded, IterableDataset):
        raise ConfigError(f"{name}: split {wanted!r} is not one table; name a single split")
    columns: list[str] = []
    number = 0
    try:
        if loaded.column_names:  # else known from the first row alone
            columns = _columns(name, loaded.column_names, column)
            loaded = loaded.select_columns(columns)
        for number, row in enumerate(loaded, start=1):
            columns = columns or _columns(name, list(row), column)
            yield number, {key: row.get(key) for key in columns}
    except _UNREADABLE as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{name}: the stream broke off behind row {number:,} ({error})") from None


def hub_fingerprint(
    name: str, split: str | None, *, config: str | None = None, revision: str | None = None
) -> dict[str, Any]:
    """What pins a hub data set: its id, the split, the configuration and the commit that it resolves to now.

    Raises:
        ConfigError: not found or offline, or no such configuration.
    """
    builder = _builder(name, config, revision)
    return {
        "hub": name,
        "split": split or _DEFAULT_SPLIT,
        "config": builder.config.name,
        "revision": builder.hash,
    }


def _builder(name: str, config: str | None, revision: str | None) -> DatasetBuilder:
    try:
        builder = datasets.load_dataset_builder(name, config, revision=revision)
    except ConnectionError as error:
        raise ConfigError(
            f"{name}: no such file or folder here, and as a hub data set it cannot be reached ({error}); "
            f"correct the path, or save the data set where there is a network and name the folder or file"
        ) from None
    except _UNREADABLE as error:
        if isinstance(error, ValueError):
            _check_config(name, config, revision)
        at = "" if revision is None else f" at {revision}"
        raise ConfigError(
            f"{name}: no such file or folder here, and the hub has no data set of that name{at} that loads ({error})"
        ) from None
    # Out of reach of the hub, `datasets` takes what it has prepared before, of whichever commit.
    if revision is not None and isinstance(builder, Cache) and builder.hash != revision:
        raise ConfigError(
            f"{name}: {revision} cannot be reached, and what is prepared here is {builder.hash}; "
            f"write {name}@{builder.hash} for that, or try again where there is a network"
        )
    return builder


def _check_config(name: str, config: str | None, revision: str | None) -> None:
    """Refuse a configuration that is not there, or none where there are several."""
    try:
        names = datasets.get_dataset_config_names(name, revision=revision)
    except _UNREADABLE:
        return
    if config is None and len(names) > 1:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        shown = ", ".join(names[:_SHOWN]) + more
        raise ConfigError(f"{name}: a data set of several configurations: {shown}; write {name}/{names[0]} or another")
    if config is not None and config not in names:
        raise ConfigError(f"{name}: no configuration {config!r}: {nearest(config, names)}; write {name}/CONFIG")


def _rows(where: str, table: Dataset, column: str | None) -> Iterator[tuple[int, Mapping[str, Any]]]:
    chosen = table.select_columns(_columns(where, table.column_names, column))
    try:
        yield from enumerate((record for record in chosen if isinstance(record, Mapping)), start=1)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{where}: damaged data ({error})") from None


def _columns(where: str, names: list[str], wanted: str | None) -> list[str]:
    columns = [name for name in (COLUMNS if wanted is None else (wanted,)) if name in names]
    if columns:
        return columns
    has = ", ".join(names) or "none"
    if wanted is not None:
        raise ConfigError(f"{where}: has no column {wanted!r} (--text-column), only {has}")
    raise ConfigError(
        f"{where}: needs a column 'text' or 'messages', has {has}; name the one that is meant with --text-column"
    )
