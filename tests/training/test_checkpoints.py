"""Checkpoints: complete or absent, without pickle, and exact."""

from __future__ import annotations

import errno
import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import toy_models
from safetensors.torch import load_file
from toy_training import At, blocks, converted, log_rows, trainer
from transformers import TrainerCallback

import hestia
from hestia import digests, recipes
from hestia.errors import ConfigError, DiskSpaceError
from hestia.schedules import LearningRateSchedule
from hestia.training import Distillation, checkpoints


def trained(folder: Path, make: Callable[[], Any] = toy_models.llama, **config: Any) -> tuple[Any, Any]:
    """A model after six steps with a checkpoint every second, and its trainer."""
    model, plan = converted(make)
    work = trainer(folder, model, plan, **{"save_every": 2, **config})
    work.fit()
    return model, work


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """A trained model, its trainer and its checkpoints/, which nobody may change."""
    folder = tmp_path_factory.mktemp("finished")
    model, work = trained(folder)
    return model, work, folder / "checkpoints"


Finished = tuple[Any, Any, Path]


def test_checkpoints_are_safetensors_and_json_and_rotate(finished: Finished) -> None:
    root = finished[2]
    assert sorted(p.name for p in root.iterdir()) == ["step-000004", "step-000006"]
    names = {p.name for p in (root / "step-000006").iterdir()}
    assert names == {
        "model.safetensors", "optimizer.safetensors", "random.safetensors", "trainer_state.json", "state.json",
    }  # fmt: skip


@pytest.mark.parametrize("make", [toy_models.llama, toy_models.tied_llama, toy_models.qwen2])
def test_model_optimizer_and_scheduler_come_back_bit_for_bit(tmp_path: Path, make: Callable[[], Any]) -> None:
    model, work = trained(tmp_path, make)
    folder = tmp_path / "checkpoints" / "step-000006"
    fresh, plan = converted(make)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    other = trainer(tmp_path / "other", fresh, plan)
    optimizer = other.create_optimizer()
    scheduler = other.create_scheduler(6, optimizer)
    checkpoints.load_model(folder, fresh)
    checkpoints.load_optimizer(folder, fresh, optimizer, scheduler)
    assert toy_models.same_bits(toy_models.snapshot(model), toy_models.snapshot(fresh))
    if make is not toy_models.llama:
        assert fresh.lm_head.weight is fresh.model.embed_tokens.weight

    before = getattr(work.optimizer, "optimizer", work.optimizer)
    names = {id(p): n for n, p in fresh.named_parameters()}
    states = {names[id(p)]: optimizer.state[p] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert set(states[name]) == {"exp_avg", "exp_avg_sq", "step"}
        for key, value in before.state[parameter].items():
            assert torch.equal(value, states[name][key]), (name, key)
    assert scheduler.last_epoch == work.lr_scheduler.last_epoch == 6
    assert scheduler.get_last_lr() == work.lr_scheduler.get_last_lr()


def test_ties_are_stored_once(tmp_path: Path) -> None:
    model, _ = trained(tmp_path, toy_models.tied_llama)
    stored = load_file(tmp_path / "checkpoints" / "step-000006" / "model.safetensors")
    assert ("lm_head.weight" in stored) != ("model.embed_tokens.weight" in stored)
    assert set(stored) == {name for name, _ in model.named_parameters()}, "nothing of the knobs, which have a clock"


def test_every_random_generator_comes_back(finished: Finished, tmp_path: Path) -> None:
    model, work, _ = finished
    random.seed(11)
    np.random.seed(12)
    torch.manual_seed(13)
    random.gauss(0, 1)
    np.random.standard_normal()
    folder = tmp_path / "step-000009"
    checkpoints.save(
        folder, model=model, optimizer=work.optimizer, scheduler=work.lr_scheduler, trainer_state={}, step=9,
        fingerprint={},
    )  # fmt: skip

    def draws() -> tuple[float, ...]:
        return random.random(), random.gauss(0, 1), np.random.standard_normal(), float(torch.rand(()))

    expected = draws()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    assert draws() != expected
    checkpoints.load_random(folder)
    assert draws() == expected


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "state.json").unlink(),
        lambda folder: (folder / "optimizer.safetensors").unlink(),
        lambda folder: (folder / "state.json").write_text("{", encoding="utf-8"),
        lambda folder: _flip(folder / "model.safetensors"),
        lambda folder: _flip(folder / "random.safetensors"),
        lambda folder: _truncate(folder / "optimizer.safetensors"),
        lambda folder: (folder / "trainer_state.json").write_text("{}", encoding="utf-8"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    finished: Finished, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    root = Path(shutil.copytree(finished[2], tmp_path / "checkpoints"))
    assert checkpoints.newest(root) == root / "step-000006"
    damage(root / "step-000006")
    assert not checkpoints.complete(root / "step-000006")
    assert checkpoints.newest(root) == root / "step-000004"


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_newest_of_nothing_is_none_and_of_ruins_refused(tmp_path: Path) -> None:
    """To begin again at the first step, and delete what stands there, is nothing to do unasked."""
    assert checkpoints.newest(tmp_path / "none") is None
    assert checkpoints.newest(tmp_path) is None
    (tmp_path / "step-000001").mkdir()
    (tmp_path / "step-000002").write_text("a file", encoding="utf-8")
    with pytest.raises(ConfigError, match="no checkpoint in it is complete; delete it to train from the first step"):
        checkpoints.newest(tmp_path)


def test_a_checkpoint_of_another_version_is_refused_and_stays(finished: Finished, tmp_path: Path) -> None:
    root = Path(shutil.copytree(finished[2], tmp_path / "checkpoints"))
    state = root / "step-000006" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "schema": checkpoints.SCHEMA + 1}))
    with pytest.raises(ConfigError, match=rf"step-000006: a checkpoint of schema {checkpoints.SCHEMA + 1}, and this"):
        checkpoints.newest(root)
    assert state.is_file()


