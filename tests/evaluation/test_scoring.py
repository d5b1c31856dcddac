"""NLL, KL and agreement against naive full softmaxes, and what must not change them."""

from __future__ import annotations

import math

import pytest
import torch
from exact_curvature import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hestia import processes
from hestia.data import Blocks
from hestia.errors import ConfigError, GuardError
from hestia.evaluation import model_logits, score, scoring, shared_score

V = 11


class Bigram:
    """A language model of one table: the logits of the next token depend on this one."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        self.table = 3.0 * torch.randn(V, V, generator=torch.Generator().manual_seed(seed)).to(dtype)

    def __call__(self, ids: Tensor) -> Tensor:
        return self.table[ids]


def random_blocks(seed: int, blocks: int = 5, tokens: int = 9, share: float = 0.7) -> Blocks:
    g = torch.Generator().manual_seed(seed)
    return Blocks(
        input_ids=torch.randint(V, (blocks, tokens), generator=g),
        loss_mask=torch.rand(blocks, tokens, generator=g) < share,
    )


def naive(model: Bigram, parent: Bigram, blocks: Blocks) -> tuple[float, float, float]:
    """Position by position, in fp64."""
    losses, divergences, same = [], [], []
    for ids, mask in zip(blocks.input_ids.tolist(), blocks.loss_mask.tolist(), strict=True):
        for t in range(len(ids) - 1):
            if not mask[t + 1]:
                continue
            q = torch.softmax(model.table[ids[t]].double(), 0)
            p = torch.softmax(parent.table[ids[t]].double(), 0)
            losses.append(-math.log(q[ids[t + 1]]))
            divergences.append(float((p * (p / q).log()).sum()))
            same.append(int(p.argmax()) == int(q.argmax()))
    n = len(losses)
    return sum(losses) / n, sum(divergences) / n, sum(same) / n


def test_nll_is_torch_cross_entropy_when_every_target_counts():
    model, blocks = Bigram(0), random_blocks(1, share=1.1)
    expected = nn.functional.cross_entropy(
        model(blocks.input_ids)[:, :-1].reshape(-1, V), blocks.input_ids[:, 1:].reshape(-1)
    )
    result = score(model, blocks)
    assert result.nll == pytest.approx(float(expected), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(float(expected)), rel=1e-6)
    assert result.tokens == 5 * 8
    assert result.kl_to_parent is None and result.top1_agreement is None and result.block_kl is None


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.2, 1.0), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_equals_the_naive_sums_under_any_mask(seed: int, share: float, dtype: torch.dtype):
    model, parent, blocks = Bigram(seed, dtype), Bigram(seed + 1, dtype), random_blocks(seed, share=share)
    nll, kl, same = naive(model, parent, blocks)
    result = score(model, blocks, parent=parent)
    assert result.nll == pytest.approx(nll, rel=1e-5)
    assert result.kl_to_parent == pytest.approx(kl, rel=1e-5)
    assert result.top1_agreement == pytest.approx(same)


def test_neither_batch_size_nor_chunks_change_a_bit(monkeypatch):
    model, parent, blocks = Bigram(2), Bigram(3), random_blocks(4, blocks=7)
    whole = score(model, blocks, parent=parent, batch_size=7)
    for batch_size, elements in ((1, 1 << 22), (2, 1), (3, 5 * V), (8, 4 * V)):
        monkeypatch.setattr(scoring, "CHUNK_ELEMENTS", elements)
        part = score(model, blocks, parent=parent, batch_size=batch_size)
        assert part.to_json() == whole.to_json()
        assert torch.equal(part.block_nll, whole.block_nll)
        assert whole.block_kl is not None and part.block_kl is not None
        assert torch.equal(part.block_kl, whole.block_kl)


def test_a_large_vocabulary_runs_fewer_blocks_at_once(monkeypatch):
    assert [scoring.blocks_at_once(256, v) for v in (8192, 131072, 131073)] == [8, 8, 7]
    assert scoring.blocks_at_once(1024, 1 << 20) == 1
    seen: list[int] = []
    model = tiny_llama()
    logits = model_logits(model)
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    blocks = random_blocks(4, blocks=7)
    monkeypatch.setattr(scoring, "MOST_LOGITS", 3 * blocks.input_ids.shape[1] * model.config.vocab_size)
    score(logits, blocks)
    score(lambda ids: logits(ids), blocks, parent=logits)  # the callable that knows decides for both
    assert seen == [3, 3, 1, 3, 3, 3, 3, 1, 1]


def test_blocks_scored_alone_give_the_per_block_means():
    model, parent, blocks = Bigram(5), Bigram(6), random_blocks(7)
    together = score(model, blocks, parent=parent)
    assert together.block_kl is not None
    for i in range(len(blocks.input_ids)):
        alone = score(model, Blocks(blocks.input_ids[i : i + 1], blocks.loss_mask[i : i + 1]), parent=parent)
        assert float(together.block_nll[i]) == alone.nll
        assert float(together.block_kl[i]) == alone.kl_to_parent
        assert int(together.block_tokens[i]) == alone.tokens
    assert float((together.block_nll * together.block_tokens).sum()) / together.tokens == pytest.approx(together.nll)


def test_a_model_is_its_own_parent():
    model = Bigram(8)
    result = score(model, random_blocks(9), parent=model)
    assert result.kl_to_parent == 0.0 and result.top1_agreement == 1.0


def test_kl_is_from_parent_to_model_and_not_the_other_way():
    sharp, flat = Bigram(0), Bigram(0)
    flat.table = torch.zeros(V, V)
    blocks = random_blocks(10)
    entropy = torch.distributions.Categorical(logits=sharp.table[blocks.input_ids[:, :-1]]).entropy()
    expected = (math.log(V) - entropy)[blocks.loss_mask[:, 1:]].mean()
    assert score(flat, blocks, parent=sharp).kl_to_parent == pytest.approx(float(expected), rel=1e-5)


def test_a_token_that_both_exclude_adds_nothing():
    model, parent = Bigram(1), Bigram(2)
    blocks = Blocks(torch.randint(V - 1, (3, 8)), torch.ones(3, 8, dtype=torch.bool))
    expected = Bigram(1), Bigram(2)
    for excluded, without in zip((model, parent), expected, strict=True):
        excluded.table[:, -1] = -math.inf
        without.table = without.table[:, :-1]
    got, want = score(model, blocks, parent=parent), score(expected[0], blocks, parent=expected[1])
    assert got.kl_to_parent == pytest.approx(want.kl_to_parent, rel=1e-6)


def test_the_caller_keeps_its_mask_and_the_first_token_never_counts():
    blocks = Blocks(torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 4, dtype=torch.bool))
    assert score(Bigram(0), blocks).tokens == 6
    assert blocks.loss_mask.all()


def test_a_block_without_targets_is_nan_alone():
    blocks = random_blocks(11)
    blocks.loss_mask[2] = False
    result = score(Bigram(0), blocks, batch_size=1)
    assert result.block_nll.isnan().tolist() == [False, False, True, False, False]
    assert math.isfinite(result.nll)


def test_no_target_at_all_is_an_error():
    blocks = Blocks(torch.zeros(2, 4, dtype=torch.long), torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        score(Bigram(0), blocks)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_is_stopped_with_its_block_and_owner(bad: float):
    broken = Bigram(0)
    broken.table[7] = bad
    ids = torch.zeros(4, 6, dtype=torch.long)
    ids[3, 2] = 7
    blocks = Blocks(ids, torch.ones(4, 6, dtype=torch.bool))
    with pytest.raises(GuardError, match=r"NLL is \w+ in block 3, .* position 3: the model's"):
        score(broken, blocks, batch_size=2)
    with pytest.raises(GuardError, match=r"KL is \w+ in block 3, .* position 3: the parent's"):
        score(Bigram(0), blocks, parent=broken, batch_size=2)


def test_shapes_that_do_not_fit_are_named():
    blocks = random_blocks(12)
    with pytest.raises(ConfigError, match=r"returned logits \[5, 9\]"):
        score(lambda ids: ids.float(), blocks)
    with pytest.raises(ConfigError, match="another model's tokenizer"):
        score(lambda ids: torch.zeros(*ids.shape, 2), blocks)
    with pytest.raises(ConfigError, match="11 vocabulary entries and the parent 12"):
        score(Bigram(0), blocks, parent=lambda ids: torch.zeros(*ids.shape, 12))
    with pytest.raises(ConfigError, match="batch_size"):
        score(Bigram(0), blocks, batch_size=0)


def test_perplexity_overflows_to_infinity():
    wrong = Bigram(0)
    wrong.table = torch.zeros(V, V)
    wrong.table[:, 0] = 1e5
    blocks = Blocks(torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.bool))
    result = score(wrong, blocks)
    assert result.nll == pytest.approx(1e5) and result.perplexity == math.inf


class Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Droppy(nn.Module):
    """Looks like a transformers model; dropout makes training mode visible."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, V)
        self.drop = nn.Dropout(0.5)
        self.asleep = nn.Dropout(0.5).eval()

    def forward(self, input_ids: Tensor, use_cache: bool) -> Output:
        assert not use_cache
        return Output(self.drop(self.embed(input_ids)))


