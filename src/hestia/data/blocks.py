"""Text in, blocks of token ids out: the whole way in one function, ``prepare``."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..progress import announce, track
from . import cache as token_cache
from .documents import AUTO, Document, Extent, Reading, documents_of
from .held_out import SAMPLE_STREAM, Split, split
from .order import permutation
from .packing import Blocks, pack, tokenize
from .sources import Source, fingerprint, resolve
from .tokenizer import JoinerName, Tokenizer, find_joiner, token_id, tokenizer_fingerprint

HUB_CHARACTERS = 8
"""Characters read of a hub data set for every token that is wanted: twice the four or so that a token of text takes."""


@dataclass(frozen=True)
class TokenizedText:
    """What training and evaluation read.

    Attributes:
        train: blocks to train on.
        held_out: blocks to evaluate on. No document that equals one of theirs is trained on; a passage that recurs in
            another document may be.
        record: how both came to be, for tokens.json and report.json.
        fresh: made now, and not found in a cache.
    """

    train: Blocks
    held_out: Blocks
    record: dict[str, Any]
    fresh: bool = True


def prepare(
    train_sources: Sequence[str | Path],
    eval_sources: Sequence[str | Path] | None,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    joiner: JoinerName = "auto",
    separator: str = AUTO,
    column: str | None = None,
    held_out_share: float = 0.05,
    seed: int = 0,
    cache: Path | None = None,
    keep: bool = True,
    max_train_tokens: int | None = None,
    max_held_out_tokens: int | None = None,
    begun: Mapping[str, Mapping[str, Any]] | None = None,
) -> TokenizedText:
    """Read, tokenize, join and cut the text; hold a part out.

    Of a hub data set only the first ``HUB_CHARACTERS`` for every token wanted are read, and what is sampled is sampled
    of these; where no number of tokens is given, all.

    Args:
        train_sources: what ``--data`` names (see ``sources.py``).
        eval_sources: what ``--eval-data`` names; without it ``held_out_share`` of the training text is held out.
        tokenizer: a transformers tokenizer.
        seq_len: T, tokens per block.
        joiner: what stands between documents; ``auto`` is what the tokenizer does itself.
        separator: the line that cuts a .txt into documents; ``auto`` is any ``<|end...|>``.
        column: what counts of a row; None: ``messages``, else ``text``.
        held_out_share: of the tokens, in (0, 0.5).
        seed: decides which documents are held out and which are sampled.
        cache: a folder of an earlier result; a matching one is loaded instead of tokenizing again.
        keep: whether a fresh result is written to ``cache``.
        max_train_tokens: tokenize only about so many, of documents sampled by seed, and cut there.
        max_held_out_tokens: read hub data sets in ``eval_sources`` for so many; files are read whole.
        begun: hub data set as given -> the fingerprint to keep to; the hub is not asked for today's.

    Raises:
        ConfigError: bad sources or options, or too little text; nothing was written.
    """
    _check(train_sources, eval_sources, seq_len, held_out_share, max_train_tokens)
    chosen_joiner = find_joiner(tokenizer, joiner)
    train = [resolve(given) for given in train_sources]
    evaluation = None if eval_sources is None else [resolve(given) for given in eval_sources]
    enough = None
    if max_train_tokens is not None:
        enough = max_train_tokens
        if evaluation is None:  # what is held out comes on top: at most twice the share (see held_out.py)
            enough = math.ceil(enough / (1 - 2 * held_out_share)) + 2 * seq_len
    most, most_held_out = _characters(enough, seq_len), _characters(max_held_out_tokens, seq_len)
    made_from: dict[str, Any] = {
        "data": [_identity(source, most, begun) for source in train],
        "eval_data": None if evaluation is None else [_identity(s, most_held_out, begun) for s in evaluation],
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
    if column is not None:  # absent, keys and records stay those of before there was a choice
        made_from["text_column"] = column
    key = _key(made_from)
    if cache is not None and (found := token_cache.load(cache, key)) is not None:
        # Names of files are no part of the key; the record tells today's.
        return TokenizedText(found[0], found[1], {**found[2], **made_from}, fresh=False)

    train = [_pinned(*pair) for pair in zip(train, made_from["data"], strict=True)]
    how = Reading(separator, column)
    documents, hub_rows = _read(train, how, "reading", most)
    given = None
    if evaluation is not None:
        evaluation = [_pinned(*pair) for pair in zip(evaluation, made_from["eval_data"], strict=True)]
        given, more = _read(evaluation, how, "reading held-out text", most_held_out)
        hub_rows += more
    _check_reading(how, [*train, *(evaluation or [])])

    held_out, dropped = None, 0
    if given is not None:
        kept = _without(documents, given)
        if not kept:
            raise ConfigError(
                f"--data {_names(train)}: every document is also in --eval-data {_names(evaluation or [])}; "
                f"give other text to evaluate on, or leave out --eval-data to hold a part out"
            )
        documents, dropped = kept, len(documents) - len(kept)
        held_out = tokenize(given, tokenizer, chosen_joiner)

    if enough is not None:
        documents = [documents[i] for i in permutation(len(documents), seed, SAMPLE_STREAM).tolist()]
    pieces = tokenize(documents, tokenizer, chosen_joiner, enough=enough)
    if held_out is None:
        parts = split(documents[: len(pieces)], pieces, share=held_out_share, seq_len=seq_len, seed=seed)
    else:
        parts = Split(pieces, held_out, dropped, "the given files", (len(pieces), len(held_out)))
    train_blocks, train_empty = pack(parts.train, seq_len, what=f"--data {_names(train)}", limit=max_train_tokens)
    held_out_blocks, held_out_empty = pack(
        parts.held_out, seq_len, what="the held-out text" if evaluation is None else f"--eval-data {_names(evaluation)}"
    )
    record = {
        **made_from,
        "key": key,
        "separators_found": sorted(how.separators),
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
    if hub_rows:
        record["hub_rows"] = hub_rows
    if empty := train_empty + held_out_empty:
        announce(f"{empty:,} blocks of {seq_len} tokens are left out: none of their tokens is the assistant's")
    if cache is not None and keep:
        token_cache.save(cache, key, train_blocks, held_out_blocks, record)
    return TokenizedText(train_blocks, held_out_blocks, record)


def pack_all(
    sources: Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    joiner: JoinerName = "auto",
    separator: str = AUTO,
    column: str | None = None,
    max_tokens: int | None = None,
) -> Blocks:
    """Every block of the given text, of hub data sets of the beginning; nothing is held out (``hestia eval``).

    ``max_tokens`` is what hub data sets are read for, ``HUB_CHARACTERS`` each; files are read whole.

    Raises:
        ConfigError: bad sources or options, or too little text.
    """
    _check(sources, None, seq_len, 0.05, None)
    resolved = [resolve(given) for given in sources]
    how = Reading(separator, column)
    documents, _ = _read(resolved, how, "reading", _characters(max_tokens, seq_len))
    _check_reading(how, resolved)
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


def _check_reading(how: Reading, sources: Sequence[Source]) -> None:
    """Refuse what was asked for and met nowhere."""
    kinds = {source.kind for source in sources}
    if how.separator != AUTO and not how.separators and "text" in kinds:
        raise ConfigError(
            f"--separator {how.separator!r}: no line of the .txt files equals it; leave it out to read each as one "
            "document"
        )
    if how.column is not None and kinds == {"text"}:
        raise ConfigError(f"--text-column {how.column!r}: a .txt file has no columns; leave it out")


def _read(
    sources: Sequence[Source], how: Reading, description: str, most: int | None
) -> tuple[list[Document], list[dict[str, Any]]]:
    """The documents, ``most`` characters of each hub data set, and how many rows of these were read."""
    extents = [None if source.kind != "hub" or most is None else Extent(most) for source in sources]
    stream = (
        document
        for source, extent in zip(sources, extents, strict=True)
        for document in documents_of(source, how, extent)
    )
    documents = list(track(stream, description))
    hub_rows: list[dict[str, Any]] = []
    for source, extent in zip(sources, extents, strict=True):
        if extent is not None:
            hub_rows.append(
                {"given": source.given, "rows_read": extent.rows, "rest": "none" if extent.whole else "not looked at"}
            )
            announce(f"{source.given}: {extent.rows:,} rows read{'' if extent.whole else ', the rest not looked at'}")
    return documents, hub_rows


def _without(documents: Sequence[Document], others: Sequence[Document]) -> list[Document]:
    """The documents that equal none of the others."""
    digests = {document.digest for document in others}
    return [document for document in documents if document.digest not in digests]


def _characters(tokens: int | None, seq_len: int) -> int | None:
    return None if tokens is None else HUB_CHARACTERS * max(tokens, seq_len)


def _identity(source: Source, most: int | None, begun: Mapping[str, Mapping[str, Any]] | None) -> dict[str, Any]:
    identity = {"given": source.given, "kind": source.kind, "split": source.split}
    if source.kind != "hub":
        return {**identity, "files": fingerprint(source)}
    kept = (begun or {}).get(source.given)
    return {**identity, "files": fingerprint(source) if kept is None else [dict(kept)], "characters_at_most": most}


def _pinned(source: Source, identity: Mapping[str, Any]) -> Source:
    """A hub data set at the commit that its fingerprint names, whatever the hub has meanwhile."""
    if source.kind != "hub":
        return source
    (kept,) = identity["files"]
    return replace(source, config=kept["config"], revision=kept["revision"])


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
