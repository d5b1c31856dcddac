"""Hearth's parts: bounded gains, a level that follows the soft value, a hard tail; and the composition itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hestia import recipes
from hestia.errors import ConfigError
from hestia.quant import INT2, STE, TERNARY, TWN, AbsMean, LeastSquares, Pull, Quantizer, QuantSpec, Saliency, Softmax
from hestia.recipes.base import GRIDS, scale_for
from hestia.schedules import KnobSchedule

Z = torch.linspace(-3, 3, 601, dtype=torch.float64)


def tau(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def test_the_gain_is_clipped_where_the_temperature_is_above_zero() -> None:
    for temperature in (0.3, 0.05, 0.01):
        plain = Softmax().gain(Z.clone(), TERNARY, tau(temperature))
        bounded = Softmax(floor=0.1, ceiling=2.0).gain(Z.clone(), TERNARY, tau(temperature))
        assert torch.equal(bounded, plain.clamp(0.1, 2.0))
        assert torch.equal(Softmax(floor=0.1).gain(Z.clone(), TERNARY, tau(temperature)), plain.clamp_min(0.1))
    values = [estimator.value(Z.clone(), TERNARY, tau(0.3)) for estimator in (Softmax(floor=0.1), Softmax())]
    assert torch.equal(*values)


def test_at_temperature_zero_the_tails_own_gain_is_used() -> None:
    assert Softmax(floor=0.5, ceiling=0.7).gain(Z.clone(), TERNARY, tau(0.0)).tolist() == [1.0] * len(Z)
    for tail in ("clipped_ste", "trust", "damped_fourier"):
        for grid in (TERNARY, INT2):
            alone = STE.make(tail).gain(Z.clone(), grid, tau(0.0))
            assert torch.equal(Softmax(floor=0.1, hard=tail).gain(Z.clone(), grid, tau(0.0)), alone)
            soft = Softmax().gain(Z.clone(), grid, tau(0.2))
            assert torch.equal(Softmax(hard=tail).gain(Z.clone(), grid, tau(0.2)), soft)


def test_bounds_out_of_order_and_a_soft_tail_are_refused() -> None:
    for options, message in (
        ({"floor": -0.1}, "0 <= floor <= ceiling, got floor=-0.1"),
        ({"floor": 2.0, "ceiling": 1.0}, "got floor=2.0, ceiling=1.0"),
        ({"hard": "softmax"}, "must come from a hard estimator, got 'softmax'"),
        ({"hard": "trsut"}, "did you mean 'trust'"),
    ):
        with pytest.raises(ConfigError, match=message):
            Softmax(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", [LeastSquares(soft=True), TWN(soft=True)])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.05, 0.0])
def test_the_soft_level_is_the_best_multiple_of_the_soft_value(rule: LeastSquares | TWN, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(4, 64, generator=generator, dtype=torch.float64)
    quantizer = Quantizer(QuantSpec(scale=rule, estimator=Softmax()))
    w_hat = quantizer.fake(w, tau(1.0), tau(temperature))
    error = ((w_hat - w) ** 2).sum(1)
    for stretch in (0.99, 1.01):
        assert bool((((stretch * w_hat - w) ** 2).sum(1) > error).all())
    if temperature == 0.0:
        torch.testing.assert_close(w_hat, quantizer.hard(w).double(), rtol=2.0**-8, atol=0.0)
        plain = Quantizer(QuantSpec(scale=type(rule)(), estimator=Softmax()))
        assert torch.equal(w_hat, plain.fake(w, tau(1.0), tau(0.0)))
        assert torch.equal(quantizer.codes(w).codes, plain.codes(w).codes)


def test_the_gradient_under_a_soft_level_is_the_derivative_with_the_level_held() -> None:
    w = torch.randn(2, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    quantizer = Quantizer(QuantSpec(scale=LeastSquares(soft=True), estimator=Softmax()))
    w_hat = quantizer.fake(w, tau(0.7), tau(0.3))
    upstream = torch.randn_like(w_hat)
    (ours,) = torch.autograd.grad(w_hat, w, upstream)
    v = w.detach()
    step = v.abs().mean(1, keepdim=True) + 1e-5
    levels = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)

    def soft(x: Tensor) -> Tensor:
        return (torch.softmax(-(((x / step)[..., None] - levels) ** 2) / 0.3, -1) * levels).sum(-1)

    level = (soft(v) * v).sum(1, keepdim=True) / (soft(v) ** 2).sum(1, keepdim=True)
    x = v.clone().requires_grad_()
    (theirs,) = torch.autograd.grad(0.3 * x + 0.7 * level * soft(x), x, upstream)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_a_hard_tail_squeezes_the_curve_and_stays_at_zero() -> None:
    whole = KnobSchedule(rho=0.2, temperature=0.3)
    tail = KnobSchedule(rho=0.2, temperature=0.3, hard_from=0.8)
    assert tail.base_temperature(0.2) == 0.3
    assert tail.base_temperature(0.5) == pytest.approx(whole.base_temperature(0.6))  # half way in both
    assert [tail.base_temperature(t) for t in (0.8, 0.9, 1.0)] == [0.0, 0.0, 0.0]
    assert 0.0 < tail.base_temperature(0.7999) < 1e-6
    for bad in (0.2, 0.1):
        with pytest.raises(ConfigError, match=f"hard_from={bad} must come after hold=0.2"):
            KnobSchedule(rho=0.2, hard_from=bad)
    with pytest.raises(ConfigError, match="hard_from is a share of the run"):
        KnobSchedule(hard_from=1.5)


def test_new_options_at_their_defaults_leave_old_plans_as_they_are() -> None:
    assert set(KnobSchedule().to_json()) == {"rho", "temperature", "hold", "decay", "end_temperature"}
    for schedule in (KnobSchedule(), KnobSchedule(hard_from=0.8), KnobSchedule(residual=0.5, residual_warmup=0.2)):
        assert KnobSchedule(**schedule.to_json()) == schedule
    assert "residual" not in KnobSchedule().at(0.5) and KnobSchedule(residual=1.0).at(0.1)["residual"] == 1.0


def test_options_choose_the_parts() -> None:
    options = {"scale": "twn", "soft": False, "floor": 0.2, "ceiling": 3.0, "tail": "trust", "hard_from": 0.9}
    spec = recipes.get("hearth", **options).spec_for(1.58, "row")
    assert spec == QuantSpec(scale=TWN(), estimator=Softmax(floor=0.2, ceiling=3.0, hard="trust"))
    assert recipes.get("hearth", scale="saliency", every=4).spec_for(1.58, "row").scale == Saliency(every=4)
    kept = recipes.get("hearth", scale="saliency", search=False).spec_for(1.58, "row").scale
    assert kept == Saliency(lowest=0.75, candidates=1)
    assert recipes.get("hearth").correction() is None
    assert recipes.get("hearth", pull=5.0, pull_start=0.7).correction() == Pull(strength=5.0, start=0.7)
    assert recipes.get("hearth", hard_from=0.85).schedule().base_temperature(0.85) == 0.0


@pytest.mark.parametrize("hard_from", [None, 1.0])
def test_a_tail_that_no_step_would_use_is_refused(hard_from: float | None) -> None:
    with pytest.raises(ConfigError, match=r"tail='trust' serves the steps after hard_from, .* such as --option hard_f"):
        recipes.get("hearth", tail="trust", hard_from=hard_from)
    assert recipes.get("hearth", tail="trust", hard_from=hard_from, temperature=0.0, rho=0.0), "hard from the start"
    assert recipes.get("hearth", tail="ste", hard_from=hard_from)


@pytest.mark.parametrize("bits", [1.0, 1.58, 2.0, 3.0, 4.0])
def test_saliency_rounds_about_as_well_as_the_default_at_every_width(bits: float) -> None:
    w = torch.randn(4, 4096, generator=torch.Generator().manual_seed(2))

    def error(**options: object) -> float:
        quantizer = Quantizer(recipes.get("hearth", **options).spec_for(bits, "row"))
        return float((quantizer.hard(w) - w).square().mean())

    for search in (True, False):
        assert error(scale="saliency", search=search) <= 1.02 * error()


def test_without_its_options_it_is_hestia_without_curvature() -> None:
    plain = recipes.get("hearth", scale="absmean", rho=0.2, temperature=0.3)
    assert plain.spec_for(1.58, "row") == recipes.get("hestia").spec_for(1.58, "row")
    assert plain.spec_for(1.58, "row").scale == AbsMean()
    assert plain.schedule() == recipes.get("hestia").schedule()


def test_one_candidate_is_weighted_least_squares_at_that_threshold() -> None:
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(3, 64, generator=generator, dtype=torch.float64)
    h = torch.rand(3, 64, generator=generator, dtype=torch.float64)
    w_hat = Quantizer(QuantSpec(scale=Saliency(lowest=0.75, candidates=1))).fake(w, tau(1.0), tau(0.0), h)
    for row, importance, found in zip(w, h, w_hat, strict=True):
        q = row.sign() * (row.abs() > 0.75 * (row.abs().mean() + 1e-5))
        level = (importance * q * row).sum() / (importance * q * q).sum()
        torch.testing.assert_close(found, level * q)


def test_the_default_is_what_the_stages_ran() -> None:
    """Changing one of these is changing the method: stages B, C and bits were made with them, as the page says."""
    schedule = recipes.get("hearth").schedule()
    assert (schedule.rho, schedule.temperature, schedule.end_temperature) == (0.05, 0.1, 0.0)
    assert schedule.hard_from is None and recipes.get("hearth").correction() is None
    assert recipes.get("hearth").spec_for(1.58, "row").scale == TWN(soft=True)


def test_four_levels_are_too_coarse_for_absmean() -> None:
    scales = {bits: scale_for(grid).name for bits, grid in GRIDS.items()}
    assert scales == {1.0: "absmean", 1.58: "absmean", 2.0: "gaussian", 3.0: "gaussian", 4.0: "gaussian"}
