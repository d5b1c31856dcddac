"""Hessian products and the estimators made of them, against the exact Hessian of a tiny Llama."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exact_curvature import (
    assert_mean_is,
    gauss_newton_blocks,
    hessian_blocks,
    linears,
    logits_of,
    tiny_llama,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hestia.curvature import CurvatureEstimator, Sensitivity, calibrate
from hestia.curvature.estimators import Candidates, Eigen, Hutchinson, HutchPlusPlus, Problem, XTrace
from hestia.curvature.estimators.hvp import Curvature
from hestia.errors import CalibrationError, ConfigError
from hestia.quant import Quantizer, QuantSpec

torch.set_num_threads(1)

IDS = torch.randint(0, 12, (3, 7), generator=torch.Generator().manual_seed(1))


def problem_of(model: nn.Module, weights: dict[str, nn.Parameter] | None = None) -> Problem:
    weights = weights or linears(model)
    return Problem(model=model, forward=logits_of(model), weights=weights, candidates=Candidates(weights, {}))


def some(model: nn.Module, *endings: str) -> dict[str, nn.Parameter]:
    """The linear weights whose path ends in one of these."""
    return {path: weight for path, weight in linears(model).items() if path.endswith(endings)}


@pytest.fixture(scope="module")
def exact() -> tuple[Problem, dict[str, Tensor]]:
    """A random model and exact Hessian blocks for its first sequence; all traces but the head's are negative."""
    model = tiny_llama()
    weights = some(model, "0.self_attn.q_proj", "0.self_attn.v_proj", "self_attn.o_proj", "up_proj", "lm_head")
    problem = problem_of(model, weights)
    return problem, hessian_blocks(problem.forward, problem.weights, IDS[0])


def gradients(problem: Problem, ids: Tensor) -> dict[str, Tensor]:
    """By ordinary backward passes and the library's own loss."""
    logits = problem.forward(ids[None])[0, :-1]
    loss = nn.functional.nll_loss(torch.log_softmax(logits, -1), ids[1:])
    found = torch.autograd.grad(loss, list(problem.weights.values()))
    return dict(zip(problem.weights, found, strict=True))


@pytest.mark.parametrize("tied", [False, True])
def test_products_equal_differences_of_first_gradients(tied: bool) -> None:
    """No double backward in the second opinion: (g(w + h v) - g(w - h v)) / 2h, default attention kernel.

    The model's norms compute in fp32 whatever its weights are: the step is the best that this allows.

    Joint over all tensors, cross blocks included; tied, the head is the embedding and its block holds both uses.
    """
    model = tiny_llama(tied=tied, scale=0.2)
    problem = problem_of(model)
    generator = torch.Generator().manual_seed(2)
    vectors = {p: torch.randn(w.shape, generator=generator, dtype=w.dtype) for p, w in problem.weights.items()}
    found = Curvature(problem, IDS[0]).joint_hessian(problem.weights)(vectors)

    def moved(step: float, paths: list[str]) -> dict[str, Tensor]:
        with torch.no_grad():
            for path in paths:
                problem.weights[path].add_(vectors[path], alpha=step)
        there = gradients(problem, IDS[0])
        with torch.no_grad():
            for path in paths:
                problem.weights[path].sub_(vectors[path], alpha=step)
        return there

    h = 3e-4
    for paths in (list(problem.weights), ["lm_head"]):
        plus, minus = moved(h, paths), moved(-h, paths)
        if len(paths) == 1:
            block = Curvature(problem, IDS[0]).hessian(problem.weights["lm_head"])
            assert block is not None
            found = {"lm_head": block(vectors["lm_head"])}
        for path, out in found.items():
            expected = (plus[path] - minus[path]) / (2 * h)
            assert float((out - expected).norm()) < 2e-3 * float(expected.norm()), path


