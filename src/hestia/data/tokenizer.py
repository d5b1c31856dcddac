"""What the tokenizer decides besides ids: what stands between documents, and whether cached ids are still its own."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from ..errors import ConfigError, nearest

JoinerName = Literal["auto", "bos", "eos", "both"]

_PROBE = "a"


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer; ``bos_token_id`` and ``eos_token_id`` are read too, where present."""

    def __call__(self, text: Any, *, add_special_tokens: bool = ..., **kwargs: Any) -> Any:
        """Token ids under the key ``input_ids``."""
        ...

    def get_chat_template(self) -> str:
        """The template of chats."""
        ...

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """A chat as one string, or tokenized."""
        ...


@dataclass(frozen=True)
class Joiner:
    """What stands between documents.

    Attributes:
        name: ``bos``, ``eos`` or ``both``.
        before: token id in front of each document, or None.
        after: token id behind each document, or None.
    """

    name: str
    before: int | None
    after: int | None


def find_joiner(tokenizer: Tokenizer, asked: JoinerName = "auto") -> Joiner:
    """The joiner ``asked`` for; ``auto`` is BOS in front if the tokenizer itself puts one there, else EOS behind.

    Raises:
        ConfigError: no such joiner, or the tokenizer has no such token.
    """
    if asked not in get_args(JoinerName):
        raise ConfigError(f"--joiner {asked!r}: {nearest(asked, get_args(JoinerName))}")
    bos, eos = token_id(tokenizer, "bos_token_id"), token_id(tokenizer, "eos_token_id")
    name = asked
    if asked == "auto":
        name = "bos" if bos is not None and _adds_in_front(tokenizer, bos) else "eos"
    for mark, token, needing in (("BOS", bos, ("bos", "both")), ("EOS", eos, ("eos", "both"))):
        if name in needing and token is None:
            other = "bos" if mark == "EOS" else "eos"
            has_other = (bos if mark == "EOS" else eos) is not None
            hint = f"write --joiner {other}" if has_other else "give it a bos_token or an eos_token"
            raise ConfigError(f"--joiner {asked}: the tokenizer has no {mark} token to join documents with; {hint}")
    return Joiner(name, bos if name != "eos" else None, eos if name != "bos" else None)


def token_id(tokenizer: Tokenizer, which: str) -> int | None:
    """``bos_token_id`` or ``eos_token_id`` of a tokenizer, None where it has none."""
    value = getattr(tokenizer, which, None)
    return value if isinstance(value, int) else None


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 over everything that decides the ids: vocabulary, rules, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        # Left behind by whoever used the tokenizer last; both are off here.
        rules.pop("truncation", None)
        rules.pop("padding", None)
    else:
        rules = {"class": type(tokenizer).__name__, "vocabulary": getattr(tokenizer, "get_vocab", dict)()}
    marks = [token_id(tokenizer, "bos_token_id"), token_id(tokenizer, "eos_token_id")]
    content = json.dumps([rules, marks, getattr(tokenizer, "chat_template", None)], sort_keys=True, default=str)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def _adds_in_front(tokenizer: Tokenizer, bos: int) -> bool:
    plain = list(tokenizer(_PROBE, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(_PROBE, add_special_tokens=True)["input_ids"])
    return len(whole) > len(plain) and whole[0] == bos
