"""Every kind of source gives the documents that are in it; every bad one says what is wrong and where."""

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hestia.data import Document, read_documents, tables
from hestia.errors import ConfigError

CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]


def zstd(content: bytes) -> bytes:
    return pa.Codec("zstd").compress(content, asbytes=True)


PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
    ".GZ": gzip.compress,
}


def texts(*sources: str | Path, separator: str = "auto", column: str | None = None) -> list[str | None]:
    return [document.text for document in read_documents(sources, separator=separator, column=column)]


# --- text files


def test_auto_separator_cuts_at_end_marks_only(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo <|endofdoc|> inline\n<|endofdoc|>\n\nthree\n<|end|>\n<|start|>\n<|endoftext|> x\n")
    documents = list(read_documents([path]))
    assert [d.text for d in documents] == ["one\n\ntwo <|endofdoc|> inline", "three", "<|start|>\n<|endoftext|> x"]
    assert [d.source for d in documents] == [f"{path}:1", f"{path}:5", f"{path}:8"]


def test_without_separator_the_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(" = Title = \n\nText.\n\n\n")
    assert texts(path) == [" = Title = \n\nText."]


def test_custom_separator_is_a_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n---\ntwo --- \n<|endofdoc|>\n ---\n---\nthree")
    assert texts(path, separator="---") == ["one", "two --- \n<|endofdoc|>\n ---", "three"]
    assert texts(path, separator="") == ["one\n---\ntwo --- \n<|endofdoc|>\n ---\n---\nthree"]


def test_empty_separator_cuts_at_empty_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\nstill one\n\n\ntwo\n")
    assert texts(path, separator="") == ["one\nstill one", "two"]


def test_separator_with_a_line_break_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo")
    with pytest.raises(ConfigError, match="one whole line"):
        texts(path, separator="\n\n")


def test_windows_line_ends_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwo\r\n<|endofdoc|>\r\nthree\r\n".encode())
    assert texts(path) == ["one\ntwo", "three"]


def test_only_line_feeds_end_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("a\u2028<|endofdoc|>\u2028b\x0bc\x85d".encode())
    assert texts(path) == ["a\u2028<|endofdoc|>\u2028b\x0bc\x85d"]


@pytest.mark.parametrize("packed", PACK)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(
        st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"]), min_size=1).filter(
            lambda t: not t.isspace() and not t.startswith("\ufeff") and "<|end" not in t
        ),
        min_size=1,
        max_size=5,
    )
)
def test_documents_survive_the_file(tmp_path: Path, packed: str, parts: list[str]) -> None:
    """What is joined by separator lines comes back, whatever the Unicode in it."""
    path = tmp_path / f"a.txt{packed}"
    path.write_bytes(PACK[packed]("\n<|endofdoc|>\n".join(parts).encode()))
    assert texts(path) == [part.strip("\n") for part in parts]


# --- rows


def test_an_archive_of_several_parts_is_read_to_its_end(tmp_path: Path) -> None:
    """As parallel packers write it, and ``cat a.gz b.gz``."""
    for suffix in (".gz", ".xz", ".zst"):
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(PACK[suffix](b"one\n") + PACK[suffix](b"two\n"))
        assert texts(path) == ["one\ntwo"]


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("plain", [".jsonl", ".json"])
def test_jsonl_rows(tmp_path: Path, plain: str, packed: str) -> None:
    path = tmp_path / f"a{plain}{packed}"
    rows = [{"text": "one\ntwo\n", "id": 3}, {"text": ""}, {"messages": CHAT, "text": "rendered elsewhere"}]
    content = "\n\n".join(json.dumps(row) for row in rows).encode()
    path.write_bytes(PACK[packed](content))
    first, chat = read_documents([path])
    assert first == Document("one\ntwo", None, f"{path}:1")
    assert chat == Document(None, tuple(CHAT), f"{path}:5")


def test_parquet_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": list(range(3000)), "text": [f"text {i}" for i in range(3000)]}), path)
    documents = list(read_documents([path]))
    assert [d.text for d in documents] == [f"text {i}" for i in range(3000)]
    assert documents[-1].source == f"{path}, row 3000"


def test_parquet_chats_drop_keys_without_value(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"messages": [[{**CHAT[0], "name": "Ada"}, {**CHAT[1], "name": None}]]}), path)
    (chat,) = read_documents([path])
    assert chat.messages == ({**CHAT[0], "name": "Ada"}, CHAT[1])


def test_saved_data_sets(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"text": ["one", "two"], "id": [1, 2]})
    other = datasets.Dataset.from_dict({"messages": [CHAT]})
    table.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": table, "test": other}).save_to_disk(tmp_path / "split")
    assert texts(tmp_path / "plain") == texts(tmp_path / "split") == ["one", "two"]
    (chat,) = read_documents([f"{tmp_path / 'split'}:test"])
    assert chat.messages == tuple(CHAT)
    with pytest.raises(ConfigError, match=r"no split 'tset': did you mean 'test'\?"):
        texts(f"{tmp_path / 'split'}:tset")
    with pytest.raises(ConfigError, match="has no splits; leave out ':test'"):
        texts(f"{tmp_path / 'plain'}:test")


