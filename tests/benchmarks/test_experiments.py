"""The comparison's runner on a toy parent: order, resuming, choosing rates, refusing what does not belong."""

from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_models
import yaml

from hestia import lock, recipes
from hestia.errors import ConfigError
from hestia.files import read_json, write_json
from hestia.training import HestiaTrainer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "experiments"))

import run as runner
import stages
import train_job

pytestmark = pytest.mark.usefixtures("toy_parent")

TOY: dict[str, Any] = {
    "title": "toy",
    "parent": "toy",
    "baseline": "bitnet_ste",
    "control": "control",
    "texts": {
        "train": ["train.txt"],
        "valid": ["valid.txt"],
        "test": ["test.txt"],
        "pool": "4k",
        "valid_blocks": 4,
        "test_blocks": 6,
    },
    "training": {"batch_size": 2, "seq_len": 32, "bf16": False},
    "tuning": {"tokens": ["128"], "seeds": [0], "rates": [0.01, 0.001]},
    "final": {"tokens": ["256"], "seeds": [1, 2]},
    "arms": [
        {"name": "bitnet_ste", "recipe": "bitnet_ste"},
        {"name": "control", "recipe": "full_precision"},
        {"name": "hestia", "recipe": "hestia", "options": {"alpha": 0.4, "centred": True}, "tier": 2},
        {"name": "future", "recipe": "not_built", "tier": 3},
    ],
    "sensitivity_sequences": 4,
}


@pytest.fixture
def toy_stage(tmp_path: Path, toy_parent: Path, toy_text: Path, toy_held_out: Path) -> list[str]:
    """The runner's arguments for a toy stage of its own folder."""
    shutil.copytree(toy_parent, tmp_path / "models" / "toy")
    (tmp_path / "data").mkdir()
    shutil.copyfile(toy_text, tmp_path / "data" / "train.txt")
    lines = toy_held_out.read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "data" / "valid.txt").write_text("".join(lines[:30]), encoding="utf-8")
    (tmp_path / "data" / "test.txt").write_text("".join(lines[30:]), encoding="utf-8")
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(TOY), encoding="utf-8")
    arguments = [str(tmp_path / "toy.yaml")]
    for name in ("data", "models", "work", "results"):
        arguments += [f"--{name}", str(tmp_path / name)]
    return [*arguments, "--scored", str(tmp_path / "scored.json")]


