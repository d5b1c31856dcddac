"""What a session asks of llama.cpp: threads and layers on a GPU. No engine is needed."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from toy_runs import Invoke

from hestia.cli.bench import table
from hestia.errors import ExportError
from hestia.export import llama_session, speed
from hestia.export.llama_session import Speed, usable_cpus


def test_the_cpus_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 6}, raising=False)
    assert usable_cpus() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert usable_cpus() == 12
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cpus() == 1


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What sessions were opened with; they are fast and say nothing."""
    found: list[dict[str, Any]] = []

    class Session:
        has_template = False
        speed = Speed(8, 0.5, 4, 0.5)

        def __init__(self, path: Path, **options: Any) -> None:
            found.append({"path": path, **options})

        def __enter__(self) -> Session:
            return self

        def __exit__(self, *_: object) -> None: ...

        def bench(self, prompt_tokens: int, tokens: int) -> Speed:
            return self.speed

        def complete(self, prompt: str, tokens: int, **_: Any) -> list[str]:
            return ["text"]

    monkeypatch.setattr(llama_session, "Session", Session)
    monkeypatch.setattr(speed, "Session", Session)
    monkeypatch.setattr(speed, "read_bandwidth", lambda threads: 1e9)
    monkeypatch.setattr(speed, "usable_cpus", lambda: 6)
    return found


def test_run_takes_all_threads_unless_it_is_told(invoke: Invoke, toy_run: Path, asked: list[dict[str, Any]]) -> None:
    file = next((toy_run / "exports" / "gguf-q4_0").iterdir())
    assert invoke("run", file, "--prompt", "a")[0] == 0
    assert invoke("run", file, "--prompt", "a", "--threads", "3", "--gpu-layers", "-1")[0] == 0
    assert [(s["threads"], s["gpu_layers"]) for s in asked] == [(None, 0), (3, -1)]


def test_bench_says_what_it_ran_on(invoke: Invoke, toy_run: Path, asked: list[dict[str, Any]]) -> None:
    file = next((toy_run / "exports" / "gguf-q4_0").iterdir())
    status, out, _ = invoke("bench", file, "--rounds", "1", "--json")
    record = json.loads(out)
    assert status == 0 and (record["threads"], record["gpu_layers"]) == (6, 0) == (asked[0]["threads"], 0)
    assert "6 threads, memory read at 1.0 GB/s" in table(record)
    assert record["files"][0]["share_of_bound"] > 0
    status, out, _ = invoke("bench", file, "--rounds", "1", "--threads", "1", "--gpu-layers", "2")
    assert status == 0 and (asked[1]["threads"], asked[1]["gpu_layers"]) == (1, 2)
    assert out.startswith("1 thread, 2 layers on the GPU: no bound is known")
    assert out.splitlines()[2].split()[2:] == ["8.0", "-", "-", "1.00", "16"]


@pytest.mark.parametrize(("layers", "gpu", "opened"), [(0, False, True), (5, True, True), (5, False, False)])
def test_the_child_opens_the_model_as_asked_or_says_that_it_has_no_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], layers: int, gpu: bool, opened: bool
) -> None:
    settings: list[dict[str, Any]] = []

    class Library:
        @staticmethod
        def Llama(path: str, **options: Any) -> None:  # noqa: N802 - llama_cpp's name
            settings.append(options)

        @staticmethod
        def llama_supports_gpu_offload() -> bool:
            return gpu

    monkeypatch.setattr(llama_session.llama_cpp, "module", Library)
    first = {"path": "a.gguf", "context": 16, "threads": 4, "gpu_layers": layers}
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(first) + "\n"))
    llama_session._serve()
    answer = json.loads(capsys.readouterr().out)
    assert ("done" in answer) == opened == bool(settings)
    if opened:
        assert (settings[0]["n_gpu_layers"], settings[0]["n_threads"], settings[0]["n_threads_batch"]) == (layers, 4, 4)
    else:
        assert answer["error"].startswith("--gpu-layers 5: this llama-cpp-python was built without a GPU")


@pytest.mark.parametrize("dies", ["at once", "later"])
def test_a_child_that_died_leaves_its_last_words(
    toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: str
) -> None:
    """Closing the pipe to it sends what it did not read again: that must not be what the user hears of."""
    file = next((toy_run / "exports" / "gguf-q4_0").iterdir())
    opened = '{"done": {"prompt_tokens": 0, "prompt_seconds": 0, "tokens": 0, "seconds": 0}}'
    child = tmp_path / "child"
    answer = "" if dies == "at once" else f"echo '{opened}'"
    child.write_text(f"#!/bin/sh\n{answer}\necho out of memory >&2\nexit 7\n")
    child.chmod(0o755)
    monkeypatch.setattr(llama_session.llama_cpp, "available", lambda: True)
    monkeypatch.setattr(sys, "executable", str(child))
    with pytest.raises(ExportError, match=r"exit status 7\): out of memory"), llama_session.Session(file) as session:
        session._child.wait()
        list(session.complete("a" * 100_000, 1))


@pytest.mark.parametrize(("bos", "refused"), [(-1, True), (1, False)])
def test_an_empty_prompt_needs_a_token_that_begins_a_text(bos: int, refused: bool) -> None:
    class Model:
        n_tokens = 1

        def token_bos(self) -> int:
            return bos

        def create_completion(self, prompt: str, **options: Any) -> list[Any]:
            return [{"choices": [{"text": "a"}]}]

    request = {"prompt": "", "tokens": 1, "temperature": 0, "seed": 0}
    if refused:
        with pytest.raises(ValueError, match="the prompt is empty, and this model has no token that begins a text"):
            llama_session._write(Model(), request)
    else:
        assert llama_session._write(Model(), request)["tokens"] == 0
