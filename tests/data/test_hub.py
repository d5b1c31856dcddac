"""Hub data sets: how they are named, what pins them, and that no more of them is read than is used.

The hub is a folder of parquet files that ``datasets`` itself streams, or a builder of a thousand million rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets.packaged_modules.cache.cache import Cache

from hestia.data import blocks, pack_all, prepare, read_documents, tables
from hestia.data.sources import fingerprint, resolve
from hestia.errors import ConfigError

CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
CARD = """---
configs:
- config_name: stories
  data_files:
  - {split: train, path: stories/train-*.parquet}
  - {split: test, path: stories/test.parquet}
- config_name: chats
  data_files: chats/*.parquet
---
"""


class Hub:
    """owner/name with two configurations, owner/one with the first alone, huge/set without end; and what was asked."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.today, self.asked, self.pulled = folder, "c0ffee", list[tuple[Any, ...]](), 0
        self._builder, self._config_names = datasets.load_dataset_builder, datasets.get_dataset_config_names
        for name, card in (("owner/name", CARD), ("owner/one", CARD.partition("- config_name: chats")[0] + "---\n")):
            for part in ("stories", "chats"):
                (folder / name / part).mkdir(parents=True)
            for k in range(3):
                self.write(name, f"stories/train-{k}", {"id": [0] * 50, "text": [story(50 * k + i) for i in range(50)]})
            self.write(name, "stories/test", {"id": [0] * 50, "text": [story(1000 + i) for i in range(50)]})
            self.write(name, "chats/train", {"messages": [CHAT] * 2})
            (folder / name / "README.md").write_text(card, encoding="utf-8")

    def write(self, name: str, part: str, columns: dict[str, Any]) -> None:
        pq.write_table(pa.table(columns), self.folder / name / f"{part}.parquet")

    def load_dataset_builder(self, name: str, config: str | None = None, *, revision: str | None = None) -> Any:
        self.asked.append((name, config, revision))
        if not self.today:
            raise ConnectionError("no network")
        builder = Endless(self) if name == "huge/set" else self._builder(str(self.folder / name), config)
        builder.hash = self.today if revision in (None, "main") else revision
        return builder

    def get_dataset_config_names(self, name: str, *, revision: str | None = None) -> list[str]:
        return self._config_names(str(self.folder / name))


class Endless:
    """A data set that nobody could download."""

    config = type("Config", (), {"name": "default"})
    hash = ""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub

    def as_streaming_dataset(self, split: str) -> datasets.IterableDataset:
        def rows() -> Iterator[dict[str, Any]]:
            for i in range(10**9):
                self.hub.pulled += 1
                yield {"text": story(i), "id": i}

        return datasets.IterableDataset.from_generator(rows)


def story(i: int) -> str:
    """A hundred characters of their own."""
    return (f"{i} is the number of this story, " * 5)[:100]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "hub")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tables.datasets, "load_dataset_builder", made.load_dataset_builder)
    monkeypatch.setattr(tables.datasets, "get_dataset_config_names", made.get_dataset_config_names)
    return made


def texts(*sources: str) -> list[str | None]:
    return [document.text for document in read_documents(sources)]


# --- names


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("owner/name", ("owner/name", None, None, None)),
        ("owner/name:test", ("owner/name", None, None, "test")),
        ("bare", ("bare", None, None, None)),
        ("bare@v1:test", ("bare", None, "v1", "test")),
        ("owner/name/en", ("owner/name", "en", None, None)),
        ("owner/name/20231101.en@refs/pr/3:test", ("owner/name", "20231101.en", "refs/pr/3", "test")),
        ("owner/name@refs/convert/parquet", ("owner/name", None, "refs/convert/parquet", None)),
    ],
)
def test_names(given: str, parts: tuple[str | None, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = resolve(given)
    assert (source.kind, source.path) == ("hub", None)
    assert (source.name, source.config, source.revision, source.split) == parts


@pytest.mark.parametrize(
    "given", ["here/name/en", "here/name", "owner/name/text.txt", "a/b/c/d", "a@2/train.txt", "a/b@"]
)
def test_what_was_meant_as_a_path_is_not_asked_of_the_hub(hub: Hub, given: str) -> None:
    (hub.folder.parent / "here" / "here").mkdir()
    with pytest.raises(ConfigError, match="no such file or folder"):
        resolve(given)
    assert not hub.asked


def test_configuration_revision_and_split_are_read(hub: Hub) -> None:
    train, test = [story(i) for i in range(150)], [story(1000 + i) for i in range(50)]
    assert texts("owner/one") == texts("owner/name/stories") == texts("owner/name/stories@v1") == train
    assert texts("owner/one:test") == texts("owner/name/stories:test") == test
    (chat, _) = read_documents(["owner/name/chats"])
    assert chat.messages == tuple(CHAT)
    assert hub.asked == [
        ("owner/one", None, None),
        ("owner/name", "stories", None),
        ("owner/name", "stories", "v1"),
        ("owner/one", None, None),
        ("owner/name", "stories", None),
        ("owner/name", "chats", None),
    ]


def test_the_fingerprint_holds_commit_configuration_and_split(hub: Hub) -> None:
    assert fingerprint(resolve("owner/one")) == [
        {"hub": "owner/one", "split": "train", "config": "stories", "revision": "c0ffee"}
    ]
    (spelt,) = fingerprint(resolve("owner/name/chats@abc123:test"))
    assert spelt == {"hub": "owner/name", "split": "test", "config": "chats", "revision": "abc123"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("owner/name", "owner/name: a data set of several configurations: stories, chats; write owner/name/stories or"),
        ("owner/name/story", "no configuration 'story': did you mean 'stories'?"),
        ("owner/one/chats", "no configuration 'chats': allowed: stories; write owner/one/CONFIG"),
        (
            "owner/one:val",
            "split 'val' could not be loaded (Bad split: val. Available splits: ['train', 'test']); write",
        ),
        ("owner/none", "no such file or folder here, and the hub has no data set of that name that loads"),
        ("owner/none@v1", "and the hub has no data set of that name at v1 that loads"),
    ],
)
def test_what_is_not_there_is_said(hub: Hub, given: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        texts(given)
    assert message in str(caught.value)


def test_the_names_of_a_hundred_configurations_are_cut_short(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"dump-{i}" for i in range(100)]
    monkeypatch.setattr(tables.datasets, "get_dataset_config_names", lambda *_, **__: names)
    with pytest.raises(ConfigError, match=r"dump-0, .* dump-29 and 70 more; write owner/name/dump-0 or another"):
        texts("owner/name")


def test_the_default_configuration_needs_no_name(hub: Hub) -> None:
    card = CARD.replace("config_name: chats", "config_name: chats\n  default: true")
    (hub.folder / "owner/name" / "README.md").write_text(card, encoding="utf-8")
    assert len(list(read_documents(["owner/name"]))) == 2


def test_out_of_reach(hub: Hub) -> None:
    hub.today = ""
    with pytest.raises(ConfigError, match=r"owner/name: no such file or folder here, and .* cannot be reached"):
        texts("owner/name")


def test_what_was_prepared_here_is_no_other_commit(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network ``datasets`` gives what it once prepared, whatever revision is asked for."""
    prepared: Any = Cache.__new__(Cache)
    prepared.hash, prepared.config = "c0ffee", Endless.config
    monkeypatch.setattr(tables.datasets, "load_dataset_builder", lambda *_, **__: prepared)
    for given in ("owner/one", "owner/one@c0ffee"):
        assert fingerprint(resolve(given))[0]["revision"] == "c0ffee"
    with pytest.raises(
        ConfigError, match="owner/one: v1 cannot be reached, and what is prepared here is c0ffee; write"
    ):
        fingerprint(resolve("owner/one@v1"))


def test_columns(hub: Hub) -> None:
    hub.write("owner/name", "chats/train", {"body": ["x"], "title": ["y"]})
    with pytest.raises(ConfigError, match="owner/name: needs a column 'text' or 'messages', has body, title"):
        texts("owner/name/chats")
    assert [d.text for d in read_documents(["owner/name/chats"], column="body")] == ["x"]
    with pytest.raises(ConfigError, match=r"owner/name: has no column 'tilte' \(--text-column\), only body, title"):
        list(read_documents(["owner/name/chats"], column="tilte"))


def test_a_stream_that_breaks_off_names_the_row(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield from ({"text": story(i)} for i in range(7))
        raise OSError("connection reset")

    broken = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(Endless, "as_streaming_dataset", lambda *_, **__: broken)
    with pytest.raises(ConfigError, match=r"huge/set: the stream broke off behind row 7 \(connection reset\)"):
        texts("huge/set")


# --- no more than is used


def test_no_more_is_read_than_the_tokens_need(hub: Hub, tokenizer: Any) -> None:
    def made(seed: int, tokens: int = 2000) -> Any:
        return prepare(["huge/set"], None, tokenizer, seq_len=16, max_train_tokens=tokens, seed=seed)

    first = made(0)
    assert first.train.tokens == 2000 and len(first.held_out) >= 1
    (read,) = first.record["hub_rows"]
    enough = first.record["data"][0]["characters_at_most"]
    assert 2000 * 8 < enough < 2500 * 8
    assert read == {"given": "huge/set", "rows_read": -(-enough // 100), "rest": "not looked at"}
    assert read["rows_read"] <= hub.pulled <= read["rows_read"] + 1
    assert json.loads(json.dumps(first.record)) == first.record
    again, other, more = made(0), made(1), made(0, 4000)
    assert torch.equal(first.train.input_ids, again.train.input_ids) and first.record == again.record
    assert not torch.equal(first.train.input_ids, other.train.input_ids)
    assert more.record["hub_rows"][0]["rows_read"] > 1.8 * read["rows_read"]
    assert len({m.record["key"] for m in (first, other, more)}) == 3


def test_documents_are_drawn_from_all_that_was_read(hub: Hub, tokenizer: Any) -> None:
    made = prepare(["huge/set"], None, tokenizer, seq_len=16, max_train_tokens=2000)
    numbers = {int(word) for word in tokenizer.decode(made.train.input_ids.flatten()).split() if word.isdigit()}
    rows = made.record["hub_rows"][0]["rows_read"]
    assert max(numbers) > 0.8 * rows


def test_a_small_data_set_is_read_as_a_file_of_the_same_rows(hub: Hub, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": story(i)}) for i in range(150)), encoding="utf-8")
    options: Any = {"eval_sources": None, "tokenizer": tokenizer, "seq_len": 16, "max_train_tokens": 3000}
    ours, files = (prepare([source], **options) for source in ("owner/one", path))
    assert ours.record["hub_rows"] == [{"given": "owner/one", "rows_read": 150, "rest": "none"}]
    assert "hub_rows" not in files.record
    assert torch.equal(ours.train.input_ids, files.train.input_ids)
    assert torch.equal(ours.held_out.input_ids, files.held_out.input_ids)


def test_held_out_text_and_text_to_score_are_cut_short_too(hub: Hub, tokenizer: Any) -> None:
    made = prepare(["owner/one"], ["huge/set"], tokenizer, seq_len=16, max_train_tokens=500, max_held_out_tokens=300)
    assert made.record["eval_data"][0]["characters_at_most"] == 300 * blocks.HUB_CHARACTERS
    train, held_out = made.record["hub_rows"]
    assert (train["given"], held_out["given"], held_out["rows_read"]) == ("owner/one", "huge/set", 24)
    assert made.held_out.tokens > 300
    hub.pulled = 0
    assert pack_all(["huge/set"], tokenizer, seq_len=16, max_tokens=300).tokens > 300
    assert hub.pulled <= 25


def test_without_a_number_of_tokens_all_is_read(hub: Hub, tokenizer: Any) -> None:
    made = prepare(["owner/one"], None, tokenizer, seq_len=16)
    assert sum(made.record["documents"][part] for part in ("train", "held_out")) == 150
    assert made.record["data"][0]["characters_at_most"] is None
    assert pack_all(["owner/one:test"], tokenizer, seq_len=16).tokens > 1000


# --- what pins it


def test_what_is_read_is_the_commit_that_the_record_names(hub: Hub, tokenizer: Any) -> None:
    made = prepare(["owner/one"], None, tokenizer, seq_len=16, max_train_tokens=500)
    assert made.record["data"][0]["files"][0]["revision"] == "c0ffee"
    assert hub.asked == [("owner/one", None, None), ("owner/one", "stories", "c0ffee")]


def test_commit_configuration_and_split_are_in_the_key(hub: Hub, tokenizer: Any) -> None:
    def key(given: str) -> str:
        return prepare([given], None, tokenizer, seq_len=16, max_train_tokens=500).record["key"]

    first = key("owner/one")
    assert key("owner/one/stories") == key("owner/one@main") == first
    others = {key("owner/one@v1"), key("owner/one:test"), key("owner/name/stories")}
    assert len(others | {first}) == 4
    hub.today = "beef"
    assert key("owner/one") != first


def test_what_was_begun_with_is_kept_to(hub: Hub, tokenizer: Any, tmp_path: Path) -> None:
    def made(cache: str, begun: Any = None) -> Any:
        options: Any = {"seq_len": 16, "max_train_tokens": 500, "cache": tmp_path / cache, "begun": begun}
        return prepare(["owner/one"], None, tokenizer, **options)

    first = made("a")
    (kept,) = first.record["data"][0]["files"]
    hub.today = "beef"
    again = made("b", {"owner/one": kept})
    assert again.record == first.record
    assert hub.asked[-1] == ("owner/one", "stories", "c0ffee")
    hub.today = ""  # what is in the cache needs no hub at all
    assert made("a", {"owner/one": kept}).record == first.record
