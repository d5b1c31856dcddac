"""The frozen model as an MLX folder: 2-bit affine groups, for mlx-lm on Apple machines.

For a quantized linear ``X`` of shape ``[O, I]`` the weight becomes three tensors; w = q scale + bias in every group:

    X.weight   uint32 [O, I / 16]   q = code + b, sixteen consecutive inputs a word, least significant bits first
    X.scales   [O, I / G]           s, in the dtype of the dense weight
    X.biases   [O, I / G]           -b s; b is 1, or 2 for a weight that has the code -2

G is the longest of 128, 64 and 32 that divides every group of the model; scales of longer groups are repeated. Every
other tensor and file is the parent's, byte for byte. config.json gets ``quantization``, and the rotation's base
and scaling where mlx-lm looks for them.

Source: mlx 0.32 (mlx/backend/cpu/quantized.cpp, python/mlx/nn/layers/quantized.py), mlx-lm 0.32 (utils.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ExportError, PlanError
from ..loading import rope_keys
from ..quant.grouping import GroupSize
from ..targets import MLX2, scale_group, span
from .frozen import FrozenModel
from .gguf_families import check_activation, check_biases, family_of, rotation_of, window_of
from .huggingface import Entry, pack_codes, write_folder

BITS = 2
_ROTATIONS = ("default", "linear", "llama3", "yarn")


def export_mlx(frozen: FrozenModel, path: Path) -> dict[str, Any]:
    """Write the frozen model as an MLX folder; the folder appears whole or not at all.

    Args:
        frozen: the run's frozen model.
        path: the folder to create; an empty one may be there.

    Returns:
        As ``export_hf``.

    Raises:
        ExportError: the folder is not empty, an architecture that is not checked in mlx-lm, or a tensor that the format
            cannot hold exactly; nothing was written.
    """
    config = mlx_config(frozen)
    return write_folder("mlx", path, frozen, list(_entries(frozen)), config, file_format="mlx")


def mlx_config(frozen: FrozenModel) -> dict[str, Any]:
    """config.json with ``quantization``, and the keys that mlx-lm reads from its top level.

    Raises:
        ExportError: an architecture that hestia has not checked in mlx-lm, or a setting that mlx-lm does not compute.
    """
    quantization = {"group_size": group_size(frozen), "bits": BITS, "mode": "affine"}
    return {**frozen.config, **check_mlx(frozen.folder / "config.json", frozen.config), "quantization": quantization}


def check_mlx(where: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Check that mlx-lm computes what ``config`` says, and return the keys that it reads from the top level.

    Args:
        where: the model's config.json, for messages.
        config: the parsed file.

    Raises:
        ExportError: an architecture that hestia has not checked in mlx-lm, or a setting that mlx-lm does not compute.
    """
    family = family_of(where, config)  # the ones whose logits the tests compare
    kind = family.arch
    if kind == "gemma":
        raise ExportError(f"{where}: mlx-lm computes gemma with the exact GELU, the model has its tanh approximation")
    check_activation(where, config, family, "mlx-lm")
    check_biases(where, config, "mlx-lm")
    window = config.get("sliding_window") if kind == "gemma2" else window_of(config)
    if window and window < config["max_position_embeddings"]:
        raise ExportError(f"{where}: mlx-lm has no sliding windows for {config['model_type']}, the model {window}")
    heads = config["num_attention_heads"]
    if kind == "qwen2" and (config.get("head_dim") or config["hidden_size"] // heads) * heads != config["hidden_size"]:
        raise ExportError(f"{where}: qwen2 in mlx-lm needs head_dim x heads = hidden_size")
    rope = rotation_of(where, config, "mlx-lm")
    if kind == "gemma3":
        return _gemma3_keys(where, config)
    _check_rotation(where, config, rope)
    return rope_keys(rope) if "rope_theta" not in config and config.get("rope_parameters") else {}


def _check_rotation(where: Path, config: dict[str, Any], rope: dict[str, Any]) -> None:
    """Refuse scalings of the rotation that mlx-lm lacks, or computes otherwise than transformers."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = ("default",) if config["model_type"] == "gemma2" else _ROTATIONS
    if kind not in known:
        listed = ", ".join(known)
        raise ExportError(f"{where}: rope type {kind!r}; checked in mlx-lm for {config['model_type']}: {listed}")
    if kind == "yarn":
        other = [name for name in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(name) is not None]
        other += [] if rope.get("truncate", True) else ["truncate"]
        other += [name for name in ("factor", "original_max_position_embeddings") if not rope.get(name)]
        if other:
            raise ExportError(f"{where}: yarn with {other[0]} {rope.get(other[0])}; mlx-lm computes another rotation")


def _gemma3_keys(where: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Rotations and windows of Gemma 3: mlx-lm has one full layer at the end of every cycle and no soft caps."""
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if config.get(name):
            raise ExportError(f"{where}: mlx-lm has no {name} for gemma3_text")
    layers: list[str] = config["layer_types"]
    period = layers.index("full_attention") + 1 if "full_attention" in layers else 0
    cycle = ["sliding_attention"] * (period - 1) + ["full_attention"]
    if not period or layers != (cycle * len(layers))[: len(layers)]:
        raise ExportError(f"{where}: layer_types {layers}, mlx-lm makes every nth layer full, n at most {len(layers)}")
    rope = config["rope_parameters"]
    for part in rope.values():
        _check_rotation(where, config, part)
    windowed = rope_keys(rope["sliding_attention"])
    if "rope_scaling" in windowed:
        raise ExportError(f"{where}: mlx-lm has no scaling in windowed layers, the model {windowed['rope_scaling']}")
    local = windowed["rope_theta"]
    return {**rope_keys(rope["full_attention"]), "rope_local_base_freq": local, "sliding_window_pattern": period}


def group_size(frozen: FrozenModel) -> int:
    """The longest group length of MLX that stores every scale of the model by repetition.

    Raises:
        ExportError: none does; the first tensor that stands in the way is named.
    """
    tensors: list[tuple[GroupSize, tuple[int, int]]] = []
    for name in frozen.quantized:
        weight = frozen.codes(name)
        length = span(weight.group_size, weight.shape)
        if length % MLX2.groups[-1]:
            raise ExportError(f"{name}: MLX has groups of {', '.join(map(str, MLX2.groups))}, none divides {length}")
        tensors.append((weight.group_size, weight.shape))
    group = scale_group(MLX2, tensors)
    assert group is not None  # the shortest divides them all
    return group


def offset_of(codes: Tensor) -> int:
    """b: what is added to a code to make it unsigned."""
    return 2 if int(codes.min()) < -1 else 1


def _entries(frozen: FrozenModel) -> Iterator[Entry]:
    quantized = {f"{name}.weight": name for name in frozen.quantized}
    group = group_size(frozen)
    for name in frozen.names():
        if name in quantized:
            yield from _affine(frozen, quantized[name], group)
        else:
            dense = frozen.tensor(name)
            yield Entry(name, dense.dtype, tuple(dense.shape), lambda name=name: frozen.tensor(name))


def _affine(frozen: FrozenModel, path: str, group: int) -> Iterator[Entry]:
    weight, dtype = frozen.codes(path), frozen.tensor(f"{path}.weight").dtype
    rows, columns = weight.shape
    refusal = MLX2.refusal(weight.grid(), weight.group_size, weight.shape)
    if refusal is not None:
        raise PlanError(f"{path}: {refusal}")
    if not torch.equal(weight.scales.to(dtype).float(), weight.scales):
        raise ExportError(f"{path}: a scale is not exact in {dtype}; freeze the model again to snap the scales")
    offset = offset_of(weight.codes)

    def words() -> Tensor:
        return pack_codes(frozen.codes(path).codes + (offset - 2), BITS).view(torch.uint32)

    def scales(factor: float = 1.0) -> Tensor:
        return (frozen.codes(path).block_scales(group) * factor).to(dtype)

    yield Entry(f"{path}.weight", torch.uint32, (rows, columns * BITS // 32), words, packed=True)
    yield Entry(f"{path}.scales", dtype, (rows, columns // group), scales, packed=True)
    yield Entry(f"{path}.biases", dtype, (rows, columns // group), lambda: scales(-float(offset)), packed=True)