def test_loaded_moments_are_no_map_of_the_file(finished: Finished, tmp_path: Path) -> None:
    """A deleted checkpoint would keep its blocks on the disk until the process ends."""
    folder = Path(shutil.copytree(finished[2] / "step-000006", tmp_path / "step-000006"))
    model, plan = converted()
    going_on = trainer(tmp_path / "run", model, plan, save_every=2, steps=8)
    going_on.create_optimizer_and_scheduler(8)
    checkpoints.load_optimizer(folder, model, going_on.optimizer, going_on.lr_scheduler)
    assert str(folder) not in Path("/proc/self/maps").read_text()


def test_the_newest_is_the_highest_step_also_beyond_a_million(finished: Finished, tmp_path: Path) -> None:
    model, work, _ = finished
    for step in (999_999, 1_000_000):
        checkpoints.save(
            tmp_path / checkpoints.folder_name(step), model=model, optimizer=work.optimizer,
            scheduler=work.lr_scheduler, trainer_state={}, step=step, fingerprint={},
        )  # fmt: skip
    newest = checkpoints.newest(tmp_path)
    assert newest is not None
    assert newest.name == checkpoints.folder_name(1_000_000)
    checkpoints.rotate(tmp_path, 1, newest)
    assert checkpoints.newest(tmp_path) == newest
    assert [p.name for p in tmp_path.iterdir()] == [newest.name]


def test_rotation_never_deletes_the_last_good_one_for_a_damaged_later_one(finished: Finished, tmp_path: Path) -> None:
    """Step 6 was damaged, so the run went on from 4 and has just written step 5: 5 stays, and one before it."""
    root = Path(shutil.copytree(finished[2], tmp_path / "checkpoints"))
    good = Path(shutil.copytree(root / "step-000004", root / "step-000005"))
    _flip(root / "step-000006" / "model.safetensors")
    checkpoints.rotate(root, 1, good)
    assert [p.name for p in root.iterdir()] == ["step-000005"]


