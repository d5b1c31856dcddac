"""Runs in the rough: other processes, other inputs, full disks, kills; and no pickle, ever."""

from __future__ import annotations

import ast
import dataclasses
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forks
import pytest
from toy_runs import CALIBRATED, QUICK, Invoke, write_stories

import hestia
from hestia import loading
from hestia.files import read_json, require_inside, sweep, write_json
from hestia.lock import LOCK_FILE, locked
from hestia.training import checkpoints

Job = Callable[..., list[str | Path]]

pytestmark = pytest.mark.usefixtures("lean")


@pytest.fixture
def job(toy_parent: Path, tmp_path: Path) -> Job:
    """The arguments of a quantize of the toy into RUN; the text is this test's own."""
    text = write_stories(tmp_path / "train.txt", 120, seed=1)

    def arguments(*more: str | Path, model: Path = toy_parent) -> list[str | Path]:
        return [
            "quantize",
            model,
            "--data",
            text,
            "--out",
            tmp_path / "run",
            *QUICK,
            *CALIBRATED,
            "--save-every",
            "2",
            *more,
        ]

    return arguments


def stopped(job: Job, tmp_path: Path, *more: str | Path, step: int = 4) -> Path:
    """The folder of a run that was killed (SIGKILL) once the checkpoint of ``step`` was there."""
    child = forks.start(job(*more), tmp_path / "killed.log")
    checkpoint = tmp_path / "run" / "checkpoints" / f"step-{step:06d}"
    until = time.monotonic() + 60
    while not checkpoint.is_dir():
        assert time.monotonic() < until
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    assert forks.finish(child) == -signal.SIGKILL
    return tmp_path / "run"


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder and its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- other processes -------------------------------------------------------------------------------------------------


def test_a_second_process_on_one_run_is_refused_and_told_who_has_it(job: Job, tmp_path: Path, invoke: Invoke) -> None:
    run = stopped(job, tmp_path)
    child = os.fork()
    if not child:
        with locked(run):
            (tmp_path / "held").touch()
            time.sleep(60)
        os._exit(0)
    try:
        while not (tmp_path / "held").exists():
            time.sleep(0.005)
        before = bytes_of(run)
        status, out, err = invoke(*job("--resume"))
        assert (status, out) == (2, "")
        assert f"hestia: {run}: in use by process {child} on " in err
        assert bytes_of(run) == before
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    status, _, err = invoke(*job("--resume"))
    assert status == 0, err
    assert f"{run}: taking over from process {child} on " in err
    assert (run / LOCK_FILE).read_bytes() == b""


def test_what_a_kill_in_the_first_moments_leaves_does_not_stand_in_the_way(
    job: Job, tmp_path: Path, invoke: Invoke
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / LOCK_FILE).write_text('{"pid": 1}', encoding="utf-8")
    (run / ".run.yaml.4711.tmp").write_text("model:", encoding="utf-8")
    assert invoke(*job("--resume"))[0] == 0
    assert not (run / ".run.yaml.4711.tmp").exists()


def test_sweeping_takes_what_is_unfinished_and_nothing_else(tmp_path: Path) -> None:
    for name in (".a.json.7.tmp", "b.tmp", ".hidden", "c.json"):
        (tmp_path / name).touch()
    (tmp_path / ".folder.7.tmp").mkdir()
    (tmp_path / ".folder.7.tmp" / "x").touch()
    (tmp_path / ".link.7.tmp").symlink_to(tmp_path / "c.json")
    sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".hidden", ".link.7.tmp", "b.tmp", "c.json"]


# --- other inputs ----------------------------------------------------------------------------------------------------


