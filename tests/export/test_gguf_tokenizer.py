"""gguf_tokenizer.py: translated tokenizers merge as llama.cpp merges, and untranslatable ones are refused by name."""

import heapq
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gguf import byte_fallback, byte_level
from tokenizers import Tokenizer

from hestia.errors import ExportError
from hestia.export import gguf_tokenizer
from hestia.export.gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, tokenizer_metadata


def translate(
    folder: Path, record: dict[str, Any], rows: int = 400, config: dict[str, Any] | None = None, **settings: Any
) -> dict[str, Any]:
    """The metadata of a tokenizer, values alone, without their ``tokenizer.ggml.`` prefix."""
    (folder / "tokenizer.json").write_text(json.dumps(record))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    found = tokenizer_metadata(folder, config or {}, rows)
    return {key.removeprefix("tokenizer.ggml."): value.value for key, value in found.items()}


def merge_by_score(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """SentencePiece's merging as llama.cpp does it: the neighbours whose union has the best score, leftmost first."""
    ids = {token: index for index, token in enumerate(tokens)}
    pieces: list[str | None] = list(text)
    queue: list[tuple[float, int, int, str]] = []

    def propose(left: int, right: int) -> None:
        if left >= 0 and right < len(pieces):
            union = f"{pieces[left]}{pieces[right]}"
            if union in ids:
                heapq.heappush(queue, (-scores[ids[union]], left, right, union))

    def neighbour(index: int, step: int) -> int:
        index += step
        while 0 <= index < len(pieces) and pieces[index] is None:
            index += step
        return index

    for i in range(len(pieces) - 1):
        propose(i, i + 1)
    while queue:
        _, left, right, union = heapq.heappop(queue)
        if pieces[left] is None or pieces[right] is None or f"{pieces[left]}{pieces[right]}" != union:
            continue
        pieces[left], pieces[right] = union, None
        propose(neighbour(left, -1), left)
        propose(left, neighbour(left, 1))
    out: list[int] = []
    for piece in pieces:
        if piece is not None:
            out += [ids[piece]] if piece in ids else [ids[f"<0x{b:02X}>"] for b in piece.encode()]
    return out


RECORD = byte_fallback()
HF = Tokenizer.from_str(json.dumps(RECORD))


@settings(max_examples=150, deadline=None)
@given(st.text(st.sampled_from("thecaonsm ,.é€😀1\n"), max_size=40))
def test_scores_reproduce_the_merges(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    found = translate(tmp_path_factory.mktemp("spm"), RECORD)
    merged = merge_by_score("▁" + text.replace(" ", "▁"), found["tokens"], found["scores"])
    assert HF.encode(text, add_special_tokens=False).ids == (merged if text else [])


def test_types_scores_and_flags_of_a_byte_fallback_tokenizer(tmp_path: Path) -> None:
    found = translate(tmp_path, RECORD, unk_token="<unk>", eos_token={"content": "</s>"})
    size = len(RECORD["model"]["vocab"])
    assert found["model"] == "llama"
    assert found["tokens"][:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert found["token_type"][:4] == [UNKNOWN, CONTROL, CONTROL, BYTE]
    assert set(found["token_type"][259:size]) == {NORMAL}
    assert set(found["token_type"][size:]) == {UNUSED}
    assert found["tokens"][-1] == "[PAD399]"
    first = "".join(RECORD["model"]["merges"][0])
    assert found["scores"][found["tokens"].index(first)] == 0.0
    third = "".join(RECORD["model"]["merges"][2])
    assert found["scores"][found["tokens"].index(third)] == -2.0
    assert (found["bos_token_id"], found["eos_token_id"], found["unknown_token_id"]) == (1, 2, 0)
    assert (found["add_bos_token"], found["add_eos_token"], found["add_space_prefix"]) == (True, False, True)
    assert "padding_token_id" not in found


def test_a_token_that_only_llama_cpp_would_merge_is_refused(tmp_path: Path) -> None:
    record = byte_fallback()
    record["model"]["merges"] = [["t", "h"], ["h", "e"], ["t", "he"]]
    single = {t: i for t, i in record["model"]["vocab"].items() if len(t) == 1 or t.startswith("<")}
    record["model"]["vocab"] = single | {"th": 390, "he": 391, "the": 392}
    # "the" is merged as th + e, which is no merge: HF never makes it, llama.cpp would
    with pytest.raises(ExportError, match=r"never make the token 'the', but llama\.cpp would, from 'th' \+ 'e'"):
        translate(tmp_path, record)


def test_an_added_token_of_spaces_is_normal_where_merges_make_it(tmp_path: Path) -> None:
    record = byte_fallback()
    record["model"]["merges"] = [["▁", "▁"], *record["model"]["merges"]]
    record["model"]["vocab"]["▁▁"] = 390
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    record["added_tokens"] += [{"id": 390, "content": "▁▁", **flags}, {"id": 391, "content": "<tool>", **flags}]
    found = translate(tmp_path, record)
    assert (found["tokens"][390], found["token_type"][390], found["scores"][390]) == ("▁▁", NORMAL, 0.0)
    assert found["token_type"][391] == USER_DEFINED
    record["added_tokens"].append({"id": 392, "content": "▁tool", **flags})
    with pytest.raises(ExportError, match="no merges make the added token '▁tool'"):
        translate(tmp_path, record)


def test_byte_level_tokens_and_merges(tmp_path: Path) -> None:
    record = byte_level()
    found = translate(tmp_path, record, config={"bos_token_id": 0, "eos_token_id": [0, 5]}, pad_token="<|end|>")
    assert (found["model"], found["pre"]) == ("gpt2", "gpt-2")
    assert found["tokens"][0] == "<|end|>"
    assert found["token_type"][0] == CONTROL
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in record["model"]["merges"]]
    assert [tuple(m.split(" ")) for m in found["merges"]] == merges
    assert (found["bos_token_id"], found["eos_token_id"], found["padding_token_id"]) == (0, 0, 0)
    assert (found["add_bos_token"], found["add_eos_token"]) == (False, False)
    assert "scores" not in found


def test_special_tokens_that_only_the_generation_settings_name(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5], "pad_token_id": 0}))
    found = translate(tmp_path, byte_level(), config={"bos_token_id": 1, "pad_token_id": 3})
    assert (found["bos_token_id"], found["eos_token_id"], found["padding_token_id"]) == (1, 2, 3)
    assert "unknown_token_id" not in found


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def sequence(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(parts)}


