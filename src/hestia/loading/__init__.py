"""Model and tokenizer in: the one door to transformers below training and the exporters.

Weights are read from safetensors only, code that a model folder may carry is never run unless asked for, and a hub id
is resolved to a commit first, so that a run records exactly what it started from.
"""

from .configs import load_config
from .models import cast_parameters, empty_model, load_model, parent_dtype, require_trainable
from .saving import COPIED, TERMS, copied, require_own_tokenizer, rope_keys, save, tokenizer_folder
from .sources import Source, config_source, describe, display_name, fingerprint, license_of, resolve
from .tokenizers import check_vocabulary, first_other_token, hard_texts, load_tokenizer

__all__ = [
    "COPIED",
    "TERMS",
    "Source",
    "cast_parameters",
    "check_vocabulary",
    "config_source",
    "copied",
    "describe",
    "display_name",
    "empty_model",
    "fingerprint",
    "first_other_token",
    "hard_texts",
    "license_of",
    "load_config",
    "load_model",
    "load_tokenizer",
    "parent_dtype",
    "require_own_tokenizer",
    "require_trainable",
    "resolve",
    "rope_keys",
    "save",
    "tokenizer_folder",
]
