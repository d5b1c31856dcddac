"""Text in, blocks out: joined, cut, held out, cached."""

import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hestia.data import blocks as blocks_module
from hestia.data import pack_all, packing, prepare, read_documents
from hestia.data.tokenizer import find_joiner, tokenizer_fingerprint
from hestia.errors import ConfigError

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def random_text(rng: random.Random, characters: int) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(characters))


def write(path: Path, documents: list[str]) -> Path:
    path.write_text("\n<|endofdoc|>\n".join(documents))
    return path


def joined(tokenizer: Any, documents: list[str], joiner: str) -> list[int]:
    """The stream, from the tokenizer's Rust backend one document at a time."""
    stream: list[int] = []
    for document in documents:
        before = [tokenizer.bos_token_id] if joiner in ("bos", "both") else []
        after = [tokenizer.eos_token_id] if joiner in ("eos", "both") else []
        stream += [*before, *tokenizer.backend_tokenizer.encode(document, add_special_tokens=False).ids, *after]
    return stream


# --- joiners


@pytest.mark.parametrize(
    ("adds", "asked", "used"),
    [
        ("", "auto", "eos"),
        ("bos", "auto", "bos"),
        ("eos", "auto", "eos"),
        ("both", "auto", "bos"),
        ("", "bos", "bos"),
        ("bos", "eos", "eos"),
        ("eos", "both", "both"),
    ],
)
def test_joiner(make_tokenizer, adds: str, asked: Any, used: str) -> None:
    tokenizer = make_tokenizer(adds=adds)
    joiner = find_joiner(tokenizer, asked)
    assert joiner.name == used
    assert joiner.before == (tokenizer.bos_token_id if used in ("bos", "both") else None)
    assert joiner.after == (tokenizer.eos_token_id if used in ("eos", "both") else None)


def test_joiner_without_its_token(make_tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"--joiner auto: the tokenizer has no EOS token .*write --joiner bos"):
        find_joiner(make_tokenizer(eos=False))
    with pytest.raises(ConfigError, match=r"--joiner both: the tokenizer has no BOS token .*write --joiner eos"):
        find_joiner(make_tokenizer(bos=False), "both")
    with pytest.raises(ConfigError, match=r"--joiner auto: .* give it a bos_token or an eos_token"):
        find_joiner(make_tokenizer(bos=False, eos=False))
    with pytest.raises(ConfigError, match="did you mean 'bos'"):
        find_joiner(make_tokenizer(), "boss")  # type: ignore[arg-type]


# --- blocks


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=12),
    seq_len=st.integers(2, 40),
    joiner=st.sampled_from(["bos", "eos", "both"]),
    seed=st.integers(0, 9),
)
def test_rows_are_the_joined_stream(tokenizer, tmp_path: Path, lengths, seq_len: int, joiner: Any, seed: int) -> None:
    rng = random.Random(seed)
    documents = [random_text(rng, n) for n in lengths]
    held = [random_text(rng, 60), random_text(rng, 60)]
    stream = joined(tokenizer, documents, joiner)
    rows = len(stream) // seq_len
    sources = ([write(tmp_path / "train.txt", documents)], [write(tmp_path / "held.txt", held)])
    if rows == 0:
        with pytest.raises(ConfigError, match=f": {len(stream)} tokens, at least {seq_len} are needed"):
            prepare(*sources, tokenizer, seq_len=seq_len, joiner=joiner)
        return
    made = prepare(*sources, tokenizer, seq_len=seq_len, joiner=joiner)
    assert made.train.input_ids.shape == made.train.loss_mask.shape == (rows, seq_len)
    assert made.train.input_ids.dtype == torch.int32
    assert made.train.input_ids.flatten().tolist() == stream[: rows * seq_len]
    assert made.train.loss_mask.all()
    assert (len(made.train), made.train.tokens) == (rows, rows * seq_len)
    assert made.record["tokens"]["train"] == made.train.tokens
    assert made.record["max_token_id"] < len(tokenizer)


