"""Tiny frozen runs for the tests of this folder, made as ``freeze`` makes them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from hestia.export.frozen import FrozenModel, save_codes
from hestia.quant import Quantizer, QuantSpec

_SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


def llama(intermediate_size: int = 128, **more: int) -> PreTrainedModel:
    """A random Llama with a tied head."""
    torch.manual_seed(0)
    sizes = {**_SMALL, "intermediate_size": intermediate_size, **more}
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))


def qwen2() -> PreTrainedModel:
    """A random Qwen2: biases on q, k, v that are not zero, and a head of its own."""
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(Qwen2Config(**_SMALL, intermediate_size=128, tie_word_embeddings=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_()
    return model


def freeze(
    model: PreTrainedModel,
    run: Path,
    spec: QuantSpec | None = None,
    dtype: torch.dtype = torch.float32,
    fixed: dict[str, QuantSpec] | None = None,
) -> FrozenModel:
    """Quantize every linear of the blocks, write RUN/model and RUN/codes.safetensors, and open them.

    Args:
        fixed: other specs for the modules whose path ends so.
    """
    model = model.to(dtype)
    codes = {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        chosen = next((s for end, s in (fixed or {}).items() if name.endswith(end)), spec or QuantSpec())
        codes[name] = Quantizer(chosen).codes(module.weight)
        module.weight.data.copy_(codes[name].dense(dtype))
    model.save_pretrained(run / "model")
    # files that exporters copy without reading; real tokenizers are for the tests of gguf
    (run / "model" / "tokenizer.json").write_text('{"version": "1.0"}\n')
    (run / "model" / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    (run / "model" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (run / "model" / "additional_chat_templates").mkdir()
    (run / "model" / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    save_codes(run / "codes.safetensors", codes)
    return FrozenModel(run)
