"""A model's configuration, refused where its sizes are no model's."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig

from ..errors import ConfigError
from ..files import read_json
from ..progress import announce
from . import reading
from .sources import Source

LARGEST = {
    "num_hidden_layers": 10_000, "hidden_size": 1 << 20, "intermediate_size": 1 << 24, "vocab_size": 1 << 26,
    "num_attention_heads": 1 << 14, "num_key_value_heads": 1 << 14, "head_dim": 1 << 16, "num_experts": 1 << 16,
    "num_local_experts": 1 << 16, "n_routed_experts": 1 << 16, "num_labels": 1 << 20,
}  # fmt: skip
"""Sizes in config.json and what no model comes near: beyond it, building the empty model would take the machine."""

HEAD, EMBEDDINGS = "lm_head.weight", ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
"""How the names of an output head and of an input embedding end, in the architectures that tie them."""

_ROWS = 4096
"""Rows compared at once."""

OTHER_TASKS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
"""Ends of class names in config.json whose weights transformers would load into a causal model all the same."""


def load_config(source: Source, *, trust_remote_code: bool = False) -> Any:
    """The model's configuration.

    Raises:
        ConfigError: it is damaged, its architecture needs code from the model folder, or it was made for another task.
    """
    config = read_config(source, trust_remote_code)
    named = getattr(config, "architectures", None)
    made = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    if made and all(name.endswith(OTHER_TASKS) for name in made):
        raise ConfigError(
            f"{source.name}: config.json: {made[0]} is no causal language model, which predicts what follows"
        )
    own = getattr(config, "auto_map", None)
    if own and not trust_remote_code:
        names = sorted({str(name) for name in own.values()}) if isinstance(own, dict) else [str(own)]
        announce(f"{source.name}: config.json names code of its own ({', '.join(names)}); it is not run")
    if source.is_local:
        with contextlib.suppress(SafetensorError):  # a damaged file is refused by name where the model is read
            _complete(config, Path(source.location))
    return config


def _complete(config: Any, folder: Path) -> None:
    """Say what the safetensors files decide where config.json is silent or wrong: the dtype, and a head of its own.

    transformers leaves a stored head that differs from the embedding untied, whatever config.json says.
    """
    if getattr(config, "dtype", None) is None:
        config.dtype = stored_dtype(folder)
    if getattr(config, "tie_word_embeddings", False) and _has_own_head(folder):
        config.tie_word_embeddings = False


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The dtype of the first floating tensor in a folder's safetensors files; None where there is none."""
    names = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                found = names.get(handle.get_slice(name).get_dtype())
                if found is not None:
                    return found
    return None


def _has_own_head(folder: Path) -> bool:
    """Whether the files hold an output head that is not the embedding once more."""
    head, embedding = _slice(folder, (HEAD,)), _slice(folder, EMBEDDINGS)
    if head is None or embedding is None:
        return False
    shape = head.get_shape()
    return shape != embedding.get_shape() or any(
        not torch.equal(head[i : i + _ROWS], embedding[i : i + _ROWS]) for i in range(0, shape[0], _ROWS)
    )


def _slice(folder: Path, names: tuple[str, ...]) -> Any:
    """The first stored tensor whose name ends so, unread; None where there is none."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as handle:
            found = next((name for name in handle.keys() if name.endswith(names)), None)  # noqa: SIM118
            if found is not None:
                return handle.get_slice(found)
    return None


def read_config(source: Source, trust_remote_code: bool) -> Any:
    """``load_config`` without a word about code that is not run.

    Raises:
        ConfigError: it is damaged, names no architecture, or holds a size that no model has.
    """
    if source.is_local:
        place = Path(source.location)
        record = read_json(place if place.is_file() else place / "config.json")
        if not isinstance(record.get("model_type"), str):
            raise ConfigError(f"{source.name}: config.json names no model_type, so no architecture can be chosen")
        _check_sizes(source, record)
    config = reading.read(source, "config.json", AutoConfig.from_pretrained, trust_remote_code=trust_remote_code)
    _check_sizes(source, config.to_dict())
    text = config.get_text_config()
    if not isinstance(text, PretrainedConfig):
        raise ConfigError(f"{source.name}: config.json: its text_config is no configuration")
    _check_sizes(source, text.to_dict())
    return config


def _check_sizes(source: Source, record: dict[str, Any]) -> None:
    for name, largest in LARGEST.items():
        value = record.get(name)
        least = 0 if "experts" in name else 1  # a family's dense members have none
        # Some configurations hold one size a layer, or none.
        if isinstance(value, (int, float)) and not least <= value <= largest:
            raise ConfigError(
                f"{source.name}: config.json: {name} must lie between {least} and {largest}, got {value:.12g}"
            )
