"""What became of the weights, and greedy continuations: with a cache, without one, and where they end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_models import llama
from toy_runs import make_tokenizer
from transformers import AutoModelForCausalLM

import hestia
from hestia.data import Blocks
from hestia.evaluation.diagnostics import continuations, greedy, histograms


class Counting(nn.Module):
    """Says one more than the last token that it reads; with a cache it must be fed one token at a time."""

    def __init__(self, cached: bool, end: int | list[int] | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.cached = cached
        self.generation_config = SimpleNamespace(eos_token_id=end)
        self.read: list[int] = []

    def forward(self, input_ids: Tensor, use_cache: bool, **kwargs: Any) -> SimpleNamespace:
        self.read.append(input_ids.shape[1])
        logits = nn.functional.one_hot(input_ids + 1, 50).float()
        if not self.cached:
            assert not kwargs
            return SimpleNamespace(logits=logits)
        assert ("past_key_values" in kwargs) == (len(self.read) > 1)
        return SimpleNamespace(logits=logits, past_key_values=object())


@pytest.mark.parametrize(("cached", "read"), [(True, [2, 1, 1]), (False, [2, 3, 4])])
def test_what_is_fed_depends_on_the_cache(cached: bool, read: list[int]) -> None:
    model: Any = Counting(cached, None)
    assert greedy(model, torch.tensor([[3, 4]]), 3) == [3, 4, 5, 6, 7]
    assert model.read == read


@pytest.mark.parametrize("end", [6, [9, 6]])
def test_it_ends_at_an_end_mark(end: int | list[int]) -> None:
    model: Any = Counting(True, end)
    assert greedy(model, torch.tensor([[3, 4]]), 10) == [3, 4, 5, 6]


def test_a_real_cache_says_the_same_as_reading_all_again() -> None:
    model = llama().eval()
    ids = torch.arange(5)[None]
    expected = ids
    for _ in range(6):
        expected = torch.cat([expected, model(input_ids=expected).logits[:, -1:].argmax(dim=-1)], dim=1)
    model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    assert greedy(model, ids, 6) == expected[0].tolist()


def test_shares_and_histograms_count_what_became_of_the_weights() -> None:
    """One row turned around, and one weight far out, which falls into the last bin instead of out of the counts."""
    parent, model = llama(), llama()
    hestia.apply(model, hestia.plan(model, "bitnet_ste"))
    path = next(iter(hestia.plan(parent, "bitnet_ste").layers))
    layer: Any = model.get_submodule(path)
    total = layer.weight.numel()
    with torch.no_grad():
        layer.weight[0] *= -1
    codes = layer.codes().codes
    record = histograms(model, parent)
    assert record["codes"][path] == pytest.approx(
        {"zero_share": float((codes == 0).sum()) / total, "flipped_share": float((codes[0] != 0).sum()) / total}
    )
    with torch.no_grad():
        layer.weight[1, 0] = 1e4
    counts = histograms(model, parent)["histograms"][path]
    assert sum(counts["before"]) == sum(counts["after"]) == total
    assert counts["after"][-1] >= 1


def test_the_outer_levels_of_a_wide_grid_are_in_the_histogram() -> None:
    """4 bits reach from -8 to 7 steps: no more than a normal weight's share may lie in the last bins."""
    parent, model = llama(), llama()
    plan = hestia.plan(model, "bitnet_ste", bits=4, target="gguf:q4_0", group_size=32)
    hestia.apply(model, plan)
    for histogram in histograms(model, parent)["histograms"].values():
        edges, counts = histogram["edges"], histogram["before"]
        assert edges[0] < -8 and edges[-1] > 8
        assert (counts[0] + counts[-1]) / sum(counts) < 0.01


def test_a_prompt_of_nothing_but_special_tokens_is_left_out() -> None:
    tokenizer = make_tokenizer()
    model = AutoModelForCausalLM.from_config(llama(vocab_size=len(tokenizer)).config).eval()
    ids = torch.zeros(2, 8, dtype=torch.int32)  # <unk>, which is not shown
    assert tokenizer.unk_token_id == 0
    ids[1] = torch.tensor(tokenizer("the cat saw a red hat and a ball")["input_ids"][:8])
    shown = continuations(model, model, tokenizer, Blocks(ids, torch.ones(2, 8, dtype=torch.bool)), new_tokens=2)
    assert len(shown) == 1 and shown[0]["prompt"].startswith("the cat")