def test_a_column_of_another_name_holds_the_text_whatever_else_is_there(tmp_path: Path) -> None:
    table = {"content": ["one", "two"], "text": ["a label", "a label"], "messages": [CHAT, CHAT]}
    lines, parquet = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    lines.write_text("\n".join(json.dumps({key: table[key][i] for key in table}) for i in range(2)))
    pq.write_table(pa.table(table), parquet)
    datasets.Dataset.from_dict(table).save_to_disk(tmp_path / "saved")
    for source in (lines, parquet, tmp_path / "saved"):
        assert texts(source, column="content") == ["one", "two"]
        assert texts(source, column="text") == ["a label", "a label"]
        assert [d.messages for d in read_documents([source], column="messages")] == [tuple(CHAT)] * 2
        with pytest.raises(ConfigError, match=r"no (column )?'body'.*content.*text"):
            texts(source, column="body")


# --- bad input


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"trian\.txt: no such file or folder; did you mean .*train\.txt\?"):
        texts(tmp_path / "trian.txt")
    with pytest.raises(ConfigError, match="holds no such name"):
        texts(tmp_path / "zzz.jsonl")
    with pytest.raises(ConfigError, match="does not exist either"):
        texts(tmp_path / "nowhere" / "train.txt")


def test_a_misspelt_path_is_not_looked_up_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tables.datasets, "load_dataset_builder", lambda name: pytest.fail("asked the hub"))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "stories.txt").write_text("x")
    for name in ("corpus/train", "elsewhere/train.txt", "stories.tx", "./corpus/x", "/abs/olute"):
        with pytest.raises(ConfigError, match="no such file or folder"):
            texts(name)


@pytest.mark.parametrize("content", [b"", b"\n \n\t\n", b"\xef\xbb\xbf", b"<|endofdoc|>\n<|endofdoc|>\n"])
def test_empty_text(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.txt: holds no text"):
        texts(path)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl", "a.parquet"])
def test_empty_other_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match=name):
        texts(path)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("bad", [b"\xff", b"\xe9t\xe9", b"\xc3", b"\xed\xa0\x80"])
def test_invalid_utf8_gives_the_byte(tmp_path: Path, mark: bytes, bad: bytes) -> None:
    path = tmp_path / "a.txt"
    for before in ("", "first é line\n", "first é line\nsecond: "):
        path.write_bytes(mark + before.encode() + bad)
        at = len(mark) + len(before.encode())
        with pytest.raises(ConfigError, match=f"line {before.count(chr(10)) + 1} is not UTF-8: bad byte at byte {at} "):
            texts(path)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".txt.gz"])
def test_nul_bytes(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    content = b'{"text": "one"}\nab\0cd'
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    with pytest.raises(ConfigError, match="line 2 holds a NUL byte at byte 18"):
        texts(path)


def test_utf16_is_recognised_as_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("hello".encode("utf-16"))
    with pytest.raises(ConfigError, match="UTF-16"):
        texts(path)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_damaged_archives(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.txt{suffix}"
    whole = PACK[suffix](b"some text " * 1000)
    for damaged in (whole[: len(whole) // 2], b"not an archive"):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match="damaged or truncated"):
            texts(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r":2: not JSON \(.* at column 13\)"),
        ('["a"]', ":2: expected an object .* got list"),
        ('{"texts": "a"}', ":2: neither 'text' nor 'messages'; the keys are 'texts': name .* with --text-column"),
        ("{}", ":2: neither .* none"),
        ('{"text": 3}', ":2: 'text' must be a string, got int"),
        ('{"text": null}', ":2: 'text' must be a string, got null"),
        ('{"text": "a\\u0000b"}', ":2: holds a NUL at character 1"),
        ('{"text": "a\\ud800b"}', ":2: is not valid Unicode at character 1"),
        ('{"messages": "hello"}', ":2: 'messages' must be a list"),
        ('{"messages": []}', ":2: 'messages' must be a list of at least one"),
        ('{"messages": [{"content": "x"}]}', r":2: messages\[0\] must be an object with 'role'"),
        ("[" * 100_000, ":2: "),
        ('{"text": ' + "1" * 5000 + "}", ":2: "),
    ],
)
def test_bad_json_lines(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=message):
        texts(path)


def test_tables_without_text(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["x"], "title": ["y"]}), path)
    with pytest.raises(ConfigError, match=r"needs a column 'text' or 'messages', has body, title; .* --text-column"):
        texts(path)
    path.write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(ConfigError, match="not a readable parquet file"):
        texts(path)


def test_damaged_saved_data_set(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": ["one"]}).save_to_disk(folder)
    (folder / "state.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a readable saved data set"):
        texts(folder)


def test_folders_and_unknown_suffixes(tmp_path: Path) -> None:
    (tmp_path / "readme.md").write_text("x")
    with pytest.raises(ConfigError, match="not a saved data set"):
        texts(tmp_path)
    with pytest.raises(ConfigError, match=r"unknown kind of file; read are \.txt"):
        texts(tmp_path / "readme.md")
