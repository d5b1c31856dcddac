"""HestiaTrainer: the clock, the log, the order of the data, and what is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import toy_models
from naive_order import batch_indices
from torch import nn
from toy_training import blocks, converted, log_rows, trainer
from transformers import Trainer, TrainerCallback, TrainingArguments

import hestia
from hestia.errors import ConfigError
from hestia.evaluation import model_logits, score
from hestia.nn import knobs_of, quantized_modules
from hestia.schedules import LearningRateSchedule
from hestia.training import TrainConfig, check_loggers
from hestia.training.arguments import arguments
from hestia.training.stream import BlockStream
from hestia.training.watch import saturated_share


class Recorder(TrainerCallback):
    """The knobs as every forward pass sees them."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        knobs = knobs_of(model)
        assert float(knobs.pressure) == pytest.approx(knobs.values["pressure"])
        self.seen.append((knobs.values["pressure"], knobs.values["temperature"]))


def test_the_knobs_follow_the_schedule(tmp_path: Path) -> None:
    model, plan = converted(rho=0.5)
    recorder = Recorder()
    trainer(tmp_path, model, plan, callbacks=[recorder], steps=8).fit()
    times = [k / 8 for k in range(8)]
    assert recorder.seen == [(plan.schedule.pressure(t), plan.schedule.base_temperature(t)) for t in times]
    assert recorder.seen[0] == (0.0, 0.3)
    assert knobs_of(model).values == {"pressure": 1.0, "temperature": 0.0}


