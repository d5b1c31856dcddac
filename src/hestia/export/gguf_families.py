"""The architectures that GGUF export knows: what llama.cpp computes for each, and the keys that say so.

Everything that a configuration may ask for and llama.cpp does not do for that architecture is refused here by name,
before any file is written.

    llama, mistral   rows of q and k interleaved, because llama.cpp rotates neighbours (2i, 2i + 1) and transformers
                     (i, i + d/2); a sliding window becomes the context length: up to there full attention is the same
    smollm3          the same; every fourth layer without rotation, which llama.cpp has built in
    qwen2, qwen3     rows as they are; biases, or norms on q and k
    gemma            norms stored as 1 + w (in fp32), because transformers multiplies by 1 + w
    gemma2, gemma3   the same, four norms a layer, soft caps, and a window in all layers but every second or sixth

Source: llama.cpp 0c1e57098 (conversion/, src/models/).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ExportError, nearest
from ..targets import BIASES
from .gguf_tokenizer import Value


@dataclass(frozen=True)
class Family:
    """How llama.cpp wants one ``model_type``.

    Attributes:
        arch: llama.cpp's name for it.
        required: tensors of every block.
        optional: tensors that a block may have.
        permuted: whether rows of q and k are interleaved.
        norm_shift: added to every norm's weight.
        activation: the only activation llama.cpp computes for it.
        own_head_size: whether heads x head_dim may differ from hidden_size.
        tied: whether it must have tied embeddings.
        window_period: layers of one cycle of windowed layers and a full one; 0 where windows are not part of it.
    """

    arch: str
    required: frozenset[str]
    optional: frozenset[str] = frozenset()
    permuted: bool = False
    norm_shift: float = 0.0
    activation: str = "silu"
    own_head_size: bool = True
    tied: bool = False
    window_period: int = 0

    @property
    def gemma(self) -> bool:
        """Whether it is one of Gemma's, which tie the head where config.json does not say."""
        return self.arch.startswith("gemma")


def _weights(*names: str) -> frozenset[str]:
    return frozenset(f"{name}.weight" for name in names)


_BIASES = {kind: frozenset(f"{layer}.bias" for layer in layers) for kind, layers in BIASES["llama.cpp"].items()}
_MATRICES = (*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))
_BLOCK = _weights("input_layernorm", "post_attention_layernorm", *_MATRICES)
_QK_NORMS = _weights("self_attn.q_norm", "self_attn.k_norm")
_FOUR_NORMS = _BLOCK | _weights("pre_feedforward_layernorm", "post_feedforward_layernorm")
_GELU = "gelu_pytorch_tanh"
_BIASED_BY = {
    "attention_bias": [f"self_attn.{x}_proj" for x in "qkvo"],
    "mlp_bias": [f"mlp.{x}_proj" for x in ("gate", "up", "down")],
}
"""Options of configurations, and the layers that they give a bias."""

FAMILIES = {
    "llama": Family("llama", _BLOCK, _BIASES["llama"], permuted=True),
    "mistral": Family("llama", _BLOCK, permuted=True),
    "smollm3": Family("smollm3", _BLOCK, permuted=True, own_head_size=False),
    "qwen2": Family("qwen2", _BLOCK, _BIASES["qwen2"], own_head_size=False),
    "qwen3": Family("qwen3", _BLOCK | _QK_NORMS, _BIASES["qwen3"]),
    "gemma": Family("gemma", _BLOCK, norm_shift=1.0, activation=_GELU, tied=True),
    "gemma2": Family("gemma2", _FOUR_NORMS, norm_shift=1.0, activation=_GELU, tied=True, window_period=2),
    "gemma3_text": Family("gemma3", _FOUR_NORMS | _QK_NORMS, norm_shift=1.0, activation=_GELU, window_period=6),
}
_LARGEST = {"gemma2": 46, "gemma3": 62}
"""Layers of the 27B models, by which llama.cpp recognizes that their attention is scaled in another way."""


@dataclass(frozen=True)
class Shape:
    """What a configuration says about a model, as GGUF keys and as numbers the layout needs.

    Attributes:
        family: its architecture.
        heads: attention heads.
        kv_heads: heads of keys and values.
        blocks: layers.
        tied: whether the head is the embedding.
        metadata: the architecture's keys.
        rope_factors: divisors of the rotation's frequencies that are stored as a tensor of their own; mostly none.
    """

    family: Family
    heads: int
    kv_heads: int
    blocks: int
    tied: bool
    metadata: dict[str, Value]
    rope_factors: tuple[float, ...]


