"""Options beside each other and beside a file: what was typed counts, or is refused; nothing is ignored in silence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from toy_runs import CALIBRATED, QUICK, Invoke
from transformers import LlamaConfig

from hestia import loading, settings
from hestia.cli.shared import options_from
from hestia.errors import ConfigError
from hestia.options import Options, count
from hestia.pipeline import delivery
from hestia.pipeline.run import _meant
from hestia.pipeline.workspace import Workspace
from hestia.training import HestiaTrainer


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., str]:
    """A configuration file with these keys."""

    def write(**values: Any) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({"model": "m", **values}), encoding="utf-8")
        return str(path)

    return write


# --- what was typed, and a file --------------------------------------------------------------------------------------


def test_another_recipe_than_the_file_s_begins_without_the_file_s_options(config: Callable[..., str]) -> None:
    file = config(recipe="hearth", options={"temperature": 0.2})
    assert options_from(file, {"recipe": "hestia"}).options == {}
    assert options_from(file, {"recipe": "hearth"}).options == {"temperature": 0.2}
    silent = config(options={"temperature": 0.2})  # a file without a recipe has the default one's options
    assert options_from(silent, {"recipe": "hearth", "options": ("rho=0.3",)}).options == {
        "temperature": 0.2,
        "rho": 0.3,
    }


def test_a_typed_option_is_not_beaten_by_its_rival_in_the_file(config: Callable[..., str]) -> None:
    file = config(steps=300, max_kl=0.1)
    assert options_from(file, {"tokens": "50M"}).steps is None
    assert options_from(file, {"bits": 1.9}).max_kl is None
    assert options_from(file, {"seed": 1}).steps == 300


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ({"steps": 10, "tokens": "5M"}, "--steps is instead of --tokens"),
        ({"bits": 1.9, "max_kl": 0.3}, "--max-kl is instead of --bits"),
        ({"plan": "p.json", "target": ("hf",)}, r"--plan p\.json has decided --target"),
        ({"plan": "p.json", "bits": 1.58, "options": ("rho=1",)}, "has decided --bits, --option"),
        ({"teacher": "none", "distill_noise": 0.1}, "there is no teacher, so --distill-noise says nothing"),
        ({"head": "q8_0"}, r"no \.gguf file is asked for, so --head says nothing"),
        ({"second_factor": 0.1}, "there is no --second-stage, so --second-factor"),
        ({"embeddings": "freeze", "embedding_rate": 0.5}, "embeddings are frozen, so --embedding-rate"),
        ({"eval_data": ("e.txt",), "held_out_share": 0.1}, "--eval-data is the held-out text, so --held-out-share"),
        (
            {"sensitivity": "s.json", "estimator": "kl"},
            "--sensitivity is read instead of measured, so --estimator says",
        ),
    ],
    ids=str,
)
def test_what_would_be_typed_in_vain_is_refused(typed: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        options_from(None, {"model": "m", **typed})


def test_what_has_an_effect_is_taken(config: Callable[..., str]) -> None:
    typed = {"head": "q8_0", "second_factor": 0.1, "embedding_rate": 0.5, "held_out_share": 0.1, "estimator": "kl"}
    options = options_from(config(second_stage=0.5, target=["hf", "gguf:q2_0"]), typed)
    assert {name: getattr(options, name) for name in typed} == typed
    assert options_from(None, {"plan": "p.json", "head": "q8_0"}).head == "q8_0"  # the plan names the formats


def test_files_that_say_too_little_or_something_odd(config: Callable[..., str]) -> None:
    with pytest.raises(ConfigError, match="--config is empty"):
        options_from("", {"model": "m"})
    with pytest.raises(ConfigError, match=r"follows plan\.json, and says nothing of what that plan decided"):
        options_from(config(plan="plan.json"), {}, ("out", "plan"))
    assert options_from(config(plan="plan.json"), {"group_size": "64"}, ("out", "plan")).group_size == "64"
    with pytest.raises(ConfigError, match="options"):
        options_from(config(options=["a=1"]), {"options": ("b=2",)})


# --- single values ---------------------------------------------------------------------------------------------------


def test_targets_are_there_and_counted_once() -> None:
    assert Options(model="m", target=("hf", "gguf:q4_0", "hf")).target == ("hf", "gguf:q4_0")
    with pytest.raises(ConfigError, match="--target: no file format is given"):
        Options(model="m", target=())


def test_commas_part_thousands_and_nothing_else() -> None:
    assert count("131,072", "tokens") == 131_072 and count("1,500k", "tokens") == 1_500_000
    for text in ("1,5M", "0,5M", "1,50", ",100", "1,,000"):
        with pytest.raises(ConfigError, match="--tokens must be a positive number"):
            count(text, "tokens")


def test_one_number_is_the_same_however_it_is_written() -> None:
    for name, ways in {
        "tokens": ("2M", "2000000"),
        "eval_tokens": ("131k", "131_000"),
        "lr": ("1e-3", "0.001"),
    }.items():
        assert len({_meant(Options(model="m", **{name: way}), name) for way in ways}) == 1  # type: ignore[arg-type]


# --- refused before the work -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--bits", "1.9", "--estimator", "hutchinson"), "--estimator hutchinson does not measure what a width costs"),
        (("--head", "q8_0"), "no .gguf file is asked for, so --head says nothing"),
    ],
    ids=str,
)
def test_a_run_that_could_not_end_does_not_begin(
    invoke: Invoke, toy_parent: Path, toy_text: Path, tmp_path: Path, more: tuple[str, ...], says: str
) -> None:
    out = tmp_path / "run"
    status, _, err = invoke("quantize", toy_parent, "--data", toy_text, "--out", out, *QUICK, *CALIBRATED, *more)
    assert status == 2 and says in err and not out.exists()


def test_a_teacher_with_fewer_positions_than_a_block_is_refused(
    invoke: Invoke, toy_parent: Path, toy_text: Path, tmp_path: Path
) -> None:
    teacher = Path(shutil.copytree(toy_parent, tmp_path / "teacher"))
    record = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**record, "max_position_embeddings": 16}))
    words = ["quantize", toy_parent, "--data", toy_text, "--out", tmp_path / "run", *QUICK, "--teacher", teacher]
    status, _, err = invoke(*words)
    assert status == 2 and "has 16 positions, a block 32 tokens: give --seq-len 16" in err


def test_tasks_are_looked_at_before_any_model_is_loaded(
    invoke: Invoke, toy_parent: Path, toy_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load_model", lambda *given, **more: pytest.fail("loaded"))
    scored = ("eval", toy_parent, "--data", toy_text)
    assert "no such folder" in invoke(*scored, "--tasks", "t", "--tasks-dir", tmp_path / "none")[2]
    (tmp_path / "t.jsonl").write_text("{}\n", encoding="utf-8")
    assert "t.jsonl" in invoke(*scored, "--tasks", "t", "--tasks-dir", tmp_path)[2]
    assert "limit is a number of items" in invoke(*scored, "--tasks", "t", "--tasks-dir", tmp_path, "--limit", "0")[2]
    assert "--limit is of --tasks" in invoke(*scored, "--limit", "3")[2]
    assert "--tasks-dir is of --tasks" in invoke(*scored, "--tasks-dir", tmp_path)[2]


def test_models_of_other_tokenizers_are_not_compared(
    invoke: Invoke, toy_parent: Path, toy_text: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(toy_parent, tmp_path / "other"))
    record = json.loads((other / "tokenizer.json").read_text())
    vocabulary = record["model"]["vocab"]
    a, b = sorted(vocabulary, key=vocabulary.get)[10:12]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(record))
    status, _, err = invoke("eval", toy_parent, "--data", toy_text, "--against", other, "--seq-len", "32")
    assert status == 2 and "has another tokenizer: its token 10 is" in err


def test_places_of_results_are_looked_at_first(
    invoke: Invoke, toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = next((toy_run / "exports" / "gguf-q4_0").iterdir())
    monkeypatch.setattr("hestia.export.speed.compare_speed", lambda *given, **more: pytest.fail("measured"))
    for out, says in ((tmp_path, "is a folder"), (tmp_path / "b.gguf", "the file is JSON"), ("", "is a folder")):
        status, _, err = invoke("bench", file, "--out", out)
        assert status == 2 and says in err
    monkeypatch.setattr("hestia.export.verify.verify", lambda *given, **more: pytest.fail("compared"))
    status, _, err = invoke("verify", toy_run / "exports" / "hf", "--samples")
    assert status == 2 and "--samples has llama.cpp continue them" in err
    status, _, err = invoke("export", toy_run, "--to", "hf", "--head", "f16", "--out", tmp_path / "hf")
    assert status == 2 and "--head f16 is of .gguf files, and hf is a folder" in err


def test_curvature_that_nothing_reads_is_said(
    invoke: Invoke, toy_run: Path, toy_parent: Path, toy_text: Path, tmp_path: Path
) -> None:
    words = ("plan", toy_parent, "--sensitivity", toy_run / "sensitivity.json", "--out", tmp_path / "plan.json")
    says = "recipe hearth reads no curvature and all tensors get one width, so this has no effect: --sens"
    assert says in invoke(*words)[2]
    assert "no effect" not in invoke(*words, "--recipe", "hestia")[2]
    words = ("quantize", toy_parent, "--data", toy_text, "--out", tmp_path / "run", *QUICK, "--dry-run")
    assert "so this has no effect: --estimator kl, --calibrate 2" in invoke(*words, "--estimator", "kl")[2]
    assert "no effect" not in invoke(*words, *CALIBRATED)[2]


# --- what a run began with -------------------------------------------------------------------------------------------


def test_a_resumed_run_keeps_batch_steps_and_precision(
    toy_parent: Path, toy_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default they follow from the device and the number of processes, which may be others now."""
    options = Options(
        model=str(toy_parent), data=(str(toy_text),), out=str(tmp_path / "run"), seq_len=32, tokens="200k"
    )
    fresh = Workspace(options)
    assert (fresh.batch_size, fresh.steps, fresh.bf16) == (16, 390, False)
    (tmp_path / "run").mkdir()
    begun = {"learning_rate": 1e-3, "steps": 520, "batch_size": 12, "precision": "bf16"}
    (tmp_path / "run" / "training.json").write_text(json.dumps(begun))
    assert Workspace(options).settled == {}
    resumed = Workspace(options, resume=True)
    assert (resumed.batch_size, resumed.steps, resumed.bf16) == (12, 520, True)
    monkeypatch.setattr("hestia.processes.world_size", lambda: 5)
    with pytest.raises(ConfigError, match="--batch-size 12 cannot be shared out evenly between 5 processes"):
        _ = Workspace(options, resume=True).batch_size


