"""A frozen model written as a Hugging Face folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..files import as_os_error, read_json, write_json
from ..progress import announce
from .sources import Source

COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)
"""Files of a parent that its frozen child carries byte for byte."""

_READS_THE_FILE = (None, "PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes, by their names in transformers 4 and 5, that take all of tokenizer.json."""


def save(
    model: PreTrainedModel, source: Source, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Write a frozen model as a Hugging Face folder: own weights and config, the parent's tokenizer files verbatim.

    Only where ``tokenizer``, which trained, is tokenizer.json as it is and tokenizer_config.json names another class,
    the copy names the class that reads all of the file: AutoTokenizer then gives everyone the ids that the model knows.
    """
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:
        raise as_os_error(error, folder) from None
    parent = Path(source.location)
    if not source.is_local:
        parent = Path(snapshot_download(source.location, revision=source.commit, allow_patterns=list(COPIED)))
    for pattern in COPIED:
        for path in sorted(parent.glob(pattern)):
            if not path.is_file():
                continue
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


def _leads_out(path: Path, folder: Path) -> bool:
    """Whether a model folder's file is a link to elsewhere; the hub's cache links to the blobs beside its snapshots."""
    home = folder.resolve()
    blobs = home.parent.parent / "blobs"
    return not any(path.resolve().is_relative_to(place) for place in (home, blobs))
