"""The assistant's turns, and only they, count in the loss of a chat."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from hestia.data import Blocks, cache, prepare
from hestia.data.chat import chat_tokens
from hestia.errors import ConfigError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TAGGED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{%- generation -%}{{ m.content }}<|im_end|>{%- endgeneration -%}{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Writes the assistant's earlier turns without what only the last one shows, as templates of reasoning models do.
FORGETFUL = (
    "{% for m in messages %}[{{ m.role }}]{% if loop.last and m.role == 'assistant' %}(thought){% endif %}"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "be warm"},
    {"role": "user", "content": "hello, naïve café?"},
    {"role": "assistant", "content": "hi there, 日本語 🙂"},
    {"role": "user", "content": "how are you?"},
    {"role": "assistant", "content": "warm\n\nby the fire "},
]


def counted(tokenizer: Any, chat: list[dict[str, Any]]) -> list[str]:
    """The counted tokens, decoded run by run."""
    ids, counts = chat_tokens(tokenizer, chat, "here")
    assert ids == tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False)["input_ids"]
    assert len(ids) == len(counts)
    runs: list[list[int]] = []
    for i, (token, counts_here) in enumerate(zip(ids, counts, strict=True)):
        if counts_here:
            if i == 0 or not counts[i - 1]:
                runs.append([])
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


def test_spans_by_rendering(make_tokenizer) -> None:
    """The turn, the template's end of it included: a model must learn to stop."""
    tokenizer = make_tokenizer(template=CHATML)
    assert counted(tokenizer, CHAT) == ["hi there, 日本語 🙂<|im_end|>\n", "warm\n\nby the fire <|im_end|>\n"]


def test_spans_by_generation_tags(make_tokenizer) -> None:
    tokenizer = make_tokenizer(template=TAGGED)
    assert counted(tokenizer, CHAT) == ["hi there, 日本語 🙂<|im_end|>", "warm\n\nby the fire <|im_end|>"]


def test_a_token_across_the_boundary_counts_where_it_ends(make_tokenizer) -> None:
    """`assistant: hi` is cut before ` hi`, which holds the prompt's space and the answer's first letters."""
    tokenizer = make_tokenizer(template=PLAIN, extra=60)
    first, second = counted(tokenizer, CHAT)
    assert first.strip() == "hi there, 日本語 🙂"
    assert second.strip() == "warm\n\nby the fire"


def test_a_chat_that_the_assistant_opens(make_tokenizer) -> None:
    tokenizer = make_tokenizer(template=CHATML)
    chat = [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "bye"}]
    assert counted(tokenizer, chat) == ["<|im_start|>assistant\nhello<|im_end|>\n"]


def test_without_template(make_tokenizer) -> None:
    with pytest.raises(ConfigError, match="here: a chat, but the tokenizer has no chat template"):
        chat_tokens(make_tokenizer(), CHAT, "here")


def test_template_that_does_not_nest(make_tokenizer) -> None:
    tokenizer = make_tokenizer(template=FORGETFUL)
    with pytest.raises(ConfigError, match=r"up to messages\[2\] differently when more follows"):
        chat_tokens(tokenizer, CHAT, "here")


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no system role') }}", "{{ messages[7].content }}", "{% if %}"]
)
def test_template_that_refuses(make_tokenizer, template: str) -> None:
    with pytest.raises(ConfigError, match="here: the chat template refuses these messages"):
        chat_tokens(make_tokenizer(template=template), CHAT, "here")


@pytest.mark.parametrize("template", [CHATML, TAGGED])
@pytest.mark.parametrize("joiner", ["bos", "eos", "both"])
def test_chats_in_blocks(make_tokenizer, tmp_path: Path, template: str, joiner: Any) -> None:
    """Rows and masks are those of the joined stream, where there is a target; the joiners themselves do not count."""
    tokenizer = make_tokenizer(template=template)
    path = tmp_path / "chats.jsonl"
    chats = [[*CHAT[:2], {"role": "assistant", "content": f"answer {i}"}] for i in range(6)]
    path.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"messages": CHAT}))
    made = prepare([path], [held], tokenizer, seq_len=16, joiner=joiner)
    stream: list[tuple[int, bool]] = []
    for chat in chats:
        ids, counts = chat_tokens(tokenizer, chat, "here")
        before = [(tokenizer.bos_token_id, False)] if joiner != "eos" else []
        after = [(tokenizer.eos_token_id, False)] if joiner != "bos" else []
        stream += [*before, *zip(ids, counts, strict=True), *after]
    rows = [stream[start : start + 16] for start in range(0, len(stream) - 15, 16)]
    taught = [row for row in rows if any(counts for _, counts in row[1:])]
    assert 0 < len(taught) < len(rows)
    assert made.train.input_ids.tolist() == [[token for token, _ in row] for row in taught]
    assert made.train.loss_mask.tolist() == [[counts for _, counts in row] for row in taught]
    assert made.train.loss_mask.dtype == torch.bool
    assert made.record["blocks"]["train"] == len(taught)
    assert made.record["blocks_without_target"]["train"] == len(rows) - len(taught)