@pytest.mark.parametrize(
    ("pre_tokenizer", "ignore_merges", "name"),
    [
        (BYTES | {"use_regex": True}, False, "gpt-2"),
        (sequence(split(GPT2), BYTES), False, "gpt-2"),
        (sequence({"type": "Digits", "individual_digits": True}, BYTES | {"use_regex": True}), False, "smollm"),
        (sequence(split(LLAMA3), BYTES), True, "llama-bpe"),
        (sequence(split(LLAMA3), BYTES), False, "smaug-bpe"),
        (sequence(split(LLAMA3.replace("{1,3}", "")), BYTES), False, "qwen2"),
    ],
)
def test_pre_tokenizers_that_llama_cpp_knows(
    tmp_path: Path, pre_tokenizer: dict[str, Any], ignore_merges: bool, name: str
) -> None:
    record = byte_level()
    record["pre_tokenizer"] = pre_tokenizer
    record["model"]["ignore_merges"] = ignore_merges
    assert translate(tmp_path, record)["pre"] == name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre_tokenizer": sequence(split(r"\w+"), BYTES)}, "knows no llama.cpp name"),
        ({"pre_tokenizer": BYTES}, "knows no llama.cpp name"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "no counterpart of the pre_tokenizer"),
        ({"pre_tokenizer": BYTES | {"add_prefix_space": True}}, "add_prefix_space"),
        ({"normalizer": {"type": "Lowercase"}}, "no counterpart of the normalizer"),
        ({"post_processor": {"type": "BertProcessing"}}, "post_processor BertProcessing"),
        ({"model": {"type": "Unigram", "vocab": []}}, "a Unigram tokenizer cannot be exported to GGUF"),
    ],
)
def test_byte_level_tokenizers_without_a_counterpart(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        translate(tmp_path, byte_level() | change)


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "prefix"),
    [
        ({"type": "Replace", "pattern": {"String": " "}, "content": "▁"}, None, False),
        (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}, True),
        (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": True}, False),
        (None, None, "writes spaces"),
        ({"type": "NFKC"}, None, "normalizer"),
        (None, {"type": "Whitespace"}, "pre_tokenizer"),
    ],
)
def test_space_prefix(tmp_path: Path, normalizer: Any, pre_tokenizer: Any, prefix: bool | str) -> None:
    record = byte_fallback() | {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer}
    if isinstance(prefix, bool):
        assert translate(tmp_path, record)["add_space_prefix"] is prefix
    else:
        with pytest.raises(ExportError, match=prefix):
            translate(tmp_path, record)


def test_vocabularies_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="has id 299, the embedding has 299 rows"):
        record = byte_level()
        record["model"]["vocab"]["zzzz"] = 299
        translate(tmp_path, record, rows=299)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    for content, options, message in (
        ("<mask>", {"lstrip": True}, "no lstrip for the added token '<mask>'"),
        ("Ġthe", {}, "two ids share the text 'Ġthe'"),
        ("", {}, "is empty"),
    ):
        record = byte_level()
        record["added_tokens"].append({"id": 350, "content": content, **flags, **options})
        with pytest.raises(ExportError, match=message):
            translate(tmp_path, record)
    record = byte_level()
    record["added_tokens"].append({"id": 350, "content": "<tool>", **flags})
    found = translate(tmp_path, record)
    assert (found["tokens"][350], found["token_type"][350]) == ("<tool>", USER_DEFINED)
    record = byte_fallback()
    del record["model"]["vocab"]["<0x7F>"]
    with pytest.raises(ExportError, match="<0x7F> is missing"):
        translate(tmp_path, record)
    with pytest.raises(ExportError, match="special token '<nope>'"):
        translate(tmp_path, byte_level(), bos_token="<nope>")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ExportError, match=r"tokenizer\.json: no such file"):
        tokenizer_metadata(tmp_path, {}, 10)


