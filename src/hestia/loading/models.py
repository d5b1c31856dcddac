"""The model: all of its weights in fp32, or its shapes alone; and the dtype that it goes back to."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import ConfigError
from ..nn import refuse_latents
from ..progress import announce
from . import reading
from .configs import read_config, stored_dtype
from .sources import Source

SPARE = 1.5
"""Weights that a configuration may describe, a stored one: shared and derived ones are counted, nothing else."""


def load_model(source: Source, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model in fp32 and eval mode, on the CPU; ``parent_dtype`` tells what it was stored in.

    Raises:
        PlanError: it holds latent weights, which no one evaluates or learns from.
        ConfigError: damaged files, weights that are missing for the configured architecture, of another shape, not
            finite or of no place in it, remote code needed.
    """
    if source.is_local and not trust_remote_code:
        _check_described(source, read_config(source, trust_remote_code), trust_remote_code)
    with contextlib.redirect_stderr(io.StringIO()):  # compressed-tensors draws a bar for each of its stages
        loaded = reading.read(
            source,
            "model weights",
            AutoModelForCausalLM.from_pretrained,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            trust_remote_code=trust_remote_code,
        )
    model, info = loaded
    refuse_latents(model)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ConfigError(f"{source.name}: the checkpoint lacks {len(missing)} weights, the first is {missing[0]}")
    mismatched = sorted(map(str, info.get("mismatched_keys", ())))
    if mismatched:
        raise ConfigError(f"{source.name}: weights of another shape than in config.json, first {mismatched[0]}")
    _check_used(source, model, sorted(info.get("unexpected_keys", ())))
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ConfigError(f"{source.name}: {name} holds NaN or infinity; the checkpoint is damaged")
    model.eval()
    return model


def empty_model(source: Source, config: Any, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model's modules on the meta device: every shape, no weight.

    Raises:
        ConfigError: transformers has no causal language model for this configuration.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except reading.ERRORS as error:
        raise ConfigError(f"{source.name}: not a causal language model ({reading.first_line(error)})") from None


def require_trainable(source: Source, config: Any, model: nn.Module) -> None:
    """Refuse a parent that could not be trained or handed back; the message says what is wrong with it.

    Raises:
        ConfigError, PlanError: it is one, and what to take instead.
    """
    if getattr(config, "quantization_config", None):
        raise ConfigError(
            f"{source.name}: quantized already; take the checkpoint in bf16, fp16 or fp32 that it was made from"
        )
    refuse_latents(model)
    for part in ("vision_config", "audio_config"):
        if getattr(config, part, None) is not None:
            raise ConfigError(
                f"{source.name}: a model of more than text ({part}); text would train only a part of what becomes "
                "low-bit. Save its language model as a checkpoint of its own"
            )
    if getattr(config, "rescale_every", 0):  # RWKV, against overflow in fp16
        raise ConfigError(
            f"{source.name}: in eval mode its layers divide their weights by powers of two, so what is saved is not "
            "what was trained; set rescale_every to 0 in its config.json"
        )
    if type(model).__module__.startswith("transformers_modules"):
        raise ConfigError(
            f"{source.name}: its model is code from its own folder ({type(model).__name__}), which no exported file "
            "brings along; --trust-remote-code is for tokenizers and scores"
        )


def _check_described(source: Source, config: Any, trust_remote_code: bool) -> None:
    """Refuse a configuration of far more weights than the files hold: they would be drawn before they are missed."""
    empty = empty_model(source, config, trust_remote_code=trust_remote_code)
    described = sum(parameter.numel() for parameter in empty.parameters())
    stored = 0
    for path in sorted(Path(source.location).glob("*.safetensors")):
        with safe_open(path, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                piece = handle.get_slice(name)
                numbers = math.prod(piece.get_shape())
                packed = piece.get_dtype() not in ("F64", "F32", "F16", "BF16")
                stored += 32 * numbers if packed else numbers  # an integer may hold many low-bit weights
    if described > SPARE * stored + 1_000_000:
        raise ConfigError(
            f"{source.name}: the checkpoint lacks weights: config.json describes {described:,} weights, "
            f"the safetensors files hold {stored:,}"
        )


def _check_used(source: Source, model: nn.Module, unused: list[str]) -> None:
    """Refuse stored weights of the model's own layers, or of further blocks, that config.json has no place for.

    Without them it is another model: a bias or a scale is left out, or the last blocks. What lies elsewhere (a value
    head, a vision tower) is named.
    """
    if not unused or getattr(getattr(model, "config", None), "quantization_config", None):
        return
    modules = dict(model.named_modules())
    for name in unused:
        owner = modules.get(name.rpartition(".")[0])
        of_layer = owner is not None and any(True for _ in owner.parameters(recurse=False))
        if of_layer or _beyond(modules, name):
            raise ConfigError(
                f"{source.name}: the checkpoint holds {name}, which the model of config.json has no place for, and is "
                "another model without it. Mend config.json, or remove the tensor if it means nothing"
            )
    more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
    announce(f"{source.name}: the checkpoint holds {unused[0]}{more}, which a causal language model does not use")


def _beyond(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Whether a weight belongs to a block behind the last of a list, such as layer 12 of 12."""
    parts = name.split(".")
    lists = ((modules.get(".".join(parts[:i])), part) for i, part in enumerate(parts) if part.isdigit())
    return any(isinstance(blocks, nn.ModuleList) and int(part) >= len(blocks) for blocks, part in lists)


def parent_dtype(source: Source, config: Any) -> torch.dtype:
    """The dtype the checkpoint is stored in, to which a frozen model returns."""
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    if dtype is None and source.is_local:
        dtype = stored_dtype(Path(source.location))
    return dtype if dtype in (torch.float32, torch.float16, torch.bfloat16) else torch.float32


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast every floating parameter of a frozen model to ``dtype``, in place (buffers keep theirs)."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