def test_rotation_deletes_nothing_where_the_new_one_is_not_there(finished: Finished, tmp_path: Path) -> None:
    root = Path(shutil.copytree(finished[2], tmp_path / "checkpoints"))
    checkpoints.rotate(root, 1, root / "step-000008")
    assert sorted(p.name for p in root.iterdir()) == ["step-000004", "step-000006"]


def test_what_is_incomplete_is_named_and_unfinished_ones_are_swept_away(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(finished[2], tmp_path / "checkpoints"))
    shutil.copytree(root / "step-000006", root / ".step-000008.tmp")
    (root / "step-000006" / "optimizer.safetensors").unlink()
    said: list[str] = []
    monkeypatch.setattr(checkpoints, "announce", said.append)
    assert checkpoints.newest(root) == root / "step-000004"
    assert said == [
        f"{root / '.step-000008.tmp'}: not a checkpoint; the process ended while it was being written",
        f"{root / 'step-000006'}: passed over, it is incomplete: optimizer.safetensors is missing",
    ]
    model, plan = converted()
    trainer(tmp_path, model, plan, save_every=2).fit(checkpoints.newest(root))
    assert sorted(p.name for p in root.iterdir()) == ["step-000004", "step-000006"]
    assert checkpoints.complete(root / "step-000006")


@pytest.mark.parametrize("seed", range(12))
def test_a_bit_anywhere_in_a_checkpoint_is_noticed(finished: Finished, tmp_path: Path, seed: int) -> None:
    folder = Path(shutil.copytree(finished[2] / "step-000006", tmp_path / "step-000006"))
    draw = random.Random(seed)
    path = draw.choice(sorted(folder.iterdir())) if seed else folder / "state.json"
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    assert checkpoints.damage(folder) is not None


def test_too_little_room_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = converted()
    usage = shutil.disk_usage(tmp_path)
    root = tmp_path / "checkpoints"

    def left(place: Any) -> Any:
        return usage._replace(free=100_000 if (root / "step-000002").is_dir() else usage.free)

    monkeypatch.setattr(checkpoints.shutil, "disk_usage", left)
    with pytest.raises(
        DiskSpaceError, match=r"step-000004: a checkpoint needs 1\.\d MB, the disk has 0\.1 MB left"
    ) as caught:
        trainer(tmp_path, model, plan, save_every=2).fit()
    assert caught.value.exit_status == 1
    assert [p.name for p in root.iterdir()] == ["step-000002"]
    assert checkpoints.complete(root / "step-000002")


def test_a_full_disk_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = converted()
    saved = checkpoints.save_file

    def full(tensors: Any, path: Path, *args: Any, **kwargs: Any) -> None:
        if "step-000004" in str(path) and path.name == "optimizer.safetensors":
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        saved(tensors, path, *args, **kwargs)

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        trainer(tmp_path, model, plan, save_every=2).fit()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    assert checkpoints.newest(tmp_path / "checkpoints") is not None


def test_saving_over_a_damaged_checkpoint_of_the_same_step(finished: Finished, tmp_path: Path) -> None:
    model, work, root = finished
    folder = Path(shutil.copytree(root, tmp_path / "checkpoints")) / "step-000006"
    (folder / "state.json").unlink()
    (folder.parent / f".{folder.name}.tmp").mkdir()  # what a killed process leaves
    checkpoints.save(
        folder, model=model, optimizer=work.optimizer, scheduler=work.lr_scheduler, trainer_state={}, step=6,
        fingerprint={},
    )  # fmt: skip
    assert checkpoints.complete(folder)
    assert not (folder.parent / f".{folder.name}.tmp").exists()


def test_a_checkpoint_of_another_model_is_refused(finished: Finished) -> None:
    folder = finished[2] / "step-000006"
    with pytest.raises(ConfigError, match="made from another model"):
        checkpoints.load_model(folder, converted(toy_models.qwen3)[0])


