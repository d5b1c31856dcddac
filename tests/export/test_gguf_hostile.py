"""Corrupted, truncated and hostile GGUF files: one clear line from our reader, and never a crash."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from test_gguf import make_run

from hestia.errors import ConfigError, ExportError, HestiaError, VerifyError
from hestia.export import llama_cpp
from hestia.export.gguf import export_gguf
from hestia.export.gguf_check import check_gguf, claims_of
from hestia.export.gguf_reader import check_structure, open_checked, parse
from hestia.export.gguf_tokenizer import Value
from hestia.export.gguf_writer import write
from hestia.targets import TQ2_0, target

NOWHERE = Path("a.gguf")


class Entry:
    """A tensor for the writer."""

    def __init__(self, name: str, shape: tuple[int, ...], size: int) -> None:
        self.name, self.shape, self.bytes = name, shape, size


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A well-formed file of some hundred bytes: every kind of value, three tensors."""
    path = tmp_path_factory.mktemp("tiny") / "a.gguf"
    metadata = {
        "general.architecture": Value("str", "llama"),
        "general.file_type": Value("u32", 37),
        "llama.rope.freq_base": Value("f32", 1e4),
        "tokenizer.ggml.tokens": Value("str[]", ["a", "é", ""]),
        "tokenizer.ggml.token_type": Value("i32[]", [1, 2, 3]),
        "tokenizer.ggml.add_bos_token": Value("bool", True),
        "hestia.codes_sha256": Value("str", "0" * 64),
        "hestia.run": Value("str", "run"),
        "hestia.quantized": Value("str", json.dumps({"blk.0.attn_q.weight": ["a", 256, 0]})),
        "hestia.file_sha256": Value("str", "0" * 64),
    }
    entries = [Entry("token_embd.weight", (2, 8), 64), Entry("output_norm.weight", (5,), 20)]
    entries.append(Entry("blk.0.attn_q.weight", (2, 256), 132))
    rng = np.random.default_rng(0)
    data = [[rng.integers(0, 160, entry.bytes).astype(np.uint8)] for entry in entries]
    write(path, metadata, entries, [0, 0, 35], map(iter, data), digest_key="hestia.file_sha256", placeholder="0" * 64)
    claims = claims_of(path)
    assert claims.run == "run" and claims.file_matches is True and claims.codes_match is False
    return path.read_bytes()


def mutated(good: bytes, draw: random.Random, header: int = 0) -> bytes:
    """One of: flipped bits, overwritten bytes, huge numbers, a cut, a repeated or dropped piece, noise."""
    data = bytearray(good)
    header = header or good.rindex(b"blk.0.attn_q.weight") + 60
    kind = draw.randrange(8)
    at = draw.randrange(header if kind < 6 else len(data))
    if kind == 0:
        for _ in range(draw.randrange(1, 9)):
            data[draw.randrange(header)] ^= 1 << draw.randrange(8)
    elif kind == 1:
        data[at : at + 4] = bytes(draw.randrange(256) for _ in range(4))
    elif kind == 2:  # a count, length, dimension or offset that is out of all proportion
        huge = draw.choice([2**64 - 1, 2**63, 2**62, 2**40, 2**33, 2**32 - 1, 2**31, 0, 1, len(good)])
        data[at : at + 8] = struct.pack("<Q", huge)
    elif kind == 3:
        data[at : at + 4] = struct.pack("<I", draw.choice([0, 8, 9, 10, 13, 31, 36, 99, 2**31, 2**32 - 1]))
    elif kind == 4:
        del data[at : at + draw.randrange(1, 40)]
    elif kind == 5:
        data[at:at] = data[at : at + draw.randrange(1, 40)]
    elif kind == 6:
        del data[at:]
    else:
        data[at : at + 30] = draw.randbytes(30)
    return bytes(data)


def outcome(data: bytes) -> str:
    """What our reader says: nothing, or one line."""
    array = np.frombuffer(data, np.uint8)
    try:
        check_structure(NOWHERE, parse(NOWHERE, array))
    except VerifyError as error:
        message = str(error)
        assert message.startswith("a.gguf: ") and "\n" not in message and len(message) < 400
        return message
    return ""


def test_ten_thousand_mutations_end_in_one_line_or_a_file_that_holds_together(tiny: bytes) -> None:
    draw = random.Random(0)
    assert outcome(tiny) == ""
    refused = sum(bool(outcome(mutated(tiny, draw))) for _ in range(10_000))
    assert 5_000 < refused < 10_000  # a changed string or number of the metadata is well-formed


def test_mutations_never_pass_for_the_file_that_was_written(tiny: bytes, tmp_path: Path) -> None:
    draw = random.Random(1)
    path = tmp_path / "a.gguf"
    for _ in range(500):
        data = mutated(tiny, draw)
        path.write_bytes(data)
        try:
            claims = claims_of(path)
        except (VerifyError, ConfigError) as error:
            assert "\n" not in str(error)
            continue
        assert data == tiny or claims.run is None or claims.file_matches is False


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"blk.0.attn_q.weight", b"../../../etc/passwd", "is not a tensor's name"),
        (b"blk.0.attn_q.weight", b"/tmp/blk.0.q.weight", "is not a tensor's name"),
        (b"blk.0.attn_q.weight", b"blk.0.attn\x00q.weight", "is not a tensor's name"),
        (b"output_norm.weight", b"token_embd.weight\x00", "is not a tensor's name"),
        (b"GGUF", b"GGML", "not a GGUF file"),
        (b"GGUF\x03", b"GGUF\x02", "GGUF version 2"),
        (b"general.architecture", b"general.architectura", "general.architecture is missing"),
        (
            b"general.file_type",
            b"hestia.codes_sha2",
            "",
        ),
    ],
)
def test_hostile_names_and_headers(tiny: bytes, old: bytes, new: bytes, message: str) -> None:
    at = tiny.index(old) if old in tiny[:64] or b"general" in old else tiny.rindex(old)
    found = outcome(tiny[:at] + new + tiny[at + len(old) :])
    assert message in found if message else found == ""  # an unknown key is well-formed


