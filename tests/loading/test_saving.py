"""What a frozen child carries of its parent."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from hestia import loading


def test_a_frozen_child_carries_its_parents_tokenizer_files_byte_for_byte(parent_copy: Path, tmp_path: Path) -> None:
    (parent_copy / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    (parent_copy / "evil.py").write_text("", encoding="utf-8")
    named = Path("additional_chat_templates", "tool_use.jinja")
    (parent_copy / named).parent.mkdir()
    (parent_copy / named).write_bytes(b"{{ tools }}\r\n")
    (parent_copy / named.parent / "evil.py").write_text("", encoding="utf-8")
    (parent_copy / named.parent / "out.jinja").symlink_to("/etc/hostname")
    source = loading.resolve(str(parent_copy))
    model = loading.load_model(source)
    loading.cast_parameters(model, torch.bfloat16)
    loading.save(model, source, tmp_path / "child", loading.load_tokenizer(source))
    names = {path.name for path in (tmp_path / "child").iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "additional_chat_templates",
    }  # fmt: skip
    assert [path.name for path in (tmp_path / "child" / named.parent).iterdir()] == ["tool_use.jinja"]
    for name in (
        str(named),
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ):
        assert (tmp_path / "child" / name).read_bytes() == (parent_copy / name).read_bytes(), name
    assert {t.dtype for t in load_file(tmp_path / "child" / "model.safetensors").values()} == {torch.bfloat16}
