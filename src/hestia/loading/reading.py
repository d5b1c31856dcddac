"""Whatever transformers raises for a file that is not what it should be, in one line that names the model."""

from __future__ import annotations

from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from ..errors import ConfigError
from .sources import Source

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

ERRORS = (
    OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError, ImportError,
    AssertionError, MemoryError,
)  # fmt: skip
"""What transformers raises, directly, for files that are not what they should be."""


def read(source: Source, what: str, reader: Any, **options: Any) -> Any:
    """``reader(location)``, pinned to the source's commit.

    Raises:
        ConfigError: it could not; ``what`` and the first line of the reason are named.
    """
    try:
        return reader(source.location, revision=source.commit or "main", **options)
    except (*ERRORS, SafetensorError, StrictDataclassError) as error:
        message = first_line(error)
        if "trust_remote_code" in str(error):
            message = "it needs code from the model folder; hestia runs none unless you pass --trust-remote-code"
        raise ConfigError(f"{source.name}: cannot read the {what}: {message}") from None


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = lines[0] if lines else type(error).__name__
    return " ".join(lines[:2]) if message.endswith(":") else message
