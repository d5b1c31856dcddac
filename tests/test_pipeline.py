"""The main job end to end: one command from a checkpoint to verified files, and what survives an interruption."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from toy_runs import CALIBRATED, QUICK, Invoke, make_parent
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainerCallback

from hestia import loading, pipeline
from hestia.errors import ConfigError, ExportError
from hestia.evaluation import model_logits, score
from hestia.options import Options, load_config
from hestia.pipeline import delivery, fitting, planning, scoring
from hestia.training import HestiaTrainer, checkpoints

SUFFIXES_OF_PICKLE = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz"}


def read(path: Path) -> dict[str, Any]:
    record = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(record, dict)
    return record


def same_codes(a: Path, b: Path) -> bool:
    """Whether two runs froze to the same integers and scales, bit for bit."""
    x, y = (load_file(run / "codes.safetensors") for run in (a, b))
    return set(x) == set(y) and all(torch.equal(x[name], y[name]) for name in x)


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def final_loss(run: Path) -> float:
    return [row["loss"] for row in rows(run) if "loss" in row][-1]


@pytest.fixture
def job(toy_parent: Path, toy_text: Path, toy_held_out: Path, tmp_path: Path) -> Callable[..., list[str | Path]]:
    """The arguments of the finished run's command, into another folder."""

    def arguments(*more: str | Path, out: str = "run", model: Path = toy_parent) -> list[str | Path]:
        text = ("--data", toy_text, "--eval-data", toy_held_out)
        return ["quantize", model, *text, "--out", tmp_path / out, *QUICK, *CALIBRATED, *more]

    return arguments


Job = Callable[..., list[str | Path]]


# --- a finished run --------------------------------------------------------------------------------------------------


def test_the_report_holds_every_promised_key(toy_run: Path) -> None:
    report = read(toy_run / "report.json")
    assert set(report) >= {
        "schema", "recipe", "target", "seed", "tokens", "learning_rate", "nll", "kl_to_parent", "top1_agreement",
        "bits_per_weight", "weights", "seconds", "tokens_per_second", "exports",
    }  # fmt: skip
    assert (report["schema"], report["recipe"], report["target"], report["seed"]) == (1, "hestia", "hf", 0)
    assert report["tokens"] == 8 * 4 * 32
    assert report["learning_rate"] == 3e-3
    assert set(report["nll"]) == {"parent", "round_to_nearest", "quantized"}
    assert set(report["bits_per_weight"]) == {"quantized_layers", "whole_model"}
    assert set(report["weights"]) == {"quantized", "kept"}
    assert set(report["seconds"]) >= {"calibrate", "train", "total"}
    assert report["seconds"]["total"] > report["seconds"]["train"] > 0
    assert report["tokens_per_second"] == pytest.approx(report["tokens"] / report["seconds"]["train"])
    assert [export["target"] for export in report["exports"]][:2] == ["hf", "gguf:q4_0"]  # others export more
    for export in report["exports"]:
        assert set(export) >= {"target", "path", "bytes", "sha256", "verify"}
        assert set(export["verify"]) >= {"codes_equal", "max_abs_logit_diff", "kl", "engine"}
        assert export["verify"]["codes_equal"] is True
        path = toy_run / export["path"]
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        assert export["sha256"] == pipeline.digest(path)  # which test_pipeline_parts computes by hand
        assert export["bytes"] == sum(p.stat().st_size for p in files)


def test_the_numbers_of_the_report_are_consistent(toy_run: Path, toy_parent: Path) -> None:
    report = read(toy_run / "report.json")
    parent = LlamaForCausalLM.from_pretrained(toy_parent)
    total = sum(p.numel() for p in parent.parameters())
    quantized = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128)
    assert report["weights"] == {"quantized": quantized, "kept": total - quantized}
    # 2 bits a code, and one scale of a row of 64 or 128 weights
    assert 2.0 < report["bits_per_weight"]["quantized_layers"] < 3.0
    assert report["bits_per_weight"]["whole_model"] == 8.0 * report["exports"][0]["bytes"] / total
    assert report["nll"]["quantized"] < report["nll"]["round_to_nearest"] - 0.5
    assert report["kl_to_parent"] > 0
    assert 0 <= report["top1_agreement"] <= 1
    hard = [row["hard_loss"] for row in rows(toy_run) if "hard_loss" in row]
    assert hard[-1] < hard[0]


