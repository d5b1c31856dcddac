"""The tokenizer against its tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from hestia import loading
from hestia.errors import ConfigError


def test_a_tokenizer_that_is_missing_or_damaged(parent_copy: Path) -> None:
    source = loading.resolve(str(parent_copy))
    (parent_copy / "tokenizer.json").write_text('{"version": "1.0"', encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot read the tokenizer"):
        loading.load_tokenizer(source)
    (parent_copy / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer in the folder \(looked for tokenizer\.json"):
        loading.load_tokenizer(source)


def edit_tokenizer(folder: Path, change: Callable[[dict[str, Any]], object], **settings: Any) -> Tokenizer:
    """Change tokenizer.json and tokenizer_config.json, and give what the former says."""
    path, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    change(record)
    path.write_text(json.dumps(record), encoding="utf-8")
    config.write_text(json.dumps({**json.loads(config.read_text(encoding="utf-8")), **settings}), encoding="utf-8")
    return Tokenizer.from_file(str(path))


def _with_digits(record: dict[str, Any]) -> None:
    """Every digit by itself, though the merges would join two."""
    record["model"]["vocab"]["12"] = len(record["model"]["vocab"])
    record["model"]["merges"].append(["1", "2"])
    digits = {"type": "Digits", "individual_digits": True}
    record["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, record["pre_tokenizer"]]}


def _as_llama_2(record: dict[str, Any]) -> None:
    """Spaces as "▁" by a normalizer, and bytes for what is not in the vocabulary."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁thecasonm", "▁t", "▁s"]
    record["model"] |= {
        "vocab": {piece: index for index, piece in enumerate(pieces)},
        "merges": [["▁", "t"], ["▁", "s"]],
        "unk_token": "<unk>",
        "byte_fallback": True,
        "fuse_unk": True,
    }
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    record["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    record["pre_tokenizer"] = None
    shown = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    record["decoder"] = {"type": "Sequence", "decoders": [shown, {"type": "ByteFallback"}, {"type": "Fuse"}]}


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [(_with_digits, "GPT2Tokenizer", "the 12 345"), (_as_llama_2, "LlamaTokenizer", " the cat")],
)
def test_a_class_that_drops_parts_of_tokenizer_json_gives_way_to_the_file(
    parent_copy: Path,
    change: Callable[[dict[str, Any]], object],
    kind: str,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(loading.tokenizers, "announce", said.append)
    written = edit_tokenizer(parent_copy, change, tokenizer_class=kind)
    named = AutoTokenizer.from_pretrained(parent_copy)
    assert named(text)["input_ids"] != written.encode(text).ids
    tokenizer = loading.load_tokenizer(loading.resolve(str(parent_copy)))
    for one in (text, "<s>the cat", *loading.tokenizers.HARD_STRINGS):
        assert tokenizer(one)["input_ids"] == written.encode(one).ids
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.model_max_length) == ("<s>", "</s>", 64)
    assert len(said) == 1 and f"{kind} cuts" in said[0]
    source = loading.resolve(str(parent_copy))
    loading.save(loading.load_model(source), source, tmp_path / "child", tokenizer)
    for one in (text, "<s>the cat", *loading.tokenizers.HARD_STRINGS):
        assert AutoTokenizer.from_pretrained(tmp_path / "child")(one)["input_ids"] == written.encode(one).ids


def test_a_class_that_cuts_as_its_file_does_stays(parent_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.tokenizers, "announce", pytest.fail)
    edit_tokenizer(parent_copy, lambda record: None, tokenizer_class="GPT2Tokenizer")
    assert type(loading.load_tokenizer(loading.resolve(str(parent_copy)))).__name__ == "GPT2Tokenizer"


def test_a_tokenizer_that_does_not_cover_the_hard_strings_is_loaded_as_before(parent_copy: Path) -> None:
    words = {"type": "WordLevel", "vocab": {"the": 0, "cat": 1}, "unk_token": "<none>"}
    written = edit_tokenizer(
        parent_copy, lambda record: record.update(model=words, added_tokens=[], post_processor=None)
    )
    with pytest.raises(Exception, match="Missing"):
        written.encode("the dog")
    assert loading.load_tokenizer(loading.resolve(str(parent_copy)))("the")["input_ids"] == [0]


def test_a_tokenizer_config_that_contradicts_tokenizer_json_is_refused(parent_copy: Path) -> None:
    stripping = {"content": "<s>", "lstrip": True, "rstrip": True, "normalized": False, "special": True}
    edit_tokenizer(parent_copy, lambda record: None, added_tokens_decoder={"1": stripping})
    with pytest.raises(ConfigError, match=r"with tokenizer_config\.json '<s>the cat.* is not cut as tokenizer\.json"):
        loading.load_tokenizer(loading.resolve(str(parent_copy)))


def test_a_sentencepiece_folder_says_what_reads_it(parent_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (parent_copy / "tokenizer.json").unlink()
    (parent_copy / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    monkeypatch.setattr(loading.tokenizers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="it may be a SentencePiece model: pip install sentencepiece"):
        loading.load_tokenizer(loading.resolve(str(parent_copy)))
