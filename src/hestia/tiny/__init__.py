"""A small trained Llama with its tokenizer, and text it may be trained on: all that the demo and the tests need.

What it is and how well it predicts: ``books-6m/README.md``. Where the text comes from: ``text/CREDITS.md``. The script
that makes such a model from any text: ``benchmarks/make_tiny_model.py`` of the repository.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Literal

from ..errors import ConfigError, nearest

_TEXTS = ("train", "held_out")


def model_path() -> Path:
    """The folder of the bundled model: a Hugging Face checkpoint (safetensors) with its tokenizer."""
    return Path(str(files(__name__))) / "books-6m"


def text_path(name: Literal["train", "held_out"]) -> Path:
    """The bundled text, xz-compressed, documents separated by lines of ``<|endofbook|>``.

    Args:
        name: ``train`` (1.4M tokens of the bundled model) or ``held_out`` (59k tokens of documents it never saw).

    Raises:
        ConfigError: another name.
    """
    if name not in _TEXTS:
        raise ConfigError(f"no bundled text {name!r}: {nearest(name, _TEXTS)}")
    return Path(str(files(__name__))) / "text" / f"{name}.txt.xz"
