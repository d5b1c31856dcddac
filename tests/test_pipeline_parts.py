"""Pieces of the main job by themselves: its stopwatch, round-to-nearest's plan, and the entries of report.json."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_models

import hestia
from hestia import recipes
from hestia.files import write_json
from hestia.options import Options
from hestia.pipeline import delivery, digest
from hestia.pipeline.fitting import _teacher
from hestia.pipeline.run import _made_later
from hestia.pipeline.scoring import round_to_nearest_twin
from hestia.pipeline.stopwatch import Stopwatch
from hestia.pipeline.workspace import Workspace
from hestia.tiny import model_path


def test_the_stopwatch_forgets_no_second_and_counts_none_twice(tmp_path: Path) -> None:
    watch = Stopwatch(tmp_path / "seconds.json", resume=False)
    watch.seconds = {"train": 50.0, "total": 10.0}  # of a process that was killed while it trained
    watch.at_least("train", 20.0)
    assert watch.seconds["train"] == 50.0
    watch.at_least("train", 55.0)
    assert watch.seconds["train"] == 55.0
    assert watch.total(5.0) == 55.0, "its stages are all that is known of it"
    assert watch.total(60.0) == 70.0
    watch.seconds = {"train": 3.0, "total": 40.0}
    assert watch.total(1.0) == 41.0


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_teacher_takes_half_the_bytes_where_training_rounds_it_anyway(
    tmp_path: Path, precision: str, dtype: torch.dtype
) -> None:
    options = Options(model=str(model_path()), data=("text.txt",), out=str(tmp_path / "run"), precision=precision)
    model = _teacher(Workspace(options))
    assert model.model.layers[0].mlp.up_proj.weight.dtype == dtype
    assert model.get_input_embeddings().weight.dtype == torch.float32


def test_the_twin_rounds_without_constraint_shift_or_training() -> None:
    model = toy_models.llama()
    twin = round_to_nearest_twin(hestia.plan(model, "sherry"))
    assert not twin.trains and twin.correction is None
    assert {(layer.spec.grid.block, layer.temperature_factor) for layer in twin.layers.values()} == {(0, 1.0)}
    by_two_bits = round_to_nearest_twin(hestia.plan(model, "lsq", bits=2.0, target="gguf:q4_0", fallback=True))
    best = recipes.get("round_to_nearest").spec_for(2.0, "row")
    assert {layer.spec for layer in by_two_bits.layers.values()} == {best}


def test_the_digest_of_a_folder_is_of_names_and_contents(tmp_path: Path) -> None:
    """What ``sha256sum`` of ``sha256sum``'s listing prints."""
    for name in ("b", "a"):
        (tmp_path / name).write_text(name.upper())
    lines = [f"{hashlib.sha256(name.upper().encode()).hexdigest()}  ./{name}\n" for name in ("a", "b")]
    assert digest(tmp_path) == hashlib.sha256("".join(lines).encode()).hexdigest()
    before = digest(tmp_path)
    (tmp_path / "a").rename(tmp_path / "c")
    assert digest(tmp_path) != before


def test_a_second_export_to_one_path_takes_the_place_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[str, Any] = {}
    monkeypatch.setattr(delivery, "publish", lambda run, record: kept.update(record))
    write_json(tmp_path / "report.json", {"schema": 1, "exports": [{"path": "a", "v": 1}, {"path": "b"}]})
    delivery._record(tmp_path, {"path": "a", "v": 2})
    assert kept["exports"] == [{"path": "a", "v": 2}, {"path": "b"}], "the first stays the one that the table tells of"
    delivery._record(tmp_path, {"path": "c", "target": "hf"})
    assert [entry["path"] for entry in kept["exports"]] == ["a", "b", "c"]


def test_of_later_exports_those_stay_that_the_run_does_not_make_itself(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / name).touch()
    entries = [
        {"path": "a", "target": "hf"},  # written by this run
        {"path": "b", "target": "hf"},  # of its format, at another place: the run writes its own
        {"path": "c", "target": "hf", "refit": {}},
        {"path": "d", "target": "mlx"},
        {"path": "e", "target": "mlx"},  # gone
    ]
    assert _made_later(tmp_path, {"exports": entries}, {"a"}, ["hf"]) == [entries[2], entries[3]]


def test_a_large_vocabulary_is_run_on_fewer_sequences() -> None:
    assert delivery.probe_shape(512, 1 << 17) == (2, 128)
    assert delivery.probe_shape(64, 1 << 18) == (2, 64)
    assert delivery.probe_shape(64, 300) == (4, 64)
    assert delivery.probe_shape(512, 1 << 20) == (1, 128)
