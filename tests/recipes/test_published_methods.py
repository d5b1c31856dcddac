"""Each recipe against a naive transcription of its paper: value, gradient of the weight, gradient of learned scales."""

from __future__ import annotations

import math
from collections.abc import Callable

import naive_methods as naive
import pytest
import torch
from torch import Tensor

from hestia import recipes
from hestia.errors import ConfigError
from hestia.quant import INT2, TERNARY, Grid, Quantizer, ScaleRule
from hestia.quant.corrections import Pull
from hestia.quant.importance import Saliency

ROWS, COLUMNS = 6, 64
Method = Callable[[Tensor, Tensor, int], Tensor]


def weights(seed: int = 0, tails: bool = True) -> Tensor:
    """Rows of very different size, with a few outliers."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    w *= torch.logspace(-3, 1, ROWS, dtype=torch.float64)[:, None]
    if tails:
        w[:, ::17] *= 4
    return w


def spread(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PLAIN: dict[str, Method] = {
    "bitnet_ste": lambda w, held, n: naive.absmean_ste(w),
    "arenas": lambda w, held, n: naive.absmean_ste(w),
    "cage": lambda w, held, n: naive.absmean_ste(w),
    "tequila": lambda w, held, n: naive.absmean_ste(w),
    "twn": lambda w, held, n: naive.twn(w),
    "sherry": lambda w, held, n: naive.sherry(w),
    "quest": lambda w, held, n: naive.quest(w),
    "quasar": lambda w, held, n: naive.quasar(w, held),
    "paretoq": lambda w, held, n: naive.seq(w, held, n),
    "lsq": lambda w, held, n: naive.lsq(w, held, n, -1, 1),
    "stableqat": lambda w, held, n: naive.stableqat(w, held, n, -1, 1),
    "dsq": lambda w, held, n: naive.dsq(w, held, n, -1, 1),
    "ternaryllm": lambda w, held, n: naive.dlt(w, held),
}
TWO_BITS: dict[str, Method] = {
    "lsq": lambda w, held, n: naive.lsq(w, held, n, -2, 1),
    "stableqat": lambda w, held, n: naive.stableqat(w, held, n, -2, 1),
    "dsq": lambda w, held, n: naive.dsq(w, held, n, -2, 1),
}
CASES = [(name, 1.58, method) for name, method in PLAIN.items()] + [(n, 2.0, m) for n, m in TWO_BITS.items()]


def compare(name: str, bits: float, method: Method, group: int | str, w: Tensor) -> None:
    quantizer = Quantizer(recipes.get(name).spec_for(bits, group))  # type: ignore[arg-type]
    columns = COLUMNS if group == "row" else int(group)
    held = quantizer.start(w)
    if held is not None and isinstance(quantizer.spec.scale, Saliency):
        held = spread(w.numel(), 5).square().reshape(w.shape)
    elif held is not None:
        held = held * (1 + 0.1 * spread(held.numel(), 5))  # as training moves it
    upstream = spread(w.numel(), 2).reshape(w.shape)
    ours = w.clone().requires_grad_()
    alpha = None if held is None else held.clone().requires_grad_(quantizer.spec.learns)
    temperature = recipes.get(name).schedule().base_temperature(0.5)
    one, tau = (torch.tensor(x, dtype=torch.float64) for x in (1.0, temperature))
    w_hat = quantizer.fake(ours, one, tau, alpha)
    w_hat.backward(upstream)
    theirs = w.clone().requires_grad_()
    other = None if alpha is None else alpha.detach().clone().requires_grad_(quantizer.spec.learns)
    parts = theirs.reshape(-1, columns)
    pieces = [
        method(part, _of(other, index, columns, quantizer.spec.learns), w.numel()) for index, part in enumerate(parts)
    ]
    expected = torch.stack(pieces).reshape(w.shape)
    torch.testing.assert_close(w_hat, expected, rtol=1e-9, atol=1e-12)
    expected.backward(upstream)
    assert ours.grad is not None and theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    if quantizer.spec.learns:
        assert alpha is not None and other is not None and alpha.grad is not None and other.grad is not None
        torch.testing.assert_close(alpha.grad, other.grad, rtol=1e-9, atol=1e-12)
        assert bool((alpha.grad != 0).all())


def _of(held: Tensor | None, index: int, columns: int, learned: bool) -> Tensor:
    if held is None:
        return torch.zeros(())
    return held[index] if learned else held.reshape(-1, columns)[index]


@pytest.mark.parametrize("group", ["row", 16])
@pytest.mark.parametrize(("name", "bits", "method"), CASES, ids=[f"{n}-{b:g}" for n, b, _ in CASES])
def test_value_and_gradients_are_the_papers(name: str, bits: float, method: Method, group: int | str) -> None:
    for seed in range(3):
        compare(name, bits, method, group, weights(seed))
    compare(name, bits, method, group, weights(9, tails=False))


def test_every_recipe_has_a_second_opinion() -> None:
    """hestia's stand in tests/oracles; round_to_nearest trains nothing; hearth is composed of parts tested here."""
    assert {*PLAIN} | {"hestia", "round_to_nearest", "hearth"} >= {*recipes.names()}


