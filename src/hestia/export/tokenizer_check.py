"""Does the tokenizer in a GGUF file cut text as the parent's tokenizer does?

The reference is ``tokenizer.json`` itself, run by the tokenizers library; the other side is llama.cpp. The strings are
those that break tokenizers: spaces in front, emoji, newlines, digits, several scripts at once, special tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from . import llama_cpp

HARD_STRINGS = (
    "",
    "the cat sat",
    " one",
    "  two spaces in front",
    "trailing space ",
    "\n\nlines\n \n",
    "\ttabs\t and  gaps  ",
    "crlf\r\nand\rcr",
    "emoji 😀👩‍👩‍👧 and ½ ² Ⅷ ٣",
    "0 12 345 6789 12345678 3.14 v2",
    "Привет 你好 عربى हिन्दी 日本語 naïve",
    "don't I'LL we've it's",
    "\u00a0nbsp \u200bzero width",
    "_init__(self): return {}[0];",
    "<0x0A> ▁under",
    "a" * 200,
)


@dataclass(frozen=True)
class Tokens:
    """How many strings were cut, how many alike, and what to say about the rest."""

    strings: int
    equal: int
    differences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def compare_tokenizers(path: Path, folder: Path) -> Tokens:
    """Cut every hard string with llama.cpp and with ``folder/tokenizer.json``.

    llama.cpp is known to put the space prefix of SentencePiece-style models behind special tokens and before text that
    begins with a space; strings of those two kinds become notes, all others differences.

    Raises:
        ExportError: llama.cpp cannot load the file.
    """
    file = folder / "tokenizer.json"
    record = json.loads(file.read_bytes())
    reference = Tokenizer.from_file(str(file))
    special = [token["content"] for token in record.get("added_tokens", [])][:6]
    texts = [*HARD_STRINGS, *(f"{token}the cat{token}\nsat {token}" for token in special)]
    found = llama_cpp.tokenize_all(path, texts)
    prefixed = bool((record.get("model") or {}).get("byte_fallback")) or record["model"].get("type") == "Unigram"
    differences: list[str] = []
    notes: list[str] = []
    for text, ids in zip(texts, found, strict=True):
        wanted = reference.encode(text).ids
        if ids == wanted:
            continue
        line = f"tokenizer: {text[:40]!r} becomes {_shown(ids)} in llama.cpp, {_shown(wanted)} in transformers"
        known = prefixed and (text.startswith(" ") or any(token in text for token in special))
        (notes if known else differences).append(line)
    return Tokens(len(texts), len(texts) - len(differences) - len(notes), tuple(differences), tuple(notes))


def _shown(ids: list[int]) -> str:
    return str(ids[:12])[:-1] + (", ...]" if len(ids) > 12 else "]")
