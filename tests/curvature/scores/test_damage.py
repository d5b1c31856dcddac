"""Scores against their formulas, on evidence whose numbers are known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from hestia.curvature import Sensitivity, TensorSensitivity
from hestia.curvature.inputs import input_moments
from hestia.curvature.scores import Evidence, LieQ, Score
from hestia.curvature.scores.baq import gptq_loss
from hestia.errors import CalibrationError, ConfigError
from hestia.quant import INT3, INT4, Gaussian, Quantizer, QuantSpec

SPECS = {"ternary": QuantSpec(scale=Gaussian()), "int4": QuantSpec(grid=INT4, scale=Gaussian())}


def evidence(**changes: object) -> Evidence:
    tensors = {
        path: TensorSensitivity.of(
            path,
            100,
            samples,
            others={
                "quadratic:ternary": [2.0, 4.0],
                "quadratic:int4": [0.2, 0.4],
                "delta_loss:ternary": [5.0, 7.0],
                "kl:ternary": [1.5, 2.5],
                "eigenvalue": [-3.0, 1.0],
            },
            errors={"ternary": 50.0, "int4": 5.0},
        )
        for path, samples in {"a": [2.0, 8.0], "b": [1.0, 4.0]}.items()
    }
    sensitivity = Sensitivity(
        estimator="gnb",
        seed=0,
        sequences=2,
        scored_positions=14,
        tensors=tensors,
        candidates={label: spec.to_json() for label, spec in SPECS.items()},
    )
    return Evidence(sensitivity=sensitivity, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "label", "damage"),
    [
        ("omega", "ternary", {"a": 5.0 / 100 * 50.0, "b": 2.5 / 100 * 50.0}),
        ("omega", "int4", {"a": 5.0 / 100 * 5.0, "b": 2.5 / 100 * 5.0}),
        ("quadratic", "ternary", {"a": 1.5, "b": 1.5}),
        ("quadratic", "int4", {"a": 0.15, "b": 0.15}),
        ("delta_loss", "ternary", {"a": 6.0, "b": 6.0}),
        ("kl", "ternary", {"a": 2.0, "b": 2.0}),
        ("eigen", "ternary", {"a": 1.0 / 100 * 50.0, "b": 1.0 / 100 * 50.0}),
    ],
)
def test_formulas(name: str, label: str, damage: dict[str, float]) -> None:
    assert Score.make(name).damage(evidence(), label) == pytest.approx(damage)


def test_an_eigenvalue_whose_sign_flips_is_not_harmless() -> None:
    """Its mean is next to nothing; the Gauss-Newton eigenvalue stands in."""
    columns = {"flips": [-5.0, 5.1, -5.0, 5.0], "sure": [0.9, 1.0, 1.1, 1.0]}
    tensors = {
        path: TensorSensitivity.of(path, 100, column, errors={"ternary": 50.0}, signed=True, gauss_newton=[5.0] * 4)
        for path, column in columns.items()
    }
    found = Sensitivity(
        estimator="eigen",
        seed=0,
        sequences=4,
        scored_positions=28,
        tensors=tensors,
        primary="eigenvalue",
        candidates={"ternary": SPECS["ternary"].to_json()},
    )
    damage = Score.make("eigen").damage(Evidence(sensitivity=found), "ternary")
    assert damage == pytest.approx({"flips": 5.0 / 100 * 50.0, "sure": 1.0 / 100 * 50.0})


def test_q_bert_adds_the_spread_over_data() -> None:
    assert Score.make("eigen", form="q_bert").damage(evidence(), "ternary") == pytest.approx({"a": 3.0, "b": 3.0})


def test_hestia_is_the_same_for_every_candidate() -> None:
    score = Score.make("hestia")
    assert score.damage(evidence(), "ternary") == score.damage(evidence(), "int4")
    assert score.damage(evidence(), "ternary")["a"] > 0.5 > score.damage(evidence(), "ternary")["b"]


def test_what_was_not_measured_is_named() -> None:
    with pytest.raises(CalibrationError, match=r"'int2' is no candidate .*: ternary, int4"):
        Score.make("quadratic").damage(evidence(), "int2")
    with pytest.raises(CalibrationError, match=r"'kl:int4' was not measured; measured were trace, quadratic:ternary"):
        Score.make("kl").damage(evidence(), "int4")
    for name in ("lieq", "baq"):
        with pytest.raises(CalibrationError, match=rf"'{name}' .*Evidence\(weights"):
            Score.make(name).damage(evidence(), "ternary")
    with pytest.raises(ConfigError, match="did you mean 'omega'"):
        Score.make("omga")


@pytest.mark.parametrize(("estimator", "primary"), [("kl", "kl:ternary"), ("eigen", "eigenvalue")])
def test_omega_takes_nothing_else_for_a_trace(estimator: str, primary: str) -> None:
    found = replace(evidence().sensitivity, estimator=estimator, primary=primary)
    with pytest.raises(CalibrationError, match=rf"'omega' needs traces, .*'{estimator}' measured '{primary}': .* gnb"):
        Score.make("omega").damage(Evidence(sensitivity=found), "ternary")


def test_lieq_of_a_tensor_of_zeros_leaves_the_others_their_scores() -> None:
    generator = torch.Generator().manual_seed(1)
    weights = {path: torch.randn(16, 12, generator=generator) for path in ("a", "b")}
    damage = LieQ().damage(evidence(weights={**weights, "dead": torch.zeros(16, 12)}), "ternary")
    assert damage["dead"] == 0.0 and damage["a"] > 0.0 and damage["b"] > 0.0 and damage["a"] != damage["b"]


def test_lieq_tells_structure_from_noise() -> None:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(64, 48, generator=generator)
    structured = noise + 8.0 * torch.outer(torch.randn(64, generator=generator), torch.randn(48, generator=generator))
    damage = LieQ().damage(evidence(weights={"a": structured, "b": noise}), "ternary")
    assert damage["a"] == pytest.approx(2.0) and damage["b"] == pytest.approx(0.0)


def test_lieq_spectrum_of_an_orthogonal_matrix_uses_every_direction() -> None:
    q, _ = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(0)))
    assert LieQ(share=0.05).spectrum(q) == pytest.approx((1 / 40, 2 / 40), rel=1e-4)


def test_gptq_with_white_inputs_is_plain_rounding() -> None:
    """H = I: nothing to compensate, so the loss is half the squared rounding error (up to damping)."""
    w = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(grid=INT3, scale=Gaussian())
    step, level = Quantizer(spec).scales(w.unsqueeze(1).double())
    rounded = (level * INT3.round(w.unsqueeze(1).double() / step)).squeeze(1)
    expected = 0.5 * float((w - rounded).square().sum())
    assert gptq_loss(w, torch.eye(12), spec, damping=0.0) == pytest.approx(expected, rel=1e-6)


def test_gptq_loss_is_the_output_error_of_the_compensated_codes() -> None:
    """sum |e|^2 / 2 = 1/2 tr(dW H dW') of the weights that GPTQ ends with: an independent transcription by column."""
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(4, 10, generator=generator).double()
    x = torch.randn(200, 10, generator=generator).double() @ torch.randn(10, 10, generator=generator).double()
    h = x.T @ x / 200
    spec = QuantSpec(grid=INT3, scale=Gaussian())
    step, level = (s.squeeze(1) for s in Quantizer(spec).scales(w.unsqueeze(1)))
    left, out = w.clone(), torch.empty_like(w)
    for q in range(10):
        rest = torch.linalg.inv(h[q:, q:])
        out[:, q] = (level * INT3.round(left[:, q : q + 1] / step)).squeeze(1)
        left[:, q:] -= ((left[:, q] - out[:, q]) / rest[0, 0])[:, None] * rest[:, 0]
    error = out - w
    assert gptq_loss(w, h, spec, damping=0.0) == pytest.approx(float(0.5 * torch.trace(error @ h @ error.T)), rel=1e-6)


def test_baq_follows_the_high_rate_law() -> None:
    weights = {"a": torch.randn(4, 8), "b": 2.0 * torch.randn(4, 8)}
    moments = {path: torch.eye(8) for path in weights}
    score = Score.make("baq")
    low = score.damage(evidence(weights=weights, inputs=moments), "ternary")
    high = score.damage(evidence(weights=weights, inputs=moments), "int4")
    for path in weights:
        assert low[path] / high[path] == pytest.approx(4.0 ** (4.0 - math.log2(3.0)))


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(self.embed(input_ids))))


