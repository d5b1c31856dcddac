"""What must hold for every weight, temperature, grid, group and scale rule."""

from typing import Any

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hestia.quant import (
    BINARY,
    INT2,
    TERNARY,
    ClippedSTE,
    Estimator,
    Grid,
    Quantizer,
    QuantSpec,
    ScaleRule,
    Softmax,
    fake_quantize,
    snap,
)
from hestia.quant.grouping import to_groups
from hestia.quant.scales import NORMAL_STEPS, best_level

ROWS, COLUMNS, GROUP = 4, 16, 4
GRIDS = [TERNARY, BINARY, INT2, Grid.of([-1.5, -0.5, 0.5, 1.5]), Grid((-8, -1, 0, 3)), Grid(tuple(range(-8, 8)))]
SYMMETRIC = [TERNARY, BINARY, Grid.of([-1.5, -0.5, 0.5, 1.5]), Grid((-8, -1, 0, 1, 8))]

grids = st.sampled_from(GRIDS)
groups = st.sampled_from(["tensor", "row", GROUP])
known = {  # rules that know some grids only
    "gaussian": NORMAL_STEPS,
    "saliency": (BINARY.values, TERNARY.values),
    "stretched_elastic": (TERNARY.values,),
}
REFITTING = ("least_squares", "twn", "gaussian")
rules = st.sampled_from(ScaleRule.names()).map(ScaleRule.make)
estimators = st.sampled_from([Softmax(), Estimator.make("ste"), ClippedSTE(margin=0.5)])
temperatures = st.one_of(st.just(0.0), st.floats(-6, 1).map(lambda exponent: 10.0**exponent))
pressures = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))
specs = rules.flatmap(
    lambda rule: st.builds(
        QuantSpec,
        grid=grids.filter(lambda grid: suits(rule, grid)),
        group_size=groups,
        scale=st.just(rule),
        estimator=estimators,
    )
)
few = settings(max_examples=50, deadline=None)


def suits(rule: ScaleRule, grid: Grid) -> bool:
    """Whether a rule does this grid, said apart from the code under test."""
    return grid.values in known.get(rule.name, [grid.values])


