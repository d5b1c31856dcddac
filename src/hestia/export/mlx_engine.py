"""mlx-lm, the engine of Apple machines: logits of an MLX folder, in a process of its own.

``python -m hestia.export.mlx_engine`` reads one JSON request on standard input and leaves its answer in a .npy file. It
runs on mlx's CPU backend, which is there on every platform and computes in the dtype that is asked for.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import VerifyError


def available() -> bool:
    """Whether mlx-lm is installed."""
    return importlib.util.find_spec("mlx_lm") is not None


def logits(path: Path, sequences: list[list[int]]) -> np.ndarray:
    """Logits ``[B, T, V]`` fp32 of an MLX folder, its 16-bit numbers widened to fp32 before anything is computed.

    Raises:
        VerifyError: mlx-lm cannot load or run it; its last words are quoted.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.npy"
        message = {"path": str(path.resolve()), "ids": sequences, "answer": str(answer)}
        child = subprocess.run(
            [sys.executable, "-m", __name__], input=json.dumps(message), capture_output=True, text=True, check=False
        )
        if child.returncode or not answer.is_file():
            said = [line for line in child.stderr.splitlines() if line.strip()][-2:]
            raise VerifyError(
                f"{path}: mlx-lm failed (exit status {child.returncode}): {' | '.join(said) or 'no message'}"
            )
        return np.load(answer, allow_pickle=False)


def _answer(request: dict[str, Any]) -> np.ndarray:
    """The child's work."""
    import mlx.core as mx  # pyright: ignore[reportMissingImports] - not a dependency
    from mlx.utils import tree_map  # pyright: ignore[reportMissingImports]
    from mlx_lm.utils import load_model  # pyright: ignore[reportMissingImports]

    mx.set_default_device(mx.cpu)
    model, _ = load_model(Path(request["path"]))
    wide = tree_map(lambda a: a.astype(mx.float32) if a.dtype in (mx.float16, mx.bfloat16) else a, model.parameters())
    model.update(wide)
    return np.array(model(mx.array(request["ids"])).astype(mx.float32))


if __name__ == "__main__":
    _request = json.load(sys.stdin)
    np.save(_request["answer"], _answer(_request), allow_pickle=False)
