"""The default estimator against the exact Gauss-Newton trace, a closed form, and its own invariances."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hestia.curvature import calibrate
from hestia.curvature.estimators import Candidates, GaussNewton, Problem, gnb

torch.set_num_threads(1)


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """Grouped-query attention, default (sdpa) kernel, weights large enough that p is far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.25,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).double()


def linears(model: nn.Module) -> dict[str, nn.Parameter]:
    return {path: module.weight for path, module in model.named_modules() if isinstance(module, nn.Linear)}


def exact_traces(
    forward: Callable[[Tensor], Tensor], weights: dict[str, nn.Parameter], ids: Tensor
) -> dict[str, float]:
    """tr(G_i) from the full Jacobian: 1/N sum_t (sum_v p_v |J_v|^2 - |sum_v p_v J_v|^2)."""
    logits = forward(ids[None])[0, :-1]
    p = torch.softmax(logits.detach(), -1)
    every = torch.eye(logits.numel(), dtype=logits.dtype).view(-1, *logits.shape)
    jacobians = torch.autograd.grad(logits, list(weights.values()), grad_outputs=every, is_grads_batched=True)
    exact = {}
    for path, jacobian in zip(weights, jacobians, strict=True):
        j_TVW = jacobian.reshape(*logits.shape, -1)
        mean_TW = torch.einsum("tv,tvw->tw", p, j_TVW)
        exact[path] = float((torch.einsum("tv,tvw->", p, j_TVW.square()) - mean_TW.square().sum()) / len(logits))
    return exact


def test_mean_over_draws_is_the_exact_gauss_newton_trace() -> None:
    model = tiny_llama()
    weights = linears(model)
    sequences = torch.randint(0, 24, (2, 7), generator=torch.Generator().manual_seed(1))
    exact = [exact_traces(lambda ids: model(input_ids=ids).logits, weights, row) for row in sequences]
    draws = [calibrate(model, weights, sequences, seed=seed).traces for seed in range(210)]
    for path in weights:
        truth = sum(row[path] for row in exact) / len(exact)
        values = torch.tensor([draw[path] for draw in draws], dtype=torch.float64)
        error = float(values.std() / len(values) ** 0.5)
        assert error < 0.08 * truth, f"{path}: the test has no power"
        assert abs(float(values.mean()) - truth) < 4 * error, path


class LinearSoftmax(nn.Module):
    """z_t = W a_t: the only model whose trace has a closed form."""

    def __init__(self, vocabulary: int = 11, width: int = 6) -> None:
        super().__init__()
        self.features = nn.Embedding(vocabulary, width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.features(ids))


def test_linear_softmax_closed_form() -> None:
    """tr(G) = 1/N sum_t |a_t|^2 (1 - |p_t|^2)."""
    torch.manual_seed(0)
    model = LinearSoftmax().double()
    sequences = torch.randint(0, 11, (2, 9))
    a, p = model.features(sequences[:, :-1]).detach(), torch.softmax(model(sequences[:, :-1]).detach(), -1)
    truth = float((a.square().sum(-1) * (1 - p.square().sum(-1))).mean())
    draws = torch.tensor(
        [
            calibrate(model, {"head": model.head.weight}, sequences, forward=model, seed=s).traces["head"]
            for s in range(256)
        ]
    )
    assert abs(float(draws.mean()) - truth) < 4 * float(draws.std()) / 16
    assert float(draws.std()) / 16 < 0.06 * truth


def test_cotangents_have_the_covariance_of_the_softmax() -> None:
    """E[r r'] = diag(p) - p p', independent between positions, zero at the last, and no push along the constant."""
    torch.manual_seed(3)
    logits = torch.randn(1, 3, 5, dtype=torch.float64)
    ids = torch.tensor([1, 4, 2])
    r_STV = torch.cat([gnb.cotangents(logits, ids, seed) for seed in range(2000)])
    assert torch.equal(r_STV[:, 2], torch.zeros(2000, 5, dtype=torch.float64))
    assert float(r_STV.sum(-1).abs().max()) < 1e-6
    p = torch.softmax(logits[0], -1)
    for t in range(2):
        covariance = r_STV[:, t].T @ r_STV[:, t] / 2000
        torch.testing.assert_close(covariance, torch.diag(p[t]) - torch.outer(p[t], p[t]), atol=0.04, rtol=0)
    assert float((r_STV[:, 0].T @ r_STV[:, 1] / 2000).abs().max()) < 0.03