@st.composite
def weights(
    draw: Any, magnitudes: tuple[float, ...] = (0.0, 1e-45, 1e-39, 1e-20, 1e-5, 0.02, 1.0, 1e10, 1e30)
) -> Tensor:
    """A matrix whose entries mix a few of these magnitudes."""
    chosen = draw(st.lists(st.sampled_from(magnitudes), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    which = torch.randint(len(chosen), (ROWS, COLUMNS), generator=generator)
    return torch.tensor(chosen)[which] * (torch.rand(ROWS, COLUMNS, generator=generator) * 2 - 1)


ordinary = weights(magnitudes=(0.02, 0.5, 1.0))


def knob(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


@few
@given(
    spec=specs,
    w=weights(),
    tau=temperatures,
    pressure=pressures,
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_everything_is_finite(spec: QuantSpec, w: Tensor, tau: float, pressure: float, dtype: torch.dtype) -> None:
    w = w.to(dtype).requires_grad_()
    w_hat = Quantizer(spec).fake(w, knob(pressure), knob(tau))
    w_hat.backward(torch.linspace(-1, 1, w.numel(), dtype=dtype).reshape(w.shape))
    assert w_hat.isfinite().all()
    assert w.grad is not None and w.grad.isfinite().all()
    frozen = Quantizer(spec).codes(w)
    assert frozen.scales.isfinite().all()
    assert (frozen.scales > 0).all()


@few
@given(spec=specs, w=weights(), tau=temperatures)
def test_no_pressure_is_the_weight_itself_and_its_gradient(spec: QuantSpec, w: Tensor, tau: float) -> None:
    g = torch.linspace(-1, 1, w.numel()).reshape(w.shape)
    leaf = w.clone().requires_grad_()
    w_hat = Quantizer(spec).fake(leaf, knob(0.0), knob(tau))
    (grad,) = torch.autograd.grad(w_hat, leaf, g)
    assert torch.equal(w_hat, w)
    assert torch.equal(grad, g)


@few
@given(spec=specs, w=weights())
def test_codes_lie_on_the_grid_and_are_the_one_truth(spec: QuantSpec, w: Tensor) -> None:
    frozen = Quantizer(spec).codes(w)
    assert set(frozen.codes.unique().tolist()) <= set(spec.grid.levels)
    assert torch.equal(frozen.dense(), Quantizer(spec).hard(w))
    assert torch.equal(snap(frozen.scales), frozen.scales)
    assert torch.equal(frozen.scales.half().float(), frozen.scales)
    assert torch.equal(frozen.scales.bfloat16().float(), frozen.scales)


@few
@given(spec=specs, w=weights(magnitudes=(1e3, 1e4)), tau=temperatures, power=st.integers(0, 12))
def test_doubling_the_weights_doubles_the_result(spec: QuantSpec, w: Tensor, tau: float, power: int) -> None:
    """Exactly, where the scale is so large that its 1e-5 vanishes in fp32."""
    w = w.sign() * (w.abs() + 4e3)
    quantizer, factor = Quantizer(spec), 2.0**power
    assert torch.equal(
        quantizer.fake(w * factor, knob(1.0), knob(tau)), quantizer.fake(w, knob(1.0), knob(tau)) * factor
    )


@few
@given(grid=st.sampled_from(SYMMETRIC), group=groups, rule=rules, estimator=estimators, w=ordinary, tau=temperatures)
def test_symmetric_grids_treat_both_signs_alike(
    grid: Grid, group: Any, rule: ScaleRule, estimator: Estimator, w: Tensor, tau: float
) -> None:
    assume(suits(rule, grid))
    quantizer = Quantizer(QuantSpec(grid=grid, group_size=group, scale=rule, estimator=estimator))
    assert torch.equal(quantizer.hard(-w), -quantizer.hard(w))
    soft, mirrored = (quantizer.fake(side, knob(0.6), knob(tau)) for side in (w, -w))
    torch.testing.assert_close(mirrored, -soft, rtol=1e-6, atol=1e-6)


@few
@given(grid=st.sampled_from(SYMMETRIC), group=groups, name=st.sampled_from(REFITTING), w=ordinary, tau=temperatures)
def test_a_level_fitted_to_soft_values_needs_none_of_hard_codes(
    grid: Grid, group: Any, name: str, w: Tensor, tau: float
) -> None:
    """The same bits as with the hard codes' level to fall back on: a soft value of a symmetric grid has its sign."""
    rule = ScaleRule.make(name, soft=True)
    assume(suits(rule, grid))
    spec = QuantSpec(grid=grid, group_size=group, scale=rule, estimator=Softmax())
    grouped = to_groups(w, group)
    step, hard = rule(grouped, grid)
    q = Softmax().value(grouped / step, grid, knob(tau))
    assert torch.equal(
        Quantizer(spec).fake(w, knob(1.0), knob(tau)), (q * best_level(grouped, q, hard)).reshape(w.shape)
    )


@few
@given(grid=grids, tau=temperatures)
def test_relaxed_rounding_never_falls_and_stays_within_the_grid(grid: Grid, tau: float) -> None:
    z = torch.linspace(-12, 12, 3001, dtype=torch.float64)
    q = Softmax().value(z.clone(), grid, torch.tensor(tau, dtype=torch.float64))
    assert (q.diff() >= -1e-12).all()
    assert q.min() >= grid.values[0] - 1e-12
    assert q.max() <= grid.values[-1] + 1e-12
    assert (Softmax().gain(z.clone(), grid, torch.tensor(tau, dtype=torch.float64)) >= 0).all()


@few
@given(
    spec=specs.filter(lambda spec: spec.group_size != "tensor"),
    w=ordinary,
    tau=temperatures,
    changed=st.integers(0, ROWS * COLUMNS // GROUP - 1),
    factor=st.floats(-4, 4),
)
def test_groups_do_not_see_each_other(spec: QuantSpec, w: Tensor, tau: float, changed: int, factor: float) -> None:
    size = COLUMNS if spec.group_size == "row" else GROUP
    changed %= w.numel() // size
    other = w.clone().reshape(-1, size)
    other[changed] *= factor
    before = Quantizer(spec).fake(w, knob(1.0), knob(tau)).reshape(-1, size)
    after = Quantizer(spec).fake(other.reshape(w.shape), knob(1.0), knob(tau)).reshape(-1, size)
    kept = torch.arange(len(other)) != changed
    assert torch.equal(before[kept], after[kept])


@few
@given(w=ordinary, seed=st.integers(0, 1000), group=groups)
def test_order_within_a_group_does_not_matter(w: Tensor, seed: int, group: Any) -> None:
    size = {"tensor": w.numel(), "row": COLUMNS}.get(group, GROUP)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    options: dict[str, Any] = {"group_size": group, "temperature": 0.3}
    shuffled = fake_quantize(w.reshape(-1, size)[:, order].reshape(w.shape), **options)
    expected = fake_quantize(w, **options).reshape(-1, size)[:, order].reshape(w.shape)
    torch.testing.assert_close(shuffled, expected)


@few
@given(w=ordinary, grid=grids, tau=st.floats(-6, -4).map(lambda exponent: 10.0**exponent))
def test_cooling_ends_at_the_hard_weight(w: Tensor, grid: Grid, tau: float) -> None:
    step = w.abs().mean() + 1e-5
    midpoints = torch.tensor([(a + b) / 2 for a, b in zip(grid.values, grid.values[1:], strict=False)])
    assume((w.reshape(-1, 1) / step - midpoints).abs().min() > 25 * tau)
    options: dict[str, Any] = {"levels": grid.values, "group_size": "tensor"}
    torch.testing.assert_close(
        fake_quantize(w, **options, temperature=tau), fake_quantize(w, **options, temperature=0.0)
    )


@few
@given(spec=specs)
def test_specs_survive_json(spec: QuantSpec) -> None:
    assert QuantSpec.from_json(spec.to_json()) == spec


@few
@given(st.lists(st.integers(-128, 127), min_size=2, max_size=9, unique=True), st.integers(0, 7))
def test_any_list_of_levels_on_a_power_of_two_step_is_a_grid(levels: list[int], exponent: int) -> None:
    values = sorted(level * 2.0**-exponent for level in levels)
    grid = Grid.of(values)
    assert list(grid.values) == values
    assert Grid.of(grid.values) == grid
