"""A chat as token ids, and which of them are the assistant's.

Templates that mark the assistant's text with ``{% generation %}`` say it themselves. For the others the chat is
rendered up to each turn: with ``r(k)`` the first k messages as text, ``p(k)`` the same with the prompt for an answer,

    assistant's turn k   =   r(n)[ len p(k) : len r(k+1) ]        provided p(k) is a prefix of r(k+1), and that of r(n)

so the turn includes whatever the template ends it with. A token counts when it ends inside such a span.
"""

from __future__ import annotations

import contextlib
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

from jinja2 import TemplateError

from ..errors import ConfigError
from .documents import checked_text
from .tokenizer import Tokenizer

TEMPLATE_SECONDS = 10.0
"""That a template may take for one chat; an honest one takes a millisecond."""

_DAY = {"%d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%H": "00", "%M": "00", "%S": "00"}
"""Told to a template that asks for the day: the same chat is the same tokens on every day. Llama 3's own default."""

_REPLACED = "".join(f" | replace('{code}', '{text}')" for code, text in _DAY.items())
_SAME_DAY = "{% macro strftime_now(f) %}{{ f" + _REPLACED + " }}{% endmacro %}"

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
# A template is a program of the checkpoint's author, run on messages that it may not expect; transformers renders it in
# jinja's sandbox, which keeps it from Python's insides and from files.
_TEMPLATE_ERRORS = (
    TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError,
)  # fmt: skip


def chat_tokens(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], where: str
) -> tuple[list[int], list[bool]]:
    """(ids [N], True where the token is the assistant's [N]) of one chat, without joiners.

    Raises:
        ConfigError: the tokenizer has no chat template, the template refuses the messages, or it renders earlier turns
            differently once later ones follow, so that the assistant's turns cannot be told.
    """
    chat = [dict(message) for message in messages]
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise ConfigError(
            f"{where}: a chat, but the tokenizer has no chat template; use a chat model's tokenizer, "
            f"or give plain 'text' instead of 'messages'"
        )
    if _GENERATION_TAG.search(str(template)):
        tagged = _render(tokenizer, chat, where, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = list(tagged["input_ids"]), [bool(flag) for flag in tagged["assistant_masks"]]
        if any(mask):
            return ids, mask
    text = checked_text(_text(tokenizer, chat, where), where)
    spans = _assistant_spans(tokenizer, chat, text, where)
    try:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    except NotImplementedError:
        raise ConfigError(
            f"{where}: chats need a fast tokenizer (tokenizer.json); "
            f"this one cannot tell which characters a token covers"
        ) from None
    ends = [end for _, end in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), [any(start < end <= stop for start, stop in spans) for end in ends]


def _assistant_spans(tokenizer: Tokenizer, chat: list[dict[str, Any]], text: str, where: str) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    for turn, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        # No template renders an empty chat; an answer that nothing precedes starts at the first character.
        prompt = _text(tokenizer, chat[:turn], where, add_generation_prompt=True) if turn else ""
        answered = _text(tokenizer, chat[: turn + 1], where)
        if not (answered.startswith(prompt) and text.startswith(answered)):
            raise ConfigError(
                f"{where}: the chat template renders the chat up to messages[{turn}] differently when more follows, so "
                f"the assistant's tokens cannot be told apart; use a template with {{% generation %}} tags, "
                f"or give the chats as plain 'text'"
            )
        spans.append((len(prompt), len(answered)))
    return spans


def _text(tokenizer: Tokenizer, chat: list[dict[str, Any]], where: str, *, add_generation_prompt: bool = False) -> str:
    return _render(tokenizer, chat, where, tokenize=False, add_generation_prompt=add_generation_prompt)


def _render(tokenizer: Tokenizer, chat: list[dict[str, Any]], where: str, **options: Any) -> Any:
    try:
        with _time_limit(where):
            template = tokenizer.get_chat_template()
            if "strftime_now" in template:
                options["chat_template"] = _SAME_DAY + template
            return tokenizer.apply_chat_template(chat, **options)
    except _TEMPLATE_ERRORS as error:
        why = str(error) or type(error).__name__
        raise ConfigError(f"{where}: the chat template refuses these messages ({why:.300})") from None


@contextlib.contextmanager
def _time_limit(where: str) -> Iterator[None]:
    """End a template that does not end by itself. Outside the main thread, which alone gets signals, it may go on."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise ConfigError(
            f"{where}: the chat template was still busy after {TEMPLATE_SECONDS:g} seconds; it is not used"
        )

    handler = signal.signal(signal.SIGALRM, stop)
    left, interval = signal.setitimer(signal.ITIMER_REAL, TEMPLATE_SECONDS)
    started = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, handler)
        if left:  # somebody else's alarm
            signal.setitimer(signal.ITIMER_REAL, max(0.001, left - (time.monotonic() - started)), interval)
