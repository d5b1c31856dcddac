"""``hestia eval`` as Python calls it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hestia import jobs
from hestia.options import Options


@pytest.mark.parametrize(("typed", "read"), [(None, 2048), (512, 512), (4000, 2048)])
def test_the_papers_protocol_reads_as_far_as_the_paper_did(
    toy_parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: int | None, read: int
) -> None:
    parent = shutil.copytree(toy_parent, tmp_path / "parent")
    config = json.loads((parent / "config.json").read_text())
    (parent / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    lengths: list[int] = []
    monkeypatch.setattr(
        jobs, "_paper_protocol", lambda logits, options, tokenizer, length: lengths.append(length) or {}
    )
    jobs.evaluate_model(Options(model=str(parent), data=("t.txt",), seq_len=typed), protocol="hestia")
    assert lengths == [read]
