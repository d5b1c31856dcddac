"""Model and tokenizer in: the one door to transformers below training and the exporters.

Weights are read from safetensors only, code that a model folder may carry is never run unless asked for, and a hub id
is resolved to a commit first, so that a run records exactly what it started from.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils.hub import cached_file

from . import digests
from .errors import ConfigError
from .files import as_os_error, read_json, require_regular, write_json
from .progress import announce

_CLIENT_ERROR: type[Exception] = HfHubHTTPError.__bases__[
    0
]  # of whichever HTTP client this version of the hub library uses

_COMMIT = re.compile(r"[0-9a-f]{40}")

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        name: what the user typed.
        location: local folder or hub id that transformers reads, without a revision.
        commit: hub commit; None for a local folder.
    """

    name: str
    location: str
    commit: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether the model lies in a local folder."""
        return self.commit is None


def resolve(name: str, commit: str | None = None) -> Source:
    """Find a model by local folder or hub id; hub ids are pinned to a commit.

    Args:
        name: a folder, owner/name, or owner/name@REVISION: a branch, a tag or a commit.
        commit: of a hub id, where it is known; as with a whole commit in ``name``, the hub is not asked for today's.

    Raises:
        ConfigError: neither a folder with a config.json nor a reachable hub model; a folder with weights in a format
            other than safetensors; a truncated or damaged safetensors file.
    """
    folder = Path(name)
    if folder.is_dir():
        _check_folder(folder)
        return Source(name=name, location=str(folder))
    location, _, revision = name.partition("@")
    if folder.exists() or name.startswith((".", "/", "~")) or location.count("/") > 1:
        raise ConfigError(f"{name}: no such model folder")
    if commit is None and _COMMIT.fullmatch(revision):
        commit = revision
    if commit is not None:
        return Source(name=name, location=location, commit=commit)
    try:
        commit = HfApi().model_info(location, revision=revision or None, timeout=20).sha
    except HFValidationError:
        raise ConfigError(f"{name}: no such model folder, and not a hub id (owner/name)") from None
    except (HfHubHTTPError, _CLIENT_ERROR, OSError, RuntimeError) as error:
        first = str(error).strip().splitlines()[:1]
        raise ConfigError(
            f"{name}: no such local folder, and the hub could not be asked ({type(error).__name__}: {''.join(first)})"
        ) from None
    return Source(name=name, location=location, commit=commit)


LARGEST = {
    "num_hidden_layers": 10_000, "hidden_size": 1 << 20, "intermediate_size": 1 << 24, "vocab_size": 1 << 26,
    "num_attention_heads": 1 << 14, "num_key_value_heads": 1 << 14, "head_dim": 1 << 16, "num_experts": 1 << 16,
    "num_local_experts": 1 << 16, "n_routed_experts": 1 << 16, "num_labels": 1 << 20,
}  # fmt: skip
"""Sizes in config.json and what no model comes near: beyond it, building the empty model would take the machine."""

SPARE = 1.5
"""Weights that a configuration may describe, a stored one: shared and derived ones are counted, nothing else."""


def config_source(name: str) -> Source:
    """Where a model's configuration comes from; no weights are needed.

    Args:
        name: a folder with a config.json, the path of such a file, or a hub id.

    Raises:
        ConfigError: none of these.
    """
    path = Path(name)
    if path.is_file() and path.suffix == ".json":
        return Source(name=name, location=str(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{path}: no config.json; is this a Hugging Face model folder?")
        return Source(name=name, location=str(path))
    return resolve(name)


def _check_folder(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        if path.exists() and not path.is_dir():
            require_regular(path)  # a pipe or device in the folder would be waited for for ever
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder}: no config.json; is this a Hugging Face model folder?")
    if (folder / "adapter_config.json").exists():
        raise ConfigError(
            f"{folder}: adapter_config.json makes it an adapter to another model; merge the two first and give the "
            "merged model, or remove that file if the weights are merged already"
        )
    for name in ("generation_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            read_json(folder / name)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        found = f" It holds {', '.join(pickled)}, and pickled weights can run code." if pickled else ""
        raise ConfigError(f"{folder}: no .safetensors weights.{found} Convert the checkpoint to safetensors first")
    for path in weights:
        try:
            with safe_open(path, framework="pt") as handle:
                handle.keys()
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path}: damaged or truncated safetensors file ({error})") from None
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = set(map(str, read_json(index)["weight_map"].values()))
        except (ConfigError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"{index}: damaged index") from None
        missing = sorted(named - {p.name for p in weights})
        if missing:
            raise ConfigError(f"{folder}: the index names {', '.join(missing)}, which are not there")


def load_config(source: Source, *, trust_remote_code: bool = False) -> Any:
    """The model's configuration.

    Raises:
        ConfigError: it is damaged, or its architecture needs code from the model folder.
    """
    config = _read_config(source, trust_remote_code)
    own = getattr(config, "auto_map", None)
    if own and not trust_remote_code:
        names = sorted({str(name) for name in own.values()}) if isinstance(own, dict) else [str(own)]
        announce(f"{source.name}: config.json names code of its own ({', '.join(names)}); it is not run")
    return config


def _read_config(source: Source, trust_remote_code: bool) -> Any:
    if source.is_local:
        place = Path(source.location)
        record = read_json(place if place.is_file() else place / "config.json")
        if not isinstance(record.get("model_type"), str):
            raise ConfigError(f"{source.name}: config.json names no model_type, so no architecture can be chosen")
        _check_sizes(source, record)
    config = _read(source, "config.json", AutoConfig.from_pretrained, trust_remote_code=trust_remote_code)
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


def load_model(source: Source, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model in fp32 and eval mode, on the CPU; ``parent_dtype`` tells what it was stored in.

    Raises:
        ConfigError: damaged files, weights that are missing for the configured architecture, of another shape or not
            finite, remote code needed.
    """
    if source.is_local and not trust_remote_code:
        _check_described(source, _read_config(source, trust_remote_code), trust_remote_code)
    with contextlib.redirect_stderr(io.StringIO()):  # compressed-tensors draws a bar for each of its stages
        loaded = _read(
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
    missing = sorted(info["missing_keys"])
    if missing:
        raise ConfigError(f"{source.name}: the checkpoint lacks {len(missing)} weights, the first is {missing[0]}")
    mismatched = sorted(map(str, info.get("mismatched_keys", ())))
    if mismatched:
        raise ConfigError(f"{source.name}: weights of another shape than in config.json, first {mismatched[0]}")
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
    except _READ_ERRORS as error:
        raise ConfigError(f"{source.name}: not a causal language model ({_first_line(error)})") from None


HARD_STRINGS = (
    "",
    "the cat sat",
    " one",
    "  two spaces in front",
    "trailing space ",
    "\n\nlines\n \n",
    "\ttabs\t and  gaps  ",
    "crlf\r\nand\rcr",
    "emoji 😀👩‍👩‍👧 and ½ ² Ⅷ ٣",
    "0 12 345 6789 12345678 3.14 v2",
    "Привет 你好 عربى हिन्दी 日本語 naïve",
    "don't I'LL we've it's",
    "\u00a0nbsp \u200bzero width",
    "_init__(self): return {}[0];",
    "<0x0A> ▁under",
    "a" * 200,
)


def load_tokenizer(source: Source, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer, which cuts text as its tokenizer.json says.

    Some classes of transformers 5 (GPT2Tokenizer, LlamaTokenizer) take little more than vocabulary and merges from it.
    The model was trained with all of that file and engines read all of it, so where the class cuts ``hard_texts``
    otherwise, the file is loaded as it is.

    Raises:
        ConfigError: there is none, it is damaged, or tokenizer_config.json contradicts tokenizer.json.
    """
    if source.is_local:
        folder = Path(source.location)
        files = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")
        if not any((folder / name).is_file() for name in files):
            raise ConfigError(f"{source.name}: no tokenizer in the folder (looked for {', '.join(files)})")
    file = _read(
        source, "tokenizer", cached_file, filename="tokenizer.json", _raise_exceptions_for_missing_entries=False
    )
    written = None if file is None else _tokenizer_file(source, file)
    tokenizer = _read(source, "tokenizer", AutoTokenizer.from_pretrained, trust_remote_code=trust_remote_code)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ConfigError(
            f"{source.name}: tokenizer_config.json names {type(tokenizer).__name__}, which is no tokenizer"
        )
    if written is not None and (text := _cut_otherwise(tokenizer, written)) is not None:
        announce(
            f"{source.name}: {type(tokenizer).__name__} cuts {text!r} unlike tokenizer.json, which is used instead"
        )
        tokenizer = _read(source, "tokenizer", PreTrainedTokenizerFast.from_pretrained)
        if (text := _cut_otherwise(tokenizer, written)) is not None:
            raise ConfigError(
                f"{source.name}: with tokenizer_config.json {text!r} is not cut as tokenizer.json says; "
                "make the two agree, engines read tokenizer.json alone"
            )
    if not isinstance(tokenizer.model_max_length, (int, float)):
        raise ConfigError(f"{source.name}: tokenizer_config.json: model_max_length must be a number")
    return tokenizer


def hard_texts(tokenizer: Tokenizer) -> list[str]:
    """Texts that tell tokenizers apart: ``HARD_STRINGS``, and one with each of the first added tokens."""
    added = [token for _, token in sorted(tokenizer.get_added_tokens_decoder().items())][:6]
    marks = [token.content if token.special else token.content.replace("▁", " ") for token in added]
    return [*HARD_STRINGS, *(f"{mark}the cat{mark}\nsat {mark}" for mark in marks)]


def _cut_otherwise(tokenizer: PreTrainedTokenizerBase, written: Tokenizer) -> str | None:
    """The first of ``hard_texts`` that ``tokenizer`` cuts in another way than its file; None where there is none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # written in Python: there is nothing to load from the file in its place
        return None
    return next((text for text in hard_texts(written) if _ids(backend, text) != _ids(written, text)), None)


def _ids(tokenizer: Tokenizer, text: str) -> list[int] | None:
    """Token ids; None for what the vocabulary does not cover."""
    try:
        return tokenizer.encode(text).ids
    except Exception as error:
        if type(error) is not Exception:  # as in ``_tokenizer_file``
            raise
        return None


def _tokenizer_file(source: Source, path: str) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception as error:
        if type(error) is not Exception:  # what the library raises for a bad file has no class of its own
            raise
        raise ConfigError(f"{source.name}: cannot read the tokenizer: tokenizer.json: {error}") from None
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= LARGEST["vocab_size"]:
        raise ConfigError(f"{source.name}: tokenizer.json holds token id {largest}, and no vocabulary is that large")
    return tokenizer


def check_vocabulary(source: Source, config: Any, largest: int) -> None:
    """Check that the model knows every token that its tokenizer made of the text.

    Raises:
        ConfigError: ``largest``, the largest id, is beyond the vocabulary.
    """
    size = int(config.get_text_config().vocab_size)
    if largest >= size:
        raise ConfigError(
            f"{source.name}: its tokenizer makes token id {largest}, the model knows {size} tokens; "
            "they do not belong together"
        )


def parent_dtype(source: Source, config: Any) -> torch.dtype:
    """The dtype the checkpoint is stored in, to which a frozen model returns."""
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    if dtype is None and source.is_local:
        dtype = _first_float_dtype(Path(source.location))
    return dtype if dtype in (torch.float32, torch.float16, torch.bfloat16) else torch.float32


def _first_float_dtype(folder: Path) -> torch.dtype | None:
    names = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                found = names.get(handle.get_slice(name).get_dtype())
                if found is not None:
                    return found
    return None


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast every floating parameter of a frozen model to ``dtype``, in place (buffers keep theirs)."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


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


def license_of(source: Source) -> str | None:
    """The licence that the front matter of a local model's README.md names, if it does."""
    card = Path(source.location) / "README.md"
    if not source.is_local or not card.is_file():
        return None
    found = re.search(
        r"\A---\n.*?^license:\s*([\w.-]+)\s*$.*?^---$", card.read_text("utf-8", "replace"), re.MULTILINE | re.DOTALL
    )
    return found.group(1) if found else None


def fingerprint(source: Source, config: Any) -> dict[str, Any]:
    """What a run records of its parent: name, commit, architecture, shape."""
    keys = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    shape = {k: getattr(config, k) for k in keys if hasattr(config, k)}
    name = Path(source.name).resolve().name if source.is_local else source.location
    return {"name": name, "commit": source.commit, **shape}


def content(source: Source) -> dict[str, Any]:
    """What pins a model's content: the hub's commit, or the digest of every file that decides a number."""
    if not source.is_local:
        return {"commit": source.commit}
    folder = Path(source.location)
    names = sorted(p.name for p in folder.iterdir() if p.name == "config.json" or p.suffix == ".safetensors")
    return {name: digests.of_large_file(folder / name) for name in names}


_READ_ERRORS = (
    OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError, ImportError,
    AssertionError, MemoryError,
)  # fmt: skip
"""What transformers raises, directly, for files that are not what they should be."""


def _read(source: Source, what: str, reader: Any, **options: Any) -> Any:
    try:
        return reader(source.location, revision=source.commit or "main", **options)
    except (*_READ_ERRORS, SafetensorError, StrictDataclassError) as error:
        message = _first_line(error)
        if "trust_remote_code" in str(error):
            message = "it needs code from the model folder; hestia runs none unless you pass --trust-remote-code"
        raise ConfigError(f"{source.name}: cannot read the {what}: {message}") from None


def _first_line(error: Exception) -> str:
    """What an error says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = lines[0] if lines else type(error).__name__
    return " ".join(lines[:2]) if message.endswith(":") else message
