"""frozen.py: what exporters read, or one line that says why not."""

from __future__ import annotations

from pathlib import Path

import pytest
from frozen_runs import freeze, llama
from safetensors.torch import load_file, save_file

from hestia.errors import ConfigError
from hestia.export.frozen import FrozenModel


def test_a_run_without_a_frozen_model_a_later_one_and_a_damaged_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no frozen model .*; train it to the end first"):
        FrozenModel(tmp_path)
    codes = freeze(llama(), tmp_path).run / "codes.safetensors"
    good = codes.read_bytes()
    save_file(load_file(codes), codes, metadata={"schema": "2", "group_size": "{}"})
    with pytest.raises(ConfigError, match=r"codes\.safetensors: schema '2', this version reads '1'"):
        FrozenModel(tmp_path)
    codes.write_bytes(good[:100])
    with pytest.raises(ConfigError, match="a safetensors file of the frozen model is damaged"):
        FrozenModel(tmp_path)
    codes.write_bytes(good)
    assert len(FrozenModel(tmp_path).quantized) == 14