def test_gauss_newton_products_are_exact() -> None:
    problem = problem_of(tiny_llama())
    blocks = gauss_newton_blocks(problem.forward, problem.weights, IDS[0])
    curvature = Curvature(problem, IDS[0])
    for path, weight in problem.weights.items():
        v = torch.randn(weight.shape, dtype=weight.dtype, generator=torch.Generator().manual_seed(3))
        product = curvature.gauss_newton(weight)
        assert product is not None
        torch.testing.assert_close(product(v).flatten(), blocks[path] @ v.flatten(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("estimator", "draws", "power"),
    [
        (Hutchinson(probes=8), 100, 0.2),
        (Hutchinson(probes=8, scaling_sequences=0), 100, 0.3),
        (HutchPlusPlus(rank=3, probes=4), 30, 0.05),
        (XTrace(vectors=4), 20, 0.05),
    ],
)
def test_mean_over_draws_is_the_exact_hessian_trace(
    exact: tuple[Problem, dict[str, Tensor]], estimator: CurvatureEstimator, draws: int, power: float
) -> None:
    """Within 4 standard errors, these being a small share of the nuclear norm; negative traces included."""
    problem, blocks = exact
    truth = {path: float(block.trace()) for path, block in blocks.items()}
    assert sum(value < 0.0 for value in truth.values()) == len(truth) - 1, "the test wants negative traces"
    nuclear = {path: power * float(torch.linalg.matrix_norm(block, "nuc")) for path, block in blocks.items()}
    problem = estimator.prepare(problem, IDS)
    columns: dict[str, list[float]] = {path: [] for path in truth}
    for seed in range(draws):
        for path, samples in estimator.sample(replace(problem, seed=seed), IDS[0]).items():
            columns[path].append(samples["trace"])
    assert_mean_is(columns, truth, nuclear)


def test_scaled_probes_keep_a_strongly_curved_tensor_out_of_the_others() -> None:
    """z = (30 A + B) x: H_AA = 900 H_BB and H_AB = 30 H_BB. At c = 1 all of B's spread is A's probe."""

    class TwoScales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Parameter(0.03 * torch.randn(6, 5, dtype=torch.float64))
            self.b = nn.Parameter(torch.randn(6, 5, dtype=torch.float64))
            self.features = torch.randn(6, 5, dtype=torch.float64)

        def forward(self, ids: Tensor) -> Tensor:
            return self.features[ids] @ (30 * self.a + self.b).T

    model = TwoScales()
    problem = replace(problem_of(model, {"a": model.a, "b": model.b}), forward=model)
    sequences = IDS % 6
    (truth,) = (float(hessian_blocks(model, {"b": model.b}, sequences[0])["b"].trace()),)
    spread = {}
    for scaling in (0, 3):
        estimator = Hutchinson(probes=1, scaling_sequences=scaling)
        scaled = estimator.prepare(problem, sequences)
        values = torch.tensor(
            [estimator.sample(replace(scaled, seed=seed), sequences[0])["b"]["trace"] for seed in range(200)]
        )
        spread[scaling] = float(values.std())
        assert abs(float(values.mean()) - truth) < 4 * spread[scaling] / 200**0.5
    assert spread[3] < 0.2 * spread[0]


def test_one_probe_is_exact_where_the_hessian_is_diagonal() -> None:
    """Two words, logit w_k for input k: every token meets one weight, so H is diagonal and signs lose nothing."""

    class OneWeightAToken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([[0.3, -0.7]], dtype=torch.float64))

        def forward(self, ids: Tensor) -> Tensor:
            first = self.w[0][ids]
            return torch.stack([first, torch.zeros_like(first)], -1)

    model = OneWeightAToken()
    sequences = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 1, 0]])
    p = torch.sigmoid(model.w[0].detach())[sequences[:, :-1]]
    expected = (p * (1 - p)).mean(-1).tolist()
    found = calibrate(model, {"w": model.w}, sequences, estimator="hutchinson", forward=model)
    assert found.tensors["w"].samples == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton"])
