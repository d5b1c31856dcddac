"""Text in, blocks of token ids out. Start in ``blocks.py``; ``sources.py`` says what ``--data`` may name."""

from .blocks import TokenizedText, pack_all, prepare
from .documents import Document, read_documents
from .order import epoch_order
from .packing import Blocks

__all__ = [
    "Blocks",
    "Document",
    "TokenizedText",
    "epoch_order",
    "pack_all",
    "prepare",
    "read_documents",
]