def test_a_checkpoint_of_another_run_is_refused_and_what_differs_is_named(finished: Finished, tmp_path: Path) -> None:
    folder = finished[2] / "step-000004"

    def refused(**other: Any) -> str:
        options = other.pop("options", {})
        model, plan = converted(**options)
        with pytest.raises(ConfigError) as caught:
            trainer(tmp_path / "other", model, plan, **other).fit(folder)
        message = str(caught.value)
        assert message.startswith(f"{folder}: made with another ")
        return message

    assert "another config than this run's: config.learning_rate is 0.01 there and 0.005 here" in refused(
        learning_rate=5e-3
    )
    message = refused(steps=12, seed=3)
    assert "config.steps is 6 there and 12 here; config.seed is 0 there and 3 here" in message
    assert "data" not in message
    assert "another plan than this run's: plan.recipe.rho is 0.2 there and 0.7 here" in refused(options={"rho": 0.7})
    data = blocks()
    data.input_ids[3, 5] += 1
    assert "another data than this run's: data.sha256 is " in refused(train=data)
    data = blocks()
    data.loss_mask[3, 5] = False
    assert "another data" in refused(train=data)
    assert "data.blocks is 24 there and 20 here" in refused(train=blocks(20))
    assert not any((tmp_path / "other" / "checkpoints").iterdir())


def test_a_run_with_another_teacher_is_refused(tmp_path: Path) -> None:
    distill = Distillation()
    model, plan = converted()
    trainer(tmp_path, model, plan, save_every=6, distill=distill, teacher=toy_models.llama()).fit()
    model, plan = converted()
    other = toy_models.llama()
    with torch.no_grad():
        other.lm_head.weight[3, 5] += 1e-6
    folder = checkpoints.newest(tmp_path / "checkpoints")
    with pytest.raises(ConfigError, match="another teacher than this run's: teacher is "):
        trainer(tmp_path, model, plan, distill=distill, teacher=other).fit(folder)


class CrashError(Exception):
    """Stands for a power cut."""


