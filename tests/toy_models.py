"""Toy models of real architectures, freshly drawn from their config classes: 2 layers, 32 wide, 64 words."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from transformers import PreTrainedModel

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [27, 18, 28, 18, 28, 45, 9, 63]])
"""Two sequences of eight tokens."""

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _of(kind: str, **more: object) -> PreTrainedModel:
    config = getattr(transformers, f"{kind}Config")(**{**_SIZES, **more})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and not parameter.is_meta:
            torch.nn.init.normal_(parameter, std=0.1)  # a fresh bias is zero, and a lost zero is not noticed
    return model


def llama(**more: object) -> PreTrainedModel:
    """Llama with a head of its own."""
    return _of("Llama", tie_word_embeddings=False, **more)


def tied_llama(**more: object) -> PreTrainedModel:
    """Llama whose head is its embedding, as in SmolLM."""
    return _of("Llama", tie_word_embeddings=True, **more)


def mistral(**more: object) -> PreTrainedModel:
    """Mistral."""
    return _of("Mistral", **more)


def qwen2(**more: object) -> PreTrainedModel:
    """Qwen2 with a tied head: biases on q, k and v that are not zero."""
    return _of("Qwen2", tie_word_embeddings=True, **more)


def qwen3(**more: object) -> PreTrainedModel:
    """Qwen3: norms on q and k."""
    return _of("Qwen3", head_dim=16, **more)


def gemma(**more: object) -> PreTrainedModel:
    """Gemma: tied."""
    return _of("Gemma", head_dim=16, **more)


def gemma2(**more: object) -> PreTrainedModel:
    """Gemma 2: four norms a layer."""
    return _of("Gemma2", head_dim=16, **more)


def mixtral(**more: object) -> PreTrainedModel:
    """Mixtral: its experts are one stacked tensor a layer, not linear modules."""
    return _of("Mixtral", num_local_experts=4, **more)


def qwen2_moe(**more: object) -> PreTrainedModel:
    """Qwen2-MoE: stacked experts beside a shared expert of linear modules."""
    sizes = {"num_experts": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 32}
    return _of("Qwen2Moe", num_experts_per_tok=1, **sizes, **more)


def gpt2() -> PreTrainedModel:
    """GPT-2: transposed ``Conv1D`` weights instead of linear modules."""
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config)


LINEAR: dict[str, Callable[[], PreTrainedModel]] = {
    f.__name__: f for f in (llama, tied_llama, mistral, qwen2, qwen3, gemma, gemma2)
}
"""Architectures made of ``nn.Linear``."""

OTHER: dict[str, Callable[[], PreTrainedModel]] = {f.__name__: f for f in (mixtral, qwen2_moe, gpt2)}
"""Architectures with weights that hestia keeps."""


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the state dict, to compare with later."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts have the same keys in the same order, dtypes, and bits (NaN and -0 included)."""
    return list(a) == list(b) and all(
        a[k].dtype == b[k].dtype
        and a[k].shape == b[k].shape
        and torch.equal(a[k].contiguous().view(torch.uint8), b[k].contiguous().view(torch.uint8))
        for k in a
    )