def test_a_run_folder_is_as_documented_and_free_of_pickle(toy_run: Path) -> None:
    names = {path.name for path in toy_run.iterdir()}
    assert names >= {
        "run.yaml", "sensitivity.json", "plan.json", "log.jsonl", "checkpoints", "model", "exports", "report.json",
        "report.html", "README.md",
    }  # fmt: skip
    assert {path.name for path in (toy_run / "exports").iterdir()} == {"hf", "gguf-q4_0"}
    files = [path for path in toy_run.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in SUFFIXES_OF_PICKLE]
    assert not [path for path in files if path.read_bytes()[:1] == b"\x80"]
    assert not [path for path in toy_run.rglob("*") if path.name.endswith(".tmp")]


def test_the_frozen_model_is_a_plain_folder_of_codes_times_scales(toy_run: Path, toy_parent: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(toy_run / "model")
    codes = load_file(toy_run / "codes.safetensors")
    paths = [name.removesuffix(".codes") for name in codes if name.endswith(".codes")]
    assert len(paths) == 14
    for path in paths:
        weight = model.get_parameter(f"{path}.weight")
        assert torch.equal(weight, codes[f"{path}.codes"].float() * codes[f"{path}.scales"])
        assert set(codes[f"{path}.codes"].unique().tolist()) == {-1, 0, 1}
    for path in toy_parent.glob("tokenizer*"):
        assert (toy_run / "model" / path.name).read_bytes() == path.read_bytes()


def test_the_log_has_both_losses_and_the_knobs(toy_run: Path) -> None:
    soft = [row for row in rows(toy_run) if "loss" in row]
    assert [row["step"] for row in soft] == list(range(1, 9))
    for row in soft:
        assert {"pressure", "temperature", "learning_rate", "saturated", "seconds", "tokens"} <= set(row)
        assert row["temperature"]["min"] <= row["temperature"]["mean"] <= row["temperature"]["max"]
    assert soft[1]["tokens_per_second"] > 0
    assert any("hard_loss" in row for row in rows(toy_run))


def test_the_last_hard_loss_is_that_of_the_frozen_model(toy_run: Path) -> None:
    run = pipeline.Workspace(Options(**load_config(toy_run / "run.yaml")), resume=True)
    frozen = loading.load_model(loading.resolve(str(toy_run / "model")))
    logged = [row["hard_loss"] for row in rows(toy_run) if "hard_loss" in row][-1]
    assert score(model_logits(frozen), run.tuning).nll == pytest.approx(logged, abs=1e-6)


def test_no_block_is_in_two_of_training_tuning_and_held_out(toy_run: Path) -> None:
    run = pipeline.Workspace(Options(**load_config(toy_run / "run.yaml")), resume=True)
    sets = [{tuple(row) for row in part.input_ids.tolist()} for part in (run.training, run.tuning, run.text.held_out)]
    assert len(run.training) + len(run.tuning) == len(run.text.train)
    assert not sets[0] & sets[1]
    assert not sets[0] & sets[2]
    assert not sets[1] & sets[2]


# --- the same command again ------------------------------------------------------------------------------------------


def test_config_repeats_the_run_and_json_prints_one_object(
    invoke: Invoke, toy_run: Path, tmp_path: Path, lean: None
) -> None:
    """The folder's run.yaml is all that is needed; what is typed goes over it."""
    out = tmp_path / "again"
    status, printed, err = invoke(
        "quantize", "--config", toy_run / "run.yaml", "--out", out, "--target", "hf", "--json"
    )
    assert status == 0, err
    assert len(printed.strip().splitlines()) == 1
    assert json.loads(printed) == read(out / "report.json")
    assert same_codes(toy_run, out)
    assert final_loss(toy_run) == final_loss(out)
    assert read(out / "report.json")["nll"] == read(toy_run / "report.json")["nll"]


@pytest.mark.slow
def test_another_seed_gives_another_model(invoke: Invoke, toy_run: Path, job: Job, tmp_path: Path, lean: None) -> None:
    assert invoke(*job("--seed", "1"))[0] == 0
    assert not same_codes(toy_run, tmp_path / "run")


def test_the_table_is_printed(invoke: Invoke, job: Job, tmp_path: Path, lean: None) -> None:
    status, printed, _ = invoke(*job("--steps", "2"))
    assert status == 0
    for kind in ("parent", "round_to_nearest", "hestia"):
        assert f"\n{kind}" in "\n" + printed
    assert f"hf: {tmp_path / 'run' / 'exports' / 'hf'}  (verified)" in printed
    assert f"report: {tmp_path / 'run' / 'report.html'}" in printed


def test_round_to_nearest_does_not_train(invoke: Invoke, job: Job, tmp_path: Path, lean: None) -> None:
    assert invoke(*job("--recipe", "round_to_nearest"))[0] == 0
    report = read(tmp_path / "run" / "report.json")
    assert report["tokens"] == 0
    assert report["learning_rate"] is None
    assert report["tokens_per_second"] is None
    assert report["nll"]["quantized"] == report["nll"]["round_to_nearest"]
    assert not (tmp_path / "run" / "sensitivity.json").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("recipe", ["tequila", "quasar", "paretoq", "sherry"])
def test_ports_go_through_the_main_job_with_a_teacher(invoke: Invoke, job: Job, tmp_path: Path, recipe: str) -> None:
    teacher = ("--teacher", "parent", "--distill", "akl", "--distill-weight", "0.7", "--distill-noise", "0.2")
    teacher += ("--scale-rate", "0.5")
    targets = ("--target", "hf", "--target", "gguf:q4_0", "--fallback")
    status, _, err = invoke(*job("--recipe", recipe, *teacher, *targets))
    assert status == 0, err
    report = read(tmp_path / "run" / "report.json")
    assert report["recipe"] == recipe and [e["verify"]["codes_equal"] for e in report["exports"]] == [True, True]
    frozen = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert not [name for name in frozen if "_hestia" in name]
    biases = [name for name in frozen if name.endswith("_proj.bias")]
    assert len(biases) == (14 if recipe == "tequila" else 0)
    last = [row["hard_loss"] for row in rows(tmp_path / "run") if "hard_loss" in row][-1]
    assert last < report["parent_hard_loss"] - 0.1, "it has learnt something"
    assert invoke(*job("--recipe", recipe, *teacher[:4], "--distill-weight", "0.6", *targets, "--resume"))[0] == 2


def test_by_default_the_parent_teaches_hearth(invoke: Invoke, toy_run: Path, job: Job, tmp_path: Path) -> None:
    words = [word for word in job() if word not in CALIBRATED]
    status, out, err = invoke(*words)
    assert status == 0, err
    assert "hearth + teacher" in out
    run = tmp_path / "run"
    report = read(run / "report.json")
    assert (report["recipe"], read(toy_run / "report.json")["teacher"]) == ("hearth", None)
    assert report["teacher"] == {"model": "parent", "divergence": "forward_kl", "weight": 1.0, "noise": 0.0}
    assert report["scores"]["quantized"]["kl_to_parent"] < report["scores"]["round_to_nearest"]["kl_to_parent"]
    page, other = ((folder / "report.html").read_text(encoding="utf-8") for folder in (run, toy_run))
    assert "hearth + teacher" in page and "a share of 1.0 in the loss" in page
    assert (">soft</span>" in page, ">soft</span>" in other) == (False, True), "a divergence is no loss on the text"
    assert "taught by the parent" in (run / "README.md").read_text(encoding="utf-8")
    assert not (run / "sensitivity.json").exists()
    work = pipeline.Workspace(Options(**load_config(run / "run.yaml")), resume=True)
    parent = score(model_logits(work.load_model()), work.tuning[:8], description="").nll
    assert report["parent_hard_loss"] == pytest.approx(parent, rel=1e-6)


def test_both_lines_of_the_hard_loss_are_taken_in_the_precision_of_training(
    invoke: Invoke, job: Job, tmp_path: Path
) -> None:
    assert invoke(*job("--precision", "bf16"))[0] == 0
    run = tmp_path / "run"
    work = pipeline.Workspace(Options(**load_config(run / "run.yaml")), resume=True)
    blocks = work.tuning[:8]
    frozen = LlamaForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    logged = [row["hard_loss"] for row in rows(run) if "hard_loss" in row][-1]
    in_report = read(run / "report.json")["parent_hard_loss"]
    for model, value in ((work.load_model(), in_report), (frozen, logged)):
        exact = score(model_logits(model), blocks, description="").nll
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert value == pytest.approx(score(model_logits(model), blocks, description="").nll, rel=1e-6)
        assert value != pytest.approx(exact, rel=1e-6)


def test_a_run_with_a_teacher_that_crashed_ends_where_the_uninterrupted_run_did(
    invoke: Invoke, job: Job, tmp_path: Path, lean: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def words(out: str) -> list[str | Path]:
        return [word for word in job("--save-every", "4", out=out) if word not in CALIBRATED]

    assert invoke(*words("whole"))[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "HestiaTrainer", lambda *a, **k: HestiaTrainer(*a, **k, callbacks=[CrashAt(6)]))
        with pytest.raises(CrashError):
            invoke(*words("run"))
    status, _, err = invoke(*words("run"), "--resume")
    assert status == 0, err
    assert same_codes(tmp_path / "whole", tmp_path / "run")
    assert read(tmp_path / "run" / "report.json")["nll"] == read(tmp_path / "whole" / "report.json")["nll"]


def test_auto_runs_the_pilot_and_takes_its_best_rate(invoke: Invoke, job: Job, tmp_path: Path, lean: None) -> None:
    assert invoke(*job("--lr", "auto", "--steps", "4", "--recipe", "bitnet_ste"))[0] == 0
    trials = [row["pilot"] for row in rows(tmp_path / "run") if "pilot" in row]
    assert len(trials) == 4, "trials as long as the run need no second round"
    assert all(trial["tuning_loss"] > 0 and trial["steps"] == 4 for trial in trials)
    best = min(trials, key=lambda trial: trial["tuning_loss"])
    report = read(tmp_path / "run" / "report.json")
    assert report["learning_rate"] == best["learning_rate"]
    assert report["seconds"]["pilot"] > 0
    assert [row["step"] for row in rows(tmp_path / "run") if "loss" in row] == [1, 2, 3, 4]
    assert not (tmp_path / "run" / "sensitivity.json").exists()
    (tmp_path / "run" / "codes.safetensors").unlink()  # as if it had been killed while it froze
    status, _, err = invoke(*job("--lr", "auto", "--steps", "4", "--recipe", "bitnet_ste", "--resume"))
    assert status == 0, err
    assert [row["pilot"] for row in rows(tmp_path / "run") if "pilot" in row] == trials, "the rate is known"


def test_the_interval_of_chats_is_around_the_reported_difference(
    invoke: Invoke, parent_copy: Path, toy_text: Path, tmp_path: Path, lean: None
) -> None:
    """Blocks of chats have few counted tokens or many; the report's losses are means over tokens."""
    tokenizer = loading.load_tokenizer(loading.resolve(str(parent_copy)))
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    tokenizer.save_pretrained(parent_copy)
    chats = tmp_path / "chats.jsonl"
    turns = [("the cat saw a ball " * (1 + i % 7), "a girl found the river " * (1 + i % 3)) for i in range(40)]
    lines = [[{"role": "user", "content": ask}, {"role": "assistant", "content": answer}] for ask, answer in turns]
    chats.write_text("\n".join(json.dumps({"messages": line}) for line in lines), encoding="utf-8")
    words = ("--data", toy_text, "--eval-data", chats, "--out", tmp_path / "run", "--recipe", "bitnet_ste")
    status, _, err = invoke("quantize", parent_copy, *words, *QUICK, "--teacher", "none")
    assert status == 0, err
    report, scores = (read(tmp_path / "run" / name) for name in ("report.json", "scores.json"))
    tokens = scores["quantized"]["block_tokens"]
    assert len(set(tokens)) > 1 and sum(tokens) == scores["quantized"]["tokens"]
    interval = report["nll_interval"]["quantized_minus_round_to_nearest"]
    difference = report["nll"]["quantized"] - report["nll"]["round_to_nearest"]
    assert interval["mean"] == pytest.approx(difference, abs=1e-9)
    assert not {"block_tokens", "block_nll"} & set(report["scores"]["quantized"])


def test_a_bf16_parent_with_a_tied_head_and_frozen_embeddings(
    invoke: Invoke, job: Job, tmp_path: Path, lean: None
) -> None:
    parent = make_parent(tmp_path / "model", tied=True)
    LlamaForCausalLM.from_pretrained(parent, dtype=torch.bfloat16).save_pretrained(parent)
    assert (
        invoke(*job("--embeddings", "freeze", "--accumulation", "2", "--gradient-checkpointing", model=parent))[0] == 0
    )
    (path,) = (tmp_path / "run" / "model").glob("*.safetensors")
    (original,) = parent.glob("*.safetensors")
    with safe_open(path, "pt") as frozen, safe_open(original, "pt") as before:
        assert set(frozen.keys()) == set(before.keys())
        assert {str(frozen.get_tensor(name).dtype) for name in frozen.keys()} == {"torch.bfloat16"}  # noqa: SIM118
        name = "model.embed_tokens.weight"
        assert torch.equal(frozen.get_tensor(name), before.get_tensor(name))


# --- interruptions ---------------------------------------------------------------------------------------------------


class CrashError(Exception):
    """Stands for a power cut."""


class CrashAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise CrashError


def test_resume_after_a_crash_ends_where_the_uninterrupted_run_did(
    invoke: Invoke, toy_run: Path, job: Job, tmp_path: Path, lean: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "HestiaTrainer", lambda *a, **k: HestiaTrainer(*a, **k, callbacks=[CrashAt(6)]))
        with pytest.raises(CrashError):
            invoke(*job("--save-every", "4"))
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000004"]
    assert not (run / "report.json").exists()
    torch.manual_seed(5)
    monkeypatch.setattr("hestia.data.blocks.tokenize", _never)  # the text was tokenized once and cached
    monkeypatch.setattr("hestia.settings.curvature.calibrate", _never)
    status, _, err = invoke(*job("--save-every", "4", "--resume"))
    assert status == 0, err
    assert same_codes(toy_run, run)
    assert final_loss(run) == final_loss(toy_run)
    assert [row["step"] for row in rows(run) if "loss" in row] == list(range(1, 9))
    assert read(run / "report.json")["nll"] == read(toy_run / "report.json")["nll"]


def _never(*_: object, **__: object) -> None:
    raise AssertionError("this stage was done already")


def test_resume_repeats_no_finished_stage(
    invoke: Invoke, job: Job, tmp_path: Path, lean: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    status, _, err = invoke(*job("--resume"))  # where nothing is, it starts
    assert status == 0, err
    first = read(run / "report.json")
    for module, name in ((planning, "calibrate_on"), (fitting, "HestiaTrainer"), (scoring, "shared_score")):
        monkeypatch.setattr(module, name, _never)
    status, _, err = invoke(*job("--resume"))
    assert status == 0, err
    again = read(run / "report.json")
    assert again["nll"] == first["nll"]
    assert again["seconds"]["train"] == first["seconds"]["train"]
    assert again["exports"][0]["sha256"] == first["exports"][0]["sha256"]


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(
    invoke: Invoke, toy_run: Path, job: Job, tmp_path: Path, lean: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "HestiaTrainer", lambda *a, **k: HestiaTrainer(*a, **k, callbacks=[CrashAt(7)]))
        with pytest.raises(CrashError):
            invoke(*job("--save-every", "3"))
    (run / "checkpoints" / "step-000006" / "optimizer.safetensors").write_bytes(b"half")
    assert invoke(*job("--save-every", "3", "--resume"))[0] == 0
    assert same_codes(toy_run, run)


def test_chats_with_long_turns_of_the_user_are_trained_on(
    invoke: Invoke, job: Job, parent_copy: Path, tmp_path: Path, lean: None
) -> None:
    """Blocks within such a turn have no target, and a batch of them alone has the loss 0/0."""
    (parent_copy / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        encoding="utf-8",
    )
    question = {"role": "user", "content": "what did the cat see? " * 9}
    chats = [json.dumps({"messages": [question, {"role": "assistant", "content": f"{i} balls"}]}) for i in range(80)]
    text, held_out = tmp_path / "chats.jsonl", tmp_path / "held_out.jsonl"
    text.write_text("\n".join(chats[:60]), encoding="utf-8")
    held_out.write_text("\n".join(chats[60:]), encoding="utf-8")
    more = ["--out", tmp_path / "run", *QUICK, "--batch-size", "1", "--steps", "30", "--log-every", "1"]
    status, _, err = invoke("quantize", parent_copy, "--data", text, "--eval-data", held_out, *more)
    assert status == 0, err
    assert "tokens are left out: none of their tokens is the assistant's" in err
    assert len([row for row in rows(tmp_path / "run") if "loss" in row]) == 30
    assert read(tmp_path / "run" / "report.json")["data"]["blocks_without_target"]["train"] > 0


def test_a_guard_stops_the_command_with_status_4(
    invoke: Invoke, job: Job, tmp_path: Path, lean: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Poison(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 5:
                with torch.no_grad():
                    model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "HestiaTrainer", lambda *a, **k: HestiaTrainer(*a, **k, callbacks=[Poison()]))
        status, out, err = invoke(*job("--save-every", "2"))
    assert (status, out) == (4, "")
    message = err[err.index("hestia: ") :]
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000004"
    assert "model.layers.1.mlp.down_proj.weight (NaN)" in message
    assert f"The last good checkpoint is {checkpoint}" in message
    assert "Traceback" not in err
    assert checkpoints.complete(checkpoint)


def _plain(path: Path) -> str:
    """A path without the dot of temporary names: ``run/.model.123.tmp/x`` as ``run/model.123.tmp/x``."""
    return str(path).replace("/.", "/")


@pytest.mark.parametrize(
    "where", ["checkpoint", "export", *(pytest.param(name, marks=pytest.mark.slow) for name in ("codes", "model"))]
)
def test_a_full_disk_leaves_no_half_file_and_the_run_can_go_on(
    invoke: Invoke, job: Job, toy_run: Path, tmp_path: Path, lean: None, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Every place that writes much: exit status 1, one message, no temporary files, and --resume completes."""
    run = tmp_path / "run"

    def full(*args: Any, **kwargs: Any) -> None:
        args[-1].write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full_late(original: Callable[..., Any]) -> Callable[..., Any]:
        calls: list[int] = []

        def save(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return full(*args) if len(calls) > 4 else original(*args, **kwargs)

        return save

    with monkeypatch.context() as patch:
        if where == "checkpoint":
            patch.setattr(checkpoints, "save_file", full_late(checkpoints.save_file))
        elif where == "codes":
            patch.setattr("hestia.export.frozen.save_file", full)
        else:
            copy = shutil.copyfile
            full_there = "exports" if where == "export" else "model"
            patch.setattr(
                shutil, "copyfile", lambda a, b: full(b) if f"{run}/{full_there}" in _plain(b) else copy(a, b)
            )
        status, out, err = invoke(*job("--save-every", "2"))
    assert (status, out) == (1, "")
    assert "hestia: the disk is full" in err
    assert "earlier checkpoints are intact" in err
    assert "Traceback" not in err
    assert not [path for path in run.rglob("*") if ".tmp" in path.name]
    assert not (run / "report.json").exists()
    found = checkpoints.newest(run / "checkpoints")
    assert found is not None
    status, _, err = invoke(*job("--save-every", "2", "--resume"))
    assert status == 0, err
    assert same_codes(toy_run, run)


def test_a_file_that_differs_stops_the_command_with_status_3(
    invoke: Invoke, job: Job, lean: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = delivery.export_model

    def dishonest(frozen: Any, target: str, path: Path, **options: Any) -> dict[str, Any]:
        entry = honest(frozen, target, path, **options)
        name = "model.layers.1.self_attn.k_proj.weight_packed"
        file = path / "model.safetensors"
        content = bytearray(file.read_bytes())
        size = int.from_bytes(content[:8], "little")
        content[8 + size + json.loads(content[8 : 8 + size])[name]["data_offsets"][0]] ^= 4
        file.write_bytes(content)
        return entry

    monkeypatch.setattr(delivery, "export_model", dishonest)
    status, out, err = invoke(*job("--steps", "1", "--calibrate", "0"))
    assert (status, out) == (3, "")
    assert "model.layers.1.self_attn.k_proj" in err
    assert "Traceback" not in err


def test_ctrl_c_while_calibrating(invoke: Invoke, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hestia.settings.curvature.calibrate", interrupted)
        words = job()
        status, out, err = invoke("calibrate", *words[1:4], "--seq-len", "32", "--out", tmp_path / "s.json")
        assert (status, out) == (130, "")
        assert [line for line in err.splitlines() if line][-1].startswith("hestia: interrupted")
        assert list(tmp_path.iterdir()) == []
        status, _, err = invoke(*job())
        assert status == 130
        assert "Traceback" not in err


def command(arguments: list[str | Path]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "hestia", *map(str, arguments)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_process_saves_and_resume_completes(
    toy_run: Path, job: Job, tmp_path: Path, number: int, status: int
) -> None:
    long = [*job("--save-every", "1000"), "--steps", "120", "--log-every", "1"]
    process = command(long)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            if len(log.read_text(encoding="utf-8").splitlines()) > 3:
                break
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, err
    assert out == ""
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("hestia: stopped at step ")
    assert last.endswith("Continue with --resume.")
    checkpoint = checkpoints.newest(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    assert str(checkpoint) in last
    process = command([*long, "--resume"])
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    steps = [row["step"] for row in rows(tmp_path / "run") if "loss" in row]
    assert steps == list(range(1, 121))


# --- what could not be delivered -------------------------------------------------------------------------------------


def test_what_a_format_cannot_hold_is_said_before_training(
    invoke: Invoke, job: Job, parent_copy: Path, tmp_path: Path
) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    config = {**read(parent_copy / "config.json"), "rope_parameters": rope}
    (parent_copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    words = ("--target", "gguf:q4_0", "--target", "hf", "--fallback")
    for command in (job(*words, model=parent_copy), ["plan", parent_copy, *words, "--out", tmp_path / "plan.json"]):
        status, out, err = invoke(*command)
        assert (status, out) == (2, "")
        assert "--target gguf:q4_0: " in err and "rope type 'dynamic' has no GGUF export" in err
    assert not (tmp_path / "run").exists() and not (tmp_path / "plan.json").exists()
    assert invoke(*job("--target", "hf", model=parent_copy))[0] == 0


def test_one_format_that_fails_costs_no_other(
    invoke: Invoke, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any, **more: Any) -> dict[str, Any]:
        if arguments[2] == "gguf:q4_0":
            raise ExportError("a scale is not exact")
        return deliver(*arguments, **more)

    deliver = delivery.deliver
    words = job("--target", "gguf:q4_0", "--target", "hf", "--fallback")
    with monkeypatch.context() as patch:
        patch.setattr("hestia.pipeline.run.deliver", fails)
        status, _, err = invoke(*words)
    assert status == 2 and "a scale is not exact" in err
    assert [entry["target"] for entry in read(tmp_path / "run" / "report.json")["exports"]] == ["hf"]
    assert (tmp_path / "run" / "report.html").is_file()
    status, _, err = invoke(*words, "--resume")
    assert status == 0, err
    assert {entry["target"] for entry in read(tmp_path / "run" / "report.json")["exports"]} == {"hf", "gguf:q4_0"}


@pytest.mark.parametrize(
    ("location", "commit", "name"),
    [
        ("owner/name", "c0ffee", "name"),
        ("hub/models--owner--name/snapshots/c0ffee", None, "name"),
        ("v1.0", None, "v1.0"),
    ],
)
def test_an_exported_file_has_the_name_of_the_model_whatever_its_revision(
    location: str, commit: str | None, name: str, tmp_path: Path
) -> None:
    """Of owner/name@refs/pr/3 it is not 3-tq2_0.gguf, and of a folder of the hub's cache it is no commit."""
    work: Any = SimpleNamespace(folder=tmp_path, source=loading.Source(f"{location}@refs/pr/3", location, commit))
    assert delivery.own_place(work, "gguf:tq2_0") == tmp_path / "exports" / "gguf-tq2_0" / f"{name}-tq2_0.gguf"
    assert delivery.own_place(work, "hf:int4") == tmp_path / "exports" / "hf-int4"


def test_a_run_resumed_when_it_was_finished_keeps_later_exports(invoke: Invoke, job: Job, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert invoke(*job())[0] == 0
    before = [entry["target"] for entry in read(run / "report.json")["exports"]]
    later = run / "exports" / "later.gguf"
    status, _, err = invoke("export", run, "--to", "gguf:q4_0", "--out", later)
    assert status == 0, err
    status, _, err = invoke(*job(), "--resume")
    assert status == 0, err
    assert [entry["target"] for entry in read(run / "report.json")["exports"]] == [*before, "gguf:q4_0"]
    later.unlink()
    status, _, err = invoke(*job(), "--resume")
    assert status == 0, err
    assert [entry["target"] for entry in read(run / "report.json")["exports"]] == before


def test_a_teacher_with_other_tokens_of_the_same_number_is_refused(
    invoke: Invoke, job: Job, parent_copy: Path, tmp_path: Path
) -> None:
    teacher = ("--teacher", parent_copy)
    words = [word for word in job() if word not in CALIBRATED]
    path = parent_copy / "tokenizer.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = record["model"]["vocab"]
    a, b = sorted(vocabulary, key=vocabulary.__getitem__)[-2:]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    path.write_text(json.dumps(record), encoding="utf-8")
    status, _, err = invoke(*words, *teacher)
    assert status == 2 and "has another tokenizer than the parent" in err
    assert not (tmp_path / "run").exists()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (parent_copy / name).unlink()
    status, _, err = invoke(*words, *teacher)
    assert status == 0 and "its tokens are taken for the parent's" in err


def test_no_trainer_is_in_memory_while_a_run_is_scored(
    toy_parent: Path, toy_text: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[HestiaTrainer]] = []
    begin, score = HestiaTrainer.__init__, scoring.shared_score

    def remembered(self: HestiaTrainer, *words: Any, **more: Any) -> None:
        begin(self, *words, **more)
        made.append(weakref.ref(self))

    def scored(*words: Any, **more: Any) -> Any:
        alive.append(sum(trainer() is not None for trainer in made))
        return score(*words, **more)

    alive: list[int] = []
    monkeypatch.setattr(HestiaTrainer, "__init__", remembered)
    monkeypatch.setattr(scoring, "shared_score", scored)
    status, _, err = invoke("quantize", toy_parent, "--data", toy_text, "--out", tmp_path / "run", *QUICK)
    assert status == 0, err
    assert made and alive and not any(alive)


def test_the_frozen_model_keeps_its_cache_and_can_be_read_by_others(toy_run: Path, toy_parent: Path) -> None:
    assert read(toy_run / "model" / "config.json").get("use_cache", True) is True
    mask = os.umask(0)
    os.umask(mask)
    for path in (toy_run / "codes.safetensors", toy_run / "model" / "model.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask


# --- choices that the run makes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "batch", "steps"),
    [
        ({"tokens": "2M"}, 16, 2_000_000 // (16 * 64)),
        ({"tokens": "100k"}, 5, 312),
        ({"tokens": "1k"}, 1, 15),
        ({"tokens": "100k", "accumulation": 4}, 4, 390),
        ({"tokens": "1k", "accumulation": 4}, 4, 3),
        ({"steps": 7, "batch_size": 3}, 3, 7),
        ({"tokens": "2M", "seq_len": 16}, 16, 7812),
    ],
)
def test_batch_size_and_steps_by_tokens(
    toy_parent: Path, toy_text: Path, options: dict[str, Any], batch: int, steps: int
) -> None:
    run = pipeline.Workspace(Options(model=str(toy_parent), data=(str(toy_text),), out="nowhere", **options))
    assert (run.batch_size, run.steps) == (batch, steps)


def test_an_accumulation_that_does_not_divide_the_batch(toy_parent: Path, toy_text: Path) -> None:
    options = Options(model=str(toy_parent), data=(str(toy_text),), out="nowhere", batch_size=6, accumulation=4)
    with pytest.raises(ConfigError, match="--accumulation 4 does not divide --batch-size 6"):
        _ = pipeline.Workspace(options).batch_size


def test_a_batch_that_processes_cannot_share_is_refused_before_the_text_is_read(
    toy_parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hestia.processes.world_size", lambda: 3)
    options = Options(model=str(toy_parent), data=("not-there.txt",), out=str(tmp_path / "run"), batch_size=4)
    with pytest.raises(ConfigError, match="--batch-size 4 cannot be shared out evenly between 3 processes"):
        _ = pipeline.Workspace(options).text
