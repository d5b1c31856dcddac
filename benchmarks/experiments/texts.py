"""The texts of a stage as blocks of token ids: tokenized once, cached, and checked against a committed list.

    train   a pool of tokens; a job's seed orders its blocks
    valid   blocks spread evenly over each valid file: they choose learning rates and nothing else
    test    blocks spread evenly over each test file: scored.json names them, by file, index and SHA-256 of token ids

A test block whose hash differs from the list stops the runner: another tokenizer, another file, or another way of
packing would make results that cannot be compared with those that are there.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stages import HERE, Stage
from transformers import PreTrainedTokenizerBase

from hestia import tiny
from hestia.data import Blocks, pack_all, prepare
from hestia.data import cache as token_cache
from hestia.data.tokenizer import tokenizer_fingerprint
from hestia.errors import ConfigError
from hestia.files import read_json, sha256, write_json
from hestia.options import count

SCORED = HERE / "scored.json"
BUNDLED = "bundled:"


@dataclass(frozen=True)
class StageTexts:
    """What the jobs of a stage read.

    Attributes:
        train: the pool.
        valid, test: file -> blocks.
        record: sources and hashes, for the results.
    """

    train: Blocks
    valid: dict[str, Blocks]
    test: dict[str, Blocks]
    record: dict[str, Any]


def prepare_texts(
    stage: Stage, data: Path, tokenizer: PreTrainedTokenizerBase, cache: Path, scored: Path
) -> StageTexts:
    """Tokenize (or load) all texts of a stage, and check the test blocks against the list in ``scored``.

    The list's entry for this tokenizer and stage is made if there is none.

    Raises:
        ConfigError: a file is missing or too short, or the test blocks are not those of the list.
    """
    texts, length = stage.texts, stage.training.seq_len
    train = prepare(
        [_find(data, name) for name in texts.train],
        [_find(data, name) for name in texts.valid],
        tokenizer,
        seq_len=length,
        cache=cache / "train",
        max_train_tokens=count(texts.pool, "pool"),
    )
    valid = {n: _blocks(_find(data, n), tokenizer, length, texts.valid_blocks, cache) for n in texts.valid}
    test = {n: _blocks(_find(data, n), tokenizer, length, texts.test_blocks, cache) for n in texts.test}
    chosen = check_list(scored, test, tokenizer_fingerprint(tokenizer), length)
    record = {
        "train": {"blocks": len(train.train), "sha256": token_hash(train.train)},
        "valid": {name: {"blocks": len(b), "sha256": token_hash(b)} for name, b in valid.items()},
        "test": {name: {"blocks": len(b), "sha256": chosen[name]["token_sha256"]} for name, b in test.items()},
    }
    return StageTexts(train.train, valid, test, record)


def check_list(path: Path, test: dict[str, Blocks], tokenizer: str, length: int) -> dict[str, dict[str, Any]]:
    """The entries of the committed list for these blocks; missing ones are added.

    Raises:
        ConfigError: an entry says other tokens.
    """
    record: dict[str, Any] = read_json(path, schema=1) if path.is_file() else {"schema": 1, "lists": []}
    out: dict[str, dict[str, Any]] = {}
    for name, blocks in test.items():
        indices, of = blocks_chosen(blocks)
        mine = {
            "file": name,
            "tokenizer_sha256": tokenizer,
            "seq_len": length,
            "blocks": len(blocks),
            "blocks_in_file": of,
            "indices": indices,
            "token_sha256": token_hash(blocks),
        }
        keys = ("file", "tokenizer_sha256", "seq_len", "blocks")
        there = [entry for entry in record["lists"] if all(entry[key] == mine[key] for key in keys)]
        if there and there[0] != mine:
            differing = [key for key in mine if there[0].get(key) != mine[key]]
            raise ConfigError(f"{path.name}: the test blocks of {name} have another {', '.join(differing)} than listed")
        if not there:
            record["lists"].append(mine)
            write_json(path, record)
        out[name] = mine
    return out


def token_hash(blocks: Blocks) -> str:
    """SHA-256 of the token ids as little-endian int32, row by row."""
    return hashlib.sha256(blocks.input_ids.numpy().astype(np.dtype("<i4")).tobytes()).hexdigest()


@dataclass(frozen=True)
class ChosenBlocks(Blocks):
    """Blocks that remember their places in the file: ``indices`` of ``blocks_in_file``."""

    indices: tuple[int, ...] = ()
    blocks_in_file: int = 0


def blocks_chosen(blocks: Blocks) -> tuple[list[int] | None, int]:
    """Indices (None where all are taken) and the number of blocks of the whole file."""
    assert isinstance(blocks, ChosenBlocks)
    everything = len(blocks) == blocks.blocks_in_file
    return (None if everything else list(blocks.indices)), blocks.blocks_in_file


def _blocks(path: Path, tokenizer: PreTrainedTokenizerBase, length: int, most: int | None, cache: Path) -> ChosenBlocks:
    key = "-".join((sha256(path)[:16], tokenizer_fingerprint(tokenizer)[:16], str(length)))
    folder = cache / path.name.partition(".")[0] / key
    found = token_cache.load(folder, key)
    if found is None:
        every = pack_all([path], tokenizer, seq_len=length)
        first = Blocks(every.input_ids[:1].clone(), every.loss_mask[:1].clone())  # the cache wants two parts
        token_cache.save(folder, key, every, first, {})
    else:
        every = found[0]
    places = Blocks(torch.arange(len(every))[:, None], torch.ones(len(every), 1, dtype=torch.bool))
    rows = places.spread(most or len(every)).input_ids[:, 0]
    return ChosenBlocks(every.input_ids[rows], every.loss_mask[rows], tuple(rows.tolist()), len(every))


def _find(data: Path, name: str) -> Path:
    if name.startswith(BUNDLED):
        return tiny.text_path(name.removeprefix(BUNDLED))  # type: ignore[arg-type]
    return data / name