def test_signs_are_balanced() -> None:
    """Uniform logits over V: sqrt(p) e - p <sqrt p, e> recovers e up to its mean; half of the signs are +1."""
    r = gnb.cotangents(torch.zeros(1, 65, 100), torch.arange(65), seed=0)[0, :-1]
    assert abs(float((r > 0).double().mean()) - 0.5) < 0.03


def test_chunks_do_not_change_the_cotangents(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(1, 10, 40, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(10)
    whole = gnb.cotangents(logits, ids, 7)
    for size in (1, 80, 130):
        monkeypatch.setattr(gnb, "CHUNK", size)
        assert torch.equal(gnb.cotangents(logits, ids, 7), whole)


def test_signs_are_keyed_by_seed_and_content() -> None:
    logits = torch.randn(1, 10, 40, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(10)
    whole = gnb.cotangents(logits, ids, 7)
    assert torch.equal(gnb.cotangents(logits, ids.to(torch.int32), 7), whole)
    assert not torch.equal(gnb.cotangents(logits, ids, 8), whole)
    assert not torch.equal(gnb.cotangents(logits, ids + 1, 7), whole)


def test_a_sample_depends_on_seed_and_content_and_not_on_place() -> None:
    model = tiny_llama().float()
    weights = linears(model)
    sequences = torch.randint(0, 24, (5, 12), generator=torch.Generator().manual_seed(2))
    whole = calibrate(model, weights, sequences, seed=3)
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = calibrate(model, weights, sequences[order], seed=3)
    part = calibrate(model, dict(list(weights.items())[:4]), sequences[1:3].to(torch.int32), seed=3)
    for path, tensor in whole.tensors.items():
        assert shuffled.tensors[path].samples == tuple(tensor.samples[k] for k in order)
    for path, tensor in part.tensors.items():
        assert tensor.samples == pytest.approx(whole.tensors[path].samples[1:3], rel=1e-5)
    assert calibrate(model, weights, sequences, seed=4).traces != whole.traces


def test_the_last_token_is_not_scored() -> None:
    """Same random signs, other last token: with the key held fixed the sample of a causal model is the same."""
    model = tiny_llama().float()
    weights = linears(model)
    sequence = torch.randint(0, 24, (8,), generator=torch.Generator().manual_seed(5))
    r = gnb.cotangents(model(input_ids=sequence[None]).logits, sequence, 0)
    changed = torch.cat([sequence[:-1], (sequence[-1:] + 1) % 24])
    norms = []
    for ids in (sequence, changed):
        gradients = torch.autograd.grad(model(input_ids=ids[None]).logits, list(weights.values()), grad_outputs=r)
        norms.append([float(g.square().sum()) for g in gradients])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    problem = Problem(
        model=model,
        forward=lambda ids: model(input_ids=ids).logits,
        weights=weights,
        candidates=Candidates(weights, {}),
    )
    row = GaussNewton().sample(problem, sequence)
    assert row.keys() == weights.keys()
    assert [row[path]["trace"] for path in weights] == pytest.approx([norm / 7 for norm in norms[0]], rel=1e-5)


def test_bf16_weights_agree_with_fp32() -> None:
    model = tiny_llama().bfloat16()
    sequences = torch.randint(0, 24, (8, 16), generator=torch.Generator().manual_seed(2))
    low = calibrate(model, linears(model), sequences)
    high = calibrate(model.float(), linears(model), sequences)
    for path in high.tensors:
        assert low.traces[path] == pytest.approx(high.traces[path], rel=0.1), path


def test_tied_weight_under_one_name_covers_both_uses() -> None:
    """Head = embedding: the exact trace of the shared Parameter includes the cross term of both uses."""
    torch.manual_seed(0)
    model = LinearSoftmax(vocabulary=9, width=4).double()
    model.head.weight = model.features.weight
    weights = {"head": model.head.weight}
    sequences = torch.randint(0, 9, (2, 6), generator=torch.Generator().manual_seed(1))
    truth = sum(exact_traces(model, weights, row)["head"] for row in sequences) / 2
    draws = torch.tensor(
        [calibrate(model, weights, sequences, forward=model, seed=s).traces["head"] for s in range(200)]
    )
    assert abs(float(draws.mean()) - truth) < 4 * float(draws.std()) / 200**0.5
