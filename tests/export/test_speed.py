"""Speed of .gguf files: what is said where the bandwidth of memory is not known."""

from __future__ import annotations

import pytest

from hestia.cli.bench import table
from hestia.export import speed


def test_a_probe_that_fails_leaves_the_bandwidth_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_PROBE", "print(3e9)")
    assert speed.read_bandwidth(1) == 3e9
    monkeypatch.setattr(speed, "_PROBE", "raise MemoryError")
    assert speed.read_bandwidth(1) is None


@pytest.mark.parametrize(
    ("layers", "says"), [(0, "could not be measured"), (-1, "all layers on the GPU"), (3, "3 layers on the GPU")]
)
def test_without_a_bound_the_table_says_why(layers: int, says: str) -> None:
    row = {"name": "a.gguf", "bytes": 1e6, "decode_tokens_per_second": 9.0, "prompt_tokens_per_second": 99.0}
    row |= {"bound_tokens_per_second": None, "share_of_bound": None, "times_first": 1.0}
    text = table({"threads": 1, "bandwidth_gb_per_s": None, "gpu_layers": layers, "files": [row]})
    assert says in text.splitlines()[0] and "no bound is known" in text
