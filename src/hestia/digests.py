"""What pins the content of large files and tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_PIECE = 1 << 24
_SAMPLES = 64
_SAMPLE = 1 << 20


def of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over name, shape, dtype and bits of tensors, in their order."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        for piece in _pieces(tensor):
            digest.update(piece)
    return digest.hexdigest()


def _pieces(tensor: Tensor) -> Iterator[Any]:
    import torch

    if tensor.numel() == 0:
        return
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    for start in range(0, flat.numel(), _PIECE):
        yield flat[start : start + _PIECE].cpu().numpy()


def of_large_file(path: Path) -> str:
    """SHA-256 over the size and the content of a file; of one beyond 64 MiB, over 64 MiB spread evenly across it.

    That tells checkpoints apart within a second, however large; it is no proof against who wants to deceive.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    whole = size <= _SAMPLES * _SAMPLE
    starts = range(0, size, _SAMPLE) if whole else (k * (size - _SAMPLE) // (_SAMPLES - 1) for k in range(_SAMPLES))
    with open(path, "rb") as handle:
        for start in starts:
            handle.seek(start)
            digest.update(handle.read(_SAMPLE))
    return digest.hexdigest()