# --- traps -----------------------------------------------------------------------------------------------------------


def fake(name: str, w: Tensor, held: Tensor | None = None) -> Tensor:
    quantizer = Quantizer(recipes.get(name).spec_for(1.58, "row"))
    one = torch.ones((), dtype=w.dtype)
    return quantizer.fake(w, one, torch.zeros_like(one), quantizer.start(w) if held is None else held)


def gain(name: str, z: Tensor, grid: Grid = TERNARY, tau: float = 0.0) -> Tensor:
    spec = recipes.get(name).spec_for(1.58 if grid == TERNARY else 2.0, "row")
    out = spec.estimator.gain(z.clone(), grid, torch.tensor(tau, dtype=z.dtype))
    assert out is not None
    return out


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("quasar", {"every": 0}, "'saliency' needs warmup >= 0 and every >= 1, got warmup=10, every=0"),
        ("quasar", {"warmup": -1}, "needs warmup >= 0 and every >= 1, got warmup=-1, every=1"),
        ("hearth", {"scale": "saliency", "every": 0}, "needs warmup >= 0 and every >= 1, got warmup=10, every=0"),
        ("twn", {"factor": -1.0}, "'twn': factor must be a positive number, got -1"),
        ("ternaryllm", {"factor": -0.75}, "'learned_level': factor must be a positive number, got -0.75"),
        ("quest", {"reach": -1.0}, "'trust': reach must be a positive number, got -1"),
        ("dsq", {"sharpness": 5.0, "end_sharpness": 5.0}, "< 1, got sharpness=5.0, end_sharpness=5.0"),
        ("dsq", {"sharpness": 0.1}, "0 < end_sharpness <= sharpness < 1, got sharpness=0.1, end_sharpness=0.2"),
        ("dsq", {"sharpness": 0.0, "end_sharpness": 0.0}, "0 < end_sharpness"),
        ("hestia", {"alpha": 20.0}, r"alpha must lie in \[-10, 10\] \(the paper uses 0.4\), got 20"),
    ],
)
def test_options_that_would_fail_late_or_turn_the_grid_around_are_refused(
    name: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        recipes.get(name, **options)


def test_twn_is_near_the_gaussian_optimum() -> None:
    """Relative squared errors of methods.md: absmean 0.264, TWN 0.1904, optimum 0.1903."""
    w = torch.randn(1, 400_000, generator=torch.Generator().manual_seed(0))
    errors = {
        n: float((fake(n, w) - w).square().mean() / w.square().mean()) for n in ("bitnet_ste", "twn", "quest", "quasar")
    }
    assert errors["bitnet_ste"] == pytest.approx(0.264, abs=2e-3)
    assert errors["twn"] == pytest.approx(0.1904, abs=1e-3)
    assert errors["quest"] == pytest.approx(0.1903, abs=1e-3)
    assert errors["quasar"] == pytest.approx(0.1903, abs=1e-3)


def test_seq_takes_the_end_of_the_clip_for_the_gradient_of_its_range() -> None:
    """The outer level is 2/3 alpha; the published gradient of a clipped weight is nevertheless 1, not 2/3."""
    w = torch.tensor([[0.1, 1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    quantizer = Quantizer(recipes.get("paretoq").spec_for(1.58, "row"))
    alpha = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    one = torch.ones((), dtype=torch.float64)
    w_hat = quantizer.fake(w, one, one, alpha)
    assert w_hat.tolist()[0] == pytest.approx([0.0, 2 / 3, -2 / 3])
    w_hat[0, 1].backward()
    assert alpha.grad is not None and float(alpha.grad) == pytest.approx(1 / math.sqrt(3))
    assert w.grad is not None and w.grad.tolist() == [[0.0, 0.0, 0.0]], "beyond the clip nothing moves"


def test_seq_starts_at_the_largest_weight_and_lsq_at_twice_the_mean() -> None:
    w = torch.tensor([[0.1, -0.4, 0.1, 0.2]])
    assert Quantizer(recipes.get("paretoq").spec_for(1.58, "row")).start(w) == pytest.approx(0.4)
    for name in ("lsq", "stableqat", "dsq"):
        assert Quantizer(recipes.get(name).spec_for(1.58, "row")).start(w) == pytest.approx(0.4 + 1e-5)
    assert Quantizer(recipes.get("ternaryllm").spec_for(1.58, "row")).start(w) == pytest.approx(0.3)


@pytest.mark.parametrize("name", ["paretoq", "lsq", "stableqat", "dsq", "ternaryllm"])
def test_a_learned_scale_that_fell_below_zero_is_the_smallest_there_is(name: str) -> None:
    w = weights()[:1]
    fallen, smallest = (fake(name, w, torch.tensor([a], dtype=w.dtype)) for a in (-3.0, 1e-5))
    assert torch.equal(fallen, smallest)
    assert 0.0 < float(fallen.abs().max()) < 2e-5


@pytest.mark.parametrize("name", ["lsq", "paretoq"])
def test_the_gradient_of_a_learned_scale_eases_in_with_the_pressure(name: str) -> None:
    w = weights()[:2]
    quantizer = Quantizer(recipes.get(name).spec_for(1.58, "row"))
    gradients = []
    for pressure in (0.5, 1.0):
        start = quantizer.start(w)
        assert start is not None
        alpha = start.clone().requires_grad_()
        quantizer.fake(w, w.new_tensor(pressure), w.new_tensor(0.0), alpha).sum().backward()
        assert alpha.grad is not None
        gradients.append(alpha.grad)
    torch.testing.assert_close(gradients[0], 0.5 * gradients[1])


def test_stableqat_is_bounded_by_one_and_uses_the_unclamped_code() -> None:
    z = torch.linspace(-2, 1, 30_001, dtype=torch.float64)
    on_two_bits = gain("stableqat", z, INT2)
    assert float(on_two_bits.max()) <= 1.0 + 1e-12, "with the clamped code it would reach 29 at |x| = 2"
    assert float(gain("stableqat", torch.tensor([0.0, 1.0, -1.0])).max()) == pytest.approx(0.0347, abs=1e-3)
    assert gain("stableqat", torch.tensor([0.5, -0.5])).tolist() == pytest.approx([1.0, 1.0])
    assert gain("stableqat", torch.tensor([1.01, -1.01])).tolist() == [0.0, 0.0]
    lsq = recipes.get("stableqat", amplitude=0.0).spec_for(1.58, "row").estimator
    assert torch.equal(lsq.gain(z.clone(), TERNARY, z[0]), gain("lsq", z))


def test_dsq_integrates_to_one_over_a_step() -> None:
    z = torch.linspace(0, 1, 100_001, dtype=torch.float64)[:-1] + 5e-6
    for a in (0.05, 0.2, 0.9):
        assert float(gain("dsq", z, tau=a).mean()) == pytest.approx(1.0, abs=1e-6)
    assert float(gain("dsq", torch.tensor([0.5]), tau=0.2)) == pytest.approx(math.log(9) / 1.6, rel=1e-6)


def test_quest_trusts_all_but_what_is_clipped_by_more_than_half_a_step() -> None:
    z = torch.tensor([0.0, 0.49, 0.51, 1.0, 1.5, 1.51, -1.49, -3.0])
    assert gain("quest", z).tolist() == [1, 1, 1, 1, 1, 0, 1, 0]


def test_quest_has_a_level_at_zero() -> None:
    """Public copies carry the centred grid of even level counts, which has none."""
    w = weights(tails=False)
    w_hat = fake("quest", w)
    assert float((w_hat == 0).double().mean()) == pytest.approx(0.46, abs=0.08)
    assert w_hat.abs().amax(dim=1) / w.square().mean(dim=1).sqrt() == pytest.approx([1.224] * ROWS, rel=1e-2)


def test_sherry_has_exactly_one_zero_in_four_even_among_equals() -> None:
    quantizer = Quantizer(recipes.get("sherry").spec_for(1.58, "row"))
    w = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0, -1.0, 1.0, -1.0, 3.0, -0.1, 0.2, -0.1]])
    codes = quantizer.codes(w).codes
    assert codes.tolist() == [[0, 1, 1, 1, 0, -1, 1, -1, 1, 0, 1, -1]]
    dense = quantizer.codes(torch.randn(64, 256)).codes.reshape(-1, 4)
    assert bool(((dense == 0).sum(-1) == 1).all())


def test_what_a_recipe_is_given_reaches_its_parts() -> None:
    """Each option at a value that is no default."""
    for name in ("arenas", "sherry"):
        schedule = recipes.get(name, residual=0.25, residual_warmup=0.3).schedule()
        assert (schedule.residual, schedule.residual_warmup) == (0.25, 0.3)
    schedule = recipes.get("dsq", sharpness=0.4, end_sharpness=0.3).schedule()
    assert (schedule.temperature, schedule.end_temperature) == (0.4, 0.3)
    assert recipes.get("ternaryllm", factor=0.5).spec_for(1.58, "row").scale == ScaleRule.make(
        "learned_level", factor=0.5
    )
    traces = {"a": 1.0, "b": 50.0, "c": 9.0}
    narrow, wide = (recipes.get("hestia", kappa=k).temperature_factors(traces) for k in (0.5, 4.0))
    assert narrow != wide


def test_quest_clips_a_gaussian_where_its_grid_fits_it_best() -> None:
    """c* of QuEST: 1.224 root mean squares on -1, 0, 1 and sqrt(2 / pi) on -1, 1."""
    ternary, binary = (recipes.get("quest").spec_for(bits, "row").scale.to_json()["clip"] for bits in (1.58, 1.0))
    assert ternary == 1.224
    assert binary == pytest.approx(math.sqrt(2 / math.pi), abs=5e-4)


@pytest.mark.parametrize("bad", [{"strength": -1.0}, {"strength": math.nan}, {"start": 1.0}, {"start": -0.1}])
def test_a_pull_that_pushes_or_never_begins_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="a pull needs strength >= 0 and 0 <= start < 1"):
        Pull(**bad)


