"""model_card.py: front matter that YAML can read, Markdown that no name can break."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from report_runs import make_run, report

from hestia.cli.quantize import summary
from hestia.report.model_card import code, fenced, plain, write_model_card

EVIL = "a: [x]\n---\n# <script>alert(1)</script> | `b` ```c``` [y](http://z) *d*"


def card(tmp_path: Path, **changes: Any) -> tuple[dict[str, Any], str]:
    text = write_model_card(make_run(tmp_path / "run", report=report() | changes)).read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_front_matter_is_what_the_hub_reads(tmp_path: Path) -> None:
    front, _ = card(tmp_path, model={"id": "org/base", "commit": "abc123"})
    assert front == {
        "base_model": "org/base",
        "base_model_relation": "quantized",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["hestia", "quantized", "ternary", "gguf", "compressed-tensors"],
    }


def test_an_unknown_licence_is_left_out(tmp_path: Path) -> None:
    assert "license" not in card(tmp_path, license=None)[0]


def test_the_body_has_the_table_the_commands_and_the_proof(tmp_path: Path) -> None:
    _, body = card(tmp_path, model={"id": "org/base", "commit": "abc123"})
    for words in (
        "| hestia | 3.602 | 36.7 | 0.311 | 71.2 % | 2.0625 | 2.31 MB |",
        "| round_to_nearest | 7.918 |",
        "llama-cli -m exports/gguf-tq2_0/model.gguf",
        'AutoModelForCausalLM.from_pretrained("exports/hf")',
        "every code and scale equals the trained model's. llama.cpp b6912 ran it",
        "at commit `abc123`",
        "hestia quantize models/books-6m --data 'my books.txt'",
        "torch 2.13.0, transformers 5.23.0",
        "## Limits",
    ):
        assert words in body, words
    table = [line for line in body.splitlines() if line.startswith("|")]
    assert len(table) == 6 and {line.count("|") for line in table} == {8}


def test_the_card_says_what_llama_cpp_must_know(tmp_path: Path) -> None:
    exports = report()["exports"]
    assert "pull request" not in card(tmp_path / "plain")[1]
    mixed = {**exports[0], "target": "gguf:mixed", "tensors": {"blk.0.attn_q.weight": "Q2_0", "output.weight": "F16"}}
    assert "a build that knows the type Q2_0 (pull request 24448" in card(tmp_path / "mixed", exports=[mixed])[1]


def test_the_card_does_not_publish_the_folders_of_its_author(tmp_path: Path) -> None:
    """Neither in the data, where a sentence may name a document, too, nor in the command."""
    rule = "the last 64 tokens of the longest document (/home/me/my texts/books.txt:1)"
    data = {"files": [{"path": "/home/me/private/books.txt", "split": None}], "held_out_rule": rule}
    words = [
        "hestia",
        "quantize",
        "/home/me/parent",
        "--data",
        "/home/me/set:train",
        "--out=/home/me/a run",
        "-a",
        "b/c",
    ]
    _, body = card(tmp_path, data=data, command=words)
    assert "/home" not in body and "books.txt" in body and "split" not in body
    assert "the longest document (books.txt:1)" in body
    assert "hestia quantize parent --data set:train '--out=a run' -a b/c" in body


def test_the_version_of_hestia_is_told(tmp_path: Path) -> None:
    versions = {"python": "3.11.9", "hestia-lm": "0.1.0", "torch": "2.13.0", "numpy": "2.0"}
    assert "\nhestia-lm 0.1.0, torch 2.13.0.\n" in card(tmp_path, versions=versions)[1]


def test_a_failed_verification_is_said_in_bold(tmp_path: Path) -> None:
    exports = report()["exports"]
    exports[1]["verify"]["codes_equal"] = False
    assert "**Verification failed: this file differs" in card(tmp_path, exports=exports)[1]


def test_hostile_strings_stay_text(tmp_path: Path) -> None:
    exports = [e | {"target": EVIL, "path": EVIL, "sha256": EVIL} for e in report()["exports"]]
    front, body = card(tmp_path, recipe=EVIL, model=EVIL, data={EVIL: EVIL}, exports=exports, license=EVIL)
    assert front["base_model"] == front["license"] == " ".join(EVIL.split())
    outside = [line for line in body.splitlines() if "<script>" in line]
    assert all("`" in line for line in outside)  # code spans and blocks show it, nothing else may
    assert not any(line.startswith("# <script>") for line in body.splitlines())
    table = [line for line in body.splitlines() if line.startswith("| ")]
    assert {line.replace("\\|", "").count("|") for line in table} == {8}


@given(st.text())
def test_plain_text_has_no_live_markup(text: str) -> None:
    line = plain(text)
    assert "\n" not in line and "<" not in line and ">" not in line
    for i, character in enumerate(line):
        if character in "`*[]|~$":
            backslashes = len(line[:i]) - len(line[:i].rstrip("\\"))
            assert backslashes % 2 == 1


@given(st.text())
def test_code_cannot_be_left(text: str) -> None:
    span = code(text)
    fence = len(span) - len(span.lstrip("`"))
    assert "`" * fence not in span[fence:-fence] and "\n" not in span
    lines = fenced(text).split("\n")
    assert all(len(lines[0]) > len(line) or set(line) != {"`"} for line in lines[1:-1])


def test_a_file_that_no_engine_ran_says_so(tmp_path: Path) -> None:
    """Equal bytes are proof of the file, not of the engine."""
    gguf, folder = report()["exports"]
    unrun = {**gguf, "verify": {"codes_equal": True, "max_abs_logit_diff": None, "kl": None, "engine": None}}
    unrun["verify"]["notes"] = ["llama-cpp-python not installed: engine check skipped"]
    _, body = card(tmp_path, exports=[unrun, folder])
    assert body.count("It was not run: its engine was not installed.") == 1
    lines = summary(tmp_path / "run").splitlines()
    assert [line.rpartition("  (")[2] for line in lines if line.startswith(("gguf", "hf:"))] == [
        "its bytes verified; llama-cpp-python not installed: engine check skipped)",
        "verified)",
    ]


@pytest.mark.parametrize(("recipe", "trained"), [("hearth", True), ("round_to_nearest", False)])
def test_what_is_kept_was_trained_along(recipe: str, trained: bool, tmp_path: Path) -> None:
    _, text = card(tmp_path, recipe=recipe)
    assert "stay in full precision" in text and ("were trained along" in text) is trained
    assert "written elsewhere" not in text


def test_a_file_elsewhere_is_named_without_its_place(tmp_path: Path) -> None:
    gguf, folder = report()["exports"]
    _, text = card(tmp_path, exports=[{**gguf, "path": "../../somewhere/m.gguf"}, folder])
    assert "what was written elsewhere is named only" in text and "somewhere" not in text and "m.gguf" in text
