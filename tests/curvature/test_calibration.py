"""calibrate: the model is left as it was, and everything that cannot be estimated is refused by name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import toy_models
from exact_curvature import linears, tiny_llama
from torch import Tensor, nn

from hestia.curvature import CurvatureEstimator, Sensitivity, calibrate
from hestia.curvature.estimators import HutchPlusPlus, Problem, Row, draws, gnb
from hestia.data import Blocks
from hestia.errors import CalibrationError, ConfigError
from hestia.options import Options
from hestia.quant import QuantSpec
from hestia.settings import calibrate_on

torch.set_num_threads(1)

IDS = torch.randint(0, 13, (4, 6), generator=torch.Generator().manual_seed(0))


class Toy(nn.Module):
    """A causal model by the letter: dropout, a bias, a spare linear that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 8)
        self.body = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 13, bias=False)
        self.spare = nn.Linear(8, 8)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.drop(torch.tanh(self.body(self.embed(input_ids))))))


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def weights_of(toy: Toy) -> dict[str, nn.Parameter]:
    return {"body": toy.body.weight, "head": toy.head.weight}


@pytest.mark.parametrize("caller", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_the_model_is_left_as_it_was(toy: Toy, caller: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
    toy.train()
    toy.body.eval()
    toy.body.weight.requires_grad_(False)
    toy.head.weight.grad = torch.full_like(toy.head.weight, 3.0)
    kept = toy.head.weight.grad
    state = {name: tensor.clone() for name, tensor in toy.state_dict().items()}
    random_state = torch.get_rng_state()
    flags = {name: parameter.requires_grad for name, parameter in toy.named_parameters()}
    modes = {name: module.training for name, module in toy.named_modules()}
    with caller():
        first = calibrate(toy, weights_of(toy), IDS)
        assert calibrate(toy, weights_of(toy), IDS).traces == first.traces, "dropout must be off"
    assert {name: module.training for name, module in toy.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in toy.named_parameters()} == flags
    assert toy.head.weight.grad is kept and torch.equal(kept, torch.full_like(kept, 3.0))
    assert all(parameter.grad is None for name, parameter in toy.named_parameters() if name != "head.weight")
    assert all(torch.equal(tensor, state[name]) for name, tensor in toy.state_dict().items())
    assert all(not parameter._backward_hooks for parameter in toy.parameters())
    assert torch.equal(torch.get_rng_state(), random_state), "the caller's random numbers are not ours to draw"


def test_the_model_is_left_as_it_was_after_an_error(toy: Toy) -> None:
    toy.train()
    toy.spare.weight.requires_grad_(False)
    with pytest.raises(CalibrationError):
        calibrate(toy, {"spare": toy.spare.weight}, IDS)
    assert toy.training and toy.drop.training and not toy.spare.weight.requires_grad
    assert not toy.spare.weight._backward_hooks


def test_what_the_result_says(toy: Toy) -> None:
    result = calibrate(toy, weights_of(toy), IDS, seed=5, fingerprint={"path": "toy"})
    assert (result.estimator, result.seed, result.sequences, result.scored_positions) == ("gnb", 5, 4, 20)
    assert result.model == {"path": "toy"} and result.seconds > 0
    assert list(result.tensors) == ["body", "head"]
    assert result.tensors["body"].weights == 64 and len(result.tensors["body"].samples) == 4


def test_the_estimators_settings_are_recorded(toy: Toy) -> None:
    result = calibrate(toy, weights_of(toy), IDS, estimator=HutchPlusPlus(rank=2, probes=3))
    assert (result.estimator, result.estimator_options) == ("hutchpp", {"rank": 2, "probes": 3})
    assert Sensitivity.from_json(result.to_json()).estimator_options == result.estimator_options


def test_only_one_gradient_is_alive_at_a_time(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """What autograd hands back for each weight is a view of a single zero."""
    plain = torch.autograd.grad
    returned: list[Tensor] = []

    def spy(*args: object, **kwargs: object) -> tuple[Tensor, ...]:
        gradients = plain(*args, **kwargs)  # type: ignore[arg-type]
        returned.extend(gradients)
        return gradients

    monkeypatch.setattr(torch.autograd, "grad", spy)
    calibrate(toy, weights_of(toy), IDS)
    assert len(returned) == 8 and all(gradient.untyped_storage().nbytes() == 4 for gradient in returned)


class Ones(CurvatureEstimator):
    """What a new estimator takes: a name and one method."""

    name: ClassVar[str] = "ones"

    def sample(self, problem: Problem, ids: Tensor) -> Row:
        return {path: {"trace": 1.0 + problem.seed} for path in problem.weights}


def test_an_estimator_is_found_by_name_once_its_class_is_defined(toy: Toy) -> None:
    assert calibrate(toy, weights_of(toy), IDS, estimator="ones", seed=2).traces == {"body": 3.0, "head": 3.0}
    with pytest.raises(ConfigError, match="did you mean 'ones'"):
        calibrate(toy, weights_of(toy), IDS, estimator="one")


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        (IDS[:1], r"at least 2 sequences of at least 2 tokens, got 1 of 6"),
        (IDS[:, :1], r"got 4 of 1"),
        (IDS[:0], r"got 0 of 6"),
        (IDS[0], r"\[K, T\]"),
        (IDS.float(), r"integer token ids"),
    ],
)
def test_too_little_or_wrong_text_is_refused(toy: Toy, sequences: Tensor, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        calibrate(toy, weights_of(toy), sequences)


def test_an_unused_tensor_is_refused_by_name(toy: Toy) -> None:
    with pytest.raises(CalibrationError, match=r"^spare: .*does not depend on this tensor"):
        calibrate(toy, {**weights_of(toy), "spare": toy.spare.weight}, IDS)


def test_a_dead_tensor_is_refused_by_name(toy: Toy) -> None:
    with torch.no_grad():
        toy.head.weight.zero_()
    with pytest.raises(CalibrationError, match=r"^body: sequence 0 \(and 3 others of 4\).*exactly zero"):
        calibrate(toy, weights_of(toy), IDS)


def test_a_tensor_that_one_sequence_does_not_reach_is_refused_by_name(toy: Toy) -> None:
    """An expert that no token of sequence 2 was sent to."""

    def forward(ids: Tensor) -> Tensor:
        reached = not torch.equal(ids[0], IDS[2])
        return toy(ids).logits + (toy.head(toy.spare(toy.embed(ids))) if reached else 0.0)

    with pytest.raises(CalibrationError, match=r"^spare: sequence 2: .*expert that no token reached"):
        calibrate(toy, {"head": toy.head.weight, "spare": toy.spare.weight}, IDS, forward=forward)


def test_logits_that_are_not_finite_are_refused(toy: Toy) -> None:
    with torch.no_grad():
        toy.body.bias[0] = float("nan")
    with pytest.raises(CalibrationError, match=r"sequence 0 of 4: .*logits are not finite"):
        calibrate(toy, weights_of(toy), IDS)


def test_an_overflowing_backward_is_refused_by_name(toy: Toy) -> None:
    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return gradient * float("inf")

    def forward(ids: Tensor) -> Tensor:
        return toy.head(Overflow.apply(toy.body(toy.embed(ids))))

    with pytest.raises(CalibrationError, match=r"^body: .*(inf|nan).*overflowed"):
        calibrate(toy, weights_of(toy), IDS, forward=forward)


def test_a_tied_weight_under_two_names_is_refused_by_both(toy: Toy) -> None:
    toy.spare.weight = toy.body.weight
    with pytest.raises(CalibrationError, match=r"^spare: the same \(tied\) weight as body"):
        calibrate(toy, {**weights_of(toy), "spare": toy.spare.weight}, IDS)


def test_foreign_missing_and_meta_weights_are_refused(toy: Toy) -> None:
    with pytest.raises(CalibrationError, match=r"^other: .*not a Parameter of the model"):
        calibrate(toy, {"other": nn.Parameter(torch.ones(2, 2))}, IDS)
    with pytest.raises(CalibrationError, match="no tensors"):
        calibrate(toy, {}, IDS)
    meta = Toy().to("meta")
    with pytest.raises(CalibrationError, match=r"^body: needs a floating-point weight with data"):
        calibrate(meta, weights_of(meta), IDS)


def test_a_forward_of_the_wrong_kind_is_refused(toy: Toy) -> None:
    with pytest.raises(CalibrationError, match=r"forward must return logits \[1, 6, vocabulary\], got \[6, 13\]"):
        calibrate(toy, weights_of(toy), IDS, forward=lambda ids: toy(ids).logits[0])
    with pytest.raises(CalibrationError, match="no gradient"):
        calibrate(toy, weights_of(toy), IDS, forward=lambda ids: toy(ids).logits.detach())


# --- which tokens count ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gnb", "fisher", "kl", "hutchinson", "hutchpp", "xtrace", "eigen"])
def test_positions_whose_token_does_not_count_leave_no_trace(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A causal model whose last three tokens do not count says what it says without them; the draws made equal."""
    for module in (gnb, draws):
        monkeypatch.setattr(module, "key", lambda ids, seed: seed + int(ids[0]))
    model = tiny_llama()
    weights = {path: weight for path, weight in linears(model).items() if "layers.1.mlp" in path}
    ids = torch.randint(0, 12, (3, 9), generator=torch.Generator().manual_seed(4))
    estimator = CurvatureEstimator.make(name, **({"scaling_sequences": 0} if name == "hutchinson" else {}))
    first = torch.arange(9).expand(3, 9) < 6
    specs = {"ternary": QuantSpec()}
    masked = calibrate(model, weights, ids, targets=first, estimator=estimator, candidates=specs, diagonals=4)
    short = calibrate(model, weights, ids[:, :6], estimator=estimator, candidates=specs, diagonals=4)
    assert masked.scored_positions == short.scored_positions == 15
    for path, tensor in masked.tensors.items():
        assert tensor.samples == pytest.approx(short.tensors[path].samples, rel=1e-6)
        for other, column in tensor.others.items():
            assert column == pytest.approx(short.tensors[path].others[other], rel=1e-6), other
        assert (tensor.gauss_newton or ()) == pytest.approx(short.tensors[path].gauss_newton or (), rel=1e-6)
    for key, value in masked.diagonals.items():
        torch.testing.assert_close(value, short.diagonals[key])


def test_scattered_targets_are_those_of_the_loss(toy: Toy) -> None:
    targets = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    found = calibrate(toy.eval(), weights_of(toy), IDS, targets=targets, estimator="fisher")
    labels = torch.where(targets, IDS, -100)[:, 1:]
    for k, (ids, label) in enumerate(zip(IDS, labels, strict=True)):
        loss = nn.functional.cross_entropy(toy(ids[None]).logits[0, :-1], label, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, toy.body.weight)
        expected = float(gradient.square().sum()) / int((label != -100).sum())
        assert found.tensors["body"].samples[k] == pytest.approx(expected, rel=1e-4)


def test_where_every_token_counts_nothing_changes(toy: Toy) -> None:
    every = calibrate(toy, weights_of(toy), IDS, targets=torch.ones_like(IDS, dtype=torch.bool))
    assert every.tensors == calibrate(toy, weights_of(toy), IDS).tensors


def test_sequences_without_a_token_that_counts_are_skipped(toy: Toy) -> None:
    targets = torch.ones_like(IDS, dtype=torch.bool)
    targets[1, 1:] = False  # nothing predicts the first token
    found = calibrate(toy, weights_of(toy), IDS, targets=targets)
    assert found.tensors == calibrate(toy, weights_of(toy), IDS[[0, 2, 3]]).tensors
    targets[2:] = False
    with pytest.raises(CalibrationError, match=r"only 1 of 4 sequences have a token that counts"):
        calibrate(toy, weights_of(toy), IDS, targets=targets)
    with pytest.raises(CalibrationError, match=r"targets must be bool and of the shape .*\[4, 6\]; got torch.int64"):
        calibrate(toy, weights_of(toy), IDS, targets=IDS)


def test_a_run_calibrates_on_the_tokens_it_trains_on() -> None:
    model = toy_models.llama()
    path = "model.layers.0.mlp.up_proj"
    blocks = Blocks(toy_models.IDS, torch.arange(8).expand(2, 8) > 4)
    options = Options(model="", calibrate=2)
    found = calibrate_on(model, [path], {}, blocks, options, {})
    direct = calibrate(
        model,
        {path: model.get_parameter(f"{path}.weight")},
        blocks.input_ids,
        targets=blocks.loss_mask,
        seed=options.seed,
    )
    assert found.scored_positions == 6
    assert sorted(found.tensors[path].samples) == sorted(direct.tensors[path].samples)