def test_model_logits_evaluates_without_gradient_and_restores_every_mode():
    model = Droppy()
    ids = torch.arange(V).reshape(1, -1).int()
    out = model_logits(model)(ids)
    assert torch.equal(out, model.embed.weight.detach()[None])
    assert not out.requires_grad
    assert model.training and model.drop.training and not model.asleep.training


def test_model_logits_restores_the_mode_after_an_error():
    model = Droppy()
    with pytest.raises(IndexError):
        model_logits(model)(torch.tensor([[V]]))
    assert model.training and model.drop.training


@pytest.mark.parametrize("mine", ["good", "bad"])
def test_processes_stop_together_where_one_cannot_score(mine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process is bad too, or alone; nobody is left waiting for sums that never come."""
    told: list[int] = []
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    monkeypatch.setattr(processes, "largest", lambda value: told.append(value) or GuardError.exit_status)
    monkeypatch.setattr(processes, "added", lambda values: pytest.fail("waits for the other process"))
    model = Bigram(0)
    if mine == "bad":
        model.table[3] = torch.nan
    with pytest.raises(GuardError, match="NLL is nan" if mine == "bad" else "another process could not score"):
        shared_score(model, random_blocks(1))
    assert told == [GuardError.exit_status if mine == "bad" else 0]


def row(first: float, others: float, dtype: torch.dtype = torch.float32) -> Bigram:
    """A model that says the same after every token."""
    model = Bigram(0)
    model.table = torch.full((V, V), others, dtype=dtype)
    model.table[:, 0] = first
    return model


def test_what_the_parent_thinks_unlikely_counts_while_it_is_possible() -> None:
    """p = 1.5e-9 of a token that the model rules out: a divergence of 1.5e-3, not of nothing."""
    parent, model = row(-18.0, 0.0), row(-1e6, 0.0)
    blocks = Blocks(torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.bool))
    p = parent.table.double().log_softmax(1)[0].exp()
    expected = float((p * (p.log() - model.table.double().log_softmax(1)[0])).sum())
    assert expected > 1e-3
    assert score(model, blocks, parent=parent).kl_to_parent == pytest.approx(expected, rel=1e-4)


def test_a_token_beyond_the_vocabulary_is_another_tokenizers() -> None:
    blocks = Blocks(torch.full((1, 4), 5), torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ConfigError, match="another model's tokenizer"):
        score(lambda ids: torch.zeros(*ids.shape, 5), blocks)


def test_logits_in_fp64_are_scored_in_fp64() -> None:
    blocks = Blocks(torch.ones(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.bool))
    table = torch.zeros(V, V, dtype=torch.float64)
    table[:, 1] = 1e-12
    assert score(lambda ids: table[ids], blocks).nll == pytest.approx(math.log(V) - 1e-12 * (1 - 1 / V), abs=1e-14)


def test_scores_that_two_processes_shared_are_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part run by itself, their sums added by hand; a block without a target belongs to nobody's mean."""
    blocks = random_blocks(3)
    blocks.loss_mask[2] = False
    model, parent = Bigram(0), Bigram(1)
    alone = score(model, blocks, parent=parent)
    sums: dict[int, Tensor] = {}
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    monkeypatch.setattr(processes, "largest", lambda value: value)
    for rank in (0, 1):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(processes, "added", lambda part, rank=rank: sums.setdefault(rank, part))
        shared_score(model, blocks, parent=parent)
    monkeypatch.setattr(processes, "added", lambda _: sums[0] + sums[1])
    both = shared_score(model, blocks, parent=parent)
    assert both.to_json() == pytest.approx(alone.to_json())
    torch.testing.assert_close(both.block_nll, alone.block_nll, equal_nan=True)