def test_eigenvalues_are_those_of_the_exact_blocks(exact: tuple[Problem, dict[str, Tensor]], matrix: str) -> None:
    problem, blocks = exact
    if matrix == "gauss_newton":
        blocks = gauss_newton_blocks(problem.forward, problem.weights, IDS[0])
    row = Eigen(matrix=matrix, iterations=300, tolerance=1e-9).sample(problem, IDS[0])
    for path in problem.weights:
        values = torch.linalg.eigvalsh(blocks[path])
        assert row[path]["eigenvalue"] == pytest.approx(float(values[values.abs().argmax()]), rel=1e-4), path


@pytest.mark.parametrize("name", ["hutchinson", "hutchpp", "xtrace", "eigen"])
def test_a_sample_depends_on_seed_and_content_and_not_on_place(name: str) -> None:
    model = tiny_llama()
    weights = {path: weight for path, weight in linears(model).items() if "layers.1.mlp" in path}
    scaled = {"scaling_sequences": 0} if name == "hutchinson" else {}  # the scales look at the first sequences
    estimator = CurvatureEstimator.make(name, **scaled)
    whole = calibrate(model, weights, IDS, estimator=estimator, seed=3)
    order = torch.tensor([2, 0, 1])
    shuffled = calibrate(model, weights, IDS[order].int(), estimator=estimator, seed=3)
    for path, tensor in whole.tensors.items():
        assert shuffled.tensors[path].samples == pytest.approx([tensor.samples[k] for k in order], rel=1e-9)
    assert calibrate(model, weights, IDS, estimator=estimator, seed=4) != whole
    if name in ("hutchpp", "xtrace"):
        path = next(iter(weights))
        alone = calibrate(model, {path: weights[path]}, IDS, estimator=estimator, seed=3)
        assert alone.tensors[path].samples == pytest.approx(whole.tensors[path].samples, rel=1e-9)


def test_a_negative_trace_falls_back_to_the_gauss_newton_value_and_is_marked(tmp_path: Path) -> None:
    """Random weights: traces are truly negative; the head's, where H = G, stands on its own."""
    model = tiny_llama()
    weights = some(model, "0.self_attn.q_proj", "0.self_attn.v_proj", "1.mlp.gate_proj", "lm_head")
    found = calibrate(model, weights, IDS, estimator=HutchPlusPlus(rank=8, probes=4), seed=2)
    positive = calibrate(model, weights, IDS, estimator="gnb", seed=2)
    truth = [hessian_blocks(logits_of(model), weights, ids) for ids in IDS]
    for path, tensor in found.tensors.items():
        mean = sum(float(blocks[path].trace()) for blocks in truth) / len(truth)
        norm = float(torch.linalg.matrix_norm(truth[0][path], "nuc"))
        assert abs(tensor.trace - mean) < 0.2 * norm, "the estimate itself is kept, whatever its sign"
        assert tensor.geometric_mean is None and tensor.log_mean is None
        if path == "lm_head":
            assert tensor.gauss_newton is None
            assert tensor.low > 0.0 and tensor.value == tensor.trace
        else:
            assert mean < 0.0 and tensor.trace < 0.0 and tensor.low < 0.0
            # a smaller set of tensors may sum its norms in another order
            assert tensor.gauss_newton == pytest.approx(positive.tensors[path].samples, rel=1e-9)
            assert tensor.value == pytest.approx(positive.traces[path], rel=1e-9)
    assert all(value > 0.0 for value in found.values.values())
    found.save(tmp_path / "s.json")
    assert Sensitivity.load(tmp_path / "s.json") == found


def test_an_eigenvalue_falls_back_to_an_eigenvalue() -> None:
    model = tiny_llama()
    path = "model.layers.0.self_attn.k_proj"
    weights = {path: linears(model)[path]}
    found = calibrate(model, weights, IDS, estimator=Eigen(iterations=200, tolerance=1e-7)).tensors[path]
    tops = [float(torch.linalg.eigvalsh(gauss_newton_blocks(logits_of(model), weights, k)[path])[-1]) for k in IDS]
    assert found.trace < 0.0 and found.gauss_newton == pytest.approx(tops, rel=1e-3)


