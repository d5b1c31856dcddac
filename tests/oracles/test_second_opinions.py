"""Equal to a naive transcription of the paper, to its closed form, and to numerical differentiation."""

import math

import naive
import pytest
import torch
from torch import Tensor

from hestia import fake_quantize
from hestia.quant import BINARY, INT2, TERNARY, Grid, Quantizer, QuantSpec, ScaleRule, Softmax

GRIDS = [TERNARY, BINARY, INT2, Grid.of([-1.5, -0.5, 0.5, 1.5]), Grid.of([-4, -1, 0, 1, 2])]
TEMPERATURES = [10.0, 1.5, 0.351, 0.05, 0.01, 1e-3]
by_name = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
by_temperature = pytest.mark.parametrize("tau", TEMPERATURES)


def line(points: int = 4001, reach: float = 6.0) -> Tensor:
    return torch.linspace(-reach, reach, points, dtype=torch.float64)


def knob(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@by_name
@by_temperature
def test_value_is_the_mean_over_the_whole_table(grid: Grid, tau: float) -> None:
    value = Softmax().value(line(), grid, knob(tau))
    torch.testing.assert_close(value, naive.relaxed(line(), grid.values, tau), rtol=0, atol=1e-12)


@by_name
@by_temperature
def test_gain_is_the_variance_over_the_whole_table(grid: Grid, tau: float) -> None:
    gain = Softmax().gain(line(), grid, knob(tau))
    expected = 2 / tau * naive.variance(line(), grid.values, tau)
    torch.testing.assert_close(gain * tau, expected * tau, rtol=1e-9, atol=1e-14)


@by_name
@pytest.mark.parametrize("tau", TEMPERATURES[:-1])
def test_gain_is_what_autograd_says(grid: Grid, tau: float) -> None:
    z = line().requires_grad_()
    (slope,) = torch.autograd.grad(naive.relaxed(z, grid.values, tau).sum(), z)
    gain = Softmax().gain(line(), grid, knob(tau))
    torch.testing.assert_close(gain * tau, slope * tau, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tau", [10.0, 1.5, 0.351, 0.05, 0.02])
def test_ternary_is_the_papers_closed_form(tau: float) -> None:
    z = line(reach=5.0)
    expected = torch.sinh(2 * z / tau) / (torch.cosh(2 * z / tau) + 0.5 * math.exp(1 / tau))
    torch.testing.assert_close(Softmax().value(z.clone(), TERNARY, knob(tau)), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("tau", [1e-2, 1e-4, 1e-6])
def test_near_a_threshold_ternary_is_a_logistic_curve(tau: float) -> None:
    """Where exp(-1/tau) vanishes only two levels share: Q = sigmoid((2z - 1) / tau), far below what exp can hold."""
    steps = torch.linspace(-30, 30, 601, dtype=torch.float64)
    z = 0.5 + 0.5 * tau * steps
    q = torch.sigmoid((2 * z - 1) / tau)
    torch.testing.assert_close(Softmax().value(z.clone(), TERNARY, knob(tau)), q, rtol=1e-9, atol=1e-15)
    gain = Softmax().gain(z.clone(), TERNARY, knob(tau))
    torch.testing.assert_close(gain * tau, 2 * q * (1 - q), rtol=1e-6, atol=1e-15)


@by_name
@pytest.mark.parametrize(("group", "naive_group"), [("tensor", 96), ("row", 16), (8, 8)])
@pytest.mark.parametrize("pressure", [0.3, 1.0])
def test_whole_operator_and_its_gradient(grid: Grid, group: int | str, naive_group: int, pressure: float) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(6, 16, generator=generator, dtype=torch.float64).mul_(0.04).requires_grad_()
    g = torch.randn(6, 16, generator=generator, dtype=torch.float64)
    ours = fake_quantize(w, levels=grid.values, group_size=group, temperature=0.2, pressure=pressure)  # type: ignore[arg-type]
    theirs = naive.surrogate(w, grid.values, naive_group, 0.2, pressure)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    (our_gradient,) = torch.autograd.grad(ours, w, g)
    (their_gradient,) = torch.autograd.grad(theirs, w, g)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=0, atol=1e-10)


@by_name
@pytest.mark.parametrize("scale", ["absmean", "absmax", "least_squares", "twn"])
def test_gradient_is_the_derivative_at_a_fixed_scale(grid: Grid, scale: str) -> None:
    """Finite differences of the value, with the scales held where they are (the paper detaches them)."""
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    quantizer = Quantizer(QuantSpec(grid=grid, scale=ScaleRule.make(scale), estimator=Softmax()))
    step, level = (s.squeeze(-1) for s in quantizer.scales(w.unsqueeze(1)))
    leaf = w.clone().requires_grad_()
    quantizer.fake(leaf, knob(0.7), knob(0.3)).sum().backward()
    assert leaf.grad is not None

    def fixed(w_OI: Tensor) -> Tensor:
        return 0.3 * w_OI + 0.7 * level * Softmax().value(w_OI / step, grid, knob(0.3))

    h = 1e-5
    numerical = (fixed(w + h) - fixed(w - h)) / (2 * h)
    torch.testing.assert_close(leaf.grad, numerical, rtol=1e-6, atol=1e-8)


@by_name
def test_gradcheck_where_the_scale_does_not_move(grid: Grid) -> None:
    """Swapping one weight's change against another's keeps mean|w|: along that direction the operator is smooth."""
    w = torch.tensor([[0.9, 0.4, 0.2, 0.6]], dtype=torch.float64)
    direction = torch.tensor([[1.0, -1.0, 0.5, -0.5]], dtype=torch.float64)

    def along(x: Tensor) -> Tensor:
        return fake_quantize(w + x * direction, levels=grid.values, temperature=0.4, pressure=0.8)

    assert torch.autograd.gradcheck(along, torch.zeros((), dtype=torch.float64, requires_grad=True))
