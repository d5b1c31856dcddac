"""Where a job runs, in which arithmetic, and what is said of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hestia import settings
from hestia.estimate.whole import estimate
from hestia.options import Options
from hestia.training import TrainConfig
from hestia.training.arguments import arguments


def config(width: int) -> Any:
    return SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=width))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(settings, "announce", lines.append)
    return lines


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Abacus 9")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (3_100_000_000, 24_000_000_000))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)


def test_a_gpu_is_named_with_what_is_free_of_it(said: list[str], gpu: None) -> None:
    assert settings.choose_device(Options()).type == "cuda"
    assert said == ["on Abacus 9, 3.1 of 24.0 GB free"]
    assert settings.choose_device(Options(device="cpu")).type == "cpu" and len(said) == 1


def test_an_estimate_names_it_once(said: list[str], gpu: None, toy_parent: Path) -> None:
    estimate(Options(model=str(toy_parent)), flops="1T", bandwidth="1T")
    assert said == ["on Abacus 9, 3.1 of 24.0 GB free"]


def test_a_gpu_that_torch_does_not_see_is_not_passed_over_in_silence(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert settings.choose_device(Options()).type == "cpu"
    assert len(said) == 1 and "a GPU is here and torch does not see it" in said[0]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert settings.choose_device(Options()).type == "cpu" and len(said) == 1


@pytest.mark.parametrize("native", [True, False])
def test_bf16_is_taken_where_it_is_not_emulated(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert settings.in_bf16(Options(), config(4096), gpu) is native
    assert settings.in_bf16(Options(), config(128), cpu) and not settings.in_bf16(Options(), config(64), cpu)
    assert settings.in_bf16(Options(precision="bf16"), config(64), gpu)
    assert not settings.in_bf16(Options(precision="fp32"), config(4096), gpu)


def test_compiling_leaves_tf32_off(tmp_path: Path) -> None:
    made = arguments(TrainConfig(steps=1, batch_size=1, learning_rate=1e-3, compile=True), tmp_path)
    assert made.torch_compile and made.tf32 is False