def test_sharding_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an FSDP configuration of accelerate leads to: the Trainer finds its plugin and says so."""
    prepare = Trainer.create_accelerator_and_postprocess

    def sharded(self: Any) -> None:
        prepare(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", sharded)
    model, plan = converted()
    with pytest.raises(ConfigError, match=r"does not shard by FSDP.*hestia\.QATCallback"):
        trainer(tmp_path, model, plan)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says of a machine with two GPUs, as far as the Trainer's arguments ask."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)


def test_one_process_takes_its_batch_once_whatever_gpus_it_sees(
    tmp_path: Path, two_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("hestia.training.arguments.announce", said.append)
    config = TrainConfig(steps=1, batch_size=4, learning_rate=1e-3, bf16=False)
    made = arguments(config, tmp_path)
    assert (made.device.type, made.n_gpu, made.train_batch_size) == ("cuda", 1, 4)
    assert said == ["one of 2 GPUs is used; torchrun --nproc-per-node 2 uses all"]


def test_the_cpu_is_used_where_it_was_asked_for(tmp_path: Path, two_gpus: None) -> None:
    config = TrainConfig(steps=1, batch_size=4, learning_rate=1e-3, bf16=False, device="cpu")
    assert arguments(config, tmp_path).device.type == "cpu"
    with pytest.raises(ConfigError, match="device must be auto, cpu or cuda, got 'gpu'"):
        TrainConfig(steps=1, batch_size=4, learning_rate=1e-3, device="gpu")


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device is cuda, and this torch sees no CUDA device"):
        TrainConfig(steps=1, batch_size=4, learning_rate=1e-3, device="cuda")


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 0), ("batch_size", 0), ("accumulation", 0), ("learning_rate", -1.0), ("learning_rate", float("nan"))],
)
def test_numbers_that_train_nothing_are_refused(name: str, value: float) -> None:
    settings: dict[str, Any] = {"steps": 1, "batch_size": 4, "learning_rate": 1e-3}
    with pytest.raises(ConfigError, match=rf"{name} must be .*, got {value}"):
        TrainConfig(**settings | {name: value})


def test_a_run_is_resumed_on_another_device(tmp_path: Path) -> None:
    model, plan = converted()
    trainer(tmp_path, model, plan, save_every=3).fit()
    again, plan = converted()
    work = trainer(tmp_path, again, plan, save_every=3, device="cpu")
    work.fit(tmp_path / "checkpoints" / "step-000003")
    assert work.state.global_step == 6
    assert toy_models.same_bits(toy_models.snapshot(again), toy_models.snapshot(model))


@pytest.mark.parametrize(
    "change",
    [{"weight_decay": 0.3}, {"betas": (0.8, 0.9)}, {"clip": 0.5}, {"accumulation": 2}, {"bf16": True}],
    ids=str,
)
def test_a_run_is_not_resumed_with_other_settings(tmp_path: Path, change: dict[str, Any]) -> None:
    model, plan = converted()
    trainer(tmp_path, model, plan, save_every=6).fit()
    model, plan = converted()
    with pytest.raises(ConfigError, match=f"config.{next(iter(change))}"):
        trainer(tmp_path / "other", model, plan, **change).fit(tmp_path / "checkpoints" / "step-000006")


def test_processes_that_have_not_joined_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would take the whole batch for its own, and all would write the same files."""
    model, plan = converted()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is 2, but .* not joined; do this within `with hestia"):
        trainer(tmp_path, model, plan)


def test_the_first_token_is_no_label() -> None:
    """Nothing predicts it; a Trainer that divided by all labels would take too small a step."""
    example = BlockStream(blocks(2), 2, seed=0)[0]
    assert example["labels"].tolist() == [-100, *example["input_ids"][1:].tolist()]


def test_three_lines_on_a_plain_trainer(tmp_path: Path) -> None:
    """The promised use: any Trainer, one callback."""
    model = toy_models.llama()
    plan = hestia.plan(model, recipe="hestia", target="hf", options={"rho": 0.5})
    hestia.apply(model, plan)
    recorder = Recorder()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, report_to="none", disable_tqdm=True,
        use_cpu=True, learning_rate=1e-2, save_strategy="no",
    )  # fmt: skip
    dataset = BlockStream(blocks(), 8, seed=0)
    before = model.get_parameter("model.layers.0.mlp.up_proj.weight").detach().clone()
    Trainer(model, arguments, train_dataset=dataset, callbacks=[hestia.QATCallback(plan), recorder]).train()
    expected = [(plan.schedule.pressure(k / 4), plan.schedule.base_temperature(k / 4)) for k in range(4)]
    assert recorder.seen == expected
    assert not torch.equal(before, model.get_parameter("model.layers.0.mlp.up_proj.weight"))
    assert len(hestia.freeze(model)) == 14


def test_a_callback_on_a_model_that_was_not_converted_says_so(tmp_path: Path) -> None:
    plan = hestia.plan(toy_models.llama())
    with pytest.raises(ConfigError, match=r"hestia\.apply"):
        trainer(tmp_path, toy_models.llama(), plan).fit()


def test_every_training_row_of_the_log_is_whole(tmp_path: Path) -> None:
    model, plan = converted()
    factors = {path: 0.5 + 0.1 * i for i, path in enumerate(plan.layers)}
    plan = plan.with_factors(factors)
    for path, module in quantized_modules(model):
        module.temperature_factor = factors[path]
    trainer(tmp_path, model, plan, steps=6, eval_every=2).fit()
    rows = log_rows(tmp_path)
    soft = [row for row in rows if "loss" in row]
    assert [row["step"] for row in soft] == [1, 2, 3, 4, 5, 6]
    for row in soft:
        t = (row["step"] - 1) / 6
        assert row["pressure"] == plan.schedule.pressure(t)
        base = plan.schedule.base_temperature(t)
        assert row["temperature"]["min"] == pytest.approx(0.5 * base)
        assert row["temperature"]["max"] == pytest.approx(1.8 * base)
        assert row["temperature"]["mean"] == pytest.approx(base * sum(factors.values()) / len(factors))
        assert 0 <= row["saturated"] <= 1
        assert row["tokens"] == row["step"] * 4 * 16
        assert row["grad_norm"] > 0
    assert all(row["tokens_per_second"] > 0 for row in soft[1:])
    hard = [row for row in rows if "hard_loss" in row]
    assert [row["step"] for row in hard] == [2, 4, 6]
    assert soft[-1]["loss"] < soft[0]["loss"]


def test_the_learning_rate_follows_its_schedule(tmp_path: Path) -> None:
    model, plan = converted()
    schedule = LearningRateSchedule(warmup=0.25, decay=0.5, final=0.0)
    trainer(tmp_path, model, plan, steps=8, schedule=schedule, learning_rate=2e-3).fit()
    rates = [row["learning_rate"] for row in log_rows(tmp_path) if "loss" in row]
    assert rates == pytest.approx([2e-3 * schedule.factor((k + 1) / 8) for k in range(8)])


def test_the_first_step_has_the_rate_of_its_place_and_the_last_the_final_one(tmp_path: Path) -> None:
    model, plan = converted()
    seen: list[float] = []

    class Rates(TrainerCallback):
        def on_pre_optimizer_step(
            self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
        ) -> None:
            seen.append(optimizer.param_groups[0]["lr"])

    schedule = LearningRateSchedule(warmup=0.5, decay=0.5, final=0.1)
    trainer(tmp_path, model, plan, steps=4, schedule=schedule, learning_rate=1e-3, callbacks=[Rates()]).fit()
    assert seen == pytest.approx([5e-4, 1e-3, 5.5e-4, 1e-4])


def test_hard_loss_is_the_score_of_the_frozen_model(tmp_path: Path) -> None:
    model, plan = converted()
    trainer(tmp_path, model, plan, eval_every=6).fit()
    logged = [row["hard_loss"] for row in log_rows(tmp_path) if "hard_loss" in row]
    assert len(logged) == 1
    hestia.freeze(model)
    frozen = score(model_logits(model), blocks(6, seed=1)).nll
    assert logged[0] == pytest.approx(frozen, abs=1e-6)


def test_evaluating_in_between_changes_nothing(tmp_path: Path) -> None:
    final = []
    for every in (0, 1):
        model, plan = converted()
        trainer(tmp_path / str(every), model, plan, eval_every=every, save_every=every).fit()
        final.append(toy_models.snapshot(model))
    assert toy_models.same_bits(*final)


def test_the_order_of_the_data_is_a_pure_function_of_seed_and_step(tmp_path: Path) -> None:
    data = blocks(10)
    stream = BlockStream(data, 28, seed=5)
    for step in range(7):
        rows = batch_indices(10, 4, 5, step)
        batch = torch.stack([stream[step * 4 + k]["input_ids"] for k in range(4)])
        assert torch.equal(batch, data.input_ids[rows])
    backwards = BlockStream(data, 28, seed=5)
    assert all(torch.equal(backwards[i]["input_ids"], stream[i]["input_ids"]) for i in reversed(range(28)))
    assert not all(torch.equal(BlockStream(data, 28, seed=6)[i]["input_ids"], stream[i]["input_ids"]) for i in range(9))

    seen: list[torch.Tensor] = []
    model, plan = converted()
    model.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    torch.manual_seed(123)  # a generator that someone else moved makes no difference
    trainer(tmp_path, model, plan, steps=7, seed=5, train=data).fit()
    for step, batch in enumerate(seen):
        assert torch.equal(batch, data.input_ids[batch_indices(10, 4, 5, step)])


def test_tokens_that_do_not_count_are_not_learnt() -> None:
    data = blocks(4)
    data.loss_mask[:, :8] = False
    labels = BlockStream(data, 4, seed=0)[0]["labels"]
    assert (labels[:8] == -100).all()
    assert (labels[8:] >= 0).all()


def test_accumulation_gives_the_gradients_of_the_whole_batch(tmp_path: Path) -> None:
    weights = []
    for accumulation in (1, 4):
        model, plan = converted()
        trainer(tmp_path / str(accumulation), model, plan, accumulation=accumulation, steps=3).fit()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*weights, atol=2e-4)
    assert float((weights[0] - weights[1]).abs().mean()) < 2e-6
    model, plan = converted()
    work = trainer(tmp_path / "rows", model, plan, accumulation=2, steps=3)
    work.fit()
    assert [row["step"] for row in log_rows(tmp_path / "rows") if "loss" in row] == [1, 2, 3]


def test_gradient_checkpointing_gives_the_same_weights(tmp_path: Path) -> None:
    final = []
    for on in (False, True):
        model, plan = converted()
        trainer(tmp_path / str(on), model, plan, gradient_checkpointing=on).fit()
        assert model.model.layers[0].gradient_checkpointing is on
        final.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*final, atol=1e-6)


@pytest.mark.parametrize("make", [toy_models.llama, toy_models.tied_llama])
def test_frozen_embeddings_do_not_move(tmp_path: Path, make: Any) -> None:
    model, plan = converted(make)
    before = toy_models.snapshot(model)
    trainer(tmp_path, model, plan, train_embeddings=False, weight_decay=0.5).fit()
    after = toy_models.snapshot(model)
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert torch.equal(before["lm_head.weight"], after["lm_head.weight"]) is (make is toy_models.tied_llama)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(moved) == len(before) - (2 if make is toy_models.tied_llama else 1)


def test_trained_embeddings_move_and_stay_tied(tmp_path: Path) -> None:
    model, plan = converted(toy_models.tied_llama)
    before = toy_models.snapshot(model)
    trainer(tmp_path, model, plan).fit()
    assert not torch.equal(before["model.embed_tokens.weight"], model.model.embed_tokens.weight)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_only_matrices_decay(tmp_path: Path) -> None:
    model, plan = converted(toy_models.qwen2)
    optimizer = trainer(tmp_path, model, plan, weight_decay=0.3, betas=(0.8, 0.9)).create_optimizer()
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.9)}
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.3 if parameter.ndim >= 2 else 0.0), name


@pytest.mark.parametrize("clip", [0.0, 1e-9])
def test_the_optimizer_sees_gradients_of_the_clipped_norm(tmp_path: Path, clip: float) -> None:
    model, plan = converted()
    work = trainer(tmp_path, model, plan, clip=clip, steps=1)
    optimizer = work.create_optimizer()
    norms: list[float] = []

    def look(*_: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(nn.utils.get_total_norm(gradients)))

    optimizer.register_step_pre_hook(look)
    work.fit()
    (told,) = [row["grad_norm"] for row in log_rows(tmp_path) if "grad_norm" in row]
    assert told > 1e-3, "the log tells the norm before clipping"
    assert norms == pytest.approx([clip or told], rel=1e-2)


def test_the_hard_loss_is_of_the_first_tuning_blocks(tmp_path: Path) -> None:
    model, plan = converted()
    trainer(tmp_path, model, plan, eval_every=6, eval_blocks=2).fit()
    told = [row["hard_loss"] for row in log_rows(tmp_path) if "hard_loss" in row][-1]
    tuning = blocks(6, seed=1)
    two, all_six = (score(model_logits(model.eval()), part).nll for part in (tuning[:2], tuning))
    assert told == pytest.approx(two, rel=1e-6) and two != pytest.approx(all_six, rel=1e-4)


def test_latent_weights_are_fp32_under_bf16_autocast(tmp_path: Path) -> None:
    model, plan = converted()
    work = trainer(tmp_path, model, plan, bf16=True, steps=3)
    seen: list[torch.dtype] = []
    model.model.layers[0].mlp.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    work.fit()
    assert {*seen[:6]} == {torch.bfloat16}
    assert all(module.weight.dtype == torch.float32 for _, module in quantized_modules(model))


def test_saturated_share_counts_weights_with_a_small_gain() -> None:
    model, _ = converted()
    knobs_of(model).set(pressure=1.0, temperature=0.05)
    share = saturated_share(model)
    total = stuck = 0
    for _, module in quantized_modules(model):
        weight = module.weight.detach().clone().requires_grad_()
        scale = weight.detach().abs().mean(dim=1, keepdim=True) + 1e-5
        module.quantizer.fake(weight, torch.tensor(1.0), torch.tensor(0.05)).sum().backward()
        assert weight.grad is not None
        total += weight.numel()
        stuck += int((weight.grad < 0.1).sum())
        assert scale.shape == (weight.shape[0], 1)
    assert share == pytest.approx(stuck / total, abs=1e-3)
    assert 0.3 < share < 1
    knobs_of(model).set(pressure=0.5, temperature=0.05)
    assert saturated_share(model) == 0, "half of every gradient passes by the rounding"


def test_tensorboard_writes_under_the_runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    elsewhere = tmp_path / "cwd"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    run = tmp_path / "run"
    model, plan = converted()
    trainer(run, model, plan, report_to=("tensorboard",), eval_every=3).fit()
    events = list(run.rglob("events.out.tfevents.*"))
    assert events
    assert all(event.stat().st_size > 100 for event in events)
    assert not list(elsewhere.iterdir())


def test_unknown_loggers_are_refused() -> None:
    check_loggers(())
    check_loggers(("tensorboard",))
    with pytest.raises(ConfigError, match="did you mean 'wandb'"):
        check_loggers(("wandbb",))


def test_nothing_is_written_without_being_asked(tmp_path: Path) -> None:
    model, plan = converted()
    trainer(tmp_path, model, plan, log_every=0).fit()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_model_is_left_whole(tmp_path: Path) -> None:
    model, plan = converted()
    names = list(model.state_dict())
    trainer(tmp_path, model, plan, save_every=2).fit()
    assert list(model.state_dict()) == names
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)
