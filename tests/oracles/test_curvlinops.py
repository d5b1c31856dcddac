"""The Gauss-Newton and empirical Fisher of curvlinops, an independent implementation, against ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from exact_curvature import assert_mean_is, gauss_newton_blocks, linears, logits_of, tiny_llama
from torch import Tensor, nn

from hestia.curvature import calibrate

curvlinops = pytest.importorskip("curvlinops", reason="curvlinops-for-pytorch is not installed (make setup does)")

torch.set_num_threads(1)

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # backpack's, not ours

IDS = torch.randint(0, 12, (2, 6), generator=torch.Generator().manual_seed(7))


PREFIX = torch.tensor([[4, 8, 0, 9]])


class Scored(nn.Module):
    """Token ids [1, T] -> the logits [T - 1, V] that predict a token: the loss terms that curvlinops averages."""

    def __init__(self, logits: Callable[[Tensor], Tensor], model: nn.Module) -> None:
        super().__init__()
        self.model, self.logits = model, logits

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits(ids)[0, :-1]


def blocks_of(
    operator: Callable[..., Any], model: nn.Module, ids: Tensor, logits: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """Module path -> that operator's block [n, n] for one sequence, column by column of the unit matrix."""
    wrapped, found = Scored(logits or logits_of(model), model), {}
    for path, weight in linears(model).items():
        matrix = operator(
            wrapped,
            nn.CrossEntropyLoss(),
            [weight],
            [(ids[None], ids[1:])],
            num_data=1,
            check_deterministic=False,
        )
        found[path] = matrix @ torch.eye(weight.numel(), dtype=weight.dtype)
    return found


def eager_llama() -> nn.Module:
    """Forward-mode derivatives need a kernel that has them."""
    return tiny_llama(scale=0.3, attn_implementation="eager")


def test_exact_blocks_agree() -> None:
    """The Jacobian formula that the other tests lean on is curvlinops' matrix, entry by entry."""
    model = eager_llama()
    theirs = blocks_of(curvlinops.GGNLinearOperator, model, IDS[0])
    ours = gauss_newton_blocks(logits_of(model), linears(model), IDS[0])
    for path, block in ours.items():
        torch.testing.assert_close(theirs[path], block, rtol=1e-4, atol=1e-6)


def test_gnb_is_unbiased_for_their_trace() -> None:
    model = eager_llama()
    weights = linears(model)
    blocks = [blocks_of(curvlinops.GGNLinearOperator, model, ids) for ids in IDS]
    truth = {path: sum(float(block[path].trace()) for block in blocks) / 2 for path in weights}
    draws = [calibrate(model, weights, IDS, seed=seed).traces for seed in range(120)]
    columns = {path: [draw[path] for draw in draws] for path in weights}
    assert_mean_is(columns, truth, {path: 0.1 * value for path, value in truth.items()})


def test_fisher_is_their_empirical_fisher() -> None:
    """Theirs squares every position's gradient, ours a sequence's: with one scored position they are one number."""
    model = eager_llama()

    def after_prefix(ids: Tensor) -> Tensor:
        return model(input_ids=torch.cat([PREFIX, ids], 1)).logits[:, -ids.shape[1] :]

    pairs = torch.tensor([[1, 5], [7, 2], [3, 3]])
    ours = calibrate(model, linears(model), pairs, estimator="fisher", forward=after_prefix)
    for k, ids in enumerate(pairs):
        theirs = blocks_of(curvlinops.EFLinearOperator, model, ids, after_prefix)
        for path, tensor in ours.tensors.items():
            assert tensor.samples[k] == pytest.approx(float(theirs[path].trace()), rel=1e-4), path
