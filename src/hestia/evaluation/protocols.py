"""Perplexity exactly as a paper measured it, for comparison with that paper's tables and with nothing else.

Hestia (Wang et al. 2026, arXiv:2601.20745; its published evaluation code): whole documents, each with its EOS, are
packed greedily into sequences of at most 2048 tokens. A document that does not fit one sequence is dropped. The token
that follows an EOS is not predicted. On WikiText-2 a "document" is a line, on C4 a web page.

Lines out of their article and long documents dropped make these perplexities higher than the usual ones: Llama-3.2-1B
has 11.41 on WikiText-2 here, about 9.7 in sliding windows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ..data import Blocks
from ..errors import ConfigError
from .scoring import Logits, Score, score

PAPER_TOKENS = 2048
"""The longest sequence of the paper's evaluation."""


@dataclass(frozen=True, kw_only=True)
class ProtocolPerplexity:
    """A perplexity by the Hestia paper's protocol.

    Attributes:
        score: NLL, perplexity and counted tokens; its blocks are the packed sequences.
        documents: non-empty documents given.
        dropped: of these, the ones longer than one sequence.
    """

    score: Score
    documents: int
    dropped: int


def hestia_protocol_perplexity(
    logits: Logits,
    documents_token_ids: Iterable[Sequence[int]],
    *,
    eos: int,
    bos: int | None = None,
    max_len: int = 2048,
    batch_size: int = 1,
) -> ProtocolPerplexity:
    """Perplexity over documents packed as the Hestia paper packs them.

        sequence = [BOS] doc EOS doc EOS ...     at most max_len tokens, documents whole and in order

    Every token of a sequence is a target but its first and those that follow an EOS; the EOS itself is one. Attention
    is not cut at an EOS. Deviation: the BOS counts towards ``max_len``, so that no sequence is longer than the model
    allows (the published code lets a document of exactly ``max_len`` tokens grow by one).

    Args:
        logits: the model.
        documents_token_ids: token ids of each document, without special tokens; empty documents are skipped.
        eos: the tokenizer's end-of-sequence id.
        bos: its beginning-of-sequence id if it puts one in front by itself, else None.
        max_len: longest sequence.
        batch_size: sequences a forward pass (padded on the right, which a causal model does not see).

    Raises:
        ConfigError: nothing is left to predict, because every document was empty or too long.
    """
    head = [] if bos is None else [bos]
    sequences: list[list[int]] = []
    current = list(head)
    documents = dropped = 0
    for document in documents_token_ids:
        if len(document) == 0:
            continue
        documents += 1
        piece = [*document, eos]
        if len(head) + len(piece) > max_len:
            dropped += 1
            continue
        if len(current) + len(piece) > max_len:
            sequences.append(current)
            current = list(head)
        current += piece
    if len(current) > len(head):
        sequences.append(current)
    if not sequences:
        raise ConfigError(
            f"nothing to evaluate: of {documents} documents {dropped} are longer than {max_len} tokens; "
            "raise max_len or cut the text into documents"
        )

    longest = max(len(sequence) for sequence in sequences)
    input_ids = torch.full((len(sequences), longest), eos)
    loss_mask = torch.zeros(input_ids.shape, dtype=torch.bool)
    for i, sequence in enumerate(sequences):
        ids = torch.tensor(sequence)
        input_ids[i, : len(ids)] = ids
        loss_mask[i, 1 : len(ids)] = ids[:-1] != eos
    blocks = Blocks(input_ids=input_ids, loss_mask=loss_mask)
    result = score(logits, blocks, batch_size=batch_size, description="perplexity, Hestia protocol")
    return ProtocolPerplexity(score=result, documents=documents, dropped=dropped)