def test_a_whole_stage(toy_stage: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(toy_stage) == 0
    assert "recipe 'not_built' is not there yet" in capsys.readouterr().out
    results = tmp_path / "results"
    names = sorted(str(path.relative_to(results)) for path in results.rglob("*.json"))
    arms = ("bitnet_ste", "control", "hestia")
    tails = ("final-256-seed1", "final-256-seed2", "tune-128-0.001-seed0", "tune-128-0.01-seed0")
    wanted = [f"{arm}/{tail}.json" for arm in arms for tail in tails]
    assert names == sorted([*wanted, "parent.json", "sensitivity.json"])
    assert not list((tmp_path / "work").rglob("checkpoints"))

    stage = stages.load(tmp_path / "toy.yaml")
    for name in arms:
        arm = stage.arm(name)
        tuned = {job.rate: stages.load_result(job, results)["valid_nll"] for job in stages.tuning_jobs(stage, arm)}
        assert stages.best_rate(stage, arm, results) == min(tuned, key=lambda rate: tuned[rate])
        for job in stages.final_jobs(stage, arm, results):
            record = stages.load_result(job, results)
            assert record["tokens"] == 256 and record["config"]["seed"] == job.seed
            test = record["test"]["test.txt"]
            assert len(test["block_nll"]) == 6
            assert sum(test["block_nll"]) / 6 == pytest.approx(record["nll"], abs=1e-5)
            assert record["kl_to_parent"] > 0 and 0 <= record["top1_agreement"] <= 1
            assert record["seconds_per_token"]["steps"] == 1
            if name != "control":
                assert 0 < record["zero_share"] < 1 and 0 < record["flip_rate"] < 1
            else:
                assert "zero_share" not in record and record["plan"] is None
    hestia = read_json(results / "hestia" / "final-256-seed1.json")
    assert hestia["plan"]["geometric_mean_factor"] == pytest.approx(1.0)
    assert hestia["plan"]["temperature_factors"]["max"] > 1.0 > hestia["plan"]["temperature_factors"]["min"]

    # Nothing is made again, and another way of cutting the test text is noticed.
    before = {path: path.read_bytes() for path in results.rglob("*.json")}
    assert runner.main(toy_stage) == 0
    assert before == {path: path.read_bytes() for path in results.rglob("*.json")}
    listed = read_json(tmp_path / "scored.json")
    assert len(listed["lists"][0]["indices"]) == 6
    listed["lists"][0]["token_sha256"] = "0" * 64
    write_json(tmp_path / "scored.json", listed)
    assert runner.main(toy_stage) == 2
    assert "the test blocks of test.txt have another token_sha256" in capsys.readouterr().err


def test_a_stopped_job_goes_on_to_the_same_result(
    toy_stage: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = [*toy_stage, "--only", "nobody,bitnet_*"]
    assert runner.main(only) == 0
    results = tmp_path / "results"
    whole = read_json(results / "bitnet_ste" / "final-256-seed1.json")
    (results / "bitnet_ste" / "final-256-seed1.json").unlink()

    stage = stages.load(tmp_path / "toy.yaml")
    job = next(job for job in stages.final_jobs(stage, stage.arm("bitnet_ste"), results) if job.seed == 1)
    parent, texts = runner.open_stage(stage, _given(toy_stage))
    work, result = tmp_path / "work" / "again", tmp_path / "again.json"
    for _ in range(job.steps - 1):  # one step a call
        with pytest.raises(train_job.Paused):
            train_job.run_job(job, parent, texts, None, work, result, deadline=0.0)
        assert not result.exists()
    record = train_job.run_job(job, parent, texts, None, work, result, deadline=0.0)
    keys = ("nll", "kl_to_parent", "test", "valid", "zero_share", "flip_rate", "config", "texts", "parent")
    assert {key: record[key] for key in keys} == {key: whole[key] for key in keys}
    assert record["seconds_per_token"]["steps"] == job.steps - 3
    with pytest.raises(ConfigError, match="never made twice"):
        train_job.run_job(job, parent, texts, None, work, result)


def test_a_signal_in_the_last_step_of_a_job_leaves_no_result(
    toy_stage: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(HestiaTrainer, "stopped", property(lambda trainer: 143))
        patch.setattr(HestiaTrainer, "fit", lambda *given: None)
        assert runner.main([*toy_stage, "--only", "bitnet_*"]) == 143
    assert not list((tmp_path / "results").rglob("*seed*.json"))


def _given(arguments: list[str]) -> Any:
    pairs = dict(zip(arguments[1::2], arguments[2::2], strict=True))
    names = ("data", "models", "work", "scored")
    return type("Given", (), {name: Path(pairs[f"--{name}"]) for name in names})


def test_no_time_left_starts_nothing(toy_stage: list[str], tmp_path: Path) -> None:
    assert runner.main([*toy_stage, "--budget-minutes", "0"]) == 75
    assert sorted(path.name for path in (tmp_path / "results").rglob("*.json")) == ["parent.json"]


def test_processes_share_a_stage(
    toy_stage: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job that another process is at is passed over, and so is what waits for it; then the rest is done."""
    stage = stages.load(tmp_path / "toy.yaml")
    results, taken = tmp_path / "results", stages.tuning_jobs(stage, stage.arms[0])[0]
    work = tmp_path / "work" / "stage_toy" / f"{taken.name}-{taken.digest()[:8]}"
    work.mkdir(parents=True)
    elsewhere = lock.locked(work)
    elsewhere.__enter__()
    waited: list[list[str]] = []

    def wait(seconds: float) -> None:
        if not waited:
            waited.append(sorted(path.stem for path in (results / "bitnet_ste").rglob("*.json")))
            elsewhere.__exit__(None, None, None)

    monkeypatch.setattr(runner.time, "sleep", wait)
    assert runner.main([*toy_stage, "--only", "bitnet_ste,control"]) == 0
    assert waited == [["tune-128-0.001-seed0"]], "the final runs wait for the rate"
    order = [line.partition(":")[0] for line in capsys.readouterr().err.splitlines() if " steps at " in line]
    assert order.index("control/final-256-seed1") < order.index(taken.name) < order.index("bitnet_ste/final-256-seed1")
    assert len(order) == len(set(order)) == 8
    assert not list((tmp_path / "work").rglob(lock.LOCK_FILE))[1:], "but for the one of the texts"


def test_a_result_made_otherwise_is_refused(toy_stage: list[str], tmp_path: Path) -> None:
    stage = stages.load(tmp_path / "toy.yaml")
    job = stages.tuning_jobs(stage, stage.arms[0])[0]
    write_json(job.result(tmp_path), {"schema": 1, "config": {**job.config(), "seed": 7}, "valid_nll": 1.0})
    with pytest.raises(ConfigError, match="made with another seed than stage toy says now"):
        stages.best_rate(stage, stage.arms[0], tmp_path)


def test_a_diverged_rate_loses_and_all_diverged_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(TOY), encoding="utf-8")
    stage = stages.load(tmp_path / "toy.yaml")
    arm = stage.arms[0]
    first, second = stages.tuning_jobs(stage, arm)
    write_json(first.result(tmp_path), {"schema": 1, "config": first.config(), "valid_nll": None})
    assert stages.best_rate(stage, arm, tmp_path) is None
    write_json(second.result(tmp_path), {"schema": 1, "config": second.config(), "valid_nll": 9.0})
    assert stages.best_rate(stage, arm, tmp_path) == second.rate
    second.result(tmp_path).write_text(
        json.dumps({"schema": 1, "config": second.config(), "valid_nll": None}), encoding="utf-8"
    )
    with pytest.raises(stages.AllDivergedError, match="every learning rate"):
        stages.best_rate(stage, arm, tmp_path)
    order = [(job.arm.name, job.phase) for job in stages.ordered_jobs(stage, "bitnet_ste", tmp_path)]
    assert order == [("bitnet_ste", "tune")] * 2
    assert any("bitnet_ste: every learning rate" in line for line in runner.overview(stage, "*", tmp_path))


def test_results_of_another_parent_are_refused(
    toy_stage: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runner.main([*toy_stage, "--budget-minutes", "0"]) == 75
    path = tmp_path / "results" / "parent.json"
    record = read_json(path)
    write_json(path, {**record, "model": {**record["model"], "weights_sha256": "0" * 64}})
    assert runner.main(toy_stage) == 2
    assert "parent: its result has another parent (weights_sha256); move it away" in capsys.readouterr().err


def test_order_is_tier_by_tier_and_seed_by_seed(tmp_path: Path) -> None:
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(TOY), encoding="utf-8")
    stage = stages.load(tmp_path / "toy.yaml")
    order = [(job.arm.name, job.phase, job.seed) for job in stages.ordered_jobs(stage, "[bch]*", tmp_path)]
    tune = [(arm, "tune", 0) for arm in ("bitnet_ste", "bitnet_ste", "control", "control")]
    final = [(arm, "final", seed) for seed in (1, 2) for arm in ("bitnet_ste", "control")]
    last = [("hestia", "tune", 0)] * 2 + [("hestia", "final", 1), ("hestia", "final", 2)]
    assert order == tune + final + last


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": [*TOY["arms"], TOY["arms"][0]]}, "two arms are called 'bitnet_ste'"),
        ({"baseline": "bitnet"}, "baseline 'bitnet' is no arm.*bitnet_ste"),
        ({"tunning": {}}, "unknown key 'tunning'.*tuning"),
        ({"training": {"batch_size": "two"}}, "training: batch_size: 'two' is not a int"),
        ({"training": {}}, "the key 'batch_size' is missing"),
        ({"arms": [*TOY["arms"][:2], {"name": "x", "recipe": "hestia", "rates": [0.1]}]}, "arm x has 1 learning rates"),
    ],
)
def test_bad_stages_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump({**TOY, **change}), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        stages.load(tmp_path / "toy.yaml")


@pytest.mark.parametrize("path", sorted(stages.HERE.glob("*.yaml")), ids=lambda path: path.stem)
def test_committed_stages_load_and_their_recipes_take_the_options(path: Path) -> None:
    stage = stages.load(path)
    for job in stages.ordered_jobs(stage):
        try:
            train_job.check_possible(job)
        except train_job.NotThereYet:
            continue


STAGES = [*sorted(stages.HERE.glob("?.yaml")), stages.HERE / "bits.yaml"]


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_arms_still_are_what_their_results_were_made_with(path: Path) -> None:
    """A default that changes would else give an arm's missing seeds another recipe than the seeds that are there."""
    for job in stages.ordered_jobs(stages.load(path)):
        if job.arm.recipe == stages.CONTROL or not job.result().is_file():
            continue
        made = stages.load_result(job)["plan"]["recipe"]
        now = recipes.get(job.arm.recipe, **job.arm.settings).to_json()
        assert {key: now[key] for key in made} == made, job.name


STAGE_A = stages.load("a")


@pytest.mark.parametrize(("name", "levels"), [("bitnet_ste_1bit", 2), ("bitnet_ste", 3), ("hestia_0_2bit", 4)])
def test_an_arm_of_another_width_has_its_grid(name: str, levels: int, toy_parent: Path) -> None:
    job = stages.Job(stage=STAGE_A, arm=STAGE_A.arm(name), phase="tune", tokens="500k", rate=1e-3, seed=0)
    assert ("bits" in job.config()) == (levels != 3), "results made before there was a choice stay valid"
    plan = train_job._plan(job, train_job.open_parent(toy_parent).load(), None)
    assert {len(layer.spec.grid.values) for layer in plan.layers.values()} == {levels}


@pytest.mark.slow
@pytest.mark.parametrize("arm", STAGE_A.arms, ids=lambda arm: arm.name)
def test_every_arm_of_stage_a_stops_and_goes_on(arm: stages.Arm, toy_stage: list[str], tmp_path: Path) -> None:
    toy = stages.load(tmp_path / "toy.yaml")
    arm = replace(arm, rates=())
    job = stages.Job(stage=toy, arm=arm, phase="final", tokens="256", rate=0.01, seed=1)
    try:
        train_job.check_possible(job)
    except train_job.NotThereYet as error:
        pytest.skip(str(error))
    parent, texts = runner.open_stage(toy, _given(toy_stage))
    sensitivity = runner._sensitivity(job, parent, texts, tmp_path)
    whole = train_job.run_job(job, parent, texts, sensitivity, tmp_path / "w", tmp_path / "whole.json")
    for _ in range(job.steps - 1):
        with pytest.raises(train_job.Paused):
            train_job.run_job(job, parent, texts, sensitivity, tmp_path / "p", tmp_path / "parts.json", deadline=0.0)
    parts = train_job.run_job(job, parent, texts, sensitivity, tmp_path / "p", tmp_path / "parts.json", deadline=0.0)
    timing = {"seconds_per_token"}
    assert {k: v for k, v in parts.items() if k not in timing} == {k: v for k, v in whole.items() if k not in timing}
    assert whole["diverged"] is None and whole["nll"] > 0


def test_a_plan_without_curvature_raises_the_first_and_last_layers() -> None:
    """Eight layers of 256 inputs, between ternary and two bits: the middle stays ternary, and the budget is kept."""
    with torch.device("meta"):
        model = toy_models.llama(hidden_size=256, intermediate_size=512, num_hidden_layers=8)
    arm = stages.Arm(name="ends", recipe="hearth", bits=1.9, spend="first and last", target="gguf:mixed")
    job = stages.Job(stage=STAGE_A, arm=arm, phase="tune", tokens="500k", rate=1e-3, seed=0)
    assert not train_job.needs_curvature(arm) and job.config()["spend"] == "first and last"
    plan = train_job._plan(job, model, None)
    assert plan.spending is not None and 1.8 < plan.spending.bits <= 1.9 and plan.spending.predicted_kl == 0.0
    bits = {
        layer: {p.spec.grid.bits for path, p in plan.layers.items() if f"layers.{layer}." in path} for layer in range(8)
    }
    ternary = math.log2(3)
    assert bits[3] == bits[4] == {ternary} and all(max(bits[layer]) > ternary for layer in (0, 7))
