"""Which part of the text is kept from training when the user names none.

By document where that comes out near the share asked for, half of it to twice: whole documents, in an order fixed by
the seed, until the share is reached. Else (one document, or a few long ones, whatever short ones lie beside them) the
tail of the longest document. A training document that is identical to one that was held out, in whole or in part, is
dropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from .documents import Document
from .order import permutation
from .packing import Piece, too_short

# Stream numbers of permutations: epochs count up from 0.
HELD_OUT_STREAM = -1
SAMPLE_STREAM = -2
# A choice by document may miss the share by this factor, above or below, not more.
_SLACK = 2


@dataclass(frozen=True)
class Split:
    """Pieces to train on and pieces held out.

    Attributes:
        train: pieces in the order of the files.
        held_out: likewise.
        dropped: training documents left out because their text is held out.
        rule: how it was cut, for people.
        documents: (training documents, held-out documents); a cut one counts in both.
    """

    train: list[Piece]
    held_out: list[Piece]
    dropped: int
    rule: str
    documents: tuple[int, int]


def split(documents: Sequence[Document], pieces: Sequence[Piece], *, share: float, seq_len: int, seed: int) -> Split:
    """Hold out about ``share`` of the tokens, at least one block, and leave at least one block to train on.

    Raises:
        ConfigError: the text is too short for both.
    """
    lengths = [len(piece) for piece in pieces]
    total = sum(lengths)
    wanted = max(math.ceil(share * total), seq_len)
    chosen = _choose(lengths, wanted, seq_len, seed)
    if sum(lengths[i] for i in chosen) >= max(seq_len, wanted / _SLACK):
        held = {documents[i].digest for i in chosen}
        kept = [i for i in range(len(pieces)) if i not in chosen and documents[i].digest not in held]
        if sum(lengths[i] for i in kept) >= seq_len:
            return Split(
                train=[pieces[i] for i in kept],
                held_out=[pieces[i] for i in sorted(chosen)],
                dropped=len(pieces) - len(chosen) - len(kept),
                rule=f"{len(chosen)} of {len(pieces)} documents, chosen by seed {seed}",
                documents=(len(kept), len(chosen)),
            )
    return _cut_tail(documents, pieces, wanted, seq_len)


def _choose(lengths: Sequence[int], wanted: int, seq_len: int, seed: int) -> set[int]:
    most = min(_SLACK * wanted, sum(lengths) - seq_len)
    chosen: set[int] = set()
    held = 0
    for i in permutation(len(lengths), seed, HELD_OUT_STREAM).tolist():
        if held >= wanted:
            break
        if held + lengths[i] <= most:
            chosen.add(i)
            held += lengths[i]
    return chosen


def _cut_tail(documents: Sequence[Document], pieces: Sequence[Piece], wanted: int, seq_len: int) -> Split:
    longest = max(range(len(pieces)), key=lambda i: len(pieces[i]))
    kept = [i for i in range(len(pieces)) if i == longest or documents[i].digest != documents[longest].digest]
    total = sum(len(pieces[i]) for i in kept)
    blocks = min(math.ceil(wanted / seq_len), len(pieces[longest]) // seq_len, total // seq_len - 1)
    if blocks < 1:
        what = f"{len(pieces)} documents" if len(pieces) > 1 else documents[0].source
        if total >= 2 * seq_len:
            raise ConfigError(
                f"{what}: none is as long as a block of --seq-len {seq_len} (the longest has {len(pieces[longest]):,} "
                "tokens), and too few remain when some are held out; give --eval-data, more text or a smaller --seq-len"
            )
        raise too_short(f"{what}, to be cut into training and held-out blocks", total, 2 * seq_len, seq_len)
    # Whole blocks, counted from the end, so the boundary is also a boundary of held-out blocks.
    boundary = len(pieces[longest]) - blocks * seq_len
    head, tail = pieces[longest][:boundary], pieces[longest][boundary:]
    train = [head if i == longest else pieces[i] for i in kept]
    return Split(
        train=[piece for piece in train if len(piece)],
        held_out=[tail],
        dropped=len(pieces) - len(kept),
        rule=f"the last {len(tail)} tokens of the longest document ({documents[longest].source})",
        documents=(len(kept) - (boundary == 0), 1),
    )
