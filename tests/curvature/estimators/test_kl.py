"""Direct KL against a model that is really quantized, and what half the quadratic form predicts."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from exact_curvature import gauss_newton_blocks, linears, tiny_llama
from torch import Tensor
from transformers import LlamaForCausalLM

from hestia.curvature import Sensitivity, calibrate
from hestia.curvature.damage import damages
from hestia.curvature.estimators import Candidates, DirectKL, Problem, Row
from hestia.errors import CalibrationError
from hestia.quant import Quantizer, QuantSpec

torch.set_num_threads(1)

IDS = torch.randint(0, 12, (3, 9), generator=torch.Generator().manual_seed(4))
SPECS = {"ternary": QuantSpec(), "by four": QuantSpec(group_size=4)}


def test_it_is_the_divergence_of_a_model_with_that_one_tensor_quantized() -> None:
    model = tiny_llama().float()
    weights = linears(model)
    found = calibrate(model, weights, IDS, estimator="kl", candidates=SPECS)
    assert found.primary == f"kl:{next(iter(SPECS))}"
    with torch.no_grad():
        parent = torch.log_softmax(model(input_ids=IDS).logits[:, :-1].double(), -1)
        for path in weights:
            for label, spec in SPECS.items():
                other = copy.deepcopy(model)
                weight = other.get_submodule(path).weight
                weight.copy_(Quantizer(spec).codes(weight).dense())
                child = torch.log_softmax(other(input_ids=IDS).logits[:, :-1].double(), -1)
                expected = (parent.exp() * (parent - child)).sum(-1).mean(-1)
                column = found.column(f"kl:{label}")[path]
                assert column == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-6), (path, label)


def test_half_the_quadratic_form_predicts_a_small_divergence() -> None:
    """A shift of one weight by 1e-2: KL = dW' G dW / 2 up to third order, with the exact G."""
    model = tiny_llama(scale=0.2)
    path = "model.layers.1.mlp.down_proj"
    weights = {path: linears(model)[path]}
    ids = IDS[:2]

    class Shifted(Candidates):
        def dense(self, path: str, label: str) -> Tensor:
            moved = weights[path].detach().clone()
            moved[0, 0] += 1e-2
            return moved

    problem = Problem(
        model=model,
        forward=lambda batch: model(input_ids=batch).logits,
        weights=weights,
        candidates=Shifted(weights, {"one": QuantSpec()}),
    )
    measured = sum(DirectKL().sample(problem, row)[path]["kl:one"] for row in ids) / 2
    form = sum(float(gauss_newton_blocks(problem.forward, weights, row)[path][0, 0]) for row in ids) / 2 * 1e-4
    assert measured == pytest.approx(form / 2, rel=0.02)


def test_the_weights_are_put_back_even_after_an_error() -> None:
    model = tiny_llama().float()
    weights = linears(model)
    kept = {path: (weight.data_ptr(), weight.detach().clone()) for path, weight in weights.items()}
    calls = 0

    def forward(ids: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        logits = model(input_ids=ids).logits
        return logits if calls < 6 else logits * float("nan")

    with pytest.raises(CalibrationError, match=r"sequence 0 of 3: .*logits are not finite"):
        calibrate(model, weights, IDS, estimator="kl", candidates=SPECS, forward=forward)
    for path, weight in weights.items():
        assert weight.data_ptr() == kept[path][0] and torch.equal(weight, kept[path][1])


def near_its_grid(exponent: float) -> LlamaForCausalLM:
    """A model that is ternary already, up to noise."""
    model = tiny_llama().float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in linears(model).values():
            weight.copy_(0.25 * weight.sign() + 10.0**exponent * torch.randn(weight.shape, generator=generator))
    return model


def test_a_kl_below_rounding_is_zero_in_every_column(tmp_path: Path) -> None:
    model = near_its_grid(-5)
    specs = {"ternary": QuantSpec(), "by four": QuantSpec(group_size=4)}
    found = calibrate(model, linears(model), IDS, estimator="kl", candidates=specs)
    columns = [column for label in specs for column in found.column(f"kl:{label}").values()]
    assert min(map(min, columns)) == 0.0 and max(map(max, columns)) < 1e-6
    assert all(value >= 0.0 for value in found.values.values())
    found.save(tmp_path / "s.json")
    assert Sensitivity.load(tmp_path / "s.json") == found


def test_no_damage_of_an_earlier_file_is_negative() -> None:
    model = near_its_grid(-5)
    found = calibrate(model, linears(model), IDS, estimator="kl", candidates=SPECS)
    others = {"kl:by four": (-2.6e-8, 1e-9, 1e-9)}
    old = replace(found, tensors={path: replace(t, others=others) for path, t in found.tensors.items()})
    assert set(damages(old, "by four")[0].values()) == {0.0}  # type: ignore[index]


def test_a_kl_that_is_no_number_is_not_blamed_on_a_gradient() -> None:
    class Broken(DirectKL):
        name: ClassVar[str] = "broken kl"

        def sample(self, problem: Problem, ids: Tensor) -> Row:
            return {path: {"kl:ternary": float("nan")} for path in problem.weights}

    model = tiny_llama().float()
    with pytest.raises(CalibrationError, match=r"sample nan: a divergence is 0 or a positive number"):
        calibrate(model, linears(model), IDS, estimator=Broken(), candidates=SPECS)


def test_it_measures_nothing_without_candidates() -> None:
    model = tiny_llama().float()
    with pytest.raises(CalibrationError, match="'kl' needs candidates"):
        calibrate(model, linears(model), IDS, estimator="kl")


def test_bf16_models_are_measured_in_fp32_logarithms() -> None:
    model = tiny_llama().bfloat16()
    found = calibrate(model, linears(model), IDS, estimator="kl", candidates={"ternary": QuantSpec()})
    high = calibrate(model.float(), linears(model), IDS, estimator="kl", candidates={"ternary": QuantSpec()})
    ratios = torch.tensor([found.traces[path] / high.traces[path] for path in high.tensors])
    assert 0.9 < float(ratios.median()) < 1.1
