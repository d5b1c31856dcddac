"""The tokenizer, held to its tokenizer.json: what the model was trained with and what engines read."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from ..errors import ConfigError
from ..progress import announce
from . import reading
from .configs import LARGEST
from .sources import Source

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


def load_tokenizer(source: Source, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer, which cuts text as its tokenizer.json says.

    Some classes of transformers 5 (GPT2Tokenizer, LlamaTokenizer) take little more than vocabulary and merges from it.
    The model was trained with all of that file and engines read all of it, so where the class cuts ``hard_texts``
    otherwise, the file is loaded as it is.

    Raises:
        ConfigError: there is none, it is damaged, or tokenizer_config.json contradicts tokenizer.json.
    """
    if source.is_local:
        folder = Path(source.location)
        files = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")
        if not any((folder / name).is_file() for name in files):
            raise ConfigError(f"{source.name}: no tokenizer in the folder (looked for {', '.join(files)})")
    file = reading.read(
        source, "tokenizer", cached_file, filename="tokenizer.json", _raise_exceptions_for_missing_entries=False
    )
    written = None if file is None else _tokenizer_file(source, file)
    try:
        tokenizer = reading.read(
            source, "tokenizer", AutoTokenizer.from_pretrained, trust_remote_code=trust_remote_code
        )
    except ConfigError as error:
        if written is None and find_spec("sentencepiece") is None:
            raise ConfigError(
                f"{error}. Without a tokenizer.json it may be a SentencePiece model: pip install sentencepiece"
            ) from None
        raise
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ConfigError(
            f"{source.name}: tokenizer_config.json names {type(tokenizer).__name__}, which is no tokenizer"
        )
    if written is not None and (text := _cut_otherwise(tokenizer, written)) is not None:
        announce(
            f"{source.name}: {type(tokenizer).__name__} cuts {text!r} unlike tokenizer.json, which is used instead"
        )
        tokenizer = reading.read(source, "tokenizer", PreTrainedTokenizerFast.from_pretrained)
        if (text := _cut_otherwise(tokenizer, written)) is not None:
            raise ConfigError(
                f"{source.name}: with tokenizer_config.json {text!r} is not cut as tokenizer.json says; "
                "make the two agree, engines read tokenizer.json alone"
            )
    if not isinstance(tokenizer.model_max_length, (int, float)):
        raise ConfigError(f"{source.name}: tokenizer_config.json: model_max_length must be a number")
    return tokenizer


def hard_texts(tokenizer: Tokenizer) -> list[str]:
    """Texts that tell tokenizers apart: ``HARD_STRINGS``, and one with each of the first added tokens."""
    added = [token for _, token in sorted(tokenizer.get_added_tokens_decoder().items())][:6]
    marks = [token.content if token.special else token.content.replace("▁", " ") for token in added]
    return [*HARD_STRINGS, *(f"{mark}the cat{mark}\nsat {mark}" for mark in marks)]


def _cut_otherwise(tokenizer: PreTrainedTokenizerBase, written: Tokenizer) -> str | None:
    """The first of ``hard_texts`` that ``tokenizer`` cuts in another way than its file; None where there is none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # written in Python: there is nothing to load from the file in its place
        return None
    return next((text for text in hard_texts(written) if _ids(backend, text) != _ids(written, text)), None)


def _ids(tokenizer: Tokenizer, text: str) -> list[int] | None:
    """Token ids; None for what the vocabulary does not cover."""
    try:
        return tokenizer.encode(text).ids
    except Exception as error:
        if type(error) is not Exception:  # as in ``_tokenizer_file``
            raise
        return None


def _tokenizer_file(source: Source, path: str) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception as error:
        if type(error) is not Exception:  # what the library raises for a bad file has no class of its own
            raise
        raise ConfigError(f"{source.name}: cannot read the tokenizer: tokenizer.json: {error}") from None
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= LARGEST["vocab_size"]:
        raise ConfigError(f"{source.name}: tokenizer.json holds token id {largest}, and no vocabulary is that large")
    return tokenizer


def check_vocabulary(source: Source, config: Any, largest: int) -> None:
    """Check that the model knows every token that its tokenizer made of the text.

    Raises:
        ConfigError: ``largest``, the largest id, is beyond the vocabulary.
    """
    size = int(config.get_text_config().vocab_size)
    if largest >= size:
        raise ConfigError(
            f"{source.name}: its tokenizer makes token id {largest}, the model knows {size} tokens; "
            "they do not belong together"
        )


def first_other_token(one: Any, other: Any) -> tuple[int, str, str] | None:
    """The first id that is another token in each of two tokenizers, and both; None where all they share are alike.

    Added tokens do not count: a chat version of the same model may name them anew.
    """
    here, there = _ordinary_tokens(one), _ordinary_tokens(other)
    place = next((i for i in sorted(here.keys() & there.keys()) if here[i] != there[i]), None)
    return None if place is None else (place, here[place], there[place])


def _ordinary_tokens(tokenizer: Any) -> dict[int, str]:
    return {i: text for text, i in tokenizer.get_vocab().items() if i not in tokenizer.added_tokens_decoder}