def test_batches_of_documents_keep_their_order(tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    documents = [random_text(rng, 30) for _ in range(50)]
    write(tmp_path / "a.txt", documents[:30])
    write(tmp_path / "b.txt", documents[30:])
    held = write(tmp_path / "held.txt", [random_text(rng, 100)])
    monkeypatch.setattr(packing, "_BATCH_CHARACTERS", 100)
    made = prepare([tmp_path / "a.txt", tmp_path / "b.txt"], [held], tokenizer, seq_len=10)
    stream = joined(tokenizer, documents, "bos")
    assert made.train.input_ids.flatten().tolist() == stream[: len(stream) // 10 * 10]


def test_a_long_text_is_tokenized_in_parts_behind_line_breaks(
    tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The toy's tokenizer, as GPT-2's, joins no line break with the word behind it: the ids are those of the whole."""
    rng = random.Random(0)
    lines = [random_text(rng, n) for n in (60, 60, 300, 60, 60, 60)]  # one line is longer than a part
    text = "\n".join(lines)
    whole = joined(tokenizer, [text, lines[0]], "both")
    path = write(tmp_path / "a.txt", [text, lines[0]])
    monkeypatch.setattr(packing, "_PART_CHARACTERS", 130)
    seen: list[str] = []
    encoded = packing._encoded
    monkeypatch.setattr(packing, "_encoded", lambda texts, tokenizer: seen.extend(texts) or encoded(texts, tokenizer))
    made = pack_all([path], tokenizer, seq_len=8, joiner="both")
    assert made.input_ids.flatten().tolist() == whole[: len(whole) // 8 * 8]
    parts = [text for text in seen if text != lines[0]]
    assert len(parts) > 3 and "".join(parts) == text
    assert all(part.endswith("\n") for part in parts[:-1])
    assert [part for part in parts if len(part) > 130] == [lines[2] + "\n"]
    (document,) = read_documents([write(tmp_path / "b.txt", [text])])
    seen.clear()
    (piece,) = packing.tokenize([document], tokenizer, find_joiner(tokenizer, "bos"), enough=30)
    assert len(seen) == 1, "no part beyond what is enough"
    assert piece.ids.tolist() == joined(tokenizer, seen, "bos")


def test_pack_all_holds_nothing_out_and_slices(tokenizer, tmp_path: Path) -> None:
    documents = [random_text(random.Random(i), 50) for i in range(10)]
    path = write(tmp_path / "a.txt", documents)
    blocks = pack_all([path], tokenizer, seq_len=16)
    stream = joined(tokenizer, documents, "bos")
    assert blocks.input_ids.flatten().tolist() == stream[: len(stream) // 16 * 16]
    assert blocks[1:3].input_ids.tolist() == blocks.input_ids[1:3].tolist()
    assert len(blocks[1:3]) == 2
    with pytest.raises(ConfigError, match=r"no line of the \.txt files equals it"):
        pack_all([path], tokenizer, seq_len=16, separator="====")


# --- held out


def windows(rows: torch.Tensor, width: int) -> set[tuple[int, ...]]:
    return {tuple(row[i : i + width]) for row in rows.tolist() for i in range(len(row) - width + 1)}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(20, 900), min_size=1, max_size=30),
    copies=st.lists(st.integers(0, 29), max_size=5),
    share=st.sampled_from([0.02, 0.05, 0.2, 0.4]),
    seed=st.integers(0, 50),
)
def test_held_out_text_is_never_trained_on(tokenizer, tmp_path: Path, lengths, copies, share: float, seed: int) -> None:
    """No window of 12 tokens of random text (26^12 and more strings) is on both sides, although documents repeat."""
    rng = random.Random(seed)
    documents = [random_text(rng, n) for n in lengths]
    documents += [documents[i % len(documents)] for i in copies]
    path = write(tmp_path / "a.txt", documents)
    total = len(joined(tokenizer, documents, "bos"))
    try:
        made = prepare([path], None, tokenizer, seq_len=16, held_out_share=share, seed=seed)
    except ConfigError as error:
        assert "at least 32 are needed" in str(error)
        assert total < 16 * 6 or len({*documents}) < 3
        return
    assert not windows(made.train.input_ids, 12) & windows(made.held_out.input_ids, 12)
    assert len(made.train) >= 1
    assert len(made.held_out) >= 1
    assert made.held_out.tokens <= max(2 * share * total + 2, 2 * 16)
    assert made.held_out.tokens > share * len(joined(tokenizer, list({*documents}), "bos")) / 2 - 16
    again = prepare([path], None, tokenizer, seq_len=16, held_out_share=share, seed=seed)
    assert torch.equal(made.train.input_ids, again.train.input_ids)
    assert torch.equal(made.held_out.input_ids, again.held_out.input_ids)


def test_about_the_share_is_held_out_by_document(tokenizer, tmp_path: Path) -> None:
    rng = random.Random(1)
    documents = [random_text(rng, rng.randint(50, 150)) for _ in range(400)]
    path = write(tmp_path / "a.txt", documents)
    made = prepare([path], None, tokenizer, seq_len=32)
    share = made.held_out.tokens / (made.held_out.tokens + made.train.tokens)
    assert 0.045 < share < 0.06
    assert "of 400 documents, chosen by seed 0" in made.record["held_out_rule"]
    counts = made.record["documents"]
    assert counts["train"] + counts["held_out"] == 400
    # Whole documents, in the order of the file: the held-out rows are the stream of some of them.
    held_ids = made.held_out.input_ids.flatten().tolist()
    starts = [i for i, token in enumerate(held_ids) if token == tokenizer.bos_token_id]
    pieces = [tokenizer.decode(held_ids[a + 1 : b]) for a, b in itertools.pairwise(starts)]
    positions = [documents.index(piece) for piece in pieces]
    assert positions == sorted(positions)
    other = prepare([path], None, tokenizer, seq_len=32, seed=1)
    assert not torch.equal(made.held_out.input_ids[0], other.held_out.input_ids[0])


def test_a_single_document_gives_its_tail(tokenizer, tmp_path: Path) -> None:
    text = random_text(random.Random(2), 3000)
    made = prepare([write(tmp_path / "a.txt", [text])], None, tokenizer, seq_len=16)
    stream = joined(tokenizer, [text], "bos")
    assert made.held_out.input_ids.flatten().tolist() == stream[-made.held_out.tokens :]
    boundary = len(stream) - made.held_out.tokens
    assert made.train.input_ids.flatten().tolist() == stream[: boundary // 16 * 16]
    assert 0.05 <= made.held_out.tokens / len(stream) < 0.06
    assert "tokens of the longest document" in made.record["held_out_rule"]


def test_two_long_documents_do_not_lose_one_of_them(tokenizer, tmp_path: Path) -> None:
    rng = random.Random(3)
    documents = [random_text(rng, 3000), random_text(rng, 3100)]
    made = prepare([write(tmp_path / "a.txt", documents)], None, tokenizer, seq_len=16)
    assert made.held_out.tokens < 0.07 * (made.train.tokens + made.held_out.tokens)


def test_a_short_document_beside_long_ones_is_not_the_held_out_text(tokenizer, tmp_path: Path) -> None:
    rng = random.Random(3)
    documents = [random_text(rng, n) for n in (3000, 3100, 40, 3200)]
    for seed in range(4):
        made = prepare([write(tmp_path / "a.txt", documents)], None, tokenizer, seq_len=16, seed=seed)
        assert 0.05 < made.held_out.tokens / (made.train.tokens + made.held_out.tokens) < 0.06
        assert "tokens of the longest document" in made.record["held_out_rule"]


def test_copies_of_held_out_documents_are_dropped_and_counted(tokenizer, tmp_path: Path) -> None:
    rng = random.Random(4)
    shared, own, held = (random_text(rng, 200) for _ in range(3))
    train = write(tmp_path / "a.txt", [shared, own, shared + "\n", own])
    evaluation = write(tmp_path / "b.txt", [held, shared])
    made = prepare([train], [evaluation], tokenizer, seq_len=16)
    assert made.record["documents"] == {"train": 2, "held_out": 2, "dropped_because_held_out": 2}
    assert not windows(made.train.input_ids, 12) & windows(made.held_out.input_ids, 12)
    with pytest.raises(ConfigError, match="every document is also in --eval-data"):
        prepare([train], [train], tokenizer, seq_len=16)


@pytest.mark.parametrize("documents", [1, 3])
def test_too_short_to_hold_a_part_out(tokenizer, tmp_path: Path, documents: int) -> None:
    path = write(tmp_path / "a.txt", [random_text(random.Random(i), 12) for i in range(documents)])
    with pytest.raises(
        ConfigError, match=r"tokens, at least 128 are needed with --seq-len 64; give more text or a small"
    ):
        prepare([path], None, tokenizer, seq_len=64)


# --- fewer tokens


def test_max_train_tokens_samples_documents(tokenizer, tmp_path: Path) -> None:
    rng = random.Random(5)
    documents = [random_text(rng, 100) for _ in range(300)]
    path = write(tmp_path / "a.txt", documents)
    whole = prepare([path], None, tokenizer, seq_len=16)
    part = prepare([path], None, tokenizer, seq_len=16, max_train_tokens=2000)
    assert part.train.tokens == 2000 // 16 * 16
    assert len(part.held_out) >= 1
    assert not windows(part.train.input_ids, 12) & windows(part.held_out.input_ids, 12)
    assert part.train.input_ids[0].tolist() != whole.train.input_ids[0].tolist()  # not simply the first ones
    capped = prepare([path], None, tokenizer, seq_len=16, max_train_tokens=10**9)
    assert Counter(capped.train.input_ids.flatten().tolist()).total() == whole.train.tokens


# --- bad options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 1}, "--seq-len 1"),
        ({"held_out_share": 0.0}, "held_out_share 0.0"),
        ({"held_out_share": 0.5}, "held_out_share 0.5"),
        ({"max_train_tokens": 5}, "fewer than one block"),
        ({"separator": "-----"}, "no line of the .txt files equals it"),
    ],
)
def test_bad_options(tokenizer, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "a.txt", [random_text(random.Random(0), 500)])
    cache = tmp_path / "cache"
    with pytest.raises(ConfigError, match=message):
        prepare([path], None, tokenizer, **{"seq_len": 16, "cache": cache, **options})
    assert not cache.exists()


def test_sources_must_be_a_list(tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give a list of sources"):
        prepare("a.txt", None, tokenizer, seq_len=16)
    with pytest.raises(ConfigError, match="--eval-data: no source given"):
        prepare([write(tmp_path / "a.txt", ["a"])], [], tokenizer, seq_len=16)


# --- cache


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often ``prepare`` tokenized."""
    calls: list[int] = []
    original = blocks_module.tokenize

    def tokenize(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(blocks_module, "tokenize", tokenize)
    return calls


def same(a: Any, b: Any) -> bool:
    return all(
        torch.equal(x, y) and x.dtype == y.dtype
        for x, y in [
            (a.train.input_ids, b.train.input_ids),
            (a.train.loss_mask, b.train.loss_mask),
            (a.held_out.input_ids, b.held_out.input_ids),
            (a.held_out.loss_mask, b.held_out.loss_mask),
        ]
    )


def test_cache_is_used_only_when_it_fits(tokenizer, make_tokenizer, tmp_path: Path, counting: list[int]) -> None:
    rng = random.Random(6)
    path = write(tmp_path / "a.txt", [random_text(rng, 100) for _ in range(30)])
    cache = tmp_path / "run" / "tokens"
    first = prepare([path], None, tokenizer, seq_len=16, cache=cache)
    assert sorted(file.name for file in cache.iterdir()) == ["tokens.json", "tokens.safetensors"]
    hit = prepare([str(path)], None, tokenizer, seq_len=16, cache=cache)
    assert len(counting) == 1
    assert same(first, hit)
    assert first.record == hit.record == json.loads((cache / "tokens.json").read_text())["record"]

    moved = path.rename(tmp_path / "moved.txt")
    assert same(first, prepare([moved], None, tokenizer, seq_len=16, cache=cache))
    assert len(counting) == 1  # the same bytes elsewhere are the same text

    changes: list[dict[str, Any]] = [{"seed": 1}, {"seq_len": 8}, {"joiner": "eos"}, {"held_out_share": 0.2}]
    changes += [{"tokenizer": make_tokenizer(adds="bos", extra=1)}, {"max_train_tokens": 1000}]
    for count, change in enumerate(changes, start=2):
        options = {"tokenizer": tokenizer, "seq_len": 16, "cache": cache, **change}
        stale = prepare([moved], None, **options)
        assert len(counting) == count, change
        assert same(stale, prepare([moved], None, **options))
        assert len(counting) == count, change

    write(moved, [random_text(rng, 100) for _ in range(30)])
    changed = prepare([moved], None, tokenizer, seq_len=16, cache=cache)
    assert len(counting) == len(changes) + 2
    assert not same(first, changed)


@pytest.mark.parametrize("damage", ["flip", "truncate", "no tokens", "no record", "bad json", "other schema"])
def test_a_damaged_cache_is_built_again(tokenizer, tmp_path: Path, counting: list[int], damage: str) -> None:
    path = write(tmp_path / "a.txt", [random_text(random.Random(i), 100) for i in range(30)])
    cache = tmp_path / "cache"
    first = prepare([path], None, tokenizer, seq_len=16, cache=cache)
    tokens, record = cache / "tokens.safetensors", cache / "tokens.json"
    data = bytearray(tokens.read_bytes())
    if damage == "flip":
        data[-5] ^= 1
        tokens.write_bytes(data)
    elif damage == "truncate":
        tokens.write_bytes(data[: len(data) // 2])
    elif damage == "no tokens":
        tokens.unlink()
    elif damage == "no record":
        record.unlink()
    elif damage == "bad json":
        record.write_text(record.read_text()[:-20])
    else:
        record.write_text(record.read_text().replace('"schema": 1', '"schema": 0'))
    again = prepare([path], None, tokenizer, seq_len=16, cache=cache)
    assert len(counting) == 2
    assert same(first, again)
    prepare([path], None, tokenizer, seq_len=16, cache=cache)
    assert len(counting) == 2  # and it is whole again


def test_fingerprint_is_of_the_rules_not_of_their_use(make_tokenizer) -> None:
    tokenizer = make_tokenizer(adds="bos")
    before = tokenizer_fingerprint(tokenizer)
    tokenizer("some text", truncation=True, max_length=3)
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.pad_token = "</s>"
    tokenizer(["some text", "more"], padding=True)
    assert tokenizer_fingerprint(tokenizer) == before
    others = [make_tokenizer(), make_tokenizer(adds="bos", bos=False), make_tokenizer(adds="bos", template="x")]
    assert len({before, *map(tokenizer_fingerprint, others)}) == 4


def test_record_says_where_the_text_came_from(tokenizer, tmp_path: Path) -> None:
    import hashlib

    path = write(tmp_path / "a.txt", [random_text(random.Random(i), 100) for i in range(30)])
    record = prepare([path], None, tokenizer, seq_len=16).record
    (data,) = record["data"]
    assert data["given"] == str(path)
    content = path.read_bytes()
    assert data["files"] == [{"path": str(path), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}]
    assert record["eval_data"] is None
    assert record["separators_found"] == ["<|endofdoc|>"]
    assert record["joiner"] == {
        "asked": "auto",
        "used": "bos",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    assert record["seq_len"] == 16
    assert record["tokenizer_sha256"] == tokenizer_fingerprint(tokenizer)
    assert json.loads(json.dumps(record)) == record


def test_another_column_is_another_text(tokenizer, tmp_path: Path, counting: list[int]) -> None:
    rng, path, cache = random.Random(8), tmp_path / "a.jsonl", tmp_path / "cache"
    rows = [{"text": random_text(rng, 100), "code": random_text(rng, 100)} for _ in range(30)]
    path.write_text("\n".join(map(json.dumps, rows)))
    plain = prepare([path], None, tokenizer, seq_len=16, cache=cache)
    code = prepare([path], None, tokenizer, seq_len=16, cache=cache, column="code")
    assert not same(plain, code) and len(counting) == 2
    assert code.record["text_column"] == "code" and "text_column" not in plain.record
    assert len(pack_all([path], tokenizer, seq_len=16, column="code")) > 0
    text = write(tmp_path / "a.txt", [row["text"] for row in rows])
    with pytest.raises(ConfigError, match=r"--text-column 'code': a \.txt file has no columns"):
        prepare([text], None, tokenizer, seq_len=16, column="code")
    assert prepare([path], [text], tokenizer, seq_len=16, column="code").record["text_column"] == "code"
