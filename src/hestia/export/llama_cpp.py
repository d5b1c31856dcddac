"""llama.cpp, the engine that most people run: logits, text and token ids from a GGUF file.

llama.cpp ends the process on many errors (a damaged file, a failed assertion), so hestia's own reader looks at a file
first, and every call runs in a child process: ``python -m hestia.export.llama_cpp`` reads one JSON request on standard
input and leaves its answer in a .npy file. ``llama_session`` is the one that talks.
Everything that could round apart from the stored types is turned off: fp32 key-value cache, no flash attention, all
layers on the CPU, and weights as they lie in the file (repacking them for AMX crashes on some virtual machines:
llama.cpp issue 20824).
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ExportError
from .gguf_reader import open_checked

_F32 = 0  # ggml type id of the key-value cache


@dataclass(frozen=True)
class Generation:
    """Greedy continuation: the new token ids, and their text."""

    ids: list[int]
    text: str


def available() -> bool:
    """Whether llama-cpp-python is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


def logits(path: Path, token_ids: Sequence[int], *, threads: int = 1) -> np.ndarray:
    """Next-token logits ``[T, V]`` fp32 of one sequence, as llama.cpp computes them on the CPU.

    Raises:
        ExportError: llama-cpp-python is not installed, or it failed on this file; its last words are quoted.
        ConfigError: no such file.
        VerifyError: the file is damaged; llama.cpp did not see it.
    """
    return logits_all(path, [token_ids], threads=threads)[0]


def logits_all(path: Path, sequences: Sequence[Sequence[int]], *, threads: int = 1) -> np.ndarray:
    """``logits`` of several sequences of one length, ``[B, T, V]``, in one process.

    Raises:
        ExportError: as ``logits``.
    """
    return _ask(path, {"do": "logits", "ids": [[int(i) for i in ids] for ids in sequences]}, threads)


def generate(path: Path, prompt: str | Sequence[int], n: int, *, threads: int = 1) -> Generation:
    """The ``n`` likeliest next tokens, one after the other; ends early at an end-of-sequence token.

    Args:
        path: the GGUF file.
        prompt: text, tokenized by llama.cpp as its metadata says, or token ids.
        n: tokens to add.
        threads: CPU threads.

    Raises:
        ExportError: as ``logits``.
    """
    request = {"text": prompt} if isinstance(prompt, str) else {"ids": [int(i) for i in prompt]}
    answer = _ask(path, {"do": "generate", "n": n, **request}, threads)
    count = int(answer[0])
    text = answer[1 + count :].astype(np.uint8).tobytes()
    return Generation([int(i) for i in answer[1 : 1 + count]], text.decode("utf-8", "replace"))


def tokenize(path: Path, text: str) -> list[int]:
    """Token ids of ``text`` by llama.cpp's tokenizer, special tokens added and recognized as transformers does.

    Raises:
        ExportError: as ``logits``.
    """
    return tokenize_all(path, [text])[0]


