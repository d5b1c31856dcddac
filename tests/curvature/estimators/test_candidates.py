"""Rounding errors as candidates hold them, and what one backward pass says about them: against plain dense
arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hestia.curvature import calibrate
from hestia.curvature.estimators import Candidates, Diagonals, base, gnb
from hestia.quant import INT4, Gaussian, GroupSize, Quantizer, QuantSpec

torch.set_num_threads(1)

GROUPS: tuple[GroupSize, ...] = ("row", "tensor", 8)


def specs(group_size: GroupSize = "row") -> dict[str, QuantSpec]:
    return {
        "ternary": QuantSpec(group_size=group_size),
        "int4": QuantSpec(grid=INT4, group_size=group_size, scale=Gaussian()),
    }


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.25, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def linears(model: nn.Module) -> dict[str, nn.Parameter]:
    return {path: m.weight for path, m in model.named_modules() if isinstance(m, nn.Linear) and path != "lm_head"}


@pytest.mark.parametrize("chunk", [1, 40, 1 << 22])
@pytest.mark.parametrize("group_size", GROUPS)
def test_products_and_errors_are_those_of_the_dense_error(
    group_size: GroupSize, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "CHUNK", chunk)
    w, g = torch.randn(6, 16), torch.randn(6, 16)
    candidates = Candidates({"w": w}, specs(group_size))
    found = {label: (signed, absolute) for label, signed, absolute in candidates.products("w", w, g)}
    assert list(found) == ["ternary", "int4"]
    for label, spec in specs(group_size).items():
        error = Quantizer(spec).hard(w) - w
        assert found[label][0] == pytest.approx(float((g * error).sum()), rel=1e-5, abs=1e-5)
        assert found[label][1] == pytest.approx(float((g * error).abs().sum()), rel=1e-5)
        assert candidates.errors["w"][label] == pytest.approx(float(error.square().sum()), rel=1e-5)
        assert torch.equal(candidates.dense("w", label), Quantizer(spec).hard(w))


def test_a_candidate_costs_one_byte_a_weight_and_its_scales() -> None:
    weights = {"a": torch.randn(4, 16), "b": torch.randn(8, 16)}
    assert Candidates(weights, specs()).nbytes == 2 * (4 * 16 + 8 * 16 + 4 * (4 + 8))
    assert Candidates(weights, {}).nbytes == 0


def test_samples_are_those_of_the_plain_gradient() -> None:
    """trace, quadratic form and DeltaLoss of one sequence, from a gradient taken without hooks."""
    model = tiny_llama()
    weights = linears(model)
    sequences = torch.randint(0, 24, (2, 9), generator=torch.Generator().manual_seed(1))
    result = calibrate(model, weights, sequences, candidates=specs(), diagonals=8, seed=5)
    for k, ids in enumerate(sequences):
        logits = model(input_ids=ids[None]).logits
        r = gnb.cotangents(logits, ids, 5)
        gradients = torch.autograd.grad(logits, list(weights.values()), grad_outputs=r)
        for (path, w), g in zip(weights.items(), gradients, strict=True):
            tensor = result.tensors[path]
            assert tensor.samples[k] == pytest.approx(float(g.square().sum()) / 8, rel=1e-4)
            for label, spec in specs().items():
                product = g * (Quantizer(spec).hard(w) - w.detach())
                assert tensor.others[f"quadratic:{label}"][k] == pytest.approx(
                    float(product.sum()) ** 2 / 8, rel=1e-3, abs=1e-9
                )
                assert tensor.others[f"delta_loss:{label}"][k] == pytest.approx(
                    float(product.abs().sum()) / 8**0.5, rel=1e-4
                )


def test_diagonals_are_partial_sums_of_the_trace() -> None:
    model = tiny_llama()
    weights = linears(model)
    sequences = torch.randint(0, 24, (3, 9), generator=torch.Generator().manual_seed(1))
    result = calibrate(model, weights, sequences, diagonals=8)
    for path, tensor in result.tensors.items():
        channel, group = result.diagonals[f"{path}/output_channel"], result.diagonals[f"{path}/group"]
        outputs, inputs = weights[path].shape
        assert channel.shape == (outputs,) and group.shape == (outputs, inputs // 8)
        assert float(channel.sum()) == pytest.approx(tensor.trace, rel=1e-5)
        torch.testing.assert_close(group.sum(-1), channel, rtol=1e-4, atol=1e-9)


def exact_quadratic(model: nn.Module, weight: nn.Parameter, error: Tensor, ids: Tensor) -> float:
    """dW' G dW = 1/N sum_t Var_{p_t}(J_t dW), by one Jacobian-vector product: a second opinion without any probe."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    name = next(n for n, p in model.named_parameters() if p is weight)

    def logits(w: Tensor) -> Tensor:
        return torch.func.functional_call(model, {**parameters, name: w}, kwargs={"input_ids": ids[None]}).logits[
            0, :-1
        ]

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        z, dz = torch.func.jvp(logits, (weight.detach(),), (error,))
    p = torch.softmax(z, -1)
    return float(((p * dz.square()).sum(-1) - (p * dz).sum(-1).square()).mean())


def test_the_quadratic_form_is_unbiased() -> None:
    model = tiny_llama().double()
    weights = dict(list(linears(model).items())[4:8])
    sequences = torch.randint(0, 24, (2, 7), generator=torch.Generator().manual_seed(1))
    draws = [
        calibrate(model, weights, sequences, candidates=specs(), seed=s).means("quadratic:ternary") for s in range(200)
    ]
    for path, weight in weights.items():
        error = Quantizer(specs()["ternary"]).hard(weight).double() - weight.detach()
        truth = sum(exact_quadratic(model, weight, error, ids) for ids in sequences) / 2
        values = torch.tensor([draw[path] for draw in draws], dtype=torch.float64)
        standard_error = float(values.std()) / 200**0.5
        assert standard_error < 0.12 * truth, "the test has no power"
        assert abs(float(values.mean()) - truth) < 4 * standard_error, path


@pytest.mark.parametrize("name", ["gnb", "fisher", "kl", "hutchinson", "hutchpp", "xtrace", "eigen"])
def test_squares_that_nobody_measured_are_not_written(name: str, tmp_path: Path) -> None:
    model = tiny_llama().float()
    weights = dict([linears(model).popitem()])
    sequences = torch.randint(0, 12, (2, 7), generator=torch.Generator().manual_seed(1))
    found = calibrate(model, weights, sequences, estimator=name, candidates=specs(), diagonals="row")
    found.save(tmp_path / "s.json")
    measured = name in ("gnb", "fisher")
    assert (tmp_path / "s.safetensors").exists() is measured
    assert all(bool(value.any()) for value in found.diagonals.values())
    assert bool(found.diagonals) is measured


def test_diagonals_of_several_sequences_are_means() -> None:
    diagonals = Diagonals("row")
    for gradient in (torch.ones(2, 4), 3 * torch.ones(2, 4)):
        diagonals.add("w", gradient, positions=2)
        diagonals.sequences += 1
    assert torch.equal(diagonals.mean()["w/output_channel"], torch.full((2,), 10.0))


def test_restored_sums_stay_where_their_weights_are() -> None:
    """As after a kill: what the file held lies on the CPU, the model does not."""
    diagonals = Diagonals("row", {"a": torch.empty(4, 8, device="meta")})
    diagonals.restore({"channel/a": torch.ones(4), "group/a": torch.ones(4, 1)}, 2)
    diagonals.add("a", torch.empty(4, 8, device="meta"), 3)
    assert {value.device.type for value in diagonals.state().values()} == {"meta"}
