"""inputs.json: what pins the text of a run, now and as earlier versions wrote it, and hub data sets that move on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from toy_runs import CALIBRATED, QUICK, Invoke, stories

from hestia import loading
from hestia.data import sources, tables
from hestia.errors import ConfigError
from hestia.files import read_json, write_json
from hestia.options import Options
from hestia.pipeline.inputs import check_inputs, keep_inputs

pytestmark = pytest.mark.usefixtures("lean")

Begin = Callable[[str], Any]


@pytest.fixture
def begin(toy_parent: Path, tmp_path: Path) -> Begin:
    """A function (what --data names) -> what ``check_inputs`` looks at, of a run whose inputs are kept."""

    def begun(given: str) -> Any:
        record = {"data": [{"given": given, "files": sources.fingerprint(sources.resolve(given))}], "eval_data": None}
        work: Any = SimpleNamespace(
            folder=tmp_path / "run",
            options=Options(model=str(toy_parent), data=(given,)),
            source=loading.resolve(str(toy_parent)),
            teacher=None,
            text=SimpleNamespace(record=record),
            hub_data=dict,
        )
        keep_inputs(work)
        return work

    return begun


def save_splits(folder: Path, *, train: str = "a text", validation: str = "another") -> None:
    """A saved data set of two splits, whose files have the same names."""
    shutil.rmtree(folder, ignore_errors=True)
    parts = {"train": train, "validation": validation}
    datasets.DatasetDict({k: datasets.Dataset.from_dict({"text": [v]}) for k, v in parts.items()}).save_to_disk(folder)


def test_every_file_of_a_saved_data_set_is_kept(begin: Begin, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    save_splits(folder)
    work = begin(str(folder))
    (kept,) = read_json(tmp_path / "run" / "inputs.json")["inputs"]["data"].values()
    assert {"train/data-00000-of-00001.arrow", "validation/data-00000-of-00001.arrow", "dataset_dict.json"} < set(kept)
    check_inputs(work)
    for changed in ("train", "validation"):
        save_splits(folder, **{changed: "changed"})
        with pytest.raises(ConfigError, match=rf"other inputs: data\..*{changed}/data-00000-of-00001\.arrow is"):
            check_inputs(work)
    save_splits(folder)
    check_inputs(work)


def test_a_run_that_an_earlier_version_began_goes_on(begin: Begin, tmp_path: Path) -> None:
    """It kept files by their last names alone: of those with one name, the last."""
    folder, path = tmp_path / "set", tmp_path / "run" / "inputs.json"
    save_splits(folder)
    work = begin(str(folder))
    record = read_json(path)
    data = record["inputs"]["data"]
    data[str(folder)] = {Path(name).name: digest for name, digest in data[str(folder)].items()}
    assert len(data[str(folder)]) == 4
    write_json(path, record)
    check_inputs(work)
    save_splits(folder, validation="changed")
    with pytest.raises(ConfigError, match="began with other inputs"):
        check_inputs(work)


def test_a_file_is_kept_by_its_name(begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a text", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    begin("a.txt")
    kept = read_json(tmp_path / "run" / "inputs.json")["inputs"]["data"]
    assert kept == {"a.txt": {"a.txt": sources.sha256(Path("a.txt"))}}


def test_keeping_reads_no_text_again(begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a text", encoding="utf-8")
    work = begin(str(tmp_path / "a.txt"))
    (tmp_path / "run" / "inputs.json").unlink()
    monkeypatch.setattr("hestia.pipeline.inputs.fingerprint", lambda _: pytest.fail("was read again"))
    keep_inputs(work)
    assert read_json(tmp_path / "run" / "inputs.json")["inputs"]["data"]


def test_a_run_on_a_hub_data_set_goes_on_with_its_commit_whatever_the_hub_says_today(
    invoke: Invoke, toy_parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hub = SimpleNamespace(today="first", rows=stories(400, 1))
    asked: list[str | None] = []

    def builder(name: str, config: str | None, *, revision: str | None) -> Any:
        if not hub.today:
            raise ConnectionError("no network")
        asked.append(revision)
        table = datasets.Dataset.from_dict({"text": hub.rows}).to_iterable_dataset()
        part = SimpleNamespace(name=config or "default")
        return SimpleNamespace(hash=revision or hub.today, config=part, as_streaming_dataset=lambda split: table)

    monkeypatch.setattr(tables.datasets, "load_dataset_builder", builder)
    words = ["quantize", toy_parent, "--data", "owner/name", "--out", "run", *QUICK, *CALIBRATED, "--calibrate", "0"]
    for hub.today in ("first", "second", ""):
        status, _, err = invoke(*words, "--resume")
        assert status == 0, err
        assert read_json(Path("run/inputs.json"))["inputs"]["data"]["owner/name"]["hub"]["revision"] == "first"
        Path("run/codes.safetensors").unlink()
    assert asked == [None, "first"], "the cache holds what was read"
    data = read_json(Path("run/report.json"))["data"]
    assert data["hub_rows"][0]["rest"] == "not looked at" and data["hub_rows"][0]["rows_read"] < 400
    hub.today = "second"
    shutil.rmtree("run/cache")
    assert invoke(*words, "--resume")[0] == 0
    assert asked == [None, "first", "first"]
