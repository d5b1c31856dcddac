"""tokenizer_check.py: llama.cpp is played by its rules on the file's own metadata, and whoever breaks them is found."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_gguf import byte_fallback, byte_level, make_run
from test_gguf_tokenizer import merge_by_score
from tokenizers import Tokenizer

from hestia.export import llama_cpp, tokenizer_check
from hestia.export.gguf import export_gguf
from hestia.export.gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, tokenizer_metadata
from hestia.export.tokenizer_check import Tokens, compare_tokenizers
from hestia.targets import target

METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
SPACES = {"id": 0, "content": "▁▁", "special": False} | dict.fromkeys(
    ("single_word", "lstrip", "rstrip", "normalized"), False
)


class SentencePiece:
    """llama.cpp's tokenizer for models with byte fallback."""

    def __init__(self, folder: Path) -> None:
        found = {k.removeprefix("tokenizer.ggml."): v.value for k, v in tokenizer_metadata(folder, {}, 384).items()}
        self.tokens, self.scores, self.types = (found[k] for k in ("tokens", "scores", "token_type"))
        self.prefix: bool = found["add_space_prefix"]
        self.drops_leading_spaces = False

    def tokenize(self, text: str) -> list[int]:
        parted = [t for t, k in zip(self.tokens, self.types, strict=True) if k in (UNKNOWN, CONTROL, USER_DEFINED)]
        ids = [self.tokens.index("<s>")]
        for part in re.split("({})".format("|".join(map(re.escape, parted))), text):
            if part in parted:
                ids.append(self.tokens.index(part))
            elif part:
                raw = part.lstrip(" ") if self.drops_leading_spaces else part
                ids += merge_by_score((" " * self.prefix + raw).replace(" ", "▁"), self.tokens, self.scores)
        return ids

    def decode(self, ids: list[int]) -> str:
        pieces = {NORMAL: lambda t: t.replace("▁", " ").encode(), BYTE: lambda t: bytes([int(t[3:5], 16)])}
        out = (pieces.get(self.types[i], lambda t: t.encode())(self.tokens[i]) for i in ids)
        return b"".join(out).decode("utf-8", "replace")


def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: dict[str, Any]) -> tuple[Path, Path, Any]:
    """A file, its folder, and the engine that reads it."""
    frozen = make_run(tmp_path / "run", tokenizer=lambda: record)
    path = tmp_path / "a.gguf"
    export_gguf(frozen, target("gguf:q2_0"), path)
    engine = SentencePiece(frozen.folder)
    monkeypatch.setattr(llama_cpp, "tokenize_all", lambda path, texts: [engine.tokenize(x) for x in texts])
    monkeypatch.setattr(llama_cpp, "decode_all", lambda path, many: [engine.decode(ids) for ids in many])
    return path, frozen.folder, engine


def spaced() -> dict[str, Any]:
    """A tokenizer whose two spaces are one token, which is also an added one, as in Gemma."""
    record = byte_fallback()
    record["model"]["merges"] = [["▁", "▁"], *record["model"]["merges"]]
    at = record["model"]["vocab"].setdefault("▁▁", len(record["model"]["vocab"]))
    record["added_tokens"].append(SPACES | {"id": at})
    return record


def test_the_prefix_that_llama_cpp_puts_more_often_is_a_note_and_nothing_else_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = byte_fallback() | {"normalizer": None, "pre_tokenizer": METASPACE}
    path, folder, engine = exported(tmp_path, monkeypatch, record)
    found = compare_tokenizers(path, folder)
    assert found.differences == ()
    assert any("' one'" in note for note in found.notes) and any("'<s>the cat" in note for note in found.notes)
    assert found.equal == found.strings - len(found.notes) > 10
    engine.drops_leading_spaces = True
    dropped = compare_tokenizers(path, folder)
    assert [x for x in dropped.differences if "'  two spaces in front'" in x]
    assert not [x for x in dropped.notes if "two spaces" in x]


def test_without_a_prefix_nothing_is_excused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = byte_fallback() | {"normalizer": None, "pre_tokenizer": METASPACE | {"prepend_scheme": "never"}}
    path, folder, engine = exported(tmp_path, monkeypatch, record)
    assert compare_tokenizers(path, folder) == Tokens(19, 19)
    engine.prefix = True
    assert len(compare_tokenizers(path, folder).differences) == 18  # all but the empty string


def test_tokens_of_spaces_are_cut_and_printed_as_in_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder, engine = exported(tmp_path, monkeypatch, spaced())
    found = compare_tokenizers(path, folder)
    assert found.differences == () and found.equal == found.strings
    engine.types[engine.tokens.index("▁▁")] = USER_DEFINED
    assert any("▁▁" in line and "reads" in line for line in compare_tokenizers(path, folder).differences)


def test_the_reference_is_the_tokenizer_that_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = byte_level()
    record["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, record["pre_tokenizer"]],
    }
    frozen = make_run(tmp_path / "run", tokenizer=lambda: record)
    (frozen.folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    export_gguf(frozen, target("gguf:q2_0"), tmp_path / "a.gguf")
    exact = Tokenizer.from_str(json.dumps(record))
    loaded: list[Any] = []
    load = tokenizer_check.loading.load_tokenizer
    monkeypatch.setattr(tokenizer_check.loading, "load_tokenizer", lambda s: loaded.append(load(s)) or loaded[-1])
    monkeypatch.setattr(llama_cpp, "tokenize_all", lambda path, texts: [exact.encode(x).ids for x in texts])
    monkeypatch.setattr(
        llama_cpp, "decode_all", lambda path, many: [exact.decode(x, skip_special_tokens=False) for x in many]
    )
    assert compare_tokenizers(tmp_path / "a.gguf", frozen.folder).differences == ()
    assert len(loaded) == 1