def test_tokens_around_a_text_must_be_bos_and_eos(tmp_path: Path) -> None:
    record = byte_fallback()
    with pytest.raises(ExportError, match=r"puts tokens \[1\] in front .* only the bos token \(2\)"):
        translate(tmp_path, record, bos_token="</s>")
    eos = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    record["post_processor"]["single"].append(eos)
    record["post_processor"]["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    found = translate(tmp_path, record)
    assert (found["eos_token_id"], found["add_eos_token"]) == (2, True)


def test_chat_templates(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "a"}, {"name": "tools", "template": "b"}]
    found = translate(tmp_path, byte_level(), chat_template=named)
    assert found["tokenizer.chat_template"] == "a"
    assert found["tokenizer.chat_template.tools"] == "b"
    assert found["tokenizer.chat_templates"] == ["tools"]
    (tmp_path / "chat_template.jinja").write_bytes("{# é #}\r\n x".encode())
    assert translate(tmp_path, byte_level(), chat_template="no")["tokenizer.chat_template"] == "{# é #}\r\n x"
    more = tmp_path / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_bytes("é\r\n".encode())
    (more / "rag.jinja").write_text("c")
    found = translate(tmp_path, byte_level(), chat_template=named)
    assert found["tokenizer.chat_template"] == "{# é #}\r\n x"
    assert found["tokenizer.chat_templates"] == ["rag", "tool_use"]
    assert found["tokenizer.chat_template.tool_use"] == "é\r\n" and found["tokenizer.chat_template.rag"] == "c"
    assert "tokenizer.chat_template.tools" not in found  # files outrank tokenizer_config.json
    (tmp_path / "chat_template.jinja").unlink()
    found = translate(tmp_path, byte_level(), chat_template=named)
    assert "tokenizer.chat_template" not in found and found["tokenizer.chat_templates"] == ["rag", "tool_use"]
    shutil.rmtree(more)
    assert "tokenizer.chat_template" not in translate(tmp_path, byte_level())


def test_a_text_that_two_ids_share_is_found_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0

    class Token(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

    record = byte_level()
    vocabulary = {Token(f"t{i}"): i for i in range(3000)}
    record["model"]["vocab"] = vocabulary
    record["added_tokens"] = [{"id": 3000, "content": Token("t2999"), "special": True}]
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(gguf_tokenizer, "read_json", lambda path: record)
    with pytest.raises(ExportError, match="two ids share the text 't2999'"):
        tokenizer_metadata(tmp_path, {}, 3001)
    assert compared < 100 * len(vocabulary)


def test_a_tokenizer_that_merges_nothing_is_refused(tmp_path: Path) -> None:
    record = byte_level()
    record["model"]["merges"] = []
    with pytest.raises(ExportError, match="needs merges whose parts hold no spaces"):
        translate(tmp_path, record)


@pytest.mark.parametrize(
    ("option", "value"), [("dropout", 0.1), ("end_of_word_suffix", "</w>"), ("continuing_subword_prefix", "##")]
)
def test_options_that_llama_cpp_does_not_know_are_refused_by_name(tmp_path: Path, option: str, value: object) -> None:
    record = byte_level()
    record["model"][option] = value
    with pytest.raises(ExportError, match=f"has no {option}"):
        translate(tmp_path, record)


def test_cutting_at_spaces_is_refused_where_a_token_spans_one(tmp_path: Path) -> None:
    record = byte_fallback()
    record["normalizer"] = None
    record["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    vocabulary = record["model"]["vocab"]
    vocabulary["a▁b"] = len(vocabulary)
    with pytest.raises(ExportError, match="cuts at spaces"):
        translate(tmp_path, record, rows=len(vocabulary))


def test_a_character_that_is_no_token_is_where_llama_cpp_begins_all_the_same(tmp_path: Path) -> None:
    record = byte_fallback()
    vocabulary = record["model"]["vocab"]
    record["model"]["merges"] = []
    record["model"]["vocab"] = {t: i for t, i in vocabulary.items() if len(t) == 1 or t.startswith("<")} | {"ßy": 390}
    with pytest.raises(ExportError, match=r"never make the token 'ßy', but llama\.cpp would, from 'ß' \+ 'y'"):
        translate(tmp_path, record)