def test_resuming_with_other_inputs_under_the_same_names_is_refused(
    job: Job, parent_copy: Path, tmp_path: Path, invoke: Invoke
) -> None:
    run = stopped(lambda *more: job(*more, model=parent_copy), tmp_path)
    text, weights = tmp_path / "train.txt", parent_copy / "model.safetensors"
    good = text.read_bytes(), weights.read_bytes()

    def refused() -> str:
        status, out, err = invoke(*job("--resume", model=parent_copy))
        assert (status, out) == (2, ""), err
        assert "the run began with other inputs: " in err
        return err

    cache = bytes_of(run / "cache")
    text.write_bytes(good[0] + b"one more sentence.\n")
    assert "data." in (message := refused()) and "train.txt is" in message
    assert bytes_of(run / "cache") == cache
    text.write_bytes(good[0])
    weights.write_bytes(good[1][:-1] + bytes([good[1][-1] ^ 1]))
    assert "model.model.safetensors is" in refused()
    weights.write_bytes(good[1])
    plan = (run / "plan.json").read_text(encoding="utf-8")
    (run / "plan.json").write_text(plan.replace('"rho": 0.2', '"rho": 0.3'), encoding="utf-8")
    status, _, err = invoke(*job("--resume", model=parent_copy))
    assert status == 2
    assert "made with another plan than this run's: plan.recipe.rho is 0.2 there and 0.3 here" in err
    (run / "plan.json").write_text(plan, encoding="utf-8")
    assert invoke(*job("--resume", model=parent_copy))[0] == 0