@pytest.mark.parametrize("name", ["hutchinson", "hutchpp", "xtrace", "eigen"])
class TestRefusals:
    def test_kernels_without_second_derivative(self, name: str) -> None:
        model = tiny_llama()
        for kernel in ("flash_attention_2", "flex_attention", "flash_attention_3"):
            model.config._attn_implementation_internal = kernel
            assert model.config._attn_implementation == kernel
            with pytest.raises(
                CalibrationError, match=rf"{name}.* attention '{kernel}' has no second.*'eager' or 'sdpa'"
            ):
                calibrate(model, linears(model), IDS, estimator=name)

    def test_before_any_candidate_is_quantized(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_llama()
        model.config._attn_implementation_internal = "flex_attention"
        monkeypatch.setattr(Quantizer, "codes", None)
        with pytest.raises(CalibrationError, match="no second"):
            calibrate(model, linears(model), IDS, estimator=name, candidates={"ternary": QuantSpec()})

    def test_a_forward_that_insists_on_a_fused_kernel(self, name: str) -> None:
        model = tiny_llama()

        def fused(ids: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return model(input_ids=ids).logits

        with pytest.raises(CalibrationError, match=r"no second derivative .*not implemented"):
            calibrate(model, linears(model), IDS, estimator=name, forward=fused)
        assert calibrate(model, linears(model), IDS, estimator="gnb", forward=fused).sequences == 3

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_narrow_weights(self, name: str, dtype: torch.dtype) -> None:
        model = tiny_llama().to(dtype)
        with pytest.raises(CalibrationError, match=rf"{name}.*needs fp32 or fp64.*{dtype}.*model\.float\(\)"):
            calibrate(model, linears(model), IDS, estimator=name)

    def test_tensors_without_influence_and_dead_ones(self, name: str) -> None:
        model = tiny_llama()
        spare = nn.Linear(4, 4, bias=False).double()
        model.spare = spare
        with pytest.raises(CalibrationError, match=r"^spare: .*does not depend on this tensor"):
            calibrate(model, {"spare": spare.weight}, IDS, estimator=name)
        with torch.no_grad():
            model.lm_head.weight.zero_()
        path = "model.layers.0.mlp.up_proj"
        with pytest.raises(CalibrationError, match=rf"^{path}: .*exactly zero"):
            calibrate(model, {path: linears(model)[path]}, IDS, estimator=name)

    def test_logits_that_are_not_finite(self, name: str) -> None:
        model = tiny_llama()
        with torch.no_grad():
            model.lm_head.weight[0, 0] = math.nan
        with pytest.raises(CalibrationError, match="logits are not finite"):
            calibrate(model, linears(model), IDS, estimator=name)


def test_an_estimator_keeps_nothing_of_the_models_it_has_seen() -> None:
    estimator, problem = Hutchinson(), problem_of(tiny_llama())
    scaled = estimator.prepare(problem, IDS)
    assert vars(estimator) == {"probes": 1, "scaling_sequences": 4} and not problem.scales
    assert set(scaled.scales) == set(problem.weights) and all(scale > 0.0 for scale in scaled.scales.values())


def test_eager_and_sdpa_agree() -> None:
    samples = []
    for kernel in ("eager", "sdpa"):
        model = tiny_llama(attn_implementation=kernel)
        assert model.config._attn_implementation == kernel
        samples.append(calibrate(model, linears(model), IDS, estimator="hutchinson").traces)
    assert samples[0] == pytest.approx(samples[1], rel=1e-3)  # eager takes its softmax in fp32


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("hutchinson", {"probes": 0}),
        ("hutchinson", {"scaling_sequences": -1}),
        ("hutchpp", {"rank": 0}),
        ("hutchpp", {"probes": 0}),
        ("xtrace", {"vectors": 1}),
        ("eigen", {"matrix": "fisher"}),
        ("eigen", {"iterations": 0}),
        ("eigen", {"tolerance": 0.0}),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=name):
        CurvatureEstimator.make(name, **options)
