from collections.abc import Callable
from typing import Any

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
    Estimator,
    Grid,
    LeastSquares,
    QuantizedTensor,
    Quantizer,
    QuantSpec,
    ScaleRule,
    Softmax,
    fake_quantize,
)
from hestia.quant.scales import NORMAL_STEPS

KNOWN = {
    "gaussian": NORMAL_STEPS,
    "saliency": (BINARY.values, TERNARY.values),
    "stretched_elastic": (TERNARY.values,),
}
LEARNED = ("learned_level", "learned_step", "stretched_elastic")
ESTIMATORS = [STE(), ClippedSTE(), Softmax()]
by_estimator = pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: e.name)


def weight(rows: int = 6, columns: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.04


def knob(value: float) -> Tensor:
    return torch.tensor(value)


# --- one truth ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", ["tensor", "row", 8])
@pytest.mark.parametrize("scale", ScaleRule.names())
@pytest.mark.parametrize("levels", [(-1, 1), (-1, 0, 1), (-2, -1, 0, 1), (-1.5, -0.5, 0.5, 1.5)])
def test_codes_times_scales_is_the_hard_weight(levels: tuple[float, ...], scale: str, group_size: Any) -> None:
    if levels not in KNOWN.get(scale, [levels]):
        pytest.skip("this rule knows some grids only, and says so (test_scales)")
    quantizer = Quantizer(QuantSpec(grid=Grid.of(levels), group_size=group_size, scale=ScaleRule.make(scale)))
    w = weight()
    frozen = quantizer.codes(w)
    assert frozen.codes.dtype == torch.int8
    assert set(frozen.codes.unique().tolist()) <= set(quantizer.spec.grid.levels)
    assert torch.equal(frozen.dense(), quantizer.hard(w))
    every_scale = frozen.block_scales(8).repeat_interleave(8, dim=1)
    assert torch.equal(frozen.codes * every_scale, frozen.dense())
    if set(quantizer.spec.grid.levels) <= {-2, -1, 0, 1}:  # the frozen model returns to its parent's dtype unrounded
        assert torch.equal(frozen.dense(torch.bfloat16).float(), frozen.dense())
        assert torch.equal(frozen.dense(torch.float16).float(), frozen.dense())


@by_estimator
def test_training_ends_at_the_codes_that_are_exported(estimator: Estimator) -> None:
    quantizer = Quantizer(QuantSpec(estimator=estimator, group_size=8))
    w = weight()
    soft = quantizer.fake(w, knob(1.0), knob(0.0)).reshape(6, 4, 8)
    step = quantizer.scales(w.reshape(6, 4, 8)).step
    assert torch.equal(soft, quantizer.codes(w).codes.reshape(6, 4, 8) * step)


def test_block_scales_repeat_and_never_straddle() -> None:
    frozen = Quantizer(QuantSpec(group_size=16)).codes(weight())
    assert frozen.block_scales(8).shape == (6, 4)
    assert torch.equal(frozen.block_scales(8)[:, ::2], frozen.block_scales(16))
    with pytest.raises(ValueError, match="straddle"):
        frozen.block_scales(32)
    whole = Quantizer(QuantSpec(group_size="tensor")).codes(weight())
    assert whole.scales.shape == (1, 1)
    assert whole.block_scales(32).unique().tolist() == whole.scales.reshape(-1).tolist()
    assert isinstance(whole, QuantizedTensor)
    assert whole.shape == (6, 32)


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pressure", [0.0, 0.25, 1.0])
def test_straight_through_passes_the_gradient_as_it_is(pressure: float) -> None:
    w, g = weight().requires_grad_(), weight(seed=1)
    (grad,) = torch.autograd.grad(Quantizer(QuantSpec()).fake(w, knob(pressure), knob(0.0)), w, g)
    assert torch.equal(grad, g)


def test_clipped_straight_through_stops_the_quantized_part_outside_the_grid() -> None:
    spec = QuantSpec(grid=INT2, estimator=ClippedSTE(), group_size="row")
    w, g = weight().requires_grad_(), weight(seed=1)
    z = w.detach() / (w.detach().abs().mean(1, keepdim=True) + 1e-5)
    mask = ((z >= -2) & (z <= 1)).float()
    assert 0 < mask.mean() < 1
    (grad,) = torch.autograd.grad(Quantizer(spec).fake(w, knob(0.75), knob(0.0)), w, g)
    torch.testing.assert_close(grad, g * (0.25 + 0.75 * mask))


def test_knobs_get_no_gradient() -> None:
    w, tau = weight().requires_grad_(), torch.tensor(0.3, requires_grad=True)
    Quantizer(QuantSpec(estimator=Softmax())).fake(w, knob(1.0), tau).sum().backward()
    assert w.grad is not None
    assert tau.grad is None


@by_estimator
def test_only_the_weight_itself_is_saved_for_backward(estimator: Estimator) -> None:
    w = weight(64, 64).requires_grad_()
    saved: list[Tensor] = []

    def remember(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        Quantizer(QuantSpec(estimator=estimator, group_size=32)).fake(w, knob(1.0), knob(0.3))
    big = [tensor for tensor in saved if tensor.numel() >= w.numel()]
    assert len(big) == 1
    assert big[0].data_ptr() == w.data_ptr()  # the parameter, not a copy
    assert sum(tensor.numel() for tensor in saved) < 1.1 * w.numel()


@by_estimator
def test_neither_pass_writes_to_its_inputs(estimator: Estimator) -> None:
    w, g = weight().requires_grad_(), weight(seed=1)
    before_w, before_g = w.detach().clone(), g.clone()
    quantizer = Quantizer(QuantSpec(estimator=estimator))
    w_hat = quantizer.fake(w, knob(0.5), knob(0.3))
    first = torch.autograd.grad(w_hat, w, g, retain_graph=True)[0].clone()
    second = torch.autograd.grad(w_hat, w, g)[0]
    assert torch.equal(first, second)
    assert torch.equal(w.detach(), before_w)
    assert torch.equal(g, before_g)


def test_gain_is_the_surrogates_own() -> None:
    w = weight()
    spec = QuantSpec(estimator=Softmax(), group_size=8)
    leaf = w.clone().requires_grad_()
    Quantizer(spec).fake(leaf, knob(1.0), knob(0.3)).sum().backward()
    gain = Quantizer(spec).gain(w, knob(0.3))
    assert gain is not None and leaf.grad is not None
    torch.testing.assert_close(gain.reshape(6, 32), leaf.grad)
    assert Quantizer(QuantSpec()).gain(w, knob(0.3)) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_kept_and_computed_in_at_least_fp32(dtype: torch.dtype) -> None:
    w = weight().to(dtype).requires_grad_()
    quantizer = Quantizer(QuantSpec(estimator=Softmax()))
    w_hat = quantizer.fake(w, knob(1.0), knob(0.3))
    w_hat.sum().backward()
    assert w_hat.dtype == dtype and w.grad is not None and w.grad.dtype == dtype
    expected = quantizer.fake(w.detach().double(), knob(1.0), knob(0.3))
    torch.testing.assert_close(w_hat.detach().double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_what_trains_as_one_is_frozen_as_one() -> None:
    """In fp32 the first weight would lie on the tie, which rounds to 0."""
    w = torch.tensor([[0.5 + 1e-12, 1.5 - 1e-12, 1.0, 1.0]], dtype=torch.float64)
    quantizer = Quantizer(QuantSpec(scale=ScaleRule.make("absmean", eps=1e-300), estimator=Softmax()))
    one = torch.ones((), dtype=torch.float64)
    assert quantizer.fake(w, one, 0.0 * one).tolist() == [[1.0] * 4]
    frozen = quantizer.codes(w)
    assert frozen.codes.tolist() == [[1] * 4] and frozen.scales.dtype == torch.float32
    assert quantizer.hard(w).dtype == torch.float32 and torch.equal(quantizer.hard(w), frozen.dense())
    gain = quantizer.gain(w, 0.3 * one)
    assert gain is not None and gain.dtype == torch.float64


# --- torch.compile --------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def counting(graphs: list[int]) -> Callable[..., Any]:
    from torch._dynamo.backends.debugging import aot_eager

    def backend(module: Any, inputs: Any) -> Any:
        graphs.append(1)
        return aot_eager(module, inputs)

    return backend


SPECS = [
    *(QuantSpec(estimator=estimator) for estimator in ESTIMATORS),
    QuantSpec(estimator=Softmax(), grid=Grid.of([-1.5, -0.5, 0.5, 1.5]), group_size=8, scale=LeastSquares()),
]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.estimator.name}-{s.grid.name}")
def test_one_graph_serves_all_knobs(spec: QuantSpec) -> None:
    graphs: list[int] = []
    spec = QuantSpec.from_json(spec.to_json())  # a grid that nothing has looked at yet
    fake = Quantizer(spec).fake
    compiled = torch.compile(fake, fullgraph=True, backend=counting(graphs))
    pressure, tau = knob(0.0), knob(0.3)
    for step in range(12):
        pressure.fill_(min(1.0, step / 5))
        tau.fill_(0.3 * (1 - step / 11))
        w = weight(seed=step).requires_grad_()
        ours = compiled(w, pressure, tau)
        (our_grad,) = torch.autograd.grad(ours.sum(), w)
        expected = fake(w, pressure, tau)
        (grad,) = torch.autograd.grad(expected.sum(), w)
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(our_grad, grad, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1


# --- the function ---------------------------------------------------------------------------------------------------


@by_estimator
@pytest.mark.parametrize("scale", [name for name in ScaleRule.names() if name not in LEARNED])
def test_fake_quantize_is_the_same_code(scale: str, estimator: Estimator) -> None:
    w = weight()
    grid = INT2 if INT2.values in KNOWN.get(scale, [INT2.values]) else TERNARY
    spec = QuantSpec(grid=grid, group_size=8, scale=ScaleRule.make(scale), estimator=estimator)
    by_name = fake_quantize(
        w, levels=grid.levels, group_size=8, scale=scale, estimator=estimator.name, temperature=0.3, pressure=0.7
    )
    assert torch.equal(by_name, Quantizer(spec).fake(w, knob(0.7), knob(0.3)))


@pytest.mark.parametrize("scale", [*LEARNED, ScaleRule.make("learned_step")])
def test_a_scale_that_nothing_would_keep_is_refused(scale: str | ScaleRule) -> None:
    with pytest.raises(ConfigError, match=r"keeps nothing between calls; scale='\w+' learns. Use .*'absmean'"):
        fake_quantize(weight(), scale=scale)


def test_the_names_in_the_docstring_are_those_there_are() -> None:
    text = fake_quantize.__doc__ or ""
    for name in {*ScaleRule.names(), *Estimator.names()} - {*LEARNED}:
        assert f'"{name}"' in text, name


def test_a_vector_is_one_row() -> None:
    w = weight(1)
    assert torch.equal(fake_quantize(w[0], group_size=8), fake_quantize(w, group_size=8)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "abs_mean"}, "unknown scale rule 'abs_mean': did you mean 'absmean'"),
        ({"estimator": "soft_max"}, "unknown estimator 'soft_max': did you mean 'softmax'"),
        ({"group_size": 5}, "does not divide in_features=32"),
        ({"group_size": "rows"}, "'row', 'tensor' or a positive integer"),
        ({"levels": [0.1, 0.7]}, "no common power-of-two step"),
        ({"w": torch.zeros(3, 6, 32)}, r"wants one matrix .*, got \(3, 6, 32\): call it for each matrix"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fake_quantize(**{"w": weight(), **options})


def test_at_temperature_zero_the_softmax_s_gradient_is_level_over_step() -> None:
    for scale in ("absmean", "twn"):
        step, level = Quantizer(QuantSpec(scale=ScaleRule.make(scale))).scales(weight().unsqueeze(1))
        for estimator, expected in (("softmax", level / step), ("ste", torch.ones_like(step))):
            w = weight().requires_grad_()
            fake_quantize(w, scale=scale, estimator=estimator, temperature=0.0).sum().backward()
            assert w.grad is not None
            torch.testing.assert_close(w.grad, expected.squeeze(1).expand_as(w))
        assert torch.equal(level, step) == (scale == "absmean")


def test_specs_travel_as_json() -> None:
    for spec in (*SPECS, QuantSpec(grid=TERNARY, group_size="tensor", scale=ScaleRule.make("twn", factor=0.7))):
        assert QuantSpec.from_json(spec.to_json()) == spec
