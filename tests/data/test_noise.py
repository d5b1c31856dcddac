"""Noise on the tokens: its share, its tokens, and that it is the same wherever and whenever it is drawn."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from hestia.data.noise import noisy


@given(
    share=st.floats(0, 1),
    vocabulary=st.integers(1, 1 << 18),
    seed=st.integers(0, 1 << 63),
    example=st.integers(0, 1 << 40),
)
def test_every_token_is_its_own_or_one_of_the_vocabulary(
    share: float, vocabulary: int, seed: int, example: int
) -> None:
    ids = torch.full((64,), -1)  # no token: what is left is told from what was drawn
    out = noisy(ids, share, vocabulary, seed, example)
    assert torch.equal(out, noisy(ids, share, vocabulary, seed, example))
    assert bool(((out == -1) | ((out >= 0) & (out < vocabulary))).all()) and out.dtype == torch.long
    assert bool((ids == -1).all()), "the text is left alone"
    if share in (0.0, 1.0):
        assert float((out != -1).float().mean()) == share


def test_shares_and_tokens_are_uniform_and_examples_differ() -> None:
    """10^5 draws: the share within 4 standard errors, tokens by chi-square with 15 degrees of freedom (p > 10^-4)."""
    ids, n, share = torch.full((1000,), -1), 100, 0.1
    drawn = torch.stack([noisy(ids, share, 16, 3, example) for example in range(n)])
    chosen = drawn >= 0
    assert abs(float(chosen.float().mean()) - share) < 4 * (share * (1 - share) / drawn.numel()) ** 0.5
    counts = torch.bincount(drawn[chosen], minlength=16).double()
    assert float(((counts - counts.mean()) ** 2 / counts.mean()).sum()) < 44.3
    assert len({tuple(row.tolist()) for row in chosen}) == n, "no two examples are noisy at the same places"
    again = noisy(ids, share, 16, 4, 0)
    assert not torch.equal(again, drawn[0]), "another seed, other noise"


def test_more_noise_replaces_what_less_of_it_does() -> None:
    ids = torch.full((500,), -1)
    little, much = (noisy(ids, share, 50, 0, 0) for share in (0.1, 0.4))
    assert torch.equal(much[little >= 0], little[little >= 0])
