"""precheck.py: what no file can hold is refused before an hour is spent on it."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig

from hestia.errors import ExportError
from hestia.export.precheck import check_targets


def test_rows_that_the_head_s_blocks_do_not_divide_are_refused() -> None:
    config = LlamaConfig(hidden_size=80, num_attention_heads=4, vocab_size=96)
    with pytest.raises(ExportError, match=r"--target gguf:q2_0: m/config.json: --head q8_0 stores blocks of 32"):
        check_targets(["gguf:q2_0"], config, Path("m"), head="q8_0")
    check_targets(["hf", "gguf:q2_0"], config, Path("m"), head="f16")
