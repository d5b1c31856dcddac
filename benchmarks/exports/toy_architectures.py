"""Frozen toy models of every architecture that exports know, and of some they refuse: random weights, real layouts.

Drawn from transformers' own config classes, 256 wide, two layers or as many as an architecture's cycle needs, with
biases and norms that are not at their neutral values, so that a lost one is noticed.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from hestia.export.frozen import FrozenModel, save_codes
from hestia.quant import Quantizer, QuantSpec

TEXT = "the cat sat on the mat. the other cat, the 3 cats and the hat: it's a 12345 test\n\n  of the theme "
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}é<|im_end|>\n{% endfor %}"
GENERATION = '{\n  "do_sample": true,\n  "temperature": 0.7,\n  "top_k": 20,\n  "top_p": 0.9\n}\n'

_SIZES: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.08,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}


def byte_level() -> dict[str, Any]:
    """A byte-level BPE tokenizer.json with a few merges, as GPT-2 writes it, and an added token that is not special."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT] * 4, vocab_size=300, min_frequency=2, special_tokens=["<|end|>"])
    record = json.loads(tokenizer.to_str())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    at = len(record["model"]["vocab"])
    added = [("<|im_start|>", True), ("<|im_end|>", True), ("<think>", False)]
    record["added_tokens"] += [{"id": at + i, "content": c, "special": s, **flags} for i, (c, s) in enumerate(added)]
    return record


def byte_fallback() -> dict[str, Any]:
    """A SentencePiece-style BPE tokenizer.json: spaces as "▁", byte fallback, BOS in front."""
    from tokenizers import SentencePieceBPETokenizer

    trained = SentencePieceBPETokenizer()
    trained.train_from_iterator([TEXT] * 4, vocab_size=80, min_frequency=2, special_tokens=[])
    record = json.loads(trained.to_str())
    specials = ["<unk>", "<s>", "</s>"]
    pieces = [*specials, *(f"<0x{b:02X}>" for b in range(256)), *record["model"]["vocab"]]
    record["model"] |= {
        "vocab": {piece: index for index, piece in enumerate(dict.fromkeys(pieces))},
        "unk_token": "<unk>",
        "fuse_unk": True,
        "byte_fallback": True,
    }
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    record["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    record["pre_tokenizer"] = None
    shown = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    record["decoder"] = {"type": "Sequence", "decoders": [shown, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    record["added_tokens"] = [{"id": i, "content": c, "special": True, **flags} for i, c in enumerate(specials)]
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    one, two = ({"Sequence": {"id": x, "type_id": 0}} for x in "AB")
    record["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, one],
        "pair": [bos, one, two],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    return record


def unigram(*, fallback: bool) -> dict[str, Any]:
    """A Unigram tokenizer.json over "▁", with or without byte fallback."""
    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256) if fallback)]
    vocab = [[piece, 0.0] for piece in pieces]
    words = ("▁the", "▁cat", "▁", "s", "at", "▁mat", "th", "e", "a", "c", "t", "m", "h", ".", "o", "▁on", "▁s")
    vocab += [[word, -2.0 - 0.37 * i] for i, word in enumerate(words)]
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": 0, "content": "<unk>", "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False},
        "post_processor": None,
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False},
        "model": {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": fallback},
    }


@dataclass(frozen=True)
class Architecture:
    """One toy model: a config class, what it changes in the sizes, and its tokenizer."""

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    tokenizer: Callable[[], dict[str, Any]] = byte_level

    def build(self, **more: Any) -> PreTrainedModel:
        """The model with random weights, the same on every call."""
        config = getattr(transformers, f"{self.kind}Config")(**{**_SIZES, **self.options, **more})
        torch.manual_seed(0)
        model = getattr(transformers, f"{self.kind.removesuffix('Text')}ForCausalLM")(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.data += 0.2 * torch.randn_like(parameter)
        return model.eval()


_GEMMA: dict[str, Any] = {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 16}
ARCHITECTURES: dict[str, Architecture] = {
    "Llama, own head": Architecture("Llama", {"tie_word_embeddings": False}, byte_fallback),
    "Llama, tied (SmolLM)": Architecture("Llama", {"tie_word_embeddings": True}),
    "Llama 3 scaling": Architecture(
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "Mistral, wide heads": Architecture("Mistral", {"head_dim": 128, "sliding_window": 96}, byte_fallback),
    "Qwen2, biases": Architecture("Qwen2", {"tie_word_embeddings": True}),
    "Qwen3": Architecture("Qwen3", {"head_dim": 128, "tie_word_embeddings": False}),
    "SmolLM3": Architecture("SmolLM3", {"num_hidden_layers": 4}),
    "Gemma": Architecture("Gemma", {"head_dim": 64}, byte_fallback),
    "Gemma 2": Architecture("Gemma2", _GEMMA, byte_fallback),
    "Gemma 3": Architecture("Gemma3Text", {**_GEMMA, "num_hidden_layers": 6}, byte_fallback),
}
"""Architectures that every target takes."""

REFUSED: dict[str, Architecture] = {
    "Gemma 2, other scale": Architecture("Gemma2", {**_GEMMA, "query_pre_attn_scalar": 100}),
    "Phi-3": Architecture("Phi3", {"pad_token_id": 0}),
    "OLMo 2": Architecture("Olmo2"),
    "Granite": Architecture("Granite"),
}
"""Architectures that GGUF and MLX refuse by name."""


def freeze(
    model: PreTrainedModel,
    run: Path,
    spec: QuantSpec | Sequence[QuantSpec] | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    tokenizer: dict[str, Any] | None = None,
) -> FrozenModel:
    """Quantize every linear but the head, write RUN/model and RUN/codes.safetensors, and open them.

    Several specs take turns, tensor by tensor.
    """
    model = model.to(dtype)
    codes = {}
    turns = itertools.cycle([spec or QuantSpec()] if spec is None or isinstance(spec, QuantSpec) else spec)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            codes[name] = Quantizer(next(turns)).codes(module.weight)
            module.weight.data.copy_(codes[name].dense(dtype))
    model.save_pretrained(run / "model")
    (run / "model" / "tokenizer.json").write_text(json.dumps(tokenizer or byte_level()))
    (run / "model" / "tokenizer_config.json").write_text("{}")
    (run / "model" / "chat_template.jinja").write_text(TEMPLATE)
    (run / "model" / "generation_config.json").write_text(GENERATION)
    save_codes(run / "codes.safetensors", codes)
    return FrozenModel(run)
