"""Every error hestia raises on purpose: what went wrong, where, what was got, what to write instead.

Each class carries the exit status of the command line (see ``hestia --help``).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HestiaError(Exception):
    """Base of all errors that hestia raises on purpose; ``exit_status`` is the command's."""

    exit_status = 1


class ConfigError(HestiaError, ValueError):
    """Bad usage, configuration, data or checkpoint; nothing was written."""

    exit_status = 2


class PlanError(ConfigError):
    """A plan that does not fit its model or that the export target cannot hold."""


class CalibrationError(ConfigError):
    """Curvature could not be estimated from the given model and text."""


class ExportError(ConfigError):
    """A frozen model that the requested file format cannot hold exactly."""


class VerifyError(HestiaError):
    """A written file differs from the frozen model it claims to be."""

    exit_status = 3


class GuardError(HestiaError):
    """Training was stopped: a NaN, an Inf or a collapse; the last good checkpoint is kept."""

    exit_status = 4


class DiskSpaceError(HestiaError):
    """Too little room on the disk for what is to be written next; what was written before is intact."""


class BusyError(ConfigError):
    """Another process is working on the same run; nothing was written."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """A short hint that names the closest allowed spelling and lists the rest.

    >>> nearest("ternery", ["ternary", "binary"])
    "did you mean 'ternary'? allowed: binary, ternary"
    """
    options = sorted(allowed)
    close = difflib.get_close_matches(name, options, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}allowed: {', '.join(options)}"