def _crash(model: Any) -> None:
    raise CrashError


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("make", [toy_models.llama, toy_models.tied_llama])
def test_a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(
    tmp_path: Path, make: Callable[[], Any], accumulation: int
) -> None:
    config = {"save_every": 3, "steps": 7, "eval_every": 7, "accumulation": accumulation}
    whole, _ = trained(tmp_path / "whole", make, **config)

    model, plan = converted(make)
    broken = tmp_path / "broken"
    with pytest.raises(CrashError):
        trainer(broken, model, plan, callbacks=[At(5, _crash)], **config).fit()
    checkpoint = checkpoints.newest(broken / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name == "step-000003"
    model, plan = converted(make)
    torch.manual_seed(99)
    trainer(broken, model, plan, **config).fit(checkpoint)

    assert toy_models.same_bits(toy_models.snapshot(whole), toy_models.snapshot(model))
    rows = [log_rows(tmp_path / name) for name in ("whole", "broken")]
    assert [row.get("hard_loss") for row in rows[0]] == [row.get("hard_loss") for row in rows[1]]
    assert [row.get("loss") for row in rows[0]] == [row.get("loss") for row in rows[1]]
    assert [row["step"] for row in rows[1] if "loss" in row] == [1, 2, 3, 4, 5, 6, 7]
    assert [row.get("learning_rate") for row in rows[0]] == [row.get("learning_rate") for row in rows[1]]
    codes = [hestia.freeze(m) for m in (whole, model)]
    assert all(torch.equal(codes[0][path].codes, codes[1][path].codes) for path in codes[0])


@pytest.mark.parametrize("recipe", [name for name in recipes.names() if recipes.get(name).trains])
def test_every_recipe_resumes_exactly(tmp_path: Path, recipe: str) -> None:
    """Learned scales, importances, corrections and constraints come back too."""
    model, plan = converted(recipe=recipe)
    trainer(tmp_path, model, plan, save_every=2, keep=9).fit()
    again, plan = converted(recipe=recipe)
    trainer(tmp_path / "again", again, plan).fit(tmp_path / "checkpoints" / "step-000004")
    assert digests.of_tensors(model.state_dict()) == digests.of_tensors(again.state_dict())


def test_a_resumed_run_logs_and_saves_at_its_own_intervals(tmp_path: Path) -> None:
    trained(tmp_path, save_every=2, log_every=2)
    shutil.rmtree(tmp_path / "checkpoints" / "step-000006")
    model, plan = converted()
    trainer(tmp_path, model, plan, save_every=1, log_every=1, keep=9).fit(tmp_path / "checkpoints" / "step-000004")
    assert [row["step"] for row in log_rows(tmp_path) if "loss" in row] == [2, 4, 5, 6]
    names = [f"step-{step:06d}" for step in (2, 4, 5, 6)]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == names[1:]


def test_a_checkpoint_is_never_older_than_half_an_hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of eleven minutes by the test's own clock: 3 and 8 are due, 5 is that of the interval, 10 the last."""
    now = [100.0]
    monkeypatch.setattr("hestia.training.trainer.time", SimpleNamespace(perf_counter=lambda: now[0]))
    model, plan = converted()

    class Slow(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now[0] += 11 * 60

    trainer(tmp_path / "saved", model, plan, steps=10, save_every=5, keep=9, callbacks=[Slow()]).fit()
    names = [p.name for p in (tmp_path / "saved" / "checkpoints").iterdir()]
    assert sorted(names) == [f"step-{step:06d}" for step in (3, 5, 8, 10)]
    model, plan = converted()
    trainer(tmp_path / "pilot", model, plan, steps=10, callbacks=[Slow()]).fit()
    assert not any((tmp_path / "pilot" / "checkpoints").iterdir())


@pytest.mark.parametrize("step", [1, 6])
def test_the_first_step_after_resuming_has_the_rate_of_its_place(tmp_path: Path, step: int) -> None:
    schedule = LearningRateSchedule(warmup=0.5, decay=0.5)  # no two steps share a rate
    whole, _ = trained(tmp_path, schedule=schedule, steps=7, save_every=1, keep=9)
    model, plan = converted()
    again = trainer(tmp_path / "again", model, plan, schedule=schedule, steps=7)
    again.fit(tmp_path / "checkpoints" / checkpoints.folder_name(step))
    assert toy_models.same_bits(toy_models.snapshot(whole), toy_models.snapshot(model))


def test_the_checkpoint_does_not_grow_with_the_run(tmp_path: Path) -> None:
    trained(tmp_path, save_every=2, keep=9)
    sizes = [
        (tmp_path / "checkpoints" / checkpoints.folder_name(step) / "trainer_state.json").stat().st_size
        for step in (2, 6)
    ]
    assert sizes[1] < sizes[0] + 20
    kept = json.loads((tmp_path / "checkpoints" / "step-000006" / "trainer_state.json").read_text(encoding="utf-8"))
    assert kept["log_history"] == [], "it is in log.jsonl"
    state = json.loads((tmp_path / "checkpoints" / "step-000006" / "state.json").read_text(encoding="utf-8"))
    assert state["step"] == 6
    assert not math.isnan(state["random"]["numpy"][4])


def test_the_checkpoint_of_another_shape_is_refused(finished: Finished) -> None:
    other, _ = converted(lambda: toy_models.llama(intermediate_size=96))
    with pytest.raises(ConfigError, match=r"made from another model \(.* is \[.* there and \[.* here\)"):
        checkpoints.load_model(checkpoints.newest(finished[2]), other)


def test_the_last_good_checkpoint_survives_any_rotation(finished: Finished, tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    shutil.copytree(finished[2], root)
    checkpoints.rotate(root, 0, root / "step-000006")
    assert [folder.name for folder in root.iterdir()] == ["step-000006"]
