"""Does the tokenizer in a GGUF file cut text as the one that trained does, and print tokens as it does?

The reference is the frozen model's tokenizer as ``loading`` gives it to training; the other side is llama.cpp. The
strings are those that break tokenizers: spaces in front, emoji, newlines, digits, several scripts at once, special
tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from .. import loading
from . import llama_cpp
from .gguf_reader import open_checked


@dataclass(frozen=True)
class Tokens:
    """How many strings were cut, how many alike, and what to say about the rest."""

    strings: int
    equal: int
    differences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def compare_tokenizers(path: Path, folder: Path) -> Tokens:
    """Cut and print every hard string with llama.cpp and with the tokenizer in ``folder``.

    llama.cpp is known to put the space prefix of SentencePiece-style models behind special tokens and before text that
    begins with a space; strings that differ by these spaces alone become notes, all others differences.

    Raises:
        ConfigError: the folder's tokenizer cannot be loaded.
        ExportError: llama.cpp cannot load the file.
    """
    reference: Any = loading.load_tokenizer(loading.resolve(str(folder)))
    texts = loading.hard_texts(Tokenizer.from_file(str(folder / "tokenizer.json")))
    prefixed = open_checked(path).flag("tokenizer.ggml.add_space_prefix")
    wanted: list[list[int]] = [list(reference(text)["input_ids"]) for text in texts]
    found = llama_cpp.tokenize_all(path, texts)
    printed = llama_cpp.decode_all(path, wanted)
    differences: list[str] = []
    notes: list[str] = []
    for text, want, ids, read in zip(texts, wanted, found, printed, strict=True):
        if ids != want:
            line = f"tokenizer: {text[:40]!r} becomes {_shown(ids)} in llama.cpp, {_shown(want)} in transformers"
            known = prefixed and ids == _with_more_prefixes(reference, text, want)
            (notes if known else differences).append(line)
        said = reference.decode(want, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if read != said and not (prefixed and read == f" {said}"):  # transformers takes the prefix off again
            differences.append(
                f"tokenizer: {_shown(want)} reads {read[:40]!r} in llama.cpp, {said[:40]!r} in transformers"
            )
    equal = sum(ids == want for ids, want in zip(found, wanted, strict=True))
    return Tokens(len(texts), equal, tuple(differences), tuple(notes))


def _with_more_prefixes(reference: Any, text: str, wanted: list[int]) -> list[int]:
    """The ids of ``text`` with a space put in front of every stretch between special tokens, as llama.cpp does."""
    backend: Tokenizer = reference.backend_tokenizer
    added = {token.content: index for index, token in backend.get_added_tokens_decoder().items()}
    pattern = "|".join(map(re.escape, sorted(added, key=len, reverse=True)))
    ids: list[int] = []
    for part in re.split(f"({pattern})", text) if added else [text]:
        if part in added:
            ids.append(added[part])
        elif part:
            ids += [token.id for token in backend.model.tokenize("▁" + part.replace(" ", "▁"))]
    plain = list(reference(text, add_special_tokens=False)["input_ids"])
    start = next((i for i in range(len(wanted) + 1) if wanted[i : i + len(plain)] == plain), None)
    if start is None:  # special tokens that change their neighbours: no prefix explains those
        return wanted
    return [*wanted[:start], *ids, *wanted[start + len(plain) :]]


def _shown(ids: list[int]) -> str:
    return str(ids[:12])[:-1] + (", ...]" if len(ids) > 12 else "]")
