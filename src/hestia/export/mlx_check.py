"""Is an MLX folder the frozen model? Read with safetensors and JSON alone, decoded with arithmetic of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from .frozen import FrozenModel
from .huggingface_check import (
    Stored,
    bytes_differences,
    file_differences,
    json_differences,
    read_config,
    value_differences,
)
from .mlx import group_size, mlx_config, offset_of

_PARTS = ("weight", "scales", "biases")


def check_mlx(path: Path, frozen: FrozenModel) -> list[str]:
    """Every difference between an MLX folder and the frozen model, one line each.

    Raises:
        VerifyError: the folder has no weights, or a file of it is damaged.
    """
    stored = Stored(path, file_format="mlx")
    lines = list(json_differences("config.json", read_config(path), mlx_config(frozen)))
    lines += stored.index_differences()
    quantized = {f"{name}.weight": name for name in frozen.quantized}
    names: set[str] = set()
    for name in frozen.names():
        names |= {f"{quantized[name]}.{part}" for part in _PARTS} if name in quantized else {name}
    lines += [f"{name}: missing" for name in sorted(names - stored.names)]
    lines += [f"{name}: unexpected tensor" for name in sorted(stored.names - names)]
    group = group_size(frozen)
    for name in frozen.names():
        if name not in quantized:
            if name in stored.names:
                lines += bytes_differences(name, stored.tensor(name), frozen.tensor(name))
        elif {f"{quantized[name]}.{part}" for part in _PARTS} <= stored.names:
            lines += _weight_differences(quantized[name], stored, frozen, group)
    return lines + list(file_differences(path, frozen.folder, set(stored.files)))


def _weight_differences(path: str, stored: Stored, frozen: FrozenModel, group: int) -> Iterator[str]:
    truth = frozen.codes(path)
    rows, columns = truth.shape
    dtype = frozen.tensor(f"{path}.weight").dtype
    words, scales, biases = (stored.tensor(f"{path}.{part}") for part in _PARTS)
    layout = {
        "weight": (words, torch.uint32, [rows, columns // 16]),
        "scales": (scales, dtype, [rows, columns // group]),
        "biases": (biases, dtype, [rows, columns // group]),
    }
    for part, (tensor, kind, size) in layout.items():
        if tensor.dtype != kind or list(tensor.shape) != size:
            yield f"{path}.{part}: {tensor.dtype} {list(tensor.shape)}, expected {kind} {size}"
            return
    offset = offset_of(truth.codes)
    digits = (words.view(torch.int32).unsqueeze(-1) >> torch.arange(0, 32, 2, dtype=torch.int32)) & 3
    codes = digits.reshape(rows, columns) - offset
    yield from value_differences(f"{path}.weight", "code", codes, truth.codes.to(torch.int32))
    want = truth.scales.repeat_interleave(columns // truth.scales.shape[1], dim=1).expand(rows, columns)
    for part, what, tensor, factor in (("scales", "scale", scales, 1.0), ("biases", "bias", biases, -float(offset))):
        got = tensor.float().repeat_interleave(group, dim=1)
        yield from value_differences(f"{path}.{part}", f"the {what} of weight", got, want * factor)