@pytest.mark.parametrize("name", ["sherry", "arenas"])
def test_the_residual_rises_falls_and_is_exactly_gone_at_the_end(name: str) -> None:
    schedule = recipes.get(name).schedule()
    assert schedule.residual_share(0.0) == 0.0 and schedule.residual_share(1.0) == 0.0
    assert schedule.residual_share(0.05) == pytest.approx(0.5) and schedule.residual_share(0.1) == 1.0
    assert schedule.residual_share(0.55) == pytest.approx(0.5)


def test_quasar_follows_what_matters() -> None:
    """Importance on the small weights lowers the threshold, on the large ones raises the level."""
    w = torch.linspace(-1, 1, 65)[None].double()
    small, large = (w.abs() < 0.5).double() + 1e-3, (w.abs() > 0.9).double() + 1e-3
    on_small, on_large = fake("quasar", w, small), fake("quasar", w, large)
    assert float((on_small != 0).double().mean()) > float((on_large != 0).double().mean())
    assert float(on_large.max()) > float(on_small.max())
    nothing = torch.zeros_like(w)
    assert torch.equal(fake("quasar", w, nothing), fake("quasar", w, torch.ones_like(w)))
    assert torch.allclose(fake("quasar", w, 1e-20 * small), on_small, rtol=1e-9), "only ratios count"


