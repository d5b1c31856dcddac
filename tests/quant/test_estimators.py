import math

import pytest
import torch
from torch import Tensor

from hestia.errors import ConfigError
from hestia.quant import (
    BINARY,
    INT2,
    STE,
    TERNARY,
    ClippedSTE,
    DampedFourier,
    Estimator,
    Grid,
    QuantSpec,
    Softmax,
    Tanh,
    Trust,
    fake_quantize,
)

GRIDS = [TERNARY, BINARY, INT2, Grid((-8, -1, 0, 3))]
by_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)


def tau(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(value, dtype=dtype)


def line(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linspace(-10, 10, 4001, dtype=dtype)


@by_grid
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tau_zero_is_hard_forward_and_identity_backward(grid: Grid, dtype: torch.dtype) -> None:
    """Bit for bit, ties included."""
    ties = torch.tensor([-4.5, -1.5, -0.5, -0.0, 0.0, 0.5, 1.0, 1.5], dtype=dtype)
    z = torch.cat([line(dtype), ties, ties * (1 + torch.finfo(dtype).eps), ties * (1 - torch.finfo(dtype).eps)])
    assert torch.equal(Softmax().value(z.clone(), grid, tau(0, dtype)), grid.round(z))
    assert torch.equal(Softmax().gain(z.clone(), grid, tau(0, dtype)), torch.ones_like(z))


@by_grid
@pytest.mark.parametrize("temperature", [1e-3, 1e-6])
def test_a_small_tau_is_hard_away_from_ties(grid: Grid, temperature: float) -> None:
    z = line()
    midpoints = torch.tensor([(a + b) / 2 for a, b in zip(grid.values, grid.values[1:], strict=False)])
    z = z[(z.unsqueeze(-1) - midpoints).abs().amin(-1) > 25 * temperature]
    torch.testing.assert_close(Softmax().value(z.clone(), grid, tau(temperature)), grid.round(z), rtol=0, atol=1e-12)
    assert Softmax().gain(z.clone(), grid, tau(temperature)).max() < 1e-6


@by_grid
@pytest.mark.parametrize("temperature", [10.0, 0.3, 0.02, 1e-4, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_never_subnormal(grid: Grid, temperature: float, dtype: torch.dtype) -> None:
    """Subnormal numbers are computed fifty times slower; there is nothing to learn from a gain of 1e-40."""
    z = torch.cat([line(dtype) * 4, torch.tensor([0.0, 1e-30, 1e3, 1e7], dtype=dtype)])
    smallest = torch.finfo(dtype).tiny
    for out in (
        Softmax().value(z.clone(), grid, tau(temperature, dtype)),
        Softmax().gain(z.clone(), grid, tau(temperature, dtype)),
    ):
        assert not ((out != 0) & (out.abs() < smallest) & (z.abs() > smallest)).any()


def test_a_pruned_weight_stays_zero() -> None:
    for temperature in (10.0, 0.3, 1e-3, 0.0):
        assert Softmax().value(torch.zeros(3), TERNARY, tau(temperature, torch.float32)).tolist() == [0, 0, 0]


def test_the_gain_at_a_threshold_is_half_of_one_over_tau() -> None:
    gain = Softmax().gain(torch.tensor([0.5, -0.5], dtype=torch.float64), TERNARY, tau(1e-3))
    torch.testing.assert_close(gain, torch.full((2,), 500.0, dtype=torch.float64))


def test_huge_outliers_keep_their_level() -> None:
    """z^2 of an outlier loses its neighbours' distances in fp32; products of differences do not."""
    for grid in GRIDS:
        z = torch.tensor([1.6e7, -1.6e7])
        ends = [grid.values[-1], grid.values[0]]
        assert Softmax().value(z.clone(), grid, tau(0.3, torch.float32)).tolist() == pytest.approx(ends)


@by_grid
def test_straight_through(grid: Grid) -> None:
    z = line()
    for estimator in (STE(), ClippedSTE()):
        assert torch.equal(estimator.value(z.clone(), grid, tau(0)), grid.round(z))
    assert STE().gain(z, grid, tau(0)) is None


def test_the_clip_mask_is_the_grids_range_and_a_margin() -> None:
    z = torch.tensor([-2.6, -2.5, -2.0, -1.0, 0.0, 1.0, 1.1, 1.5, 1.6])
    inside = ClippedSTE().gain(z.clone(), INT2, tau(0, torch.float32))
    assert inside.tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 0]
    wider = ClippedSTE(margin=0.5).gain(z.clone(), INT2, tau(0, torch.float32))
    assert wider.tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("estimator", [DampedFourier(), Tanh()], ids=lambda estimator: estimator.name)
@pytest.mark.parametrize("levels", [(-1, 1), (-1.5, -0.5, 0.5, 1.5), (-2, 0, 2), (-1, 0, 1), (-0.5, 0, 0.5, 1)])
def test_a_staircase_s_gain_follows_the_levels(estimator: STE, levels: tuple[float, ...]) -> None:
    """Small at a level and large between two, as on 0, 1, 2, ... and wherever the grid lies."""
    grid, counted = Grid.of(levels), Grid(tuple(range(len(levels))))
    distance = levels[1] - levels[0]
    u = torch.arange(-512, 512 * len(levels) + 1, dtype=torch.float64) / 512
    gain = estimator.gain(levels[0] + distance * u, grid, tau(0.2))
    torch.testing.assert_close(gain, estimator.gain(u.clone(), counted, tau(0.2)), rtol=1e-12, atol=1e-12)
    places = torch.tensor([levels[0], levels[0] + 0.5 * distance], dtype=torch.float64)
    at_a_level, between = estimator.gain(places.clone(), grid, tau(0.2))
    assert at_a_level < 0.5 and between > 0.99
    if isinstance(estimator, DampedFourier):
        assert torch.equal(Softmax(hard="damped_fourier").gain(places.clone(), grid, tau(0.0))[1], between)


def test_a_staircase_on_consecutive_integers_is_the_formula_bit_for_bit() -> None:
    z = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    for grid in (TERNARY, INT2):
        inside = (z >= grid.values[0]) & (z <= grid.values[-1])
        c = (z - torch.round(z)).mul(math.pi).cos().mul(0.21 * math.sqrt(2.0) * math.pi)
        assert torch.equal(DampedFourier().gain(z.clone(), grid, tau(0.0)), (1.0 - c) / (c + 1.0) * inside)


@pytest.mark.parametrize("estimator", [DampedFourier(), Tanh(), Softmax(hard="tanh")], ids=lambda e: e.name)
def test_a_staircase_needs_levels_that_are_equally_far_apart(estimator: Estimator) -> None:
    with pytest.raises(ConfigError, match=r"the levels must be equally far apart, got \[-8, -1, 0, 3\]; use 'ste'"):
        QuantSpec(grid=Grid((-8, -1, 0, 3)), estimator=estimator)


def test_estimators_travel_as_json_and_name_the_nearest() -> None:
    bounded = Softmax(floor=0.1, ceiling=2.0, hard="trust")
    for estimator in (STE(), ClippedSTE(margin=0.25), Softmax(), bounded, Trust(), Tanh(), DampedFourier()):
        assert Estimator.from_json(estimator.to_json()) == estimator
    assert Estimator.names() == ["clipped_ste", "damped_fourier", "softmax", "ste", "tanh", "trust"]
    with pytest.raises(ConfigError, match="did you mean 'softmax'"):
        Estimator.make("softmaxx")


def test_trust_reaches_half_a_step_beyond_the_ends() -> None:
    z = torch.tensor([-2.6, -2.4, -0.5, 1.4, 1.6])
    assert Trust().gain(z, INT2, tau(0, torch.float32)).tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


def test_a_tanh_of_no_sharpness_is_the_identity_and_of_the_most_is_finite() -> None:
    z = torch.linspace(-1.4, 1.4, 9)
    assert bool(Tanh().gain(z.clone(), TERNARY, tau(1.0, torch.float32)).isfinite().all())
    assert torch.equal(Tanh().gain(z.clone(), TERNARY, tau(0.0, torch.float32)), torch.ones_like(z))


def test_trust_wants_levels_that_are_equally_far_apart() -> None:
    """Elsewhere a weight between two of them may be farther from both than half of the smallest step."""
    with pytest.raises(ConfigError, match="must be equally far apart"):
        fake_quantize(torch.ones(1, 4), levels=[-2, -1, 1, 2], estimator="trust")
