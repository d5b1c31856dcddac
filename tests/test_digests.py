"""Digests of tensors and large files: every bit counts in a tensor, every sampled one in a file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from hestia import digests


def test_of_tensors_is_sha256_of_names_and_bits() -> None:
    a, b = torch.arange(6, dtype=torch.int32).view(2, 3), torch.tensor(1.5)
    expected = hashlib.sha256(
        b"a (2, 3) torch.int32\n" + a.numpy().tobytes() + b"b () torch.float32\n" + b.numpy().tobytes()
    )
    assert digests.of_tensors({"a": a, "b": b}) == expected.hexdigest()
    assert digests.of_tensors({"a": a.T.contiguous().T, "b": b}) == expected.hexdigest()
    assert digests.of_tensors({"a": a, "b": -b}) != expected.hexdigest()
    assert digests.of_tensors({"a": torch.zeros(0, 3)}) != digests.of_tensors({"a": torch.zeros(3, 0)})
    assert digests.of_tensors({"a": torch.zeros(3, dtype=torch.bfloat16)})


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (64 << 20) - 1, (64 << 20) + 12_345])
def test_of_large_file_sees_the_first_and_the_last_byte_and_the_size(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x"
    with open(path, "wb") as handle:
        handle.truncate(size)
    before = digests.of_large_file(path)
    assert digests.of_large_file(path) == before
    for place in {0, size - 1} if size else ():
        with open(path, "rb+") as handle:
            handle.seek(place)
            handle.write(b"\x01")
        assert digests.of_large_file(path) != before
        with open(path, "rb+") as handle:
            handle.seek(place)
            handle.write(b"\x00")
    with open(path, "ab") as handle:
        handle.write(b"\x00")
    assert digests.of_large_file(path) != before
