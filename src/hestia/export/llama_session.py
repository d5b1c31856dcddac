"""A conversation with a GGUF file in llama.cpp, and how fast it goes.

llama.cpp lives in a child process, ``python -m hestia.export.llama_session``, that reads one JSON request a line and
answers with lines of JSON: ``{"text": ...}`` while it writes, then ``{"done": {...}}`` with counts and seconds, or
``{"error": ...}``. A crash there is one clear error here. The child is told nothing but the file and the text.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ..errors import ExportError
from . import llama_cpp
from .gguf_reader import open_checked


@dataclass(frozen=True)
class Speed:
    """Tokens and seconds of one answer: reading the prompt, and writing."""

    prompt_tokens: int
    prompt_seconds: float
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """How fast it wrote."""
        return self.tokens / self.seconds if self.seconds else 0.0


def usable_cpus() -> int:
    """CPUs that this process may use: of a container or a batch job often fewer than the machine has."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


class Session:
    """An open model; use it in a ``with`` block.

    Args:
        path: the GGUF file.
        context: tokens of prompt and answer together, at most; None takes the model's own, up to 4096.
        threads: CPU threads; None takes all that this process may use.
        gpu_layers: layers that run on the GPU, where llama-cpp-python was built for one; -1 for all.

    Attributes:
        speed: of the last answer.
        has_template: whether the file carries a chat template.

    Raises:
        ExportError: llama-cpp-python is not installed, or it failed on this file; its last words are quoted.
        ConfigError: no such file.
        VerifyError: the file is damaged; llama.cpp did not see it.
    """

    def __init__(
        self, path: Path, *, context: int | None = None, threads: int | None = None, gpu_layers: int = 0
    ) -> None:
        file = open_checked(path)
        if not llama_cpp.available():
            raise ExportError("llama-cpp-python is not installed: pip install 'hestia-lm[run]'")
        self.path, self.speed = path, Speed(0, 0.0, 0, 0.0)
        self.has_template = file.text("tokenizer.chat_template") is not None
        longest = file.integer(f"{file.text('general.architecture')}.context_length") or 512
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed in close
        self._child = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        settings = {"threads": threads or usable_cpus(), "gpu_layers": gpu_layers}
        try:
            self._send({"path": str(path), "context": min(longest, context or 4096), **settings})
            for _ in self._pieces():
                pass
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child."""
        if self._child.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # a child that died did not read what was sent
                self._child.stdin.close()
        try:
            self._child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._child.kill()
        if self._child.stdout is not None:
            self._child.stdout.close()
        self._log.close()

    def complete(self, prompt: str, tokens: int, *, temperature: float = 0.0, seed: int = 0) -> Iterator[str]:
        """Continue a text, piece by piece; ``speed`` is set at the end.

        Raises:
            ExportError: llama.cpp failed.
        """
        self._send({"prompt": prompt, "tokens": tokens, "temperature": temperature, "seed": seed})
        yield from self._pieces()

    def chat(
        self, messages: Sequence[dict[str, str]], tokens: int, *, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[str]:
        """Answer ``[{"role", "content"}, ...]`` through the file's own chat template, piece by piece.

        Raises:
            ExportError: llama.cpp failed.
        """
        self._send({"messages": list(messages), "tokens": tokens, "temperature": temperature, "seed": seed})
        yield from self._pieces()

    def bench(self, prompt_tokens: int, tokens: int) -> Speed:
        """Read and write tokens that do not matter, and measure.

        Raises:
            ExportError: llama.cpp failed.
        """
        self._send({"bench": [prompt_tokens, tokens]})
        for _ in self._pieces():
            pass
        return self.speed

    def _send(self, request: dict[str, Any]) -> None:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(request) + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None

    def _pieces(self) -> Iterator[str]:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            if not line.startswith("{"):
                continue  # something that llama.cpp printed
            answer = json.loads(line)
            if "error" in answer:
                raise ExportError(f"{self.path}: llama.cpp failed: {answer['error']}")
            if "done" in answer:
                self.speed = Speed(**answer["done"])
                return
            yield answer["text"]
        raise self._failure()

    def _failure(self) -> ExportError:
        status = self._child.wait()
        self._log.seek(0)
        said = [line for line in self._log.read().splitlines() if line.strip()][-3:]
        return ExportError(f"{self.path}: llama.cpp failed (exit status {status}): {' | '.join(said) or 'no message'}")


# --- the child -----------------------------------------------------------------------------------------------------


def _serve() -> None:
    """Open the model named in the first request, then answer until standard input ends."""
    first = json.loads(sys.stdin.readline())
    library = llama_cpp.module()
    if first["gpu_layers"] and not library.llama_supports_gpu_offload():
        what = f"--gpu-layers {first['gpu_layers']}: this llama-cpp-python was built without a GPU; leave it out"
        _say({"error": what})
        return
    model = library.Llama(
        first["path"],
        n_ctx=first["context"],
        n_batch=min(512, first["context"]),
        n_gpu_layers=first["gpu_layers"],
        n_threads=first["threads"],
        n_threads_batch=first["threads"],
        verbose=True,
    )
    _say({"done": {"prompt_tokens": 0, "prompt_seconds": 0.0, "tokens": 0, "seconds": 0.0}})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            _say({"done": _bench(model, *request["bench"]) if "bench" in request else _write(model, request)})
        except (ValueError, RuntimeError, KeyError, TypeError) as error:  # a text too long, a broken chat template
            _say({"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"})


def _write(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    options = {
        "max_tokens": request["tokens"],
        "temperature": request["temperature"],
        "seed": request["seed"],
        "repeat_penalty": 1.0,
        "stream": True,
    }
    if request["temperature"] == 0:
        options["top_k"] = 1
    start = time.perf_counter()
    first: float | None = None
    pieces = 0
    if "messages" in request:
        stream = model.create_chat_completion(request["messages"], **options)
    elif not request["prompt"] and model.token_bos() < 0:
        raise ValueError("the prompt is empty, and this model has no token that begins a text")
    else:
        stream = model.create_completion(request["prompt"], **options)
    for chunk in stream:
        choice = chunk["choices"][0]
        text = choice["delta"].get("content") if "delta" in choice else choice["text"]
        if text:
            first = first or time.perf_counter()
            pieces += 1
            _say({"text": text})
    end = time.perf_counter()
    first = first or end
    tokens = max(0, pieces - 1)  # the first piece ends the reading of the prompt
    read = max(0, int(model.n_tokens) - pieces)
    return {"prompt_tokens": read, "prompt_seconds": first - start, "tokens": tokens, "seconds": end - first}


def _bench(model: Any, prompt_tokens: int, tokens: int) -> dict[str, Any]:
    """Seconds of the prompt, and of ``tokens`` single steps: the fastest half of them, twice, against interruptions."""
    ids = [1 + (i * 7919) % (model.n_vocab() - 1) for i in range(prompt_tokens)]
    model.reset()
    start = time.perf_counter()
    model.eval(ids)
    prompt = time.perf_counter() - start
    steps: list[float] = []
    for i in range(tokens):
        start = time.perf_counter()
        model.eval([ids[i % len(ids)]])
        steps.append(time.perf_counter() - start)
    fastest = sorted(steps)[: max(1, tokens // 2)]
    seconds = sum(fastest) / len(fastest) * tokens
    return {"prompt_tokens": prompt_tokens, "prompt_seconds": prompt, "tokens": tokens, "seconds": seconds}


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
