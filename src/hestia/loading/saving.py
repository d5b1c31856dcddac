"""A frozen model written as a Hugging Face folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import ConfigError
from ..files import as_os_error, make_readable, read_json, write_json
from ..progress import announce
from .sources import Source

TERMS = ("LICENSE*", "NOTICE*", "USE_POLICY*")
"""The terms of a parent, which its child is under as well."""

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "chat_template*",
    "additional_chat_templates/*.jinja",
)
"""The files of a tokenizer and its templates."""

COPIED = (*TOKENIZER, "tokenizer*", "generation_config.json", *TERMS)
"""Files of a parent that its frozen child carries byte for byte."""

_READS_THE_FILE = (None, "PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes, by their names in transformers 4 and 5, that take all of tokenizer.json."""


def save(
    model: PreTrainedModel,
    source: Source,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    copied: Sequence[str] = COPIED,
) -> None:
    """Write a frozen model as a Hugging Face folder: own weights and config, and of the parent verbatim what ``copied``
    names, its tokenizer's files above all.

    Only where ``tokenizer``, which trained, is tokenizer.json as it is and tokenizer_config.json names another class,
    the copy names the class that reads all of the file: AutoTokenizer then gives everyone the ids that the model knows.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is not embeddings.weight:
        model.config.tie_word_embeddings = False  # as it is, whatever the parent's config.json says
    parent = tokenizer_folder(source)
    settings = model.generation_config
    if "generation_config.json" in copied and (parent / "generation_config.json").is_file():
        model.generation_config = GenerationConfig()  # the parent's own is copied; saving may refuse its values
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:
        raise as_os_error(error, folder) from None
    finally:
        model.generation_config = settings
    for path in folder.glob("*.safetensors"):
        make_readable(path)
    saved = read_json(folder / "config.json")
    write_json(folder / "config.json", {**saved, **earlier_keys(saved)})
    for path in _matching(parent, copied):
        if _leads_out(path, parent):
            announce(f"{path}: not copied, it is a link to {path.resolve()}, out of the model's folder")
            continue
        copy = folder / path.relative_to(parent)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    config = folder / "tokenizer_config.json"
    if type(tokenizer) is PreTrainedTokenizerFast and config.is_file():
        record = read_json(config)
        if record.get("tokenizer_class") not in _READS_THE_FILE:
            write_json(config, {**record, "tokenizer_class": "PreTrainedTokenizerFast"})


def copied(folder: Path) -> list[Path]:
    """The files of a parent's folder that its frozen child carries."""
    return [path for path in _matching(folder, COPIED) if not _leads_out(path, folder)]


def _matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    found = (path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file())
    return list(dict.fromkeys(found))


def tokenizer_folder(source: Source) -> Path:
    """Where the tokenizer's files of a model lie: its folder, or the hub's snapshot of them, terms and card too."""
    if source.is_local:
        return Path(source.location)
    needed = [pattern for pattern in COPIED if pattern not in TERMS]
    try:
        return _snapshot(source, [*needed, *TERMS, "README.md"])
    except LocalEntryNotFoundError:  # no hub, and a cache without those
        return _snapshot(source, needed)


def _snapshot(source: Source, patterns: list[str]) -> Path:
    return Path(snapshot_download(source.location, revision=source.commit, allow_patterns=patterns))


def earlier_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotation as transformers 4 reads it from config.json: it passes over ``rope_parameters`` without a word."""
    rope = config.get("rope_parameters") or {}
    if not isinstance(rope, Mapping) or "rope_theta" in config:
        return {}
    if "rope_theta" in rope:
        return rope_keys(rope)
    full, windowed = rope.get("full_attention"), rope.get("sliding_attention")
    if full and windowed and config.get("model_type") == "gemma3_text":
        return {**rope_keys(full), "rope_local_base_freq": windowed["rope_theta"]}
    return {}


def rope_keys(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The base of one rotation, and its scaling where there is one, as config.json had them before transformers 5."""
    keys: dict[str, Any] = {"rope_theta": rope["rope_theta"]}
    if rope.get("rope_type", "default") != "default":
        keys["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    return keys


def require_own_tokenizer(source: Source) -> None:
    """Refuse a model folder whose tokenizer is a link to elsewhere: it would not be copied beside the frozen model.

    Raises:
        ConfigError: it is one; how to make it a file is said.
    """
    if not source.is_local:
        return
    folder = Path(source.location)
    for path in _matching(folder, TOKENIZER):
        if _leads_out(path, folder):
            raise ConfigError(
                f"{path}: a link to {path.resolve()}, out of the model's folder; what lies there is given to nobody. "
                f"Put the file itself there: cp -L {path} {path}.file && mv {path}.file {path}"
            )


def _leads_out(path: Path, folder: Path) -> bool:
    """Whether a model folder's file is a link to elsewhere; the hub's cache links to the blobs beside its snapshots."""
    home = folder.resolve()
    blobs = home.parent.parent / "blobs"
    return not any(path.resolve().is_relative_to(place) for place in (home, blobs))