def test_resuming_with_another_sensitivity_under_the_same_name_is_refused(
    job: Job, toy_run: Path, tmp_path: Path, invoke: Invoke, lean: None
) -> None:
    given = tmp_path / "given.json"
    shutil.copyfile(toy_run / "sensitivity.json", given)
    words = job("--sensitivity", given)
    status, _, err = invoke(*words)
    assert status == 0, err
    given.write_text(given.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    status, _, err = invoke(*words, "--resume")
    assert status == 2 and "the run began with other inputs: sensitivity is" in err


def test_a_run_from_the_hub_goes_on_with_its_commits_whatever_the_hub_says_today(
    job: Job, toy_parent: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub: every commit of owner/parent and owner/teacher holds the toy; which one was read is kept."""
    hub, read, from_the_hub = SimpleNamespace(today="first"), set[tuple[str, str]](), loading.reading.read

    def model_info(self: Any, name: str, *, revision: str | None, timeout: float) -> Any:
        if not hub.today:
            raise OSError("no network")
        return SimpleNamespace(sha=f"{hub.today} of {name}")

    def reading(source: loading.Source, what: str, reader: Any, **options: Any) -> Any:
        if source.commit is not None:
            read.add((source.location, source.commit))
            source = dataclasses.replace(source, location=str(toy_parent))
        return from_the_hub(source, what, reader, **options)

    monkeypatch.setattr(loading.sources.HfApi, "model_info", model_info)
    monkeypatch.setattr(loading.reading, "read", reading)
    monkeypatch.setattr(loading.saving, "snapshot_download", lambda *_, **__: toy_parent)
    words = ["--teacher", "owner/teacher", "--resume", "--calibrate", "0"]
    run, begun = tmp_path / "run", {(name, f"first of {name}") for name in ("owner/parent", "owner/teacher")}
    for hub.today in ("first", "second", ""):
        status, _, err = invoke(*job(*words, model=Path("owner/parent")))
        assert status == 0, err
        assert read == begun
        (run / "codes.safetensors").unlink()
    assert read_json(run / "report.json")["model"]["commit"] == "first of owner/parent"
    hub.today = "second"
    status, _, err = invoke(*job(*words, model=Path("owner/other")))
    assert status == 2
    assert "holds a different run: model is 'owner/parent' there and 'owner/other' here" in err


def test_a_run_is_one_run_however_its_folders_are_written_and_wherever_it_saves(
    job: Job, toy_parent: Path, tmp_path: Path, invoke: Invoke
) -> None:
    run = stopped(lambda *more: job("--teacher", toy_parent, *more), tmp_path)
    words = job("--teacher", toy_parent, "--resume", "--save-every", "1", "--log-every", "1")
    status, _, err = invoke(*(f"{word}/" if word in (toy_parent, run) else word for word in words))
    assert status == 0, err
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000007", "step-000008"]


def test_seconds_of_a_killed_process_are_not_forgotten(job: Job, tmp_path: Path, invoke: Invoke) -> None:
    run = stopped(job, tmp_path)
    state = read_json(run / "checkpoints" / "step-000004" / "state.json")
    before = state["memory"]["seconds"]
    assert before > 0
    began = read_json(run / "timing.json")["started"]
    long = {**state["memory"], "seconds": 1000.0}
    record = {key: value for key, value in {**state, "memory": long}.items() if key != "sha256"}
    write_json(run / "checkpoints" / "step-000004" / "state.json", {**record, "sha256": checkpoints._own_hash(record)})
    assert invoke(*job("--resume"))[0] == 0
    report = read_json(run / "report.json")
    assert report["seconds"]["train"] > 1000.0
    assert report["seconds"]["total"] >= sum(v for k, v in report["seconds"].items() if k != "total")
    assert report["started"] == began[:19] + began[-6:], "the first process's, to the second"
    assert invoke(*job("--resume"))[0] == 0
    assert read_json(run / "report.json")["started"] == report["started"]


def test_links_out_of_the_run_and_links_inside_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "exports").mkdir(parents=True)
    (run / "exports" / "inside").symlink_to(run)
    require_inside(run)
    elsewhere = tmp_path / "through"
    elsewhere.symlink_to(run)  # the whole run may lie behind a link
    require_inside(elsewhere)
    (run / "exports" / "out").symlink_to(tmp_path)
    with pytest.raises(hestia.errors.ConfigError, match="out: a symbolic link out of the run's folder"):
        require_inside(run)


# --- disks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [600, 40_000, 200_000, 700_000])
def test_a_limit_on_file_size_stops_the_run_with_one_message_and_it_goes_on_without(
    job: Job, tmp_path: Path, limit: int
) -> None:
    """The system itself refuses to write: run.yaml, the token cache, the first checkpoint, its optimizer state."""
    status, said = forks.run(job(), tmp_path / "log", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert status == 1, said
    assert said.count("hestia: ") == 1
    assert "hestia: the disk is full ([Errno 27] File too large" in said
    assert "Traceback" not in said
    run = tmp_path / "run"
    assert not [p for p in run.rglob("*") if p.name.endswith(".tmp")]
    status, said = forks.run(job("--resume"), tmp_path / "log")
    assert status == 0, said


def test_a_small_disk_in_memory(job: Job, tmp_path: Path) -> None:
    """A tmpfs of 1.5 MB would hold the run's first files; before them it is said what is lacking."""
    run = tmp_path / "run"
    run.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(run)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("this process may not mount a tmpfs")
    try:
        status, said = forks.run(job(), tmp_path / "log")
        assert status == 1, said
        assert said.count("hestia: ") == 1
        assert "checkpoints and the frozen model take up to 0.00 GB, and 0.00 GB are free there; make room" in said
        assert not list(run.iterdir())
        subprocess.run(["mount", "-o", "remount,size=64m", str(run)], check=True)
        status, said = forks.run(job(), tmp_path / "log")
        assert status == 0, said
    finally:
        subprocess.run(["umount", str(run)], check=True)


@pytest.mark.parametrize("verb", ["calibrate", "export"])
def test_a_full_disk_under_other_verbs(
    verb: str, toy_parent: Path, toy_run: Path, toy_text: Path, tmp_path: Path
) -> None:
    arguments: list[str | Path] = ["export", toy_run, "--to", "gguf:q4_0", "--out", tmp_path / "x.gguf"]
    if verb == "calibrate":
        arguments = ["calibrate", toy_parent, "--data", toy_text, "--out", tmp_path / "s.json", "--calibrate", "2"]
        arguments += ["--seq-len", "32", "--threads", "1"]
    limit = 1000
    status, said = forks.run(
        arguments, tmp_path / "log", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    assert status == 1, said
    assert said.count("hestia: ") == 1
    assert "File too large" in said
    assert not (tmp_path / "s.json").exists()
    assert not (tmp_path / "x.gguf").exists()


# --- no pickle, no code ----------------------------------------------------------------------------------------------


def test_no_pickle_is_opened_or_written_in_a_whole_run_with_a_resume(job: Job, tmp_path: Path) -> None:
    """Python reports every global that an unpickler looks up; hestia's verbs look up none."""
    marks = tmp_path / "marks"
    marks.mkdir()

    def watch() -> None:
        def hook(event: str, arguments: Any) -> None:
            if event == "pickle.find_class":
                (marks / "-".join(map(str, arguments))).touch()

        sys.addaudithook(hook)
        import torch

        torch.load = torch.save = lambda *_, **__: (marks / "torch").touch()

    child = forks.start(job("--teacher", "parent"), tmp_path / "log", watch)
    while not (tmp_path / "run" / "checkpoints" / "step-000004").is_dir():
        time.sleep(0.002)
    os.kill(child, signal.SIGTERM)
    forks.finish(child)
    status, said = forks.run(job("--teacher", "parent", "--resume"), tmp_path / "log", watch)
    assert status == 0, said
    assert [p.name for p in marks.iterdir()] == []
    suffixes = {path.suffix for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert not suffixes & {".bin", ".pt", ".pth", ".pkl", ".ckpt"}


FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "torch.load", "torch.save", "yaml.load", "yaml.unsafe_load", "__import__"}


def test_the_source_names_nothing_that_opens_pickles_or_runs_text() -> None:
    root = Path(str(hestia.__file__)).parent
    found = []
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            if FORBIDDEN_MODULES & {name.partition(".")[0] for name in names}:
                found.append(f"{path.name}:{node.lineno}: import {names}")
            if isinstance(node, ast.Call):
                if ast.unparse(node.func) in FORBIDDEN_CALLS:
                    found.append(f"{path.name}:{node.lineno}: {ast.unparse(node.func)}")
                for word in node.keywords:
                    if word.arg == "allow_pickle" and ast.unparse(word.value) != "False":
                        found.append(f"{path.name}:{node.lineno}: allow_pickle")
                if ast.unparse(node.func) == "np.load" and "allow_pickle" not in {w.arg for w in node.keywords}:
                    found.append(f"{path.name}:{node.lineno}: np.load without allow_pickle=False")
    assert found == []


def test_a_link_in_a_model_folder_does_not_carry_a_secret_into_the_frozen_one(
    parent_copy: Path, job: Job, tmp_path: Path, invoke: Invoke
) -> None:
    (tmp_path / "secret").write_text("-----BEGIN PRIVATE KEY-----", encoding="utf-8")
    (parent_copy / "tokenizer.extra").symlink_to(tmp_path / "secret")
    status, _, err = invoke(*job("--calibrate", "0", model=parent_copy))
    assert status == 0, err
    assert "tokenizer.extra: not copied, it is a link to " in err
    assert not any(b"PRIVATE KEY" in content for content in bytes_of(tmp_path / "run").values())
    assert (tmp_path / "run" / "model" / "tokenizer.json").is_file()


def test_the_hubs_cache_may_link_to_its_blobs(toy_parent: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for path in toy_parent.iterdir():
        shutil.copyfile(path, blobs / f"hash-of-{path.name}")
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / f"hash-of-{path.name}")
    source = loading.resolve(str(snapshot))
    loading.save(loading.load_model(source), source, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (toy_parent / "tokenizer.json").read_bytes()


def test_the_kept_inputs_are_json_with_a_schema(job: Job, tmp_path: Path, invoke: Invoke) -> None:
    assert invoke(*job("--calibrate", "0"))[0] == 0
    path = tmp_path / "run" / "inputs.json"
    assert set(read_json(path, schema=1)["inputs"]) == {"model", "teacher", "data", "eval_data", "sensitivity"}
    write_json(path, {"schema": 9})
    status, _, err = invoke(*job("--calibrate", "0", "--resume"))
    assert status == 2
    assert "inputs.json: schema 9" in err


def test_two_processes_that_start_one_run_at_the_same_moment_are_one_run(job: Job, tmp_path: Path) -> None:
    children = [forks.start(job("--resume"), tmp_path / f"{k}.log") for k in range(2)]
    statuses = [forks.finish(child) for child in children]
    said = [(tmp_path / f"{k}.log").read_text(encoding="utf-8") for k in range(2)]
    assert sorted(statuses) in ([0, 2], [0, 0]), said  # 0 twice: the second began when the first had ended
    for status, text in zip(statuses, said, strict=True):
        assert "Traceback" not in text
        assert status == 0 or "in use by process " in text
    assert forks.run(job("--resume"), tmp_path / "again.log")[0] == 0
