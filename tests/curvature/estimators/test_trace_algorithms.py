"""Hutch++, XTrace and power iteration on matrices whose trace and eigenvalues are known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hestia.curvature.estimators.draws import rademacher
from hestia.curvature.estimators.eigen import top_eigenvalue
from hestia.curvature.estimators.hutchpp import basis, hutchpp
from hestia.curvature.estimators.xtrace import xtrace


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def product_with(a: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda v: (a @ v.view(-1)).view(v.shape)


def symmetric(n: int, rank: int, seed: int) -> Tensor:
    """Random, of the given rank, with eigenvalues of both signs."""
    generator = draws(seed)
    factor = torch.randn(n, rank, generator=generator, dtype=torch.float64)
    values = torch.randn(rank, generator=generator, dtype=torch.float64)
    return factor @ torch.diag(values) @ factor.T


@settings(max_examples=40)
@given(st.integers(4, 6), st.integers(6, 9), st.integers(0, 6), st.integers(0, 10**6))
def test_exact_on_low_rank(rows: int, columns: int, rank: int, seed: int) -> None:
    """Hutch++ where rank <= r, XTrace where rank < s; indefinite and zero matrices included."""
    n = rows * columns  # 24 at least: shorter vectors of signs are too often equal up to sign
    a = symmetric(n, rank, seed)
    like = torch.empty(rows, columns, dtype=torch.float64)
    truth, size = float(a.trace()), 1.0 + float(torch.linalg.matrix_norm(a, "nuc"))
    assert abs(hutchpp(product_with(a), like, max(rank, 1), 1, draws(seed)) - truth) < 1e-8 * size
    for vectors in (max(rank + 1, 2), rank + 3):  # R is singular in the second case
        value, error = xtrace(product_with(a), like, vectors, draws(seed))
        assert abs(value - truth) < 1e-6 * size
        assert error < 1e-6 * size


def test_more_vectors_than_dimensions_are_capped() -> None:
    a = symmetric(3, 3, 0)
    like = torch.empty(1, 3, dtype=torch.float64)
    for k in range(12):  # a full basis leaves nothing to chance, even where the signs of the sketch are dependent
        assert hutchpp(product_with(a), like, 10, 2, draws(k)) == pytest.approx(float(a.trace()), rel=1e-9)
    assert all(abs(xtrace(product_with(a), like, 9, draws(k))[0]) < 1e3 for k in range(12))


@pytest.mark.parametrize("name", ["hutchpp", "xtrace"])
@pytest.mark.parametrize("seed", [0, 1])
def test_unbiased_on_random_symmetric_matrices(name: str, seed: int) -> None:
    """Full rank, both signs: 600 draws within 4 standard errors, and those below 3 % of the nuclear norm."""
    a = symmetric(24, 24, seed)
    like = torch.empty(4, 6, dtype=torch.float64)
    run: Callable[[int], float] = {
        "hutchpp": lambda k: hutchpp(product_with(a), like, 3, 3, draws(k)),
        "xtrace": lambda k: xtrace(product_with(a), like, 5, draws(k))[0],
    }[name]
    values = torch.tensor([run(k) for k in range(600)], dtype=torch.float64)
    error = float(values.std()) / 600**0.5
    assert error < 0.03 * float(torch.linalg.matrix_norm(a, "nuc")), "the test has no power"
    assert abs(float(values.mean()) - float(a.trace())) < 4 * error


def test_xtrace_equals_leave_one_out_by_its_definition() -> None:
    """Without the downdate: one factorisation for every vector left out."""
    a = symmetric(20, 20, 3)
    like = torch.empty(4, 5, dtype=torch.float64)
    s = 6
    generator = draws(9)
    omega = torch.stack([rademacher(like, generator).view(-1) for _ in range(s)], 1)
    estimates = []
    for i in range(s):
        kept = [j for j in range(s) if j != i]
        q = torch.linalg.qr(a @ omega[:, kept])[0]
        off = omega[:, i] - q @ (q.T @ omega[:, i])
        estimates.append(torch.trace(q.T @ a @ q) + off @ a @ off)
    expected = torch.stack(estimates)
    value, error = xtrace(product_with(a), like, s, draws(9))
    assert value == pytest.approx(float(expected.mean()), rel=1e-9)
    assert error == pytest.approx(float(expected.std()) / s**0.5, rel=1e-9)


def test_the_own_error_of_xtrace_has_the_right_size() -> None:
    a = symmetric(40, 40, 5)
    like = torch.empty(5, 8, dtype=torch.float64)
    runs = [xtrace(product_with(a), like, 8, draws(k)) for k in range(300)]
    true_rmse = (sum((value - float(a.trace())) ** 2 for value, _ in runs) / 300) ** 0.5
    stated = (sum(error**2 for _, error in runs) / 300) ** 0.5
    assert 0.5 * true_rmse < stated < 1.3 * true_rmse


@settings(max_examples=30)
@given(st.lists(st.floats(-100.0, 100.0), min_size=1, max_size=70), st.integers(0, 10**6))
def test_random_signs_are_exact_on_a_diagonal(values: list[float], seed: int) -> None:
    diagonal = torch.tensor(values, dtype=torch.float64)
    signs = rademacher(diagonal, draws(seed))
    assert torch.equal(signs.abs(), torch.ones_like(diagonal))
    assert float((signs * diagonal * signs).sum()) == pytest.approx(float(diagonal.sum()), abs=1e-12)


def test_signs_are_fair_and_independent() -> None:
    signs = torch.stack([rademacher(torch.empty(37), draws(k)) for k in range(4000)])
    assert float(signs.mean(0).abs().max()) < 4.5 / 4000**0.5
    covariance = signs.T @ signs / 4000
    assert float((covariance - torch.eye(37)).abs().max()) < 5 / 4000**0.5


def test_the_basis_is_orthonormal_and_spans_the_range() -> None:
    a = symmetric(12, 3, 0)
    q = basis(product_with(a), torch.empty(3, 4, dtype=torch.float64), 3, draws(1))
    torch.testing.assert_close(q.T @ q, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(q @ (q.T @ a), a)


@settings(max_examples=30)
@given(st.integers(2, 8), st.sampled_from([-3.0, 3.0]), st.floats(-2.0, 2.0), st.integers(0, 10**6))
def test_power_iteration_finds_the_largest_magnitude_with_its_sign(
    n: int, top: float, second: float, seed: int
) -> None:
    q = torch.linalg.qr(torch.randn(n, n, generator=draws(seed), dtype=torch.float64))[0]
    rest = second * torch.rand(n - 1, generator=draws(seed + 1), dtype=torch.float64)
    a = q @ torch.diag(torch.cat([torch.tensor([top], dtype=torch.float64), rest])) @ q.T
    found = top_eigenvalue(product_with(a), torch.empty(1, n, dtype=torch.float64), 400, 1e-10, draws(seed))
    assert found == pytest.approx(top, abs=1e-4)


def test_power_iteration_on_the_zero_matrix() -> None:
    assert top_eigenvalue(torch.zeros_like, torch.empty(2, 3), 5, 1e-3, draws(0)) == 0.0
