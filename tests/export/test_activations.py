"""activations.py: the same rounding as llama.cpp's own code, and logits that it explains."""

from pathlib import Path

import numpy as np
import pytest
import torch
from frozen_runs import freeze, llama
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hestia.export import llama_cpp
from hestia.export.activations import FLOOR, ROUNDING, emulating, kl_bound, round_q8_0, round_q8_k
from hestia.export.huggingface import load, logits
from hestia.targets import F16, F32, Q2_0, TARGETS


def naive_q8_0(row: list[float]) -> list[float]:
    """One block of 32, number by number."""
    largest = max(abs(v) for v in row)
    if largest == 0:
        return [0.0] * 32
    d = float(np.float16(np.float32(largest) / np.float32(127)))
    return [round(float(np.float32(v) * (np.float32(127) / np.float32(largest)))) * d for v in row]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.floats(-4, 4))
def test_q8_0_against_one_number_at_a_time(seed: int, size: float) -> None:
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(seed)) * 10**size
    expected = [naive_q8_0(x[i, a : a + 32].tolist()) for i in range(2) for a in (0, 32)]
    assert torch.equal(round_q8_0(x), torch.tensor(expected).reshape(2, 64))


def test_rounding_keeps_zeros_and_the_largest_number_of_a_block() -> None:
    x = torch.zeros(3, 512)
    x[1, 5], x[1, 300], x[2, 7] = -3.0, 4.0, 1e-30
    for rounding in (round_q8_0, round_q8_k):
        assert torch.equal(rounding(x)[0], x[0])
        assert rounding(x)[1, 5].item() == pytest.approx(-3.0, rel=1e-3)
        assert rounding(x)[1, 300].item() == pytest.approx(4.0, rel=1e-3)
        assert torch.isfinite(rounding(x)).all()


def test_every_packed_gguf_type_has_a_rounding() -> None:
    types = {t.name for target in TARGETS.values() for t in target.types if t.ggml is not None}
    assert types - ROUNDING.keys() == {"F32"}


def test_emulation_is_undone_and_rounds_what_it_is_told_to(tmp_path: Path) -> None:
    frozen = freeze(llama(), tmp_path / "run")
    model, ids = load(frozen.folder), torch.tensor([[3, 1, 4, 1, 5]])
    before = logits(model, ids)
    path = frozen.quantized[0]
    with emulating(model, {path: F32}):
        assert torch.equal(logits(model, ids), before)
    seen: list[torch.Tensor] = []
    with emulating(model, {path: Q2_0, "no.such.module": Q2_0}, {"model.norm.weight": torch.zeros(64)}):
        handle = model.get_submodule(path).register_forward_hook(lambda m, x, y: seen.append(x[0]))
        assert not logits(model, ids).any()  # the norm was set to zero
        handle.remove()
    assert torch.equal(seen[0], round_q8_0(seen[0]))
    assert torch.equal(logits(model, ids), before)
    with emulating(model, {path: F16}):
        assert 0 < (logits(model, ids) - before).abs().max() < 0.05


def test_gelu_goes_through_the_table_of_fp16() -> None:
    from transformers.activations import GELUTanh

    model = nn.Sequential(GELUTanh())
    x = torch.tensor([-20.0, -1.2345678, 0.3333333, 12.3456789])
    with emulating(model, {}):
        y = model(x)
    expected = nn.functional.gelu(x.half().float(), approximate="tanh")
    assert torch.equal(y[:3], torch.cat([expected[:1], expected[1:3].half().float()]))
    assert torch.equal(model(x), nn.functional.gelu(x, approximate="tanh"))


def test_the_bound_grows_with_what_is_explained() -> None:
    assert kl_bound(0.0) == FLOOR
    assert 1e-3 < kl_bound(1e-3) <= 2e-3


NEEDS_LLAMA_CPP = [
    pytest.mark.llama_cpp,
    pytest.mark.skipif(not llama_cpp.available(), reason="llama-cpp-python is not installed"),
]


class TestLlamaCpp:
    pytestmark = NEEDS_LLAMA_CPP

    @pytest.mark.parametrize("name", ["Q8_0", "Q8_K"])
    def test_the_rounding_of_llama_cpp_itself(self, name: str) -> None:
        import ggml

        rng = np.random.default_rng(0)
        x = (rng.standard_normal((100, 1024)) * np.exp(rng.uniform(-6, 6, (100, 1)))).astype(np.float32)
        x[3] = 0
        theirs = ggml.quantize_activations(x, name)
        ours = (round_q8_0 if name == "Q8_0" else round_q8_k)(torch.from_numpy(x)).numpy()
        largest = np.abs(x).reshape(100, -1, 32).max(-1).repeat(32, -1)
        # x * (127 / max) and x / (max / 127) fall on different sides of a half once in 100,000 numbers
        assert (np.abs(theirs - ours) > 1e-6 * largest).mean() < 3e-5
        assert (np.abs(theirs - ours) <= 1.01 * largest / 127 + 1e-30).all()
