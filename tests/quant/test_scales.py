import pytest
import torch
from torch import Tensor

from hestia.errors import ConfigError
from hestia.quant import (
    BINARY,
    INT2,
    INT3,
    INT4,
    TERNARY,
    TWN,
    AbsMax,
    AbsMean,
    Gaussian,
    Grid,
    LeastSquares,
    QuantSpec,
    Saliency,
    ScaleRule,
    importance,
    snap,
)
from hestia.quant.scales import LARGEST_SCALE, NORMAL_STEPS, SMALLEST_SCALE, best_level


def weights(seed: int = 0) -> Tensor:
    return torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_absmean_and_absmax() -> None:
    w = weights()
    step, level = AbsMean()(w, TERNARY)
    assert step is level
    torch.testing.assert_close(step, w.abs().mean(-1, keepdim=True) + 1e-5)
    torch.testing.assert_close(AbsMax()(w, INT2).step, w.abs().amax(-1, keepdim=True) / 2 + 1e-5)


@pytest.mark.parametrize("rule", [LeastSquares(), TWN(), Gaussian()], ids=lambda rule: rule.name)
@pytest.mark.parametrize("grid", [BINARY, TERNARY, INT2], ids=lambda grid: grid.name)
def test_the_level_is_the_best_one_for_the_codes(rule: ScaleRule, grid: Grid) -> None:
    w = weights()
    step, level = rule(w, grid)
    q = grid.round(w / step)

    def error(s: Tensor) -> Tensor:
        return (w - s * q).square().sum(-1, keepdim=True)

    best = error(level)
    for factor in torch.linspace(0.5, 1.5, 201, dtype=torch.float64):
        assert (best <= error(level * factor) + 1e-12).all()


def test_least_squares_keeps_the_codes_of_absmean() -> None:
    w = weights()
    assert torch.equal(LeastSquares()(w, TERNARY).step, AbsMean()(w, TERNARY).step)


def test_twn_is_the_papers_formula() -> None:
    w = weights()
    step, level = TWN(eps=1e-12)(w, TERNARY)
    delta = 0.75 * w.abs().mean(-1, keepdim=True)
    survives = w.abs() > delta
    assert torch.equal(TERNARY.round(w / step), w.sign() * survives)
    expected = (w.abs() * survives).sum(-1, keepdim=True) / survives.sum(-1, keepdim=True)
    torch.testing.assert_close(level, expected)


def test_gaussian_errors_are_the_known_ones() -> None:
    """Relative squared error of ternary codes on a Gaussian: 0.264, 0.213 and 0.190 (the optimum is 0.190)."""
    w = torch.randn(1, 1, 400_000, generator=torch.Generator().manual_seed(0))
    for rule, known in ((AbsMean(), 0.264), (LeastSquares(), 0.213), (TWN(), 0.190), (Gaussian(), 0.190)):
        step, level = rule(w, TERNARY)
        error = (w - level * TERNARY.round(w / step)).square().mean() / w.square().mean()
        assert error.item() == pytest.approx(known, abs=0.002)


@pytest.mark.parametrize("name", ScaleRule.names())
def test_a_group_of_zeros_has_a_positive_scale(name: str) -> None:
    step, level = ScaleRule.make(name)(torch.zeros(2, 1, 8), TERNARY)
    assert (step > 0).all()
    assert torch.equal(step, level)


@pytest.mark.parametrize("name", ScaleRule.names())
@pytest.mark.parametrize("eps", [0.0, -1e-5, float("inf"), float("nan")])
def test_an_eps_that_lets_a_step_be_zero_is_refused(name: str, eps: float) -> None:
    with pytest.raises(ConfigError, match=f"scale rule '{name}': eps must be a positive number, got {eps}"):
        ScaleRule.make(name, eps=eps)


@pytest.mark.parametrize(
    ("name", "option"),
    [("rms", "clip"), ("saliency", "lowest"), ("saliency", "width"), ("saliency", "candidates")],
)
def test_a_step_that_an_option_makes_zero_is_refused(name: str, option: str) -> None:
    with pytest.raises(ConfigError, match=f"scale rule '{name}': {option} must be a positive number, got 0"):
        ScaleRule.make(name, **{option: 0})


def test_a_learned_step_needs_a_level_above_zero() -> None:
    for levels in ([-2, -1, 0], [-3, -1]):
        with pytest.raises(ConfigError, match="'learned_step' needs a level above 0, got"):
            QuantSpec(grid=Grid.of(levels), scale=ScaleRule.make("learned_step"))


def test_snap_is_exact_in_every_format_and_idempotent() -> None:
    scales = torch.logspace(-12, 8, 20_001)
    snapped = snap(scales)
    assert torch.equal(snap(snapped), snapped)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(snapped.to(dtype).float(), snapped)
    inside = (scales >= SMALLEST_SCALE) & (scales <= LARGEST_SCALE)
    assert ((snapped / scales - 1).abs()[inside] <= 2**-8).all()
    assert (snapped.min(), snapped.max()) == (SMALLEST_SCALE, LARGEST_SCALE)