def test_the_report_tells_the_machine_that_trained(
    invoke: Invoke, toy_parent: Path, toy_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lean: None
) -> None:
    run = tmp_path / "run"
    words = ["quantize", toy_parent, "--data", toy_text, "--out", run, *QUICK, *CALIBRATED]
    assert invoke(*words)[0] == 0
    training = json.loads((run / "training.json").read_text())
    (run / "training.json").write_text(json.dumps({**training, "machine": {"device": "cuda", "gpu": "G"}}))
    assert invoke(*words, "--resume")[0] == 0
    assert json.loads((run / "report.json").read_text())["machine"] == {"device": "cuda", "gpu": "G"}
    assert not (run / "exports.json").exists()


def test_exports_of_a_call_that_ended_between_two_are_not_made_again(
    invoke: Invoke, toy_parent: Path, toy_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lean: None
) -> None:
    run = tmp_path / "run"
    words = ["quantize", toy_parent, "--data", toy_text, "--out", run, *QUICK, *CALIBRATED]
    words += ["--target", "hf", "gguf:q4_0"]
    made: list[str] = []
    whole = delivery.export_and_verify

    def failing(frozen: Any, target: str, *given: Any, **more: Any) -> Any:
        made.append(target)
        if target == "gguf:q4_0" and made.count(target) == 1:
            raise OSError(28, "No space left on device")
        return whole(frozen, target, *given, **more)

    monkeypatch.setattr(delivery, "export_and_verify", failing)
    assert invoke(*words)[0] == 1
    assert invoke(*words, "--resume")[0] == 0
    assert made == ["hf", "gguf:q4_0", "gguf:q4_0"]
    assert [e["target"] for e in json.loads((run / "report.json").read_text())["exports"]] == ["hf", "gguf:q4_0"]


