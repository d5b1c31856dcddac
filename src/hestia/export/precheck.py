"""What a file format would refuse at the end of a run, asked before it: architecture, settings, tokenizer.

What only the weights can say (a scale that a type cannot hold) is left to the exporters.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import ExportError
from ..targets import HEAD_TYPES, TARGETS, is_gguf
from .gguf_families import shape_of
from .gguf_tokenizer import tokenizer_metadata
from .mlx import check_mlx


def check_targets(
    targets: Iterable[str], config: Any, where: Path, tokenizer: Path | None = None, *, head: str = "auto"
) -> None:
    """Refuse file formats that cannot hold a model of this configuration.

    Args:
        targets: names of file formats.
        config: transformers' configuration of the model.
        where: the model's folder, for messages.
        tokenizer: the folder of its tokenizer; None leaves that unasked.
        head: how a GGUF file stores embedding and head.

    Raises:
        ExportError: one cannot; what stands in its way is named.
    """
    record = json.loads(config.to_json_string(use_diff=True))  # what the frozen model's config.json will say
    place = where / "config.json"
    for target in targets:
        try:
            if is_gguf(target):
                shape_of(place, record)
                kind = HEAD_TYPES[head]
                if kind is not None and int(record["hidden_size"]) % kind.block:
                    raise ExportError(f"{place}: --head {head} stores blocks of {kind.block}; they divide no row of it")
                if tokenizer is not None:
                    tokenizer_metadata(tokenizer, record, int(record["vocab_size"]))
            elif target == "mlx":
                check_mlx(place, record)
        except ExportError as error:
            raise ExportError(f"--target {target}: {error}") from None


def refusals(config: Any, where: Path, tokenizer: Path | None = None) -> dict[str, str]:
    """What ``check_targets`` says of every file format that cannot hold such a model: target -> reason."""
    found: dict[str, str] = {}
    for name in TARGETS:
        try:
            check_targets([name], config, where, tokenizer)
        except ExportError as error:
            found[name] = str(error).removeprefix(f"--target {name}: ")
    return found
