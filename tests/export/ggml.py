"""llama.cpp's own scalar decoders and encoders, called through ctypes: second opinions on our bytes."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import numpy as np


def library() -> ctypes.CDLL:
    """The base library of the installed llama-cpp-python."""
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "lib"
    return ctypes.CDLL(
        str(next(f for f in sorted(folder.iterdir()) if f.name.startswith(("libggml-base", "ggml-base"))))
    )


def _suffix(type_name: str) -> str:
    return type_name.lower().replace("_k", "_K")


def dequantize(packed: np.ndarray, type_name: str, columns: int) -> np.ndarray:
    """Rows of packed bytes as fp32 ``[O, columns]``, by ``dequantize_row_*``."""
    decode = getattr(library(), f"dequantize_row_{_suffix(type_name)}")
    packed = np.ascontiguousarray(packed)
    out = np.empty((packed.shape[0], columns), np.float32)
    decode.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    for source, target in zip(packed, out, strict=True):
        decode(source.ctypes.data, target.ctypes.data, columns)
    return out


def quantize_activations(values: np.ndarray, type_name: str) -> np.ndarray:
    """Rows of fp32 through ``quantize_row_{q8_0,q8_K}_ref`` and back, as the CPU kernels see them."""
    block, size = {"Q8_0": (32, 34), "Q8_K": (256, 292)}[type_name]
    encode = getattr(library(), f"quantize_row_{_suffix(type_name)}_ref")
    encode.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    values = np.ascontiguousarray(values, np.float32)
    packed = np.zeros((values.shape[0], values.shape[1] // block * size), np.uint8)
    for source, target in zip(values, packed, strict=True):
        encode(source.ctypes.data, target.ctypes.data, values.shape[1])
    return dequantize(packed, type_name, values.shape[1])