@pytest.mark.parametrize(("positions", "tokens"), [(4096, 1024), (64, 64)])
def test_a_block_is_as_long_as_the_model_reads_but_no_longer_than_a_thousand(positions: int, tokens: int) -> None:
    config = LlamaConfig(max_position_embeddings=positions)
    assert settings.longest_block(config, Options(model="m")) == tokens


# --- a signal in the last step ---------------------------------------------------------------------------------------


def test_a_signal_in_the_last_step_stops_the_run_when_the_model_is_frozen(
    invoke: Invoke, toy_parent: Path, toy_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lean: None
) -> None:
    run = tmp_path / "run"
    words = ["quantize", toy_parent, "--data", toy_text, "--out", run, *QUICK, *CALIBRATED]
    with monkeypatch.context() as patch:
        patch.setattr(
            HestiaTrainer, "stopped", property(lambda trainer: 143 if trainer.state.global_step == 8 else None)
        )
        status, _, err = invoke(*words)
    assert status == 143 and "stopped when the training was done; the model is frozen" in err
    assert (run / "codes.safetensors").is_file() and not (run / "scores.json").exists()
    monkeypatch.setattr(HestiaTrainer, "fit", lambda *given: pytest.fail("trained again"))
    assert invoke(*words, "--resume")[0] == 0


def test_a_signal_in_the_last_step_of_a_trial_stops_the_pilot(
    invoke: Invoke, toy_parent: Path, toy_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HestiaTrainer, "stopped", property(lambda work: 130 if work.state.global_step else None))
    words = ["quantize", toy_parent, "--data", toy_text, "--out", tmp_path / "run", *QUICK, *CALIBRATED, "--lr", "auto"]
    status, _, err = invoke(*words, "--steps", "40")
    assert status == 130 and "stopped in the learning-rate pilot" in err
    assert not (tmp_path / "run" / "training.json").exists()
