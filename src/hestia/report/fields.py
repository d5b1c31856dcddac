"""Values of JSON files, read strictly where the format promises them and leniently where it does not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import read_json

SCHEMA = 1
"""Of every artefact that names no other."""


def text(value: Any) -> str:
    """``value`` as text that UTF-8 can encode; empty for None. JSON can carry half a surrogate pair, files cannot."""
    return "" if value is None else str(value).encode("utf-8", "replace").decode("utf-8")


def number(value: Any) -> float | None:
    """``value`` if it is a finite number, else None; true and false are not numbers."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


class Object:
    """A JSON object that knows where it lies, so that a key which is missing or of another type is named in full.

    Every method raises ConfigError for such a key.
    """

    def __init__(self, raw: dict[str, Any], where: str, prefix: str = "") -> None:
        self.raw, self.where, self.prefix = raw, where, prefix

    def value(self, key: str) -> Any:
        """The value of a key that must be there."""
        if key not in self.raw:
            raise ConfigError(f"{self.where}: missing key {self.prefix + key!r}; write the run's report again")
        return self.raw[key]

    def number(self, key: str) -> float | None:
        """A finite number; None for null, NaN and infinity."""
        value = self.value(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ConfigError(f"{self.where}: {self.prefix + key!r} must be a number or null, got {value!r}")
        return number(value)

    def integer(self, key: str) -> int | None:
        """The same, towards zero."""
        value = self.number(key)
        return None if value is None else int(value)

    def object(self, key: str) -> Object:
        """An object within this one."""
        value = self.value(key)
        if not isinstance(value, dict):
            raise ConfigError(f"{self.where}: {self.prefix + key!r} must be an object, got {value!r}")
        return Object(value, self.where, f"{self.prefix}{key}.")

    def objects(self, key: str, *, required: bool = True) -> list[Object]:
        """A list of objects; empty where it is not ``required`` and not there."""
        values = self.value(key) if required else self.raw.get(key) or []
        if not isinstance(values, list) or not all(isinstance(v, dict) for v in values):
            raise ConfigError(f"{self.where}: {self.prefix + key!r} must be a list of objects, got {values!r}")
        return [Object(v, self.where, f"{self.prefix}{key}[{i}].") for i, v in enumerate(values)]


def optional(path: Path, schema: int = SCHEMA) -> Object | None:
    """A JSON file that may be absent."""
    return Object(read_json(path, schema=schema), str(path)) if path.is_file() else None


def mapping(value: Any) -> Mapping[str, Any]:
    """``value`` if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def texts(value: Any) -> tuple[str, ...]:
    """``value`` if it is a list, as texts, else none."""
    return tuple(text(v) for v in value) if isinstance(value, list) else ()


def whole(value: Any) -> int | None:
    """``value`` if it is a whole number, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None
