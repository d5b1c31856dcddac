"""The Hestia paper's packing on documents small enough to write down."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hestia.errors import ConfigError
from hestia.evaluation import hestia_protocol_perplexity

EOS, BOS, V = 0, 9, 10


class Recorder:
    """Logits of a fixed table; remembers what it was asked."""

    def __init__(self) -> None:
        self.table = torch.randn(V, V, generator=torch.Generator().manual_seed(0))
        self.seen: list[list[int]] = []

    def __call__(self, ids: Tensor) -> Tensor:
        self.seen += ids.tolist()
        return self.table[ids]

    def nll(self, pairs: list[tuple[int, int]]) -> float:
        rows = self.table.double().log_softmax(1)
        return -sum(float(rows[a, b]) for a, b in pairs) / len(pairs)


def test_packs_whole_documents_and_never_predicts_across_eos():
    model = Recorder()
    #           3 with EOS  2       4, does not fit      6: dropped          2
    documents = [[1, 2], [3], [4, 5, 6], [], [1, 1, 1, 1, 1], [7]]
    result = hestia_protocol_perplexity(model, documents, eos=EOS, max_len=5)
    assert model.seen == [[1, 2, EOS, 3, EOS], [4, 5, 6, EOS, EOS], [7, EOS, EOS, EOS, EOS]]  # padded with EOS
    counted = [(1, 2), (2, EOS), (3, EOS), (4, 5), (5, 6), (6, EOS), (7, EOS)]
    assert result.score.tokens == len(counted)
    assert result.score.nll == pytest.approx(model.nll(counted), rel=1e-6)
    assert result.score.perplexity == pytest.approx(math.exp(model.nll(counted)), rel=1e-6)
    assert (result.documents, result.dropped) == (5, 1)


def test_bos_stands_once_in_front_and_predicts_the_first_token():
    model = Recorder()
    result = hestia_protocol_perplexity(model, [[1, 2], [3], [4, 5, 6], [1, 1, 1, 1]], eos=EOS, bos=BOS, max_len=5)
    assert model.seen == [[BOS, 1, 2, EOS, EOS], [BOS, 3, EOS, EOS, EOS], [BOS, 4, 5, 6, EOS]]
    counted = [(BOS, 1), (1, 2), (2, EOS), (BOS, 3), (3, EOS), (BOS, 4), (4, 5), (5, 6), (6, EOS)]
    assert result.score.nll == pytest.approx(model.nll(counted), rel=1e-6)
    assert result.dropped == 1


def test_batches_change_nothing():
    documents = [[1 + (i + j) % 8 for j in range(i % 7)] for i in range(40)]
    one = hestia_protocol_perplexity(Recorder(), documents, eos=EOS, max_len=12)
    four = hestia_protocol_perplexity(Recorder(), documents, eos=EOS, max_len=12, batch_size=4)
    assert one.score.to_json() == four.score.to_json()


def test_an_eos_inside_a_document_is_a_border_too():
    model = Recorder()
    result = hestia_protocol_perplexity(model, [[1, EOS, 2]], eos=EOS, max_len=8)
    assert result.score.nll == pytest.approx(model.nll([(1, EOS), (2, EOS)]), rel=1e-6)


@pytest.mark.parametrize("documents", [[], [[]], [[1, 2, 3, 4, 5]]])
def test_nothing_left_is_an_error(documents: list[list[int]]):
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        hestia_protocol_perplexity(Recorder(), documents, eos=EOS, max_len=5)
