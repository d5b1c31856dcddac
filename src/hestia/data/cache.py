"""Tokenized text on disk, so that a run tokenizes once.

    FOLDER/tokens.safetensors   train.ids, held_out.ids int32 [B, T]; train.mask, held_out.mask bool [B, T]
    FOLDER/tokens.json          schema, key (what the tokens were made from), sha256 of the other file, record

The JSON is written last. A cache whose key differs is stale, as is one with blocks without a target (earlier versions
kept them), one whose hash differs is damaged; all are made anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import ConfigError
from ..files import read_json, replacing, save_file, sha256, write_json
from .packing import Blocks

# Part of every key too: raise it whenever the same text and options give other tokens than before.
SCHEMA = 1
_TOKENS = "tokens.safetensors"
_RECORD = "tokens.json"


def save(folder: Path, key: str, train: Blocks, held_out: Blocks, record: dict[str, Any]) -> None:
    """Write both files, each whole or not at all."""
    arrays = {
        f"{name}.{part}": tensor.contiguous()
        for name, blocks in (("train", train), ("held_out", held_out))
        for part, tensor in (("ids", blocks.input_ids.to(torch.int32)), ("mask", blocks.loss_mask))
    }
    tokens = folder / _TOKENS
    with replacing(tokens) as temporary:
        save_file(arrays, temporary)
    write_json(folder / _RECORD, {"schema": SCHEMA, "key": key, "sha256": sha256(tokens), "record": record})


def load(folder: Path, key: str) -> tuple[Blocks, Blocks, dict[str, Any]] | None:
    """(train, held out, record) if the folder holds them for ``key``, undamaged; else None."""
    try:
        found = read_json(folder / _RECORD, schema=SCHEMA)
        if found.get("key") != key or found.get("sha256") != sha256(folder / _TOKENS):
            return None
        arrays = load_file(folder / _TOKENS)
        train, held_out = (Blocks(arrays[f"{name}.ids"], arrays[f"{name}.mask"]) for name in ("train", "held_out"))
        return (train, held_out, found["record"]) if all(bool(b.with_target.all()) for b in (train, held_out)) else None
    except (ConfigError, OSError, SafetensorError, KeyError):
        return None
