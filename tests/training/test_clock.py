"""The clock by itself, in a loop of one's own: what a Trainer's callback does, step by step, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toy_models
from torch import nn
from torch.nn import functional
from toy_training import blocks, converted
from transformers import Trainer, TrainingArguments

import hestia
from hestia import loading
from hestia.errors import ConfigError, PlanError
from hestia.nn import knobs_of
from hestia.training.stream import BlockStream, stack

STEPS = 4


def batches() -> list[dict[str, torch.Tensor]]:
    stream = BlockStream(blocks(), STEPS * 2, seed=0)
    return [stack([stream[2 * k], stream[2 * k + 1]]) for k in range(STEPS)]


def loop(model: Any, plan: Any, look: Callable[[Any], None] = lambda model: None) -> None:
    """A training loop as the module's docstring has it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    clock = hestia.Clock(model, plan, STEPS)
    model.train()
    for batch in batches():
        look(model)
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # as a Trainer does by itself
        optimizer.step()
        clock.step(optimizer)
        optimizer.zero_grad()


def callback(model: Any, plan: Any, folder: Path) -> None:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, report_to="none", disable_tqdm=True,
        use_cpu=True, learning_rate=1e-2, lr_scheduler_type="constant", save_strategy="no", weight_decay=0.0,
    )  # fmt: skip
    dataset = BlockStream(blocks(), STEPS * 2, seed=0)

    class InOrder(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(dataset)  # type: ignore[arg-type]

    InOrder(model, arguments, train_dataset=dataset, callbacks=[hestia.QATCallback(plan)]).train()


@pytest.mark.parametrize(("recipe", "options"), [("hearth", {}), ("quasar", {"warmup": 2}), ("cage", {"start": 0.25})])
def test_a_loop_of_one_s_own_trains_as_a_trainer_with_the_callback(
    tmp_path: Path, recipe: str, options: dict[str, Any]
) -> None:
    """Knobs, importance and pull, by the codes that come out."""
    found = []
    for train in (loop, lambda model, plan: callback(model, plan, tmp_path)):
        model, plan = converted(recipe=recipe, **options)
        train(model, plan)
        assert knobs_of(model).values == plan.schedule.at(1.0)
        found.append(hestia.freeze(model))
    for path, tensor in found[0].items():
        assert torch.equal(tensor.codes, found[1][path].codes), path
        torch.testing.assert_close(tensor.scales, found[1][path].scales)


def test_every_step_stands_where_the_schedule_says() -> None:
    model, plan = converted(rho=0.5)
    seen: list[dict[str, float]] = []
    loop(model, plan, lambda m: seen.append(knobs_of(m).values))
    assert seen == [plan.schedule.at(k / STEPS) for k in range(STEPS)]
    hestia.Clock(model, plan, STEPS, done=2)
    assert knobs_of(model).values == plan.schedule.at(0.5), "a run that goes on"
    assert hestia.Clock(model, plan, 0).t == 1.0


def test_a_step_in_eval_mode_is_refused() -> None:
    """There the quantized weights are rounded, and get no gradient: all but them would train."""
    model, plan = converted()
    clock = hestia.Clock(model.eval(), plan, STEPS)
    with pytest.raises(ConfigError, match=r"model\.train\(\) first"):
        clock.step(torch.optim.AdamW(model.parameters()))


@pytest.mark.parametrize(
    ("of_model", "of_plan"),
    [("quasar", "bitnet_ste"), ("sherry", "hearth"), ("bitnet_ste", "sherry"), ("hearth", "cage"), ("arenas", "twn")],
)
def test_another_plan_than_the_model_s_is_refused(of_model: str, of_plan: str) -> None:
    model, own = converted(recipe=of_model)
    other = hestia.plan(toy_models.llama(), of_plan)
    hestia.Clock(model, own, STEPS)
    with pytest.raises(ConfigError, match=r"converted by a(nother)? plan"):
        hestia.Clock(model, other, STEPS)
    fewer = replace(own, layers=dict(list(own.layers.items())[:-1]))
    with pytest.raises(ConfigError, match="another plan"):
        hestia.Clock(model, fewer, STEPS)
    turned = replace(own, layers=dict(reversed(own.layers.items())))
    hestia.Clock(model, turned, STEPS)


def test_a_skipped_step_is_served_nothing() -> None:
    """As accelerate's scaler does where an fp16 gradient overflows: the weights did not move, and nothing pulls."""
    model, plan = converted(recipe="cage", start=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    clock = hestia.Clock(model, plan, STEPS, done=3)
    before = toy_models.snapshot(model)
    clock.serve(SimpleNamespace(optimizer=optimizer, step_was_skipped=True))
    assert toy_models.same_bits(toy_models.snapshot(model), before)
    clock.serve(SimpleNamespace(optimizer=optimizer, step_was_skipped=False))
    assert not toy_models.same_bits(toy_models.snapshot(model), before)


def test_parameters_that_train_in_half_precision_are_told(recwarn: pytest.WarningsRecorder) -> None:
    for dtype, told in ((torch.bfloat16, 1), (torch.float32, 0)):
        model = toy_models.llama().to(dtype)
        plan = hestia.plan(model)
        hestia.Clock(hestia.apply(model, plan), plan, STEPS)
        assert ["small updates vanish" in str(w.message) for w in recwarn] == [True] * told
        recwarn.clear()


def test_weights_that_were_trained_without_the_clock_are_told(recwarn: pytest.WarningsRecorder) -> None:
    """In full precision, with a beautiful loss: the worst way to lose a night."""
    model, plan = converted()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in batches():
        model(**batch).loss.backward()
        optimizer.step()
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hestia.Clock(model, plan, steps=9)  # made, and never asked to step
    with pytest.warns(UserWarning, match="pressure and temperature never moved"):
        hestia.freeze(model)
    recwarn.clear()
    model = toy_models.llama()
    hestia.apply(model, hestia.plan(model, "twn"))  # hard from the first step: nothing has to move
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
        model.get_submodule("model.layers.0.mlp.up_proj").weight.mul_(0.5)
    hestia.freeze(model)
    assert not [w for w in recwarn if "pressure" in str(w.message)]
    for prepare in (
        lambda model, plan: None,  # rounded, which nobody need train for
        lambda model, plan: copy.deepcopy(model),
        lambda model, plan: model.load_state_dict(trained) and None,
        loop,
    ):
        model, plan = converted()
        hestia.freeze(prepare(model, plan) or model)
    assert not [w for w in recwarn if "pressure" in str(w.message)]


class Fused(nn.Module):
    """Takes ``out``'s weight past its layer, as the kernels of state-space models do, and never calls ``spare``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out, self.spare = (nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(self.first(x), self.out.weight)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_weight_that_is_read_past_its_layer_is_refused_after_one_step(compiled: bool) -> None:
    def train(skip: str = "") -> None:
        model = nn.Sequential(Fused())
        plan = hestia.plan(model, "hearth", skip=skip or ())
        hestia.apply(model, plan)
        clock, optimizer = hestia.Clock(model, plan, 2), torch.optim.SGD(model.parameters(), lr=0.1)
        model.train()
        run = torch.compile(model, backend="eager") if compiled else model
        for _ in range(2):
            run(torch.ones(1, 8)).sum().backward()
            optimizer.step()
            clock.step(optimizer)

    train("*.out")
    refused = pytest.raises(ConfigError, match=r"^0\.out: .* train unrounded .*: --skip '\*\.out'")
    with nullcontext() if compiled else refused:  # a graph does not say which layers it asked
        train()


def test_a_layer_of_a_list_may_rest_where_another_process_used_it() -> None:
    model = nn.ModuleList([nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)])
    plan = hestia.plan(model, "hearth")
    hestia.apply(model, plan)
    clock, optimizer = hestia.Clock(model, plan, 1), torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    model[0](torch.ones(1, 8)).sum().backward()
    model[1].weight.grad = torch.ones(8, 8)  # as an all-reduce leaves it
    clock.step(optimizer)
    assert [layer.asked for layer in model] == [True, False]


@pytest.mark.filterwarnings("ignore:.*small updates vanish")
@pytest.mark.parametrize("recipe", ["hearth", "lsq", "quasar"])
@pytest.mark.parametrize("pieces", [1, 2])
def test_what_a_trainer_saved_comes_back_bit_for_bit(tmp_path: Path, recipe: str, pieces: int) -> None:
    """From a bf16 parent, tied, in one file and in several: latent weights, learned scales and importance."""

    def parent() -> Any:
        torch.manual_seed(0)
        return toy_models.tied_llama().bfloat16()

    model = parent()
    plan = hestia.plan(model, recipe)
    callback(hestia.apply(model, plan), plan, tmp_path / "out")
    model.save_pretrained(tmp_path / "kept", **({} if pieces == 1 else {"max_shard_size": "60KB"}))
    assert (tmp_path / "kept" / "model.safetensors").is_file() == (pieces == 1)
    again = hestia.apply(parent(), plan)
    hestia.load_latents(again, tmp_path / "kept")
    ours, theirs = hestia.freeze(model), hestia.freeze(again)
    for path, tensor in ours.items():
        assert torch.equal(tensor.codes, theirs[path].codes) and torch.equal(tensor.scales, theirs[path].scales), path
    assert toy_models.same_bits(toy_models.snapshot(model), toy_models.snapshot(again))


def test_latent_weights_are_not_taken_for_a_parent(tmp_path: Path) -> None:
    model, plan = converted(recipe="lsq")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    with pytest.raises(PlanError, match=r"no parent: load the parent, .*hestia\.load_latents"):
        hestia.apply(loaded, plan)
    with pytest.raises(PlanError, match="these are latent weights"):  # nor for a model to score or to learn from
        loading.load_model(loading.resolve(str(tmp_path)))
    for undo in (hestia.restore, hestia.freeze):
        undo(model)
        model.save_pretrained(tmp_path)
        hestia.apply(type(model).from_pretrained(tmp_path), plan)
        hestia.apply(model, plan)
    twin = type(model)(model.config)  # a configuration in memory may be another model's too
    hestia.apply(twin, plan)


def test_weights_of_another_model_or_none_are_refused(tmp_path: Path) -> None:
    model, _ = converted(recipe="lsq")
    before = toy_models.snapshot(model)
    with pytest.raises(ConfigError, match="no weights can be read"):
        hestia.load_latents(model, tmp_path)
    converted(recipe="hearth")[0].save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"hestia\.apply"):
        hestia.load_latents(toy_models.llama(), tmp_path / "other")
    for recipe, options in {"hearth": {"bits": 2.0}, "twn": {}, "round_to_nearest": {"skip": "*.q_proj"}}.items():
        other = toy_models.llama()
        hestia.apply(other, hestia.plan(other, recipe, **options))
        twin = toy_models.snapshot(other)
        with pytest.raises(ConfigError, match=r"converted by another plan \(recipe 'hearth'; other bits"):
            hestia.load_latents(other, tmp_path / "other")
        assert toy_models.same_bits(toy_models.snapshot(other), twin)
    (tmp_path / "other" / "config.json").unlink()  # its tensors alone tell of learned scales that are not there
    with pytest.raises(ConfigError, match=r"another model \(14 missing, 0 unexpected\)"):
        hestia.load_latents(model, tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="no weights can be read"):
        hestia.load_latents(model, tmp_path / "other")
    assert toy_models.same_bits(toy_models.snapshot(model), before)
