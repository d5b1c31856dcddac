"""Where a job runs, in which arithmetic, and what is said of it; and what lies in memory when it scores."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toy_runs import QUICK, Invoke

from hestia import jobs
from hestia.estimate.whole import estimate
from hestia.options import Options
from hestia.pipeline import scoring
from hestia.training import HestiaTrainer, TrainConfig
from hestia.training.arguments import arguments


def config(width: int) -> Any:
    return SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=width))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(jobs, "announce", lines.append)
    return lines


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Abacus 9")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (3_100_000_000, 24_000_000_000))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)


def test_a_gpu_is_named_with_what_is_free_of_it(said: list[str], gpu: None) -> None:
    assert jobs.choose_device(Options()).type == "cuda"
    assert said == ["on Abacus 9, 3.1 of 24.0 GB free"]
    assert jobs.choose_device(Options(device="cpu")).type == "cpu" and len(said) == 1


def test_an_estimate_names_it_once(said: list[str], gpu: None, toy_parent: Path) -> None:
    estimate(Options(model=str(toy_parent)), flops="1T", bandwidth="1T")
    assert said == ["on Abacus 9, 3.1 of 24.0 GB free"]


def test_a_gpu_that_torch_does_not_see_is_not_passed_over_in_silence(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert jobs.choose_device(Options()).type == "cpu"
    assert len(said) == 1 and "a GPU is here and torch does not see it" in said[0]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert jobs.choose_device(Options()).type == "cpu" and len(said) == 1


@pytest.mark.parametrize("native", [True, False])
def test_bf16_is_taken_where_it_is_not_emulated(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert jobs.in_bf16(Options(), config(4096), gpu) is native
    assert jobs.in_bf16(Options(), config(128), cpu) and not jobs.in_bf16(Options(), config(64), cpu)
    assert jobs.in_bf16(Options(precision="bf16"), config(64), gpu)
    assert not jobs.in_bf16(Options(precision="fp32"), config(4096), gpu)


def test_compiling_leaves_tf32_off(tmp_path: Path) -> None:
    made = arguments(TrainConfig(steps=1, batch_size=1, learning_rate=1e-3, compile=True), tmp_path)
    assert made.torch_compile and made.tf32 is False


def test_no_trainer_is_in_memory_while_a_run_is_scored(
    toy_parent: Path, toy_text: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[HestiaTrainer]] = []
    begin, score = HestiaTrainer.__init__, scoring.shared_score

    def remembered(self: HestiaTrainer, *words: Any, **more: Any) -> None:
        begin(self, *words, **more)
        made.append(weakref.ref(self))

    def scored(*words: Any, **more: Any) -> Any:
        alive.append(sum(trainer() is not None for trainer in made))
        return score(*words, **more)

    alive: list[int] = []
    monkeypatch.setattr(HestiaTrainer, "__init__", remembered)
    monkeypatch.setattr(scoring, "shared_score", scored)
    status, _, err = invoke("quantize", toy_parent, "--data", toy_text, "--out", tmp_path / "run", *QUICK)
    assert status == 0, err
    assert made and alive and not any(alive)


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
