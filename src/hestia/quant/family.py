"""Families of small frozen dataclasses (scale rules, estimators) that name themselves and travel as JSON."""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass, fields
from importlib.metadata import entry_points
from typing import Any, ClassVar, Self

from ..errors import ConfigError, nearest

ENTRY_POINTS = "hestia.recipes"


@functools.cache
def load_packages() -> None:
    """Import what other packages list under the entry-point group; recipes and their parts register themselves.

    Raises:
        ConfigError: one of them cannot be imported.
    """
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except ImportError as error:
            raise ConfigError(f"the recipe {entry.name!r} of another package cannot be imported: {error}") from None


def _place(kind: type) -> tuple[str, str]:
    """Where a class is defined: one that is defined there again, as in a notebook, takes its own place."""
    return kind.__module__, kind.__qualname__


@dataclass(frozen=True)
class Member:
    """A frozen value with a ``name``, registered in its ``family`` when its class is defined."""

    family: ClassVar[str]
    name: ClassVar[str]
    _registry: ClassVar[dict[str, dict[str, type[Member]]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            known = Member._registry.get(cls.family, {}).get(cls.name)
            if known is not None and _place(known) != _place(cls):
                raise ConfigError(f"two {cls.family}s are called {cls.name!r}: {known.__module__} and {cls.__module__}")
            Member._registry.setdefault(cls.family, {})[cls.name] = cls

    @classmethod
    def names(cls) -> list[str]:
        """The names of all members of this family."""
        return sorted(Member._registry.get(cls.family, {}))

    @classmethod
    def make(cls, name: str, **options: Any) -> Self:
        """The member called ``name`` with the given options; other packages are asked for a name that hestia lacks.

        Raises:
            ConfigError: an unknown name or option; the nearest valid one is named.
        """
        members = Member._registry.setdefault(cls.family, {})
        if name not in members:
            load_packages()
        if name not in members:
            raise ConfigError(f"unknown {cls.family} {name!r}: {nearest(str(name), members)}")
        kind = members[name]
        allowed = {f.name for f in fields(kind)}
        for key in options:
            if key not in allowed:
                raise ConfigError(f"{cls.family} {name!r} has no option {key!r}: {nearest(key, allowed)}")
        member = kind(**options)
        assert isinstance(member, cls)
        return member

    def require_positive(self, *options: str) -> None:
        """Refuse what would divide by zero or turn the grid around.

        Raises:
            ConfigError: one of these options is not a positive, finite number.
        """
        for option in options:
            value = getattr(self, option)
            if not 0.0 < value < math.inf:
                raise ConfigError(f"{self.family} {self.name!r}: {option} must be a positive number, got {value}")

    def to_json(self) -> dict[str, Any]:
        """``{"name": ..., option: value, ...}``."""
        return {"name": self.name, **asdict(self)}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Self:
        """The inverse of ``to_json``."""
        options = {str(k): v for k, v in record.items() if k != "name"}
        return cls.make(record.get("name", ""), **options)
