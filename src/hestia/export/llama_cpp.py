"""llama.cpp, the engine that most people run: logits, text and token ids from a GGUF file.

llama.cpp ends the process on many errors (a damaged file, a failed assertion), so every call runs in a child process:
``python -m hestia.export.llama_cpp`` reads one JSON request on standard input and leaves its answer in a .npy file.
Everything that could round apart from the stored types is turned off: fp32 key-value cache, no flash attention, all
layers on the CPU, and weights as they lie in the file (repacking them for AMX crashes on some virtual machines:
llama.cpp issue 20824).
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, ExportError

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


def activation_kl_bound(type_names: Iterable[str]) -> float:
    """The largest mean KL divergence, in nats a token, that llama.cpp's own arithmetic explains.

    The stored weights are exact, but llama.cpp rounds what they are multiplied with: to 8 bits for TQ1_0 and TQ2_0
    (Q8_K, one scale for 256 numbers) and for Q2_0 and Q4_0 (Q8_0, one for 32), to fp16 for F16, not at all for F32.

    Measured on exact files: a random 4-layer Llama 3.4e-4 (TQ types) and 1.45e-4 (Q2_0, Q4_0), where PyTorch with
    activations rounded in the same way gives the same numbers; a trained 6M Llama 2.6e-4 to 3.7e-4 and 6e-5 to 1.1e-4;
    a trained 260k Llama 1.5e-4 to 2.1e-4 (Q2_0). F16: 1e-7 to 1e-5. A wrong row order or scale costs more than 1e-2.
    Hence 1e-3 where any low-bit type occurs, 1e-4 for F16, 1e-5 for F32 alone.
    """
    names = set(type_names)
    if names - {"F16", "F32"}:
        return 1e-3
    return 1e-4 if "F16" in names else 1e-5


def _ask(path: Path, request: dict[str, Any], threads: int) -> np.ndarray:
    """Send one request to a child process and return the array it leaves."""
    if not available():
        raise ExportError("llama-cpp-python is not installed: pip install 'hestia-lm[run]'")
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
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


def _answer(request: dict[str, Any]) -> np.ndarray:
    """The child's work, in a process of its own."""
    import llama_cpp  # pyright: ignore[reportMissingImports] - an extra

    defaults = llama_cpp.llama_cpp.llama_model_default_params

    def without_repacking() -> Any:
        parameters = defaults()
        parameters.use_extra_bufts = False
        return parameters

    # Llama() offers no argument for it and asks this function for its defaults
    llama_cpp.llama_cpp.llama_model_default_params = without_repacking

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


if __name__ == "__main__":
    _request = json.load(sys.stdin)
    np.save(_request["answer"], _answer(_request), allow_pickle=False)
