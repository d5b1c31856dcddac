"""Text in, blocks of token ids out: the whole way in one function, ``prepare``."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..progress import announce, track
from . import cache as token_cache
from .documents import AUTO, Document, documents_of
from .held_out import SAMPLE_STREAM, Split, split
from .order import permutation
from .packing import Blocks, pack, tokenize
from .sources import Source, fingerprint, resolve
from .tokenizer import JoinerName, Tokenizer, find_joiner, token_id, tokenizer_fingerprint


@dataclass(frozen=True)
class TokenizedText:
    """What training and evaluation read.

    Attributes:
        train: blocks to train on.
        held_out: blocks to evaluate on. No document that equals one of theirs is trained on; a passage that recurs in
            another document may be.
        record: how both came to be, for run.yaml.
    """

    train: Blocks
    held_out: Blocks
    record: dict[str, Any]


def prepare(
    train_sources: Sequence[str | Path],
    eval_sources: Sequence[str | Path] | None,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    joiner: JoinerName = "auto",
    separator: str = AUTO,
    held_out_share: float = 0.05,
    seed: int = 0,
    cache: Path | None = None,
    max_train_tokens: int | None = None,
) -> TokenizedText:
    """Read, tokenize, join and cut the text; hold a part out.

    Args:
        train_sources: what ``--data`` names (see ``sources.py``).
        eval_sources: what ``--eval-data`` names; without it ``held_out_share`` of the training text is held out.
        tokenizer: a transformers tokenizer.
        seq_len: T, tokens a block.
        joiner: what stands between documents; ``auto`` is what the tokenizer does itself.
        separator: the line that cuts a .txt into documents; ``auto`` is any ``<|end...|>``.
        held_out_share: of the tokens, in (0, 0.5).
        seed: decides which documents are held out and which are sampled.
        cache: a folder to keep the result in; a matching one is loaded instead of tokenizing again.
        max_train_tokens: tokenize only about so many, of documents sampled by seed, and cut there.

    Raises:
        ConfigError: bad sources or options, or too little text; nothing was written.
    """
    _check(train_sources, eval_sources, seq_len, held_out_share, max_train_tokens)
    chosen_joiner = find_joiner(tokenizer, joiner)
    train = [resolve(given) for given in train_sources]
    evaluation = None if eval_sources is None else [resolve(given) for given in eval_sources]
    made_from: dict[str, Any] = {
        "data": [_identity(source) for source in train],
        "eval_data": None if evaluation is None else [_identity(source) for source in evaluation],
        "separator": separator,
        "joiner": {
            "asked": joiner,
            "used": chosen_joiner.name,
            "bos_token_id": token_id(tokenizer, "bos_token_id"),
            "eos_token_id": token_id(tokenizer, "eos_token_id"),
        },
        "seq_len": seq_len,
        "held_out_share": held_out_share if evaluation is None else None,
        "seed": seed,
        "max_train_tokens": max_train_tokens,
        "tokenizer_sha256": tokenizer_fingerprint(tokenizer),
    }
    key = _key(made_from)
    if cache is not None and (found := token_cache.load(cache, key)) is not None:
        # Names of files are no part of the key; the record tells today's.
        return TokenizedText(found[0], found[1], {**found[2], **made_from})

    separators: set[str] = set()
    documents = _read(train, separator, separators, "reading")
    eval_documents = None if evaluation is None else _read(evaluation, separator, separators, "reading held-out text")
    _check_separator(separator, separators, [*train, *(evaluation or [])])

    held_out_documents = None
    dropped = 0
    if eval_documents is not None:
        digests = {document.digest for document in eval_documents}
        fresh = [document for document in documents if document.digest not in digests]
        if not fresh:
            raise ConfigError(
                f"--data {_names(train)}: every document is also in --eval-data {_names(evaluation or [])}; "
                f"give other text to evaluate on, or leave out --eval-data to hold a part out"
            )
        dropped = len(documents) - len(fresh)
        documents = fresh
        held_out_documents = tokenize(eval_documents, tokenizer, chosen_joiner)

    enough = None
    if max_train_tokens is not None:
        enough = max_train_tokens
        if held_out_documents is None:  # what is held out comes on top: at most twice the share (see held_out.py)
            enough = math.ceil(enough / (1 - 2 * held_out_share)) + 2 * seq_len
        documents = [documents[i] for i in permutation(len(documents), seed, SAMPLE_STREAM).tolist()]
    pieces = tokenize(documents, tokenizer, chosen_joiner, enough=enough)
    documents = documents[: len(pieces)]

    if held_out_documents is not None and eval_documents is not None:
        parts = Split(pieces, held_out_documents, dropped, "the given files", (len(pieces), len(held_out_documents)))
    else:
        parts = split(documents, pieces, share=held_out_share, seq_len=seq_len, seed=seed)
    train_blocks, train_empty = pack(parts.train, seq_len, what=f"--data {_names(train)}", limit=max_train_tokens)
    held_out_blocks, held_out_empty = pack(
        parts.held_out, seq_len, what="the held-out text" if evaluation is None else f"--eval-data {_names(evaluation)}"
    )
    record = {
        **made_from,
        "key": key,
        "separators_found": sorted(separators),
        "held_out_rule": parts.rule,
        "documents": {
            "train": parts.documents[0],
            "held_out": parts.documents[1],
            "dropped_because_held_out": parts.dropped,
        },
        "blocks": {"train": len(train_blocks), "held_out": len(held_out_blocks)},
        "blocks_without_target": {"train": train_empty, "held_out": held_out_empty},
        "tokens": {"train": train_blocks.tokens, "held_out": held_out_blocks.tokens},
        "max_token_id": int(max(train_blocks.input_ids.max(), held_out_blocks.input_ids.max())),
    }
    if empty := train_empty + held_out_empty:
        announce(f"{empty:,} blocks of {seq_len} tokens are left out: none of their tokens is the assistant's")
    if cache is not None:
        token_cache.save(cache, key, train_blocks, held_out_blocks, record)
    return TokenizedText(train_blocks, held_out_blocks, record)


def pack_all(
    sources: Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    joiner: JoinerName = "auto",
    separator: str = AUTO,
) -> Blocks:
    """Every block of the given text; nothing is held out (``hestia eval``).

    Raises:
        ConfigError: bad sources or options, or too little text.
    """
    _check(sources, None, seq_len, 0.05, None)
    resolved = [resolve(given) for given in sources]
    separators: set[str] = set()
    documents = _read(resolved, separator, separators, "reading")
    _check_separator(separator, separators, resolved)
    pieces = tokenize(documents, tokenizer, find_joiner(tokenizer, joiner))
    return pack(pieces, seq_len, what=f"--data {_names(resolved)}")[0]


def _check(
    train: Sequence[str | Path],
    evaluation: Sequence[str | Path] | None,
    seq_len: int,
    share: float,
    max_train_tokens: int | None,
) -> None:
    for option, given in (("--data", train), ("--eval-data", evaluation)):
        if isinstance(given, (str, Path)):
            raise ConfigError(f"{option}: give a list of sources, got {given!r}; write [{str(given)!r}]")
        if given is not None and not given:
            raise ConfigError(f"{option}: no source given; name a file, a saved data set or a hub data set")
    if seq_len < 2:
        raise ConfigError(f"--seq-len {seq_len}: a block needs at least 2 tokens, one to read and one to predict")
    if not 0.0 < share < 0.5:
        raise ConfigError(f"held_out_share {share}: must lie between 0 and 0.5, for example 0.05")
    if max_train_tokens is not None and max_train_tokens < seq_len:
        raise ConfigError(f"{max_train_tokens} training tokens: fewer than one block of --seq-len {seq_len}")


def _check_separator(separator: str, found: set[str], sources: Sequence[Source]) -> None:
    if separator != AUTO and not found and any(source.kind == "text" for source in sources):
        raise ConfigError(
            f"--separator {separator!r}: no line of the .txt files equals it; leave it out to read each as one document"
        )


def _read(sources: Sequence[Source], separator: str, found: set[str], description: str) -> list[Document]:
    stream = (document for source in sources for document in documents_of(source, separator=separator, found=found))
    return list(track(stream, description))


def _identity(source: Source) -> dict[str, Any]:
    return {"given": source.given, "kind": source.kind, "split": source.split, "files": fingerprint(source)}


def _key(made_from: dict[str, Any]) -> str:
    """SHA-256 of what decides the tokens; where a file lies does not."""

    def without_paths(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: without_paths(v) for k, v in value.items() if k not in ("given", "path")}
        return [without_paths(v) for v in value] if isinstance(value, list) else value

    content = json.dumps([token_cache.SCHEMA, without_paths(made_from)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _names(sources: Sequence[Source]) -> str:
    return " ".join(source.given for source in sources)
