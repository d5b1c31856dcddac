"""The ports that training serves: importance and correction by the clock, learned scales, groups of the optimizer."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import toy_models
from toy_training import At, converted, log_rows, trainer
from transformers import TrainerState

import hestia
from hestia.errors import ConfigError
from hestia.nn import quantized_modules
from hestia.quant import Grid, WeightedRule
from hestia.quant.family import Member
from hestia.quant.scales import Scales
from hestia.training import TrainConfig
from hestia.training.clock import correct, hand_over_importance
from hestia.training.optimizer import parameter_groups


def codes(model: Any) -> dict[str, list[Any]]:
    return {p: [layer.codes().codes.tolist(), layer.codes().scales.tolist()] for p, layer in quantized_modules(model)}


def adam(run: Any) -> Any:
    return getattr(run.optimizer, "optimizer", run.optimizer)


def test_importance_is_adams_second_moment_from_the_tenth_step_on(tmp_path: Path) -> None:
    model, plan = converted(recipe="quasar", warmup=4)
    seen: list[bool] = []

    def uniform(m: Any) -> None:
        seen.append(all(bool((layer.held == 1).all()) for _, layer in quantized_modules(m)))

    callbacks = [At(k, uniform) for k in range(6)]
    run = trainer(tmp_path / "run", model, plan, callbacks=callbacks)  # type: ignore[arg-type]
    run.fit()
    assert seen == [True, True, True, True, False, False], "uniform before the first four steps"
    for path, layer in quantized_modules(model):
        moment = adam(run).state[layer.weight]["exp_avg_sq"]
        assert layer.held is not None and torch.equal(layer.held, moment), path


def test_a_weighted_rule_of_one_s_own_is_handed_importance_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Member._registry, "scale rule", dict(Member._registry["scale rule"]))

    @dataclass(frozen=True)
    class Loudest(WeightedRule):
        """The mean magnitude, weighted."""

        name: ClassVar[str] = "loudest"

        def scales(self, w_RGN: torch.Tensor, grid: Grid, held: torch.Tensor) -> Scales:
            s = (held * w_RGN.abs()).sum(-1, keepdim=True) / held.sum(-1, keepdim=True) + 1e-5
            return Scales(s, s)

    model = toy_models.llama()
    plan = hestia.plan(model, "quasar")
    own = {p: replace(v, spec=replace(v.spec, scale=Loudest(warmup=3, every=2))) for p, v in plan.layers.items()}
    plan = replace(plan, layers=own)
    hestia.apply(model, plan)
    uniform: list[bool] = []
    spy = At(3, lambda m: uniform.extend(bool((layer.held == 1).all()) for _, layer in quantized_modules(m)))
    run = trainer(tmp_path / "run", model.train(), plan, steps=4, callbacks=[spy])
    run.fit()
    assert len(uniform) == len(own) and all(uniform), "the third step is none of every two"
    for path, layer in quantized_modules(model):
        assert layer.held is not None and torch.equal(layer.held, adam(run).state[layer.weight]["exp_avg_sq"]), path


@pytest.mark.parametrize(("recipe", "options"), [("quasar", {"warmup": 2, "every": 2}), ("paretoq", {})])
def test_a_resumed_run_has_the_very_same_codes(tmp_path: Path, recipe: str, options: dict[str, Any]) -> None:
    model, plan = converted(recipe=recipe, **options)
    at_three: list[Any] = []
    spy = At(3, lambda m: at_three.append(codes(m)))
    trainer(tmp_path / "whole", model, plan, save_every=3, callbacks=[spy]).fit()
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-000003"

    again, plan = converted(recipe=recipe, **options)
    for _, layer in quantized_modules(again):
        assert layer.held is not None
        layer.held.data.mul_(0.1 + torch.rand_like(layer.held))  # what a fresh layer holds must not survive
    assert codes(again) != at_three[0]
    resumed = trainer(tmp_path / "whole", again, plan, save_every=3, callbacks=[spy])
    resumed.fit(checkpoint)
    assert at_three[0] == at_three[1], "the step after resuming starts from the very same codes"
    assert codes(again) == codes(model)
    before = codes(model)
    model.eval()
    frozen = hestia.freeze(model)
    assert {p: [t.codes.tolist(), t.scales.tolist()] for p, t in frozen.items()} == before
    assert not [name for name in model.state_dict() if "_hestia" in name]


def test_learned_scales_train_without_decay_and_are_saved(tmp_path: Path) -> None:
    model, plan = converted(recipe="ternaryllm")
    start = {p: layer.held.detach().clone() for p, layer in quantized_modules(model)}  # type: ignore[union-attr]
    run = trainer(tmp_path / "run", model, plan, save_every=6, weight_decay=0.5)
    run.fit()
    moved = [bool((layer.held != start[p]).any()) for p, layer in quantized_modules(model)]
    assert all(moved)
    held = {id(layer.held) for _, layer in quantized_modules(model)}
    for group in adam(run).param_groups:
        assert not group["weight_decay"] or held.isdisjoint(id(p) for p in group["params"])
    state = tmp_path / "run" / "checkpoints" / "step-000006" / "state.json"
    assert json.loads(state.read_text())["step"] == 6


def test_the_pull_is_decoupled_and_late(tmp_path: Path) -> None:
    """With gradients of exactly zero the weights move by the pull alone: w <- w - lr strength (w - w_hat)."""
    model, plan = converted(recipe="cage", strength=10.0, start=0.5)
    for parameter in model.parameters():
        parameter.register_hook(torch.zeros_like)
    layer = dict(quantized_modules(model))["model.layers.0.mlp.up_proj"]
    seen: list[torch.Tensor] = []
    spies = [At(k, lambda m: seen.append(layer.weight.detach().clone())) for k in range(4)]
    flat = {"schedule": hestia.schedules.LearningRateSchedule(warmup=0.0, decay=0.0)}
    run = trainer(tmp_path / "run", model, plan, steps=4, weight_decay=0.0, callbacks=spies, **flat)  # type: ignore[arg-type]
    run.fit()
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2]) and torch.equal(seen[2], seen[3])
    w = seen[3]
    s = w.abs().mean(dim=1, keepdim=True) + 1e-5
    expected = w - 1e-2 * 5.0 * (w - s * torch.clamp(torch.round(w / s), -1, 1))  # t = 3/4: half of the strength
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-6, atol=1e-8)
    assert not torch.equal(layer.weight, w)


def test_a_pull_needs_no_port_where_the_plan_has_none(tmp_path: Path) -> None:
    losses = []
    for name, recipe in (("cage", {"recipe": "cage", "strength": 0.0}), ("ste", {"recipe": "bitnet_ste"})):
        model, plan = converted(**recipe)  # type: ignore[arg-type]
        trainer(tmp_path / name, model, plan).fit()
        losses.append([row["loss"] for row in log_rows(tmp_path / name) if "loss" in row])
    assert losses[0] == losses[1], "bit for bit"


def stepped(optimizer: torch.optim.Optimizer, model: Any) -> list[Any]:
    """The layers after one step of ``optimizer``, the gradients still there."""
    ids = toy_models.IDS
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    return [layer for _, layer in quantized_modules(model)]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adafactor])
def test_an_optimizer_without_a_second_moment_is_refused_by_name(kind: Any) -> None:
    model, _ = converted(recipe="quasar", warmup=1)
    optimizer = kind(model.parameters(), lr=1e-3)
    layers = stepped(optimizer, model)
    with pytest.raises(ConfigError, match=rf"'saliency' weighs by .* {kind.__name__} keeps no exp_avg_sq .*AdamW, or"):
        hand_over_importance(layers, optimizer, 3)


def test_a_weight_without_a_gradient_or_an_optimizer_stays_uniform() -> None:
    model, _ = converted(recipe="quasar", warmup=1)
    layers = [layer for _, layer in quantized_modules(model)]
    layers[0].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([layer.weight for layer in layers[:-1]], lr=1e-3)
    stepped(optimizer, model)
    hand_over_importance(layers, optimizer, 3)
    uniform = [bool((layer.held == 1).all()) for layer in layers]
    assert uniform == [True, *[False] * (len(layers) - 2), True]


def test_a_step_that_was_skipped_hands_nothing_over() -> None:
    """As accelerate's scaler does where an fp16 gradient overflows, before there is any second moment."""
    model, plan = converted(recipe="quasar", warmup=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(input_ids=toy_models.IDS, labels=toy_models.IDS, use_cache=False).loss.backward()
    state = TrainerState(max_steps=10, global_step=3)
    arguments: Any = (None, state, None)
    wrapped = SimpleNamespace(optimizer=optimizer, step_was_skipped=True)
    callback = hestia.QATCallback(plan)
    callback.on_train_begin(*arguments, model=model)
    callback.on_optimizer_step(*arguments, model=model, optimizer=wrapped)
    assert all(bool((layer.held == 1).all()) for _, layer in quantized_modules(model))
    wrapped.step_was_skipped = False
    with pytest.raises(ConfigError, match="AdamW keeps no exp_avg_sq"):
        callback.on_optimizer_step(*arguments, model=model, optimizer=wrapped)


def test_a_correction_that_would_move_nothing_is_refused() -> None:
    model, plan = converted(recipe="cage")
    layers = [layer for _, layer in quantized_modules(model)]
    assert plan.correction is not None
    copies = [torch.nn.Parameter(layer.weight.detach().clone()) for layer in layers]
    with pytest.raises(ConfigError, match=r"'pull' moves .* AdamW has none of the 14 quantized ones in its param_gr"):
        correct(layers, torch.optim.AdamW(copies), plan.correction, 0.95)
    before = [layer.weight.detach().clone() for layer in layers]
    correct(layers, torch.optim.SGD([layers[0].weight], lr=0.1), plan.correction, 0.95)
    moved = [not torch.equal(layer.weight, old) for layer, old in zip(layers, before, strict=True)]
    assert moved == [True, *[False] * 13]


def test_rates_of_their_own_make_groups_of_their_own() -> None:
    model, _ = converted(toy_models.tied_llama, recipe="lsq")
    plain = TrainConfig(steps=1, batch_size=1, learning_rate=0.1)
    assert [(g["weight_decay"], g["lr"]) for g in parameter_groups(model, plain)] == [(0.01, 0.1), (0.0, 0.1)]
    own = TrainConfig(steps=1, batch_size=1, learning_rate=0.1, scale_rate=0.5, norm_rate=2.0, embedding_rate=0.25)
    names = {id(p): n for n, p in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in parameter_groups(model, own) for p in group["params"]}
    assert len(rates) == len(names), "every parameter once"
    for name, rate in rates.items():
        expected = 0.1
        if "_hestia" in name:
            expected = 0.05
        elif "norm" in name:
            expected = 0.2
        elif "embed" in name:
            expected = 0.025
        assert rate == pytest.approx(expected), name
    with pytest.raises(ConfigError, match="norm_rate must be 0 or a positive number, got -1"):
        TrainConfig(steps=1, batch_size=1, learning_rate=0.1, norm_rate=-1)


def test_each_weight_is_pulled_at_the_rate_of_its_own_group() -> None:
    model, plan = converted(recipe="cage")
    layers = [layer for _, layer in quantized_modules(model)][:2]
    groups = [{"params": [layer.weight], "lr": rate} for layer, rate in zip(layers, (0.01, 0.02), strict=True)]
    before = [layer.weight.detach().clone() for layer in layers]
    assert plan.correction is not None
    correct(layers, torch.optim.SGD(groups), plan.correction, 1.0)
    for layer, old, rate in zip(layers, before, (0.01, 0.02), strict=True):
        s = old.abs().mean(dim=1, keepdim=True) + 1e-5
        hard = s * torch.clamp(torch.round(old / s), -1, 1)
        torch.testing.assert_close(layer.weight.detach(), old - rate * 10.0 * (old - hard), rtol=1e-6, atol=1e-8)