def test_cage_pulls_late_and_by_the_learning_rate() -> None:
    pull = recipes.get("cage").correction()
    assert pull is not None and not pull.active(0.8) and pull.active(0.81)
    w, target = torch.tensor([1.0, -2.0]), torch.tensor([0.0, -1.0])
    for t, strength in ((0.9, 5.0), (1.0, 10.0)):
        moved = w.clone()
        pull(moved, target, {}, 1e-2, t)
        assert torch.allclose(moved, w - 1e-2 * strength * (w - target))
    moved = w.clone()
    pull(moved, target, {}, 1.0, 1.0)
    assert torch.equal(moved, target), "a pull of more than the gap stops at the grid"


def test_hestia_keeps_the_mean_temperature_asked_for() -> None:
    traces = {f"t{k}": 7.0**k for k in range(9)} | {"outlier": 1e30}
    for alpha in (0.4, -0.4):
        plain, centred, matched = (
            list(recipes.get("hestia", alpha=alpha, **o).temperature_factors(traces).values())
            for o in ({}, {"centred": True}, {"matched": True})
        )
        assert sum(matched) / len(matched) == pytest.approx(1.0)
        assert sum(map(math.log, centred)) == pytest.approx(0.0, abs=1e-12)
        assert abs(sum(plain) / len(plain) - 1.0) > 0.1
        assert matched == pytest.approx([f * len(plain) / sum(plain) for f in plain])
