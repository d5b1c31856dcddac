"""Everything a user can get wrong: the documented exit status, one clear message, nothing written."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_runs import CALIBRATED, QUICK, Invoke, make_tokenizer

Refuse = Callable[..., str]


@pytest.fixture
def refuse(invoke: Invoke, tmp_path: Path) -> Refuse:
    """``refuse(verb, ...)``: the one message of a command that exits with 2 and writes nothing."""

    def call(*arguments: str | Path, status: int = 2) -> str:
        before = snapshot(tmp_path)
        got, out, err = invoke(*arguments)
        lines = [line for line in err.splitlines() if line.strip()]
        assert got == status, err
        assert out == ""
        assert "Traceback" not in err
        assert sum(line.startswith("hestia: ") for line in lines) == 1, err
        said, message = err.split("hestia: ", 1)
        assert not said or said.startswith("exporting "), said  # what it was about to do, nothing else
        assert snapshot(tmp_path) == before
        return message.strip()

    return call


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every path under ``folder`` and its content."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture
def job(toy_parent: Path, toy_text: Path, tmp_path: Path) -> Callable[..., list[str | Path]]:
    """The arguments of a good quantize of the toy; keywords replace the model and the data."""

    def arguments(*more: str | Path, model: Path = toy_parent, data: Path = toy_text) -> list[str | Path]:
        return ["quantize", model, "--data", data, "--out", tmp_path / "run", *QUICK, *CALIBRATED, *more]

    return arguments


Job = Callable[..., list[str | Path]]

# --- text ------------------------------------------------------------------------------------------------------------


def test_a_missing_data_file_names_the_nearest(refuse: Refuse, job: Job, tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a", encoding="utf-8")
    message = refuse(*job(data=tmp_path / "trian.txt"))
    assert f"did you mean {tmp_path / 'train.txt'}?" in message


def test_an_empty_data_file(refuse: Refuse, job: Job, tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.touch()
    assert "empty.txt: holds no text" in refuse(*job(data=path))
    path.write_text("\n<|endofstory|>\n \n", encoding="utf-8")
    assert "empty.txt: holds no text" in refuse(*job(data=path))


def test_documents_that_are_all_shorter_than_a_block(refuse: Refuse, job: Job, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("\n<|endofstory|>\n".join(f"{number}" + " the cat" * 11 for number in range(3)), encoding="utf-8")
    message = refuse(*job(data=path))
    assert "3 documents: none is as long as a block of --seq-len 32 (the longest has" in message
    assert "give --eval-data" in message


@pytest.mark.parametrize("words", [3, 25, 45])
def test_text_that_fills_too_few_blocks(refuse: Refuse, job: Job, tmp_path: Path, words: int) -> None:
    """Three words do not fill a block of 32 tokens, 25 fill one, 45 two: one to train on and one held out."""
    path = tmp_path / "short.txt"
    path.write_text("the cat " * words, encoding="utf-8")
    message = refuse(*job(data=path))
    assert "--seq-len" in message
    assert re.search(r"at least \S+ are needed", message)


def test_held_out_text_that_is_the_training_text(refuse: Refuse, job: Job, toy_text: Path) -> None:
    assert "every document is also in --eval-data" in refuse(*job("--eval-data", toy_text))


def test_text_that_is_not_utf_8(refuse: Refuse, job: Job, tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("Möbel".encode("latin-1"))
    assert "not UTF-8" in refuse(*job(data=path))


def test_a_separator_that_is_nowhere(refuse: Refuse, job: Job) -> None:
    assert "no line of the .txt files equals it" in refuse(*job("--separator", "***"))


# --- model -----------------------------------------------------------------------------------------------------------


def test_no_such_model_folder(refuse: Refuse, job: Job, tmp_path: Path) -> None:
    assert "no such model folder" in refuse(*job(model=tmp_path / "nothing"))


def test_a_model_folder_without_tokenizer(refuse: Refuse, job: Job, parent_copy: Path) -> None:
    for path in parent_copy.glob("tokenizer*"):
        path.unlink()
    assert "no tokenizer in the folder" in refuse(*job(model=parent_copy))


def test_a_damaged_tokenizer(refuse: Refuse, job: Job, parent_copy: Path) -> None:
    (parent_copy / "tokenizer.json").write_text('{"model":', encoding="utf-8")
    assert "cannot read the tokenizer" in refuse(*job(model=parent_copy))


@pytest.mark.parametrize("kept", [0, 4, 300, -1])
def test_truncated_safetensors(refuse: Refuse, job: Job, parent_copy: Path, kept: int) -> None:
    path = parent_copy / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:kept])
    assert "model.safetensors: damaged or truncated safetensors file" in refuse(*job(model=parent_copy))


def test_a_checkpoint_that_is_only_pickle_is_not_opened(refuse: Refuse, job: Job, parent_copy: Path) -> None:
    (parent_copy / "model.safetensors").unlink()
    (parent_copy / "pytorch_model.bin").write_bytes(b"\x80\x04would be run by torch.load")
    message = refuse(*job(model=parent_copy))
    assert "pytorch_model.bin" in message
    assert "pickled weights can run code" in message


def test_a_folder_without_config(refuse: Refuse, job: Job, parent_copy: Path) -> None:
    (parent_copy / "config.json").unlink()
    assert "no config.json" in refuse(*job(model=parent_copy))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"model_type": "llamma"}',
        pytest.param('{"model_type": "t5"}', marks=pytest.mark.slow),
        '{"model_type": "llama", "hidden_size": "x"}',
    ],
)
def test_a_damaged_config(refuse: Refuse, job: Job, parent_copy: Path, content: str) -> None:
    (parent_copy / "config.json").write_text(content, encoding="utf-8")
    assert str(parent_copy) in refuse(*job(model=parent_copy))


def test_a_config_that_does_not_fit_the_weights(refuse: Refuse, job: Job, parent_copy: Path) -> None:
    path = parent_copy / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "intermediate_size": 96}), encoding="utf-8")
    assert "weights of another shape than in config.json" in refuse(*job(model=parent_copy))
    path.write_text(json.dumps({**config, "num_hidden_layers": 3}), encoding="utf-8")
    assert "lacks" in refuse(*job(model=parent_copy))


def test_weights_that_are_not_finite(refuse: Refuse, job: Job, parent_copy: Path) -> None:
    tensors = load_file(parent_copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, parent_copy / "model.safetensors", metadata={"format": "pt"})
    message = refuse(*job("--calibrate", "0", model=parent_copy))
    assert "model.layers.1.mlp.up_proj.weight" in message


def test_a_tokenizer_of_another_model(refuse: Refuse, job: Job, parent_copy: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["the cat"])
    tokenizer.save_pretrained(parent_copy)
    message = refuse(*job(model=parent_copy))
    assert "makes token id 320, the model knows 320 tokens" in message


def test_code_in_a_model_folder_is_not_run(refuse: Refuse, job: Job, parent_copy: Path, tmp_path: Path) -> None:
    mark = tmp_path / "was run"
    (parent_copy / "modeling_evil.py").write_text(
        f"open({str(mark)!r}, 'w').close()\nclass C: pass\nclass M: pass\n", encoding="utf-8"
    )
    path = parent_copy / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    own = {"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    path.write_text(json.dumps({**config, "model_type": "evil", "auto_map": own}), encoding="utf-8")
    assert "--trust-remote-code" in refuse(*job(model=parent_copy))
    assert not mark.exists()


def test_known_architectures_ignore_code_in_the_folder(invoke: Invoke, parent_copy: Path, tmp_path: Path) -> None:
    mark = tmp_path / "was run"
    (parent_copy / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass M: pass\n", encoding="utf-8")
    path = parent_copy / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "evil.M"}}), encoding="utf-8")
    status, _, err = invoke("plan", parent_copy, "--out", tmp_path / "plan.json")
    assert status == 0, err
    assert not mark.exists()


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--recipe", "hestai"), "did you mean 'hestia'?"),
        (("--option", "alfa=0"), "did you mean 'alpha'?"),
        (("--option", "alpha"), "KEY=VALUE"),
        (("--option", "alpha=hot"), "alpha"),
        (("--option", "rho=2"), "rho"),
        (("--estimator", "gmb"), "did you mean 'gnb'?"),
        (("--teacher", "/nothing"), "/nothing"),
        (("--target", "gguf:tq2"), "did you mean 'gguf:tq2_0'?"),
        (("--group-size", "48"), "48"),
        (("--group-size", "zero"), "--group-size"),
        (("--bits", "3"), "cannot express the levels int3"),
        (("--bits", "1.9", "--calibrate", "0"), "leaves nothing to spend --bits 1.9 by"),
        (("--bits", "1.9"), "ask for --bits 2."),
        (("--max-kl", "0"), "--max-kl must be a positive number"),
        (("--widths", "5"), "--widths '5': allowed: 1, 1.58, 16, 2, 3, 4"),
        (("--lr", "quick"), "--lr"),
        (("--tokens", "-5"), "--tokens"),
        (("--warmup", "1.5"), "warmup"),
        (("--warmup", "0.9", "--lr-decay", "0.5"), "overlap"),
        (("--second-stage", "2"), "second_stage"),
        (("--seq-len", "65"), "longer than the model's 64 positions"),
        (("--seq-len", "1"), "at least 2 tokens"),
        (("--accumulation", "3"), "--accumulation 3 does not divide --batch-size 4"),
        (("--skip", "model.layers.9.*"), "matches no linear layer"),
        (("--skip", "*_proj"), "quantiz"),
        (("--report-to", "tensorbord"), "did you mean 'tensorboard'?"),
        (("--device", "cuda"), "CUDA"),
        (("--sensitivity", "/nothing/s.json"), "no such file"),
        (("--threads", "0"), "--threads"),
    ],
)
def test_a_bad_option_is_refused_before_anything_is_written(
    more: tuple[str, ...], message: str, refuse: Refuse, job: Job
) -> None:
    if "cuda" in more and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert message in refuse(*job(*more))


def test_a_target_that_cannot_hold_the_rows_names_tensors_and_what_would(refuse: Refuse, job: Job) -> None:
    message = refuse(*job("--target", "gguf:tq2_0"))
    assert "model.layers.0.self_attn.q_proj" in message
    assert "gguf:q4_0" in message or "Q4_0" in message


def test_an_unknown_key_in_the_configuration_names_the_nearest(refuse: Refuse, job: Job, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("tokenz: 3M\n", encoding="utf-8")
    assert "c.yaml: unknown option 'tokenz': did you mean 'tokens'?" in refuse(*job("--config", path))
    assert "no such configuration file" in refuse(*job("--config", tmp_path / "d.yaml"))


def test_a_sensitivity_of_another_model(refuse: Refuse, job: Job, toy_run: Path, tmp_path: Path) -> None:
    record = json.loads((toy_run / "sensitivity.json").read_text(encoding="utf-8"))
    text = json.dumps(record).replace("up_proj", "up_prol")
    path = tmp_path / "s.json"
    path.write_text(text, encoding="utf-8")
    assert "up_pro" in refuse(*job("--sensitivity", path))
    path.write_text("{}", encoding="utf-8")
    assert "schema" in refuse(*job("--sensitivity", path))


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_run_is_left_alone(refuse: Refuse, job: Job, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work", encoding="utf-8")
    for more in ((), ("--resume",)):
        assert "exists and is not a run of hestia; choose another --out" in refuse(*job(*more))


def test_a_file_where_the_run_should_be(refuse: Refuse, job: Job, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file", encoding="utf-8")
    assert "exists and is not a run of hestia" in refuse(*job())


def test_a_parent_of_the_run_that_cannot_be_made(refuse: Refuse, job: Job, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file", encoding="utf-8")
    assert str(tmp_path / "file") in refuse(*job("--out", tmp_path / "file" / "run"))


def test_a_teacher_with_other_tokens(refuse: Refuse, job: Job, parent_copy: Path) -> None:
    config = json.loads((parent_copy / "config.json").read_text(encoding="utf-8"))
    (parent_copy / "config.json").write_text(json.dumps({**config, "vocab_size": 999}), encoding="utf-8")
    assert "has a vocabulary of 999, the parent one of 320" in refuse(*job("--teacher", parent_copy))


def test_a_different_run_and_the_same_run_twice(
    refuse: Refuse, toy_run: Path, toy_parent: Path, toy_text: Path, toy_held_out: Path
) -> None:
    same = ["quantize", toy_parent, "--data", toy_text, "--eval-data", toy_held_out, "--out", toy_run, *QUICK]
    same += ["--target", "hf", "gguf:q4_0", *CALIBRATED]
    before = snapshot(toy_run)
    assert "already holds this run; continue it with --resume" in refuse(*same)
    for more in ((), ("--resume",)):
        message = refuse(*same, "--seed", "1", *more)
        assert "holds a different run: seed is 0 there and 1 here" in message
        assert message.endswith("Choose another --out")
    more_files = refuse(*same[: same.index("--target")], "--target", "hf", "gguf:q2_0", *CALIBRATED)
    assert f"add files to a finished run by `hestia export {toy_run} --to NAME`" in more_files
    assert snapshot(toy_run) == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--teacher", "parent"), "by hestia, taught by its parent (forward_kl), on cpu in "),
        (("--recipe", "round_to_nearest", "--target", "hf"), "scored on"),
        (("--bits", "2.8", "--target", "gguf:mixed"), "bits by damage per quantized weight\ncurvature from"),
    ],
)
def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    invoke: Invoke, job: Job, tmp_path: Path, more: tuple[str, ...], said: str
) -> None:
    before = snapshot(tmp_path)
    status, out, err = invoke(*job(*more), "--dry-run")
    assert (status, snapshot(tmp_path)) == (0, before), err
    assert said in out and f"nothing was written; without --dry-run it goes to {tmp_path / 'run'}" in out
    assert ("steps of" in out) == ("round_to_nearest" not in more)
    status, out, _ = invoke(*job(*more), "--dry-run", "--json")
    record = json.loads(out)
    assert status == 0 and record["tensors"]["quantized"] > 0 and record["blocks"]["train"] > 0


def test_a_dry_run_refuses_what_the_run_would_refuse(
    refuse: Refuse, job: Job, toy_run: Path, toy_parent: Path, toy_text: Path, toy_held_out: Path, tmp_path: Path
) -> None:
    assert "has a vocabulary of" not in refuse(*job(data=tmp_path / "nothing.txt"), "--dry-run")
    same = ["quantize", toy_parent, "--data", toy_text, "--eval-data", toy_held_out, "--out", toy_run, *QUICK]
    same += ["--target", "hf", "gguf:q4_0", *CALIBRATED, "--dry-run"]
    before = snapshot(toy_run)
    assert "already holds this run; continue it with --resume" in refuse(*same)
    assert "--plan is missing" in refuse("train", toy_parent, "--data", toy_text, "--out", toy_run, "--dry-run")
    assert snapshot(toy_run) == before


def test_the_same_text_by_another_path_is_the_same_run(
    invoke: Invoke,
    refuse: Refuse,
    toy_run: Path,
    toy_parent: Path,
    toy_text: Path,
    toy_held_out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(toy_text.parent)
    text, held_out = Path(toy_text.name), Path(os.path.relpath(toy_held_out))
    same = ["quantize", toy_parent, "--data", text, "--eval-data", held_out, "--out", toy_run, *QUICK]
    same += ["--target", "hf", "gguf:q4_0", *CALIBRATED]
    assert "already holds this run" in refuse(*same)
    status, out, err = invoke(*same, "--resume", "--dry-run")
    assert status == 0 and "nothing was written" in out, err


def test_a_disk_that_the_run_would_fill(
    refuse: Refuse, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hestia.pipeline.run.free_disk", lambda folder: 100_000)
    message = refuse(*job(), status=1)
    assert "checkpoints and the frozen model take up to 0.00 GB" in message and "make room" in message
    assert not (tmp_path / "run").exists()


def test_a_run_yaml_that_was_damaged(refuse: Refuse, job: Job, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text("colour: blue\n", encoding="utf-8")
    assert "run.yaml: unknown option 'colour'" in refuse(*job("--resume"))


# --- the other verbs -------------------------------------------------------------------------------------------------


def test_verbs_that_want_a_run_refuse_what_is_none(refuse: Refuse, toy_run: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder in (empty, tmp_path / "none"):
        assert str(folder) in refuse("export", folder, "--to", "hf", "--out", tmp_path / "x")
        assert str(folder) in refuse("verify", toy_run / "exports" / "hf", "--against", folder)
        assert str(folder) in refuse("report", folder)
        assert str(folder) in refuse("compare", toy_run, folder)


def test_export_refuses_targets_and_places(refuse: Refuse, toy_run: Path, tmp_path: Path) -> None:
    assert "did you mean 'gguf:q4_k'?" in refuse("export", toy_run, "--to", "gguf:q4", "--out", tmp_path / "x.gguf")
    assert "down_proj" in refuse("export", toy_run, "--to", "gguf:tq2_0", "--out", tmp_path / "x.gguf")
    (tmp_path / "taken").mkdir()
    assert "exists already" in refuse("export", toy_run, "--to", "hf", "--out", tmp_path / "taken")


def test_verify_of_nothing(refuse: Refuse, toy_run: Path, tmp_path: Path) -> None:
    assert "none" in refuse("verify", tmp_path / "none", "--against", toy_run)


def test_train_refuses_what_is_no_plan_or_another_models(
    refuse: Refuse, toy_run: Path, toy_parent: Path, toy_text: Path, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    words = ["train", toy_parent, "--plan", path, "--data", toy_text, "--out", tmp_path / "run", *QUICK[:8]]
    assert "no such file" in refuse(*words)
    path.write_text("{}", encoding="utf-8")
    assert "schema" in refuse(*words)
    text = (toy_run / "plan.json").read_text(encoding="utf-8")
    path.write_text(text.replace("layers.1.", "layers.7."), encoding="utf-8")
    assert "the model has no such module; was it made for another model?" in refuse(*words)
    path.write_text(text.replace('"shape": [\n    128,', '"shape": [\n    96,'), encoding="utf-8")
    assert "mlp" in refuse(*words)


def test_recipes_names_the_nearest(refuse: Refuse) -> None:
    assert "did you mean 'bitnet_ste'?" in refuse("recipes", "show", "bitnet")


def test_calibrate_and_plan_into_a_place_that_is_none(
    refuse: Refuse, toy_parent: Path, toy_text: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("a file", encoding="utf-8")
    out = tmp_path / "file" / "x.json"
    assert str(tmp_path / "file") in refuse("plan", toy_parent, "--out", out)
    words = ("--calibrate", "2", "--seq-len", "16")
    assert str(tmp_path / "file") in refuse("calibrate", toy_parent, "--data", toy_text, "--out", out, *words)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_may_not_be_written(refuse: Refuse, job: Job, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "locked" in refuse(*job("--out", tmp_path / "locked" / "run"))


@pytest.mark.parametrize(
    ("error", "whose"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "the GPU's"),
        (RuntimeError("CUDA error: out of memory"), "the GPU's"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "the GPU's"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), "the"),
        (MemoryError(), "the"),
    ],
)
def test_full_memory_is_one_message(
    invoke: Invoke, job: Job, monkeypatch: pytest.MonkeyPatch, error: Exception, whose: str
) -> None:
    monkeypatch.setattr("hestia.loading.load_model", _raising(error))
    status, out, err = invoke(*job())
    assert (status, out) == (1, "")
    assert f"hestia: {whose} memory is full; what a run had saved is intact" in err
    assert "Traceback" not in err


def test_other_failures_are_not_hidden(invoke: Invoke, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hestia.loading.load_model", _raising(RuntimeError("a defect")))
    with pytest.raises(RuntimeError, match="a defect"):
        invoke(*job())


def _raising(error: Exception) -> Callable[..., None]:
    def load(*_: object, **__: object) -> None:
        raise error

    return load


def test_a_damage_that_cannot_pace_temperatures_is_refused_before_it_is_measured(refuse: Refuse, job: Job) -> None:
    said = refuse(*job("--estimator", "kl"))
    assert said.startswith("recipe 'hestia' paces its temperatures by curvature, and the estimator 'kl' measures 'kl'")
    assert "calibrate with --estimator gnb" in said


@pytest.mark.parametrize("damage", ["gone", "flipped"])
def test_a_dry_run_of_a_resume_leaves_the_cache_as_it_is(
    invoke: Invoke, toy_run: Path, toy_parent: Path, toy_text: Path, toy_held_out: Path, tmp_path: Path, damage: str
) -> None:
    run = shutil.copytree(toy_run, tmp_path / "run")
    tokens = run / "cache" / "tokens.safetensors"
    if damage == "gone":
        shutil.rmtree(run / "cache")
    else:
        data = bytearray(tokens.read_bytes())
        data[-5] ^= 1
        tokens.write_bytes(data)
    before = snapshot(run)
    same = ["quantize", toy_parent, "--data", toy_text, "--eval-data", toy_held_out, "--out", run, *QUICK]
    same += ["--target", "hf", "gguf:q4_0", *CALIBRATED, "--resume"]
    status, _, err = invoke(*same, "--dry-run")
    assert status == 0 and snapshot(run) == before, err
    status, _, err = invoke(*same)
    assert status == 0, err
    assert tokens.read_bytes() == (toy_run / "cache" / "tokens.safetensors").read_bytes()  # made anew, and kept
