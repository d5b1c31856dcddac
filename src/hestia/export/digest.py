"""What all exports of one frozen model have in common: a hash of its codes and scales."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from .frozen import FrozenModel


class CodesDigest:
    """SHA-256 of every code and scale, fed one weight at a time.

    Over module paths in alphabetical order: the path in UTF-8, a zero byte, the codes as int8 and the scales ``[R, G]``
    as little-endian fp32, both row by row.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, path: str, codes_OI: npt.NDArray[np.int8], scales_RG: npt.NDArray[np.float32]) -> None:
        """One quantized weight; callers keep the alphabetical order."""
        self._hash.update(path.encode() + b"\0")
        self._hash.update(np.ascontiguousarray(codes_OI).data)
        self._hash.update(np.ascontiguousarray(scales_RG.astype("<f4")).data)

    def hexdigest(self) -> str:
        """The hash so far, as 64 hexadecimal digits."""
        return self._hash.hexdigest()


def codes_digest(frozen: FrozenModel) -> str:
    """The digest of a frozen model."""
    digest = CodesDigest()
    for path in sorted(frozen.quantized):
        tensor = frozen.codes(path)
        digest.add(path, tensor.codes.numpy(), tensor.scales.numpy())
    return digest.hexdigest()