def family_of(where: Path, config: dict[str, Any]) -> Family:
    """The family of a configuration.

    Raises:
        ExportError: llama.cpp's counterpart is not known to hestia; the known ones are listed.
    """
    model_type = str(config.get("model_type"))
    family = FAMILIES.get(model_type)
    if family is None:
        raise ExportError(f"{where}: model_type {model_type!r} has no GGUF export: {nearest(model_type, FAMILIES)}")
    return family


def shape_of(where: Path, config: dict[str, Any]) -> Shape:
    """Read a configuration.

    Args:
        where: its config.json, for messages.
        config: the parsed file.

    Raises:
        ExportError: an architecture or setting that llama.cpp does not compute exactly; it is named.
    """
    family = family_of(where, config)
    arch = family.arch
    check_activation(where, config, family, "llama.cpp")
    check_biases(where, config, "llama.cpp")
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        kv_heads, blocks = int(config.get("num_key_value_heads") or heads), int(config["num_hidden_layers"])
        head_size = int(config.get("head_dim") or hidden // heads)
        if head_size * heads != hidden and not family.own_head_size:
            raise ExportError(f"{where}: {config['model_type']} in llama.cpp needs head_dim x heads = hidden_size")
        rope, factors = _rope(where, config, family, head_size)
        context = int(config["max_position_embeddings"])
        if not family.window_period:
            context = min(context, window_of(config) or context)
        metadata = {
            f"{arch}.context_length": Value("u32", context),
            f"{arch}.embedding_length": Value("u32", hidden),
            f"{arch}.block_count": Value("u32", blocks),
            f"{arch}.feed_forward_length": Value("u32", int(config["intermediate_size"])),
            f"{arch}.attention.head_count": Value("u32", heads),
            f"{arch}.attention.head_count_kv": Value("u32", kv_heads),
            f"{arch}.attention.layer_norm_rms_epsilon": Value("f32", float(config["rms_norm_eps"])),
            f"{arch}.rope.dimension_count": Value("u32", head_size),
            **{f"{arch}.rope.{key}": value for key, value in rope.items()},
        }
        if head_size * heads != hidden:
            metadata |= {f"{arch}.attention.{x}_length": Value("u32", head_size) for x in ("key", "value")}
        if family.window_period:
            metadata |= _gemma_keys(where, config, family, hidden // heads, head_size, blocks)
    except KeyError as error:
        raise ExportError(f"{where}: missing key {error}") from None
    tied = bool(config.get("tie_word_embeddings", family.gemma or config["model_type"] == "smollm3"))
    if family.tied and not tied:
        raise ExportError(f"{where}: {arch} in llama.cpp has tied embeddings, this model has a head of its own")
    if config["model_type"] == "smollm3":
        _check_smollm3(where, config, blocks)
    return Shape(family, heads, kv_heads, blocks, tied, metadata, factors)


def check_activation(where: Path, config: dict[str, Any], family: Family, engine: str) -> None:
    """Check that the model's activation is the one that engines compute for its family.

    Raises:
        ExportError: it is another.
    """
    activation = config.get("hidden_activation") or config.get("hidden_act")
    if activation != family.activation:
        raise ExportError(
            f"{where}: {config['model_type']} in {engine} uses {family.activation}, the model {activation}"
        )


def check_biases(where: Path, config: dict[str, Any], engine: str) -> None:
    """Check that every bias that the configuration's options bring is one that the engine loads.

    Raises:
        ExportError: one is not; the option and the layer are named.
    """
    allowed = BIASES[engine].get(config["model_type"], frozenset())
    for option, layers in _BIASED_BY.items():
        missing = [layer for layer in layers if layer not in allowed]
        if config.get(option) and missing:
            raise ExportError(f"{where}: {option}; {engine} loads no bias of {missing[0]} for {config['model_type']}")


def window_of(config: dict[str, Any]) -> int | None:
    """The sliding window, in families without a cycle of windowed layers; None where no layer has one."""
    layers = config.get("layer_types")
    windowed = config.get("use_sliding_window", config["model_type"] == "mistral")
    if not windowed or (layers and "sliding_attention" not in layers):
        return None
    return int(config["sliding_window"]) if config.get("sliding_window") else None


def rotation_of(where: Path, config: dict[str, Any], engine: str) -> dict[str, Any]:
    """What the configuration says about the rotation, as transformers 5 writes it.

    Raises:
        ExportError: only a part of every head is rotated, which no engine does for these families.
    """
    rope = config.get("rope_parameters")
    if rope is None:
        rope = {**(config.get("rope_scaling") or {}), "rope_theta": config.get("rope_theta", 10000.0)}
    if (rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ExportError(f"{where}: {engine} rotates whole heads of {config['model_type']}: partial_rotary_factor")
    return rope


def _gemma_keys(
    where: Path, config: dict[str, Any], family: Family, share: int, head_size: int, blocks: int
) -> dict[str, Value]:
    """Windows and soft caps of Gemma 2 and 3, after checking what llama.cpp has built in."""
    arch = family.arch
    scale = float(config.get("query_pre_attn_scalar", head_size))
    built_in = share if blocks == _LARGEST[arch] else head_size
    if scale != built_in:
        raise ExportError(
            f"{where}: query_pre_attn_scalar {scale:g}, llama.cpp takes {built_in} for {arch} with {blocks} layers"
        )
    if config.get("use_bidirectional_attention"):
        raise ExportError(f"{where}: use_bidirectional_attention has no GGUF export for {arch}")
    if not config.get("sliding_window"):
        raise ExportError(f"{where}: no sliding_window, and llama.cpp computes {arch} with one")
    window, period = int(config["sliding_window"]), family.window_period
    cycle = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(blocks)]
    if (config.get("layer_types") or cycle) != cycle:
        raise ExportError(f"{where}: layer_types {config['layer_types']}, llama.cpp makes every {period}th layer full")
    keys = {
        f"{arch}.attention.sliding_window": Value("u32", window),
        f"{arch}.attention.key_length": Value("u32", head_size),
        f"{arch}.attention.value_length": Value("u32", head_size),
    }
    attention, final = config.get("attn_logit_softcapping"), config.get("final_logit_softcapping")
    if arch == "gemma2":
        if not attention or not final:
            raise ExportError(f"{where}: gemma2 in llama.cpp always has both soft caps, the model {attention}, {final}")
        keys[f"{arch}.attn_logit_softcapping"] = Value("f32", float(attention))
        keys[f"{arch}.final_logit_softcapping"] = Value("f32", float(final))
    else:
        if attention:
            raise ExportError(f"{where}: attn_logit_softcapping has no GGUF export for {arch}")
        if final:
            keys[f"{arch}.final_logit_softcapping"] = Value("f32", float(final))
    return keys


def _check_smollm3(where: Path, config: dict[str, Any], blocks: int) -> None:
    cycle = [int((i + 1) % 4 != 0) for i in range(blocks)]
    if (config.get("no_rope_layers") or cycle) != cycle:
        raise ExportError(f"{where}: no_rope_layers {config['no_rope_layers']}, llama.cpp skips every 4th layer")
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or []):
        raise ExportError(f"{where}: sliding windows have no GGUF export for smollm3")


def _rope(
    where: Path, config: dict[str, Any], family: Family, head_size: int
) -> tuple[dict[str, Value], tuple[float, ...]]:
    """The ``rope.*`` keys, and the divisors of the frequencies that Llama 3's scaling needs (none otherwise)."""
    rope = rotation_of(where, config, "llama.cpp")
    keys: dict[str, Value] = {}
    if family.arch == "gemma3":
        windowed = rope.get("sliding_attention") or {"rope_theta": config.get("rope_local_base_freq", 10000.0)}
        if windowed.get("rope_type", "default") != "default":
            raise ExportError(f"{where}: rope type {windowed['rope_type']!r} in windowed layers has no GGUF export")
        keys["freq_base_swa"] = Value("f32", float(windowed["rope_theta"]))
        rope = rope.get("full_attention") or rope
    if any(isinstance(value, dict) for value in rope.values()):
        raise ExportError(f"{where}: rope_parameters that differ by layer type have no GGUF export for {family.arch}")
    keys = {"freq_base": Value("f32", float(rope["rope_theta"])), **keys}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return keys, ()
    if kind == "linear" and not family.window_period:
        keys |= {"scaling.type": Value("str", "linear"), "scaling.factor": Value("f32", float(rope["factor"]))}
        return keys, ()
    if kind == "llama3" and family.arch == "llama":
        if float(rope["low_freq_factor"]) == float(rope["high_freq_factor"]):
            raise ExportError(f"{where}: rope type 'llama3' with low_freq_factor equal to high_freq_factor")
        return keys, _llama3_divisors(rope, head_size)
    kinds = "default" if family.window_period else "default, linear or llama3"
    raise ExportError(f"{where}: rope type {kind!r} has no GGUF export for {family.arch}: {kinds}")


def _llama3_divisors(rope: dict[str, Any], head_size: int) -> tuple[float, ...]:
    low, high, factor = (float(rope[k]) for k in ("low_freq_factor", "high_freq_factor", "factor"))
    length = float(rope["original_max_position_embeddings"])
    divisors: list[float] = []
    for i in range(0, head_size, 2):
        turns = length / (2.0 * math.pi * float(rope["rope_theta"]) ** (i / head_size))
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        divisors.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return tuple(divisors)