def tokenize_all(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """``tokenize`` for many texts in one process.

    Raises:
        ExportError: as ``logits``.
    """
    flat = iter(_ask(path, {"do": "tokenize", "texts": list(texts)}, 1).tolist())
    return [[next(flat) for _ in range(next(flat))] for _ in texts]


def decode_all(path: Path, sequences: Sequence[Sequence[int]]) -> list[str]:
    """The text that llama.cpp prints for each sequence of token ids, special tokens included, in one process.

    Raises:
        ExportError: as ``logits``.
    """
    request = {"do": "decode", "ids": [[int(i) for i in ids] for ids in sequences]}
    flat = iter(_ask(path, request, 1).tolist())
    return [bytes(next(flat) for _ in range(next(flat))).decode("utf-8", "replace") for _ in sequences]


def _ask(path: Path, request: dict[str, Any], threads: int) -> np.ndarray:
    """Send one request to a child process and return the array it leaves."""
    if not available():
        raise ExportError("llama-cpp-python is not installed: pip install 'hestia-lm[run]'")
    open_checked(path)
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.npy"
        message = {**request, "path": str(path), "answer": str(answer), "threads": threads}
        child = subprocess.run(
            [sys.executable, "-m", __name__], input=json.dumps(message), capture_output=True, text=True, check=False
        )
        if child.returncode or not answer.is_file():
            said = [line for line in child.stderr.splitlines() if line.strip()][-3:]
            raise ExportError(
                f"{path}: llama.cpp failed (exit status {child.returncode}): {' | '.join(said) or 'no message'}"
            )
        return np.load(answer, allow_pickle=False)


def module() -> Any:
    """The ``llama_cpp`` module, told not to repack weights; only in a child process."""
    llama_cpp: Any = importlib.import_module("llama_cpp")  # an extra: type checkers may not find it
    defaults = llama_cpp.llama_cpp.llama_model_default_params

    def without_repacking() -> Any:
        parameters = defaults()
        parameters.use_extra_bufts = False
        return parameters

    # Llama() offers no argument for it and asks this function for its defaults
    llama_cpp.llama_cpp.llama_model_default_params = without_repacking
    return llama_cpp


def _answer(request: dict[str, Any]) -> np.ndarray:
    """The child's work, in a process of its own."""
    llama_cpp = module()

    def opened(context: int, **options: Any) -> Any:
        return llama_cpp.Llama(
            request["path"],
            n_ctx=context,
            n_batch=context,
            n_ubatch=context,
            n_gpu_layers=0,
            n_threads=request["threads"],
            n_threads_batch=request["threads"],
            flash_attn=False,
            type_k=_F32,
            type_v=_F32,
            verbose=True,  # onto standard error, where the parent looks for the reason of a failure
            **options,
        )

    if request["do"] == "tokenize":
        model = opened(8, vocab_only=True)
        out: list[int] = []
        for text in request["texts"]:
            ids = model.tokenize(text.encode(), add_bos=True, special=True)
            out += [len(ids), *ids]
        return np.array(out, np.int64)
    if request["do"] == "decode":
        model = opened(8, vocab_only=True)  # held while it is asked: its vocabulary goes with it
        library, vocabulary = llama_cpp.llama_cpp, model._model.vocab
        texts = [b"".join(_piece(library, vocabulary, token) for token in ids) for ids in request["ids"]]
        return np.array([number for text in texts for number in (len(text), *text)], np.int64)
    if request["do"] == "logits":
        length = len(request["ids"][0])
        model = opened(length, logits_all=True)
        rows: list[np.ndarray] = []
        for sequence in request["ids"]:
            model.reset()
            model.eval(sequence)
            rows.append(np.array(model.scores[:length], np.float32))
        return np.stack(rows)
    text = request.get("text", "").encode()
    prompt_limit = len(request["ids"]) if "ids" in request else len(text) + 3  # a token has a byte; BOS, EOS, a prefix
    model = opened(prompt_limit + request["n"] + 1)
    ids = request["ids"] if "ids" in request else model.tokenize(text, add_bos=True, special=True)
    new: list[int] = []
    for token in model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
        if len(new) == request["n"] or token == model.token_eos():
            break
        new.append(token)
    said = model.detokenize(new, prev_tokens=list(ids)) if new else b""
    return np.array([len(new), *new, *said], np.int64)


def _piece(library: Any, vocabulary: Any, token: int) -> bytes:
    """The bytes of one token; ``Llama.detokenize`` loses those of more than 32."""
    size = 32
    while True:
        buffer = ctypes.create_string_buffer(size)
        length = int(library.llama_token_to_piece(vocabulary, token, buffer, size, 0, True))
        if length >= 0:
            return buffer.raw[:length]
        size = -length


if __name__ == "__main__":
    _request = json.load(sys.stdin)
    np.save(_request["answer"], _answer(_request), allow_pickle=False)
