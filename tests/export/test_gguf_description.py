"""What a GGUF file tells people of the parent: keys on which no number depends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
from test_gguf import make_run

from hestia.export import export_model, gguf_layout
from hestia.export.frozen import FrozenModel
from hestia.export.gguf import export_gguf
from hestia.export.gguf_check import check_gguf, claims_of
from hestia.export.gguf_layout import DESCRIPTION, Parent
from hestia.export.gguf_tokenizer import Value
from hestia.targets import target


def described(path: Path) -> dict[str, Any]:
    """The keys of ``DESCRIPTION`` in a file, as the gguf package reads them."""
    fields = gguf.GGUFReader(path).fields
    return {key: fields[key].contents() for key in DESCRIPTION if key in fields}


@pytest.fixture
def frozen(tmp_path: Path) -> FrozenModel:
    return make_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("parent", "expected"),
    [
        (
            Parent("Tiny-95K-Instruct", "some-org/Tiny-95K-Instruct", "apache-2.0"),
            {
                "general.name": "Tiny-95K-Instruct",
                "general.basename": "Tiny",
                "general.size_label": "95K",
                "general.license": "apache-2.0",
                "general.base_model.count": 1,
                "general.base_model.0.name": "Tiny-95K-Instruct",
                "general.base_model.0.organization": "some-org",
                "general.base_model.0.repo_url": "https://huggingface.co/some-org/Tiny-95K-Instruct",
            },
        ),
        (
            Parent("my model"),
            {
                "general.name": "my model",
                "general.size_label": "99K",
                "general.base_model.count": 1,
                "general.base_model.0.name": "my model",
            },
        ),
        (None, {"general.name": "llama Q4_0 by hestia", "general.size_label": "99K"}),
    ],
)
def test_a_file_names_its_parent(
    tmp_path: Path, frozen: FrozenModel, parent: Parent | None, expected: dict[str, Any]
) -> None:
    path = tmp_path / "a.gguf"
    export_model(frozen, "gguf:q4_0", path, parent=parent)
    assert described(path) == expected
    assert check_gguf(path, frozen, "gguf:q4_0") == []
    assert claims_of(path).ok


def test_files_of_earlier_versions_still_verify(
    tmp_path: Path, frozen: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.gguf"
    with monkeypatch.context() as patch:
        name = {"general.name": Value("str", "llama Q4_0 by hestia")}
        patch.setattr(gguf_layout, "_description", lambda *_, **__: name)
        export_gguf(frozen, target("gguf:q4_0"), path)
    assert described(path) == {"general.name": "llama Q4_0 by hestia"}
    assert check_gguf(path, frozen, "gguf:q4_0") == []


def test_a_changed_name_is_found_by_the_digest_and_a_wrong_type_by_the_key(
    tmp_path: Path, frozen: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.gguf"
    export_gguf(frozen, target("gguf:q4_0"), path, parent=Parent("Tiny-95K"))
    path.write_bytes(path.read_bytes().replace(b"Tiny-95K", b"Huge-95B"))
    (line,) = check_gguf(path, frozen, "gguf:q4_0")
    assert line.startswith("hestia.file_sha256: ")
    odd = {"general.name": Value("u32", 7), "general.author": Value("str", "me")}
    monkeypatch.setattr(gguf_layout, "_description", lambda *_, **__: odd)
    export_gguf(frozen, target("gguf:q4_0"), path)
    monkeypatch.undo()
    assert check_gguf(path, frozen, "gguf:q4_0") == [
        "general.name: type u32, expected str",
        "general.author: not a key of this model",
    ]