def test_tensors_may_not_overlap_repeat_or_leave_the_file(tiny: bytes) -> None:
    at = tiny.index(b"output_norm.weight") + len(b"output_norm.weight") + 4
    for offset, message in ((32, "inside the tensor before it"), (33, "no multiple of 32"), (2**40, "needs bytes")):
        assert message in outcome(tiny[: at + 12] + struct.pack("<Q", offset) + tiny[at + 20 :])
    assert "impossible shape" in outcome(tiny[:at] + struct.pack("<Q", 0) + tiny[at + 8 :])
    assert "needs bytes" in outcome(tiny[:at] + struct.pack("<Q", 2**40) + tiny[at + 8 :])
    assert "unknown type 31" in outcome(tiny[: at + 8] + struct.pack("<I", 31) + tiny[at + 12 :])
    assert "stores blocks of 256" in outcome(tiny[: at + 8] + struct.pack("<I", 35) + tiny[at + 12 :])
    assert "truncated or damaged" in outcome(tiny[:-40])
    for empty in (b"", b"G", b"GGUF", bytes(24), b"GGUF" + struct.pack("<IQQ", 3, 2**63, 2**63)):
        assert outcome(empty)
    for tensors, keys in ((2**17, 1), (1, 2**17)):
        assert f"the header claims {tensors} tensors and {keys} keys" in outcome(
            b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + tiny[24:]
        )


def test_a_folder_and_a_missing_file_are_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        open_checked(tmp_path)
    with pytest.raises(ConfigError, match="no such file"):
        open_checked(tmp_path / "a.gguf")


def test_a_file_says_which_run_it_is_from_and_whether_it_still_is(tmp_path: Path) -> None:
    frozen = make_run(tmp_path / "my run", hidden=256, width=512)
    path = tmp_path / "a.gguf"
    export_gguf(frozen, target("gguf:tq2_0"), path)
    claims = claims_of(path)
    assert (claims.run, claims.target, claims.codes_match, claims.file_matches) == ("my run", "gguf:tq2_0", True, True)
    good = path.read_bytes()
    infos = {i.name: i for i in open_checked(path).tensors}
    start = open_checked(path).data_start
    for name, codes in (("blk.1.ffn_down.weight", False), ("token_embd.weight", True)):
        damaged = bytearray(good)
        damaged[start + infos[name].offset + 5] ^= 2
        path.write_bytes(damaged)
        claims = claims_of(path)
        assert (claims.codes_match, claims.file_matches, claims.ok) == (codes, False, False)
    with pytest.raises(VerifyError, match="truncated"):
        path.write_bytes(good[:-64])
        claims_of(path)


@pytest.mark.parametrize("group_size", ["tensor", "row", 256])
def test_the_codes_are_recomputed_for_every_grouping_and_row_order(tmp_path: Path, group_size: object) -> None:
    frozen = make_run(tmp_path / "run", hidden=256, width=512, group_size=group_size)  # type: ignore[arg-type]
    for name in ("gguf:tq2_0", "gguf:q2_k", "gguf:q4_0"):
        path = tmp_path / f"{name[5:]}.gguf"
        export_gguf(frozen, target(name), path)
        assert claims_of(path).codes_match is True


def test_codes_of_tensors_that_are_stored_dense_cannot_be_told(tmp_path: Path) -> None:
    frozen = make_run(tmp_path / "run", width=172)
    export_gguf(frozen, target("gguf:tq2_0"), tmp_path / "a.gguf", fallback=True)
    claims = claims_of(tmp_path / "a.gguf")
    assert claims.codes_match is None and claims.file_matches is True and claims.ok
    assert check_gguf(tmp_path / "a.gguf", frozen, "gguf:tq2_0") == []
    assert TQ2_0.name not in claims.tensors


class TestLlamaCpp:
    pytestmark = pytest.mark.llama_cpp

    @pytest.mark.skipif(not llama_cpp.available(), reason="llama-cpp-python is not installed")
    @pytest.mark.parametrize("count", [6, pytest.param(200, marks=pytest.mark.slow)])
    def test_mutations_that_reach_llama_cpp_end_in_logits_or_one_line(self, tmp_path: Path, count: int) -> None:
        """Files that pass our reader and are still wrong: changed settings, names, tokens and weights."""
        frozen = make_run(tmp_path / "run")
        path = tmp_path / "a.gguf"
        export_gguf(frozen, target("gguf:q2_0"), path)
        good = path.read_bytes()
        draw = random.Random(2)
        last = good.rindex(b"blk.0.attn_q.weight") + 60
        reached = failed = 0
        while reached < count:
            # most of the header is the vocabulary: begin, all, or all of the file
            path.write_bytes(mutated(good, draw, draw.choice([1500, last, len(good)])))
            try:
                open_checked(path)
            except VerifyError:
                continue
            reached += 1
            try:
                found = llama_cpp.logits(path, [1, 2, 3])
            except HestiaError as error:
                assert isinstance(error, ExportError) and "\n" not in str(error)
                failed += 1
            else:
                assert found.shape[0] == 3
        assert count < 100 or failed > 0


def test_a_file_of_ours_without_its_hash_is_damaged(tiny: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(tiny.replace(b"hestia.codes_sha256", b"hestia.codes_sha257"))
    with pytest.raises(VerifyError, match=r"it has hestia\.[a-z_0-9]+ and no hestia\.codes_sha256"):
        claims_of(path)
