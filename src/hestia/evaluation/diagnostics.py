"""What happened to the weights, and what the model says now: the material of the report's pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import Blocks
from ..nn import quantized_modules
from ..quant import Quantizer
from ..quant.grouping import to_groups

SHOWN_TENSORS = 8
NEW_TOKENS = 48
"""How far a sample goes on; `hestia verify --samples` has llama.cpp go as far."""

_BINS = 10
"""Bins of a histogram in a step of the grid."""

_RANGE = 4.0


@torch.no_grad()
def histograms(model: nn.Module, parent: nn.Module) -> dict[str, Any]:
    """diagnostics.json without its samples: latent weights in units of their scale, before and after, and codes.

    Args:
        model: converted, before freezing.
        parent: the model before training.
    """
    modules = dict(quantized_modules(model))
    shown = set(list(modules)[:: max(1, -(-len(modules) // SHOWN_TENSORS))])
    record: dict[str, Any] = {"schema": 1, "histograms": {}, "codes": {}, "samples": []}
    for path, module in modules.items():
        before = parent.get_parameter(f"{path}.weight").to(module.weight.device)
        old, new = module.quantizer.codes(before), module.codes()
        record["codes"][path] = {
            "zero_share": float((new.codes == 0).float().mean()),
            "flipped_share": float((new.codes != old.codes).float().mean()),
        }
        if path in shown:
            edges, counts_before = _histogram(module.quantizer, before)
            record["histograms"][path] = {
                "edges": edges,
                "before": counts_before,
                "after": _histogram(module.quantizer, module.weight, module.held)[1],
            }
    return record


def _histogram(quantizer: Quantizer, weight: Tensor, held: Tensor | None = None) -> tuple[list[float], list[int]]:
    w = to_groups(weight.detach().float().cpu(), quantizer.spec.group_size)
    reach = max(_RANGE, 1.0 + max(map(abs, quantizer.spec.grid.levels)))
    z = (w / quantizer.scales(w, None if held is None else held.cpu()).step).flatten().clamp(-reach, reach)
    edges = torch.linspace(-reach, reach, 1 + round(2 * reach * _BINS))
    counts = torch.histogram(z, edges).hist
    return [round(float(e), 6) for e in edges], [int(c) for c in counts]


@torch.no_grad()
def continuations(
    parent: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: Blocks,
    *,
    count: int = 5,
    prompt_tokens: int = 24,
    new_tokens: int = NEW_TOKENS,
) -> list[dict[str, str]]:
    """Greedy continuations of the same held-out prompts by parent and quantized model."""
    samples: list[dict[str, str]] = []
    rows = range(0, len(blocks), max(1, len(blocks) // count))
    for row in list(rows)[:count]:
        opening = str(tokenizer.decode(blocks.input_ids[row, :prompt_tokens].long(), skip_special_tokens=True))
        opening = opening.rsplit(" ", 1)[0].strip() or opening  # the cut may fall inside a word
        prompt = tokenizer(opening, return_tensors="pt")["input_ids"]
        assert isinstance(prompt, Tensor)
        if not opening.strip() or not prompt.numel():  # nothing but special tokens, which are not shown
            continue
        texts = [
            tokenizer.decode(greedy(candidate, prompt, new_tokens)[prompt.shape[1] :], skip_special_tokens=True)
            for candidate in (parent, model)
        ]
        samples.append({"prompt": opening, "parent": str(texts[0]), "quantized": str(texts[1])})
    return samples


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> list[int]:
    """Token ids of ``prompt`` [1, T] followed by ``new_tokens`` greedy ones, or fewer that end with an end mark."""
    ids = prompt.to(next(model.parameters()).device)
    last = _end_marks(model)
    cache: dict[str, Any] = {}
    fed = ids
    for _ in range(new_tokens):
        output = model(input_ids=fed, use_cache=True, **cache)
        token = output.logits[:, -1:].argmax(dim=-1)
        ids = torch.cat([ids, token], dim=1)
        if int(token) in last:
            break
        kept = getattr(output, "past_key_values", None)  # models with a state instead of a cache read all of it again
        cache, fed = ({}, ids) if kept is None else ({"past_key_values": kept}, token)
    return ids[0].tolist()


def _end_marks(model: PreTrainedModel) -> set[int]:
    marks = getattr(model.generation_config, "eos_token_id", None)
    return set() if marks is None else {marks} if isinstance(marks, int) else set(marks)
