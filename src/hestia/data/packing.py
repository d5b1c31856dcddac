"""From documents to rows of token ids: tokenize, join, cut.

stream = [BOS] doc_1 [EOS] [BOS] doc_2 [EOS] ...        which of the two marks is written is the joiner's choice
rows   = stream[: B*T].reshape(B, T)                    the partial last row is dropped, and rows without a target

A text of more than 4M characters is tokenized in parts, cut behind line breaks. Every shorter one has the very ids that
the tokenizer gives it whole; at a seam they may differ from that: a tokenizer that joins line breaks with what follows
them, or begins every text with a space, does so there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigError
from ..progress import track
from .chat import chat_tokens
from .documents import Document
from .tokenizer import Joiner, Tokenizer

# Encodings take some 150 bytes per token while they are in flight: of this many characters mostly below 200 MB. A batch
# ends with the document that fills it, so it may hold as much as a part more.
_BATCH_CHARACTERS = 2_000_000
_PART_CHARACTERS = 4_000_000


@dataclass(frozen=True)
class Piece:
    """The tokens of one document, its joiners included.

    Attributes:
        ids: int32 [N].
        counts: bool [N], True where the token is a target; None where all are.
    """

    ids: NDArray[np.int32]
    counts: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> Piece:
        return Piece(self.ids[part], None if self.counts is None else self.counts[part])


@dataclass(frozen=True)
class Blocks:
    """Rows of token ids, B rows of T tokens.

    Attributes:
        input_ids: int32 [B, T].
        loss_mask: bool [B, T], True where the token is a target that counts: every token of a text, the assistant's
            turns of a chat. Nothing predicts position 0 of a row, so what the mask holds there changes no loss.
    """

    input_ids: Tensor
    loss_mask: Tensor

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def __getitem__(self, rows: slice) -> Blocks:
        """Some of the rows, as blocks again."""
        return Blocks(self.input_ids[rows], self.loss_mask[rows])

    @property
    def with_target(self) -> Tensor:
        """Rows that teach something, bool [B]: one of their tokens but the first counts."""
        return self.loss_mask[:, 1:].any(dim=1)

    @property
    def tokens(self) -> int:
        """Tokens in all rows, B * T."""
        return self.input_ids.numel()

    def spread(self, most: int) -> Blocks:
        """At most ``most`` of the rows (at least one), evenly spread, so that every source keeps its share."""
        if len(self) <= most:
            return self
        rows = torch.linspace(0, len(self) - 1, max(1, most)).round().long()
        return Blocks(self.input_ids[rows], self.loss_mask[rows])


def tokenize(
    documents: Sequence[Document], tokenizer: Tokenizer, joiner: Joiner, *, enough: int | None = None
) -> list[Piece]:
    """The pieces of ``documents``, in order; stops early, also within a long one, once ``enough`` tokens are there.

    Raises:
        ConfigError: a chat that the tokenizer's template cannot render.
    """
    pieces: list[Piece] = []
    tokens = 0
    batches = list(_batches(documents, enough))
    for batch in track(batches, "tokenizing", total=len(batches)):
        texts = [document.text for document in batch if document.text is not None and not _is_long(document.text)]
        encoded = iter(_encoded(texts, tokenizer))
        for document in batch:
            if document.messages is not None:
                ids, counts = chat_tokens(tokenizer, document.messages, document.source)
                piece = _joined_chat(ids, counts, joiner)
            elif document.text is not None and _is_long(document.text):
                left = None if enough is None else enough - tokens
                piece = _joined(_in_parts(document.text, tokenizer, left), joiner)
            else:
                piece = _joined(next(encoded), joiner)
            pieces.append(piece)
            tokens += len(piece)
            if enough is not None and tokens >= enough:
                return pieces
    return pieces


def pack(pieces: Sequence[Piece], seq_len: int, *, what: str, limit: int | None = None) -> tuple[Blocks, int]:
    """Join ``pieces`` and cut them into rows of ``seq_len`` tokens, at most ``limit`` tokens in all.

    Returns:
        The rows with something to learn, and how many there were without: a loss over no target is 0/0.

    Raises:
        ConfigError: less than one row, or no target in any; ``what`` names the text.
    """
    tokens = sum(map(len, pieces))
    rows = tokens // seq_len
    if rows == 0:
        raise too_short(what, tokens, seq_len, seq_len)
    stream = torch.from_numpy(np.concatenate([piece.ids for piece in pieces])[: rows * seq_len])
    counts = np.concatenate(
        [np.ones(len(piece), dtype=np.bool_) if piece.counts is None else piece.counts for piece in pieces]
    )
    blocks = Blocks(stream.view(rows, seq_len), torch.from_numpy(counts[: rows * seq_len]).view(rows, seq_len))
    taught = blocks.with_target.nonzero().flatten()
    if not len(taught):
        raise ConfigError(f"{what}: no token to learn from; chats need at least one turn with the role 'assistant'")
    kept = taught if limit is None else taught[: max(1, limit // seq_len)]
    return Blocks(blocks.input_ids[kept], blocks.loss_mask[kept]), rows - len(taught)


def too_short(what: str, tokens: int, needed: int, seq_len: int) -> ConfigError:
    """The error for a text that does not fill its blocks."""
    return ConfigError(
        f"{what}: {tokens:,} tokens, at least {needed:,} are needed with --seq-len {seq_len}; "
        f"give more text or a smaller --seq-len"
    )


def _batches(documents: Sequence[Document], enough: int | None) -> Iterator[list[Document]]:
    # With a token limit, small batches keep what is tokenized in vain below a fraction of it.
    most = _BATCH_CHARACTERS if enough is None else min(_BATCH_CHARACTERS, max(1, enough))
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += document.characters
        if characters >= most:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _is_long(text: str) -> bool:
    return len(text) > _PART_CHARACTERS


def _encoded(texts: Sequence[str], tokenizer: Tokenizer) -> Sequence[Sequence[int]]:
    if not texts:
        return ()
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _in_parts(text: str, tokenizer: Tokenizer, enough: int | None) -> NDArray[np.int32]:
    """The ids of a long text, part by part, until ``enough`` are there."""
    parts: list[NDArray[np.int32]] = []
    start = tokens = 0
    while start < len(text) and (enough is None or tokens < enough):
        end = start + _PART_CHARACTERS
        if end < len(text):  # behind the last line break in reach, else behind the first beyond it
            end = text.rfind("\n", start, end) + 1 or text.find("\n", end) + 1 or len(text)
        (ids,) = _encoded([text[start:end]], tokenizer)
        parts.append(np.asarray(ids, dtype=np.int32))
        start, tokens = end, tokens + len(ids)
    return np.concatenate(parts)


def _joined(ids: Sequence[int] | NDArray[np.int32], joiner: Joiner) -> Piece:
    front = [] if joiner.before is None else [joiner.before]
    back = [] if joiner.after is None else [joiner.after]
    return Piece(np.concatenate([np.asarray(part, dtype=np.int32) for part in (front, ids, back)]))


def _joined_chat(ids: Sequence[int], counts: Sequence[bool], joiner: Joiner) -> Piece:
    """Joiners beside a chat are not the assistant's, so they do not count; what the template wrote is not doubled."""
    front = [] if joiner.before is None or ids[:1] == [joiner.before] else [joiner.before]
    back = [] if joiner.after is None or ids[-1:] == [joiner.after] else [joiner.after]
    mask = [False] * len(front) + list(counts) + [False] * len(back)
    return Piece(np.asarray([*front, *ids, *back], dtype=np.int32), np.asarray(mask, dtype=np.bool_))
