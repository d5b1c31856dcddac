"""The doctor finds what is broken, says what to do, and passes a sound machine."""

from __future__ import annotations

import importlib.util
import json
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hestia import doctor, resources
from hestia.cli.main import main
from hestia.doctor import Check
from hestia.export import packing
from hestia.quant import Quantizer


def by_name(name: str, folder: Path = Path()) -> Check:
    makers: dict[str, Any] = {
        "threads": doctor._threads,
        "memory": doctor._memory,
        "disk": lambda: doctor._disk(folder),
        "device": doctor._device,
        "bf16": doctor._bf16,
    }
    return makers[name]()


def test_self_tests_pass_here() -> None:
    for name, work in (("quantizer", doctor._quantizer), ("packer", doctor._packer), ("trainer", doctor._trainer)):
        assert doctor.self_test(name, work).status == "ok", name


def test_a_quantizer_whose_codes_are_off_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    hard = Quantizer.hard
    monkeypatch.setattr(Quantizer, "hard", lambda self, w: hard(self, w) * 1.01)
    check = doctor.self_test("quantizer", doctor._quantizer)
    assert check.status == "problem" and "codes times scales is not the hard weight" in check.found and check.advice


def test_a_packer_that_loses_a_code_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = packing.pack_tq2_0
    monkeypatch.setattr(packing, "pack_tq2_0", lambda codes, scales: pack(np.abs(codes), scales))
    check = doctor.self_test("packer", doctor._packer)
    assert check.status == "problem" and "does not read back" in check.found


def test_a_missing_import_is_a_finding_and_no_traceback() -> None:
    def work() -> str:
        raise ImportError("No module named 'gguf'")

    assert doctor.self_test("packer", work).found == "ImportError: No module named 'gguf'"


def test_old_and_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"python": "3.11.7", "torch": "2.4.1+cpu", "transformers": "5.23.0", "gguf": "0.19.0"}
    monkeypatch.setattr(doctor, "versions", lambda: dict(found))
    checks = {check.name: check for check in doctor._versions()}
    assert checks["torch"].status == "problem" and "pip install 'torch>=2.11'" in checks["torch"].advice
    assert checks["transformers"].status == "ok"
    assert checks["compressed-tensors"].found == "not installed"


def test_more_threads_than_cores_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4096)
    check = by_name("threads")
    assert check.status == "problem" and "--threads" in check.advice


def test_a_full_disk_and_little_memory_are_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(10, 9, 1))
    assert by_name("disk", tmp_path).status == "note"
    monkeypatch.setattr(resources, "available_memory", lambda: 10**9)
    assert by_name("memory").status == "note" and "1.0 GB free" in by_name("memory").found


def test_a_folder_that_cannot_be_written_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(doctor.files, "write_text", refuse)
    check = by_name("disk", tmp_path / "not" / "yet" / "there")
    assert check.status == "problem" and "No space left" in check.found
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_torch_cannot_see_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    check = by_name("device")
    assert check.status == "problem" and "CUDA build" in check.advice


def test_engines_that_are_missing_come_with_their_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    checks = list(doctor._engines())
    assert [check.status for check in checks] == ["note", "note"]
    assert checks[0].advice == "pip install 'hestia-lm[run]'"


def test_an_engine_without_a_version_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Built by hand, it can be imported and has no metadata; others stand among the versions."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "there")
    monkeypatch.setattr(doctor, "versions", lambda: {"lm-eval": "0.4.13"})
    (llama,) = doctor._engines()
    assert llama.status == "ok" and llama.found.startswith("version unknown")


def test_the_command_prints_every_check_and_its_status_says_whether_all_is_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = [Check("torch", "ok", "2.13.0"), Check("device", "note", "no GPU", "small models train here")]
    monkeypatch.setattr(doctor, "examine", lambda folder: iter(sound))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "fit for a run" in out and "small models train here" in out
    monkeypatch.setattr(doctor, "examine", lambda folder: iter([*sound, Check("disk", "problem", "full", "free some")]))
    assert main(["doctor", "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert record["ok"] is False and record["checks"][-1]["advice"] == "free some"