def test_a_cache_with_blocks_without_a_target_is_stale(make_tokenizer, tmp_path: Path) -> None:
    """Earlier versions kept them; a cache of theirs whose blocks all have one stays as it is."""
    tokenizer, path, folder = make_tokenizer(template=CHATML), tmp_path / "chats.jsonl", tmp_path / "cache"
    path.write_text("\n".join(json.dumps({"messages": [*CHAT, {"role": "user", "content": str(i)}]}) for i in range(9)))
    made = prepare([path], None, tokenizer, seq_len=16, cache=folder)
    key = made.record["key"]
    assert cache.load(folder, key) is not None
    mask = made.train.loss_mask.clone()
    mask[0, 1:] = False
    cache.save(folder, key, Blocks(made.train.input_ids, mask), made.held_out, made.record)
    assert cache.load(folder, key) is None
    assert torch.equal(prepare([path], None, tokenizer, seq_len=16, cache=folder).train.loss_mask, made.train.loss_mask)


def test_marks_that_the_template_writes_are_not_doubled(make_tokenizer, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(template="{{ bos_token }}" + PLAIN + "{{ eos_token }}")
    path = tmp_path / "chats.jsonl"
    path.write_text(
        "\n".join(json.dumps({"messages": [{"role": "user", "content": str(i)}, *CHAT[2:3]]}) for i in range(9))
    )
    # This template closes every rendering with EOS, so what it writes for the first turns is no prefix of the rest.
    with pytest.raises(ConfigError, match="differently"):
        chat_tokens(tokenizer, CHAT, "here")
    tokenizer.chat_template = "{{ bos_token }}" + PLAIN
    made = prepare([path], None, tokenizer, seq_len=16, joiner="bos")
    ids = torch.cat([made.train.input_ids.flatten(), made.held_out.input_ids.flatten()]).tolist()
    assert not any(a == b == tokenizer.bos_token_id for a, b in zip(ids, ids[1:], strict=False))
    assert tokenizer.bos_token_id in ids


def test_chats_without_an_assistant(make_tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"messages": [{"role": "user", "content": f"hello {i}"}]}) for i in range(20)))
    with pytest.raises(ConfigError, match="at least one turn with the role 'assistant'"):
        prepare([path], None, make_tokenizer(template=CHATML), seq_len=16)


def test_a_template_without_end_is_ended_and_the_alarm_given_back(
    make_tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hestia.data.chat.TEMPLATE_SECONDS", 0.2)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    before = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    with pytest.raises(ConfigError, match=r"here: the chat template was still busy after 0\.2 seconds"):
        chat_tokens(make_tokenizer(template=endless), [{"role": "user", "content": "hi"}], "here")
    after = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    assert after[0] is before[0]
    assert (after[1][0] > 0) == (before[1][0] > 0)


def test_a_template_that_asks_for_the_day_gets_the_same_on_every_day(make_tokenizer) -> None:
    tokenizer = make_tokenizer(template="{{ strftime_now('%d %b %Y') }} " + PLAIN)
    ids, _ = chat_tokens(tokenizer, CHAT, "here")
    assert tokenizer.decode(ids).startswith("26 Jul 2024")


def test_an_end_that_the_template_writes_is_not_doubled(make_tokenizer, tmp_path: Path) -> None:
    """Every turn closes with EOS here, and EOS joins the chats."""
    turn = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer = make_tokenizer(template=turn + "{% if add_generation_prompt %}assistant: {% endif %}")
    path = tmp_path / "chats.jsonl"
    chats = [[{"role": "user", "content": str(i)}, CHAT[2]] for i in range(9)]
    path.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    made = prepare([path], None, tokenizer, seq_len=16, joiner="eos")
    ids = torch.cat([made.train.input_ids.flatten(), made.held_out.input_ids.flatten()]).tolist()
    assert tokenizer.eos_token_id in ids
    assert not any(a == b == tokenizer.eos_token_id for a, b in zip(ids, ids[1:], strict=False))


def test_a_template_that_marks_nothing_is_asked_by_rendering(make_tokenizer) -> None:
    """Its tag stands in a branch that these messages do not take."""
    never = "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    found, plain = (chat_tokens(make_tokenizer(template=t), CHAT, "here") for t in (never + PLAIN, PLAIN))
    assert found == plain and any(found[1])
