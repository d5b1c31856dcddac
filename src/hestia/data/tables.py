"""Rows of parquet files, saved data sets and the hub: the one file that imports ``datasets`` and ``pyarrow``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetBuilder, DatasetDict
from datasets.exceptions import DatasetsError

from ..errors import ConfigError, nearest

COLUMNS = ("messages", "text")
_DEFAULT_SPLIT = "train"
_ROWS = 1024


def parquet_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(1-based row, {"text" or "messages": value}) of a parquet file, a batch in memory at a time.

    Raises:
        ConfigError: damaged, or neither column is there.
    """
    try:
        with pq.ParquetFile(path) as table:
            columns = _columns(str(path), table.schema_arrow.names)
            row = 0
            for batch in table.iter_batches(batch_size=_ROWS, columns=columns):
                for record in batch.to_pylist():
                    row += 1
                    yield row, record
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{path}: not a readable parquet file ({error})") from None


def saved_rows(path: Path, split: str | None) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows of a folder written by ``save_to_disk``; of a ``DatasetDict``, those of ``split`` (``train`` if None).

    Raises:
        ConfigError: damaged, no such split, or neither column is there.
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
    yield from _rows(str(path), loaded)


def hub_rows(name: str, split: str | None) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows of a hub data set, downloaded into the cache of ``datasets`` first.

    Raises:
        ConfigError: not found, offline, no such split, or neither column is there.
    """
    builder = _builder(name)
    try:
        builder.download_and_prepare()
        loaded = builder.as_dataset(split=split or _DEFAULT_SPLIT)
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        raise ConfigError(f"{name}: split {split or _DEFAULT_SPLIT!r} could not be loaded ({error})") from None
    if not isinstance(loaded, Dataset):
        raise ConfigError(f"{name}: split {split!r} is not one table; name a single split")
    yield from _rows(name, loaded)


def hub_fingerprint(name: str, split: str | None) -> dict[str, Any]:
    """What pins a hub data set: its id, the split and the commit it resolves to now.

    Raises:
        ConfigError: not found or offline.
    """
    builder = _builder(name)
    return {
        "hub": name,
        "split": split or _DEFAULT_SPLIT,
        "config": builder.config.name,
        "revision": builder.hash,
    }


def _builder(name: str) -> DatasetBuilder:
    try:
        return datasets.load_dataset_builder(name)
    except ConnectionError as error:
        raise ConfigError(
            f"{name}: no such file or folder here, and as a hub data set it cannot be reached ({error}); "
            f"correct the path, or save the data set where there is a network and name the folder or file"
        ) from None
    except (OSError, ValueError, DatasetsError) as error:
        raise ConfigError(
            f"{name}: no such file or folder here, and the hub has no data set of that name that loads ({error})"
        ) from None


def _rows(where: str, table: Dataset) -> Iterator[tuple[int, Mapping[str, Any]]]:
    chosen = table.select_columns(_columns(where, table.column_names))
    try:
        yield from enumerate((record for record in chosen if isinstance(record, Mapping)), start=1)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{where}: damaged data ({error})") from None


def _columns(where: str, names: list[str]) -> list[str]:
    columns = [name for name in COLUMNS if name in names]
    if not columns:
        raise ConfigError(
            f"{where}: needs a column 'text' or 'messages', has {', '.join(names) or 'none'}; "
            f"rename the one that is meant"
        )
    return columns
