"""From memory to disk: a model that ``hestia.freeze`` left, where exporters and verification find it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import loading
from ..errors import ConfigError
from ..files import replacing_folder
from ..nn import quantized_modules, unwrapped
from ..nn.shards import is_sharded
from ..plans import Plan
from ..quant import QuantizedTensor
from . import require_free
from .frozen import CODES_FILE, MODEL_FOLDER, save_codes


def save(
    model: PreTrainedModel,
    codes: Mapping[str, QuantizedTensor],
    folder: str | Path,
    *,
    parent: str,
    plan: Plan | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Write what your own training loop froze, so that ``hestia export FOLDER`` and ``hestia verify`` work on it.

    Weights go back to the parent's dtype, which holds codes times scales without rounding; the tokenizer's files are
    the parent's, byte for byte, unless you give one. The generation configuration is the model's own.

    Args:
        model: after ``hestia.freeze``, on one process; its parameters are cast to the parent's dtype in place.
        codes: what ``hestia.freeze`` returned.
        folder: FOLDER/model and FOLDER/codes.safetensors are written; nothing is there yet, or an empty folder.
        parent: the folder or hub id of the model that was quantized.
        plan: kept as FOLDER/plan.json, for ``hestia export FOLDER --list``.
        tokenizer: in place of the parent's, where training added tokens.

    Returns:
        The folder.

    Raises:
        ConfigError: the model is still converted or sharded, a weight is not its codes times its scales any more, the
            vocabulary has grown and no tokenizer is given, or there is no such parent; nothing was written.
        ExportError: something is in the folder.
    """
    place = Path(folder)
    require_free(place)
    source = loading.resolve(parent)
    config = loading.load_config(source)
    dtype = loading.parent_dtype(source, config)
    inner: Any = unwrapped(model)
    _check_frozen(inner, codes, dtype)
    words, before = (int(c.get_text_config().vocab_size) for c in (inner.config, config))
    if words != before and tokenizer is None:
        raise ConfigError(
            f"the model has {words:,} words, its parent {before:,}: give save the tokenizer that knows the new ones "
            "(tokenizer=...)"
        )
    if hasattr(config, "use_cache"):
        inner.config.use_cache = config.use_cache  # a Trainer switches it off while it trains
    carried = [p for p in loading.COPIED if p != "generation_config.json"] if tokenizer is None else loading.TERMS
    write_frozen(inner, codes, place, source, dtype, copied=carried, own=tokenizer)
    if plan is not None:
        plan.save(place / "plan.json")
    return place


def write_frozen(
    model: PreTrainedModel,
    codes: Mapping[str, QuantizedTensor],
    run: Path,
    source: loading.Source,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    copied: Sequence[str] = loading.COPIED,
    own: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write RUN/model, cast to ``dtype``, and then RUN/codes.safetensors, each whole or not at all.

    Args:
        model, codes, run, source, dtype: what is written, where, and the parent that it came from.
        tokenizer: the parent's, as it trained.
        copied: which of the parent's files the model carries.
        own: a tokenizer that is written in place of the parent's.
    """
    loading.cast_parameters(model, dtype)
    with replacing_folder(run / MODEL_FOLDER) as temporary:
        loading.save(model, source, temporary, tokenizer, copied=copied)
        if own is not None:
            own.save_pretrained(temporary)
    save_codes(run / CODES_FILE, codes)


def _check_frozen(model: nn.Module, codes: Mapping[str, QuantizedTensor], dtype: torch.dtype) -> None:
    converted = next((path for path, _ in quantized_modules(model)), None)
    if converted is not None:
        raise ConfigError(f"{converted} is still quantized for training: codes = hestia.freeze(model) comes first")
    weights = dict(model.named_parameters())
    shared = next((name for name, weight in weights.items() if is_sharded(weight)), None)
    if shared is not None:
        raise ConfigError(f"{shared} is shared out between processes: hand over a whole model, gathered on one of them")
    for name, weight in weights.items():
        if not bool(torch.isfinite(weight.detach().to(dtype)).all()):
            raise ConfigError(
                f"{name} holds NaN or infinity in the parent's dtype, {str(dtype).removeprefix('torch.')}"
            )
    for path, tensor in codes.items():
        weight = weights.get(f"{path}.weight")
        if weight is None or not torch.equal(weight.detach().cpu().to(dtype), tensor.dense(dtype).cpu()):
            raise ConfigError(
                f"{path}: the model's weight is not its codes times its scales; hand over the model and the codes of "
                "one hestia.freeze, unchanged"
            )