def test_every_scale_that_snap_can_return_survives_fp16() -> None:
    """All bf16 numbers in [2^-14, 65280], 3840 of them."""
    every = torch.arange(0, 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    allowed = every[(every >= SMALLEST_SCALE) & (every <= LARGEST_SCALE)]
    assert len(allowed) == 3840
    assert torch.equal(snap(allowed), allowed)
    assert torch.equal(allowed.half().float(), allowed)


def test_rules_travel_as_json_and_name_the_nearest() -> None:
    for rule in (AbsMean(eps=1e-3), AbsMax(), LeastSquares(), TWN(factor=0.7)):
        assert ScaleRule.from_json(rule.to_json()) == rule
    with pytest.raises(ConfigError, match="did you mean 'absmean'"):
        ScaleRule.make("absmeen")
    with pytest.raises(ConfigError, match="has no option 'epsilon': did you mean 'eps'"):
        ScaleRule.make("absmean", epsilon=1.0)


@pytest.mark.parametrize("grid", [TERNARY, INT2, INT3, INT4], ids=lambda grid: grid.name)
def test_normal_steps_are_the_best_ones(grid: Grid) -> None:
    """Search again, by the inverse distribution function: no step within 10 % is better by more than 0.02 %."""
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    x = 2**0.5 * torch.erfinv(2 * u - 1)

    def error(step: float) -> float:
        q = grid.round(x / step)
        return float((x - (q * x).sum() / q.square().sum() * q).square().mean())

    chosen = NORMAL_STEPS[grid.values]
    best = min((error(chosen * (0.9 + 0.002 * k)), k) for k in range(101))
    assert error(chosen) <= best[0] * 1.0002
    assert 25 < best[1] < 75, "the minimum lies inside the search"


def test_gaussian_refuses_a_grid_it_does_not_know() -> None:
    with pytest.raises(ConfigError, match=r"no step for the grid \[-3, 0, 3\]; use 'least_squares'"):
        Gaussian()(weights(), Grid.of([-3, 0, 3]))


def test_saliency_refuses_grids_whose_loss_it_does_not_minimise() -> None:
    for grid in (BINARY, TERNARY):
        assert QuantSpec(grid=grid, scale=Saliency()).scale == Saliency()
    for grid in (INT2, INT3, INT4, Grid.of([-1.5, -0.5, 0.5, 1.5])):
        with pytest.raises(ConfigError, match=r"'saliency' is for binary and ternary, not .*; use 'gaussian'"):
            QuantSpec(grid=grid, scale=Saliency())


def test_a_stretched_range_is_cut_into_three_levels_and_no_others() -> None:
    for grid in (BINARY, INT2, INT4, Grid.of([-0.5, 0.0, 0.5])):
        with pytest.raises(ConfigError, match=r"'stretched_elastic' is for ternary, not .*; use 'learned_step'"):
            QuantSpec(grid=grid, scale=ScaleRule.make("stretched_elastic"))


@pytest.mark.parametrize("shape", [(64, 1, 96), (16, 8, 32), (1, 1, 4096)])
def test_thresholds_are_weighed_alike_in_one_pass_and_one_by_one(shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.rand(shape, generator=generator, dtype=torch.float64)
    place = torch.randint(0, 18, shape, generator=generator).double()
    expected = [
        [[float(b[c > k].sum()) for k in range(17)] for b, c in zip(row, places, strict=True)]
        for row, places in zip(h[:2], place[:2], strict=True)
    ]
    for above in (importance._above_in_one_pass, importance._above_one_by_one):
        found = above(place, h, 17)
        assert found.shape == (*shape[:2], 17)
        torch.testing.assert_close(found[:2], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_off_the_cpu_no_sum_hangs_on_the_order_of_its_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance, "_above_in_one_pass", None)
    assert Saliency()(torch.empty(2, 1, 64, device="meta"), TERNARY).step.shape == (2, 1, 1)


@pytest.mark.parametrize("grid", [TERNARY, INT2, INT3, INT4, Grid((-15, -9, 1, 12))], ids=lambda g: g.name)
def test_a_snapped_scale_times_any_level_is_exact_in_bf16_and_fp16(grid: Grid) -> None:
    scales = torch.logspace(-4, 3, 2000) * torch.linspace(1.0, 2.0, 2000)
    snapped = snap(scales, grid)
    assert torch.equal(snap(snapped, grid), snapped)
    for level in grid.levels:
        product = snapped * level
        assert torch.equal(product.bfloat16().float(), product) and torch.equal(product.half().float(), product)
    odd = max(abs(v) // (abs(v) & -abs(v)) for v in grid.levels if v)
    assert float(((snapped - scales) / scales).abs().max()) <= 2.0 ** ((odd - 1).bit_length() - 8) * (1 + 1e-6)


def test_a_best_level_that_is_negative_gives_way() -> None:
    """Codes against the weights' signs: only a level below zero would fit them, and a scale is positive."""
    w, against = torch.tensor([[-1.0, 2.0]]), torch.tensor([[1.0, 0.0]])
    assert best_level(w, against, torch.tensor([[0.5]])).item() == 0.5
    assert best_level(w, -against, torch.tensor([[0.5]])).item() == 1.0