def test_input_moments_are_those_of_the_layers_inputs() -> None:
    torch.manual_seed(0)
    model = TwoLayers()
    sequences = torch.randint(0, 7, (3, 6))
    moments = input_moments(model, ["first", "second"], sequences)
    x = model.embed(sequences).reshape(-1, 4).detach()
    h = torch.tanh(model.first(x)).detach()
    torch.testing.assert_close(moments["first"], x.T @ x / 18)
    torch.testing.assert_close(moments["second"], h.T @ h / 18)
    assert not model.first._forward_pre_hooks


def test_a_layer_without_tokens_is_refused_by_name() -> None:
    model = TwoLayers()
    model.spare = nn.Linear(2, 2)
    with pytest.raises(CalibrationError, match=r"^spare: no token reached"):
        input_moments(model, ["first", "spare"], torch.zeros(1, 3, dtype=torch.long))


def test_what_noise_alone_would_show_is_taken_off_at_every_size() -> None:
    generator = torch.Generator().manual_seed(3)
    wide, small = torch.randn(64, 48, generator=generator), torch.randn(8, 8, generator=generator)
    assert LieQ()._beyond_chance(wide)[1] == pytest.approx(0.0, abs=0.05)
    assert LieQ()._beyond_chance(small)[0] == pytest.approx(0.0, abs=1.0)
    assert LieQ(share=0.01).spectrum(torch.eye(4))[1] == pytest.approx(0.25), "one direction at the least"


def test_gptq_damps_in_units_of_the_inputs() -> None:
    """Ten times larger inputs: a hundred times the loss, whatever the damping."""
    generator = torch.Generator().manual_seed(4)
    w, x = torch.randn(4, 6, generator=generator), torch.randn(30, 6, generator=generator)
    h, spec = x.T @ x / 30, QuantSpec(grid=INT3)
    assert gptq_loss(w, 100 * h, spec) == pytest.approx(100 * gptq_loss(w, h, spec), rel=1e-6)


def test_omega_reads_a_signed_trace_as_the_other_scores_do() -> None:
    """A mean that is surely not positive has no square root of a meaning: the Gauss-Newton trace stands in."""
    tensors = {
        "a": TensorSensitivity.of(
            "a", 100, [-2.0, -2.1, -1.9], errors={"ternary": 50.0}, signed=True, gauss_newton=[4.0, 5.0, 6.0]
        )
    }
    found = replace(evidence().sensitivity, estimator="hutchinson", sequences=3, tensors=tensors)
    assert Score.make("omega").damage(Evidence(sensitivity=found), "ternary") == pytest.approx({"a": 5.0 / 100 * 50.0})
