"""A calibration that is killed goes on where it was, and ends with the very same table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import toy_models
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hestia.curvature import Stopping, calibrate, partial
from hestia.curvature.estimators import Fisher, GaussNewton
from hestia.quant import QuantSpec


class KilledError(Exception):
    """Stands for kill -9."""


SEQUENCES = 12


def measured(
    keep: Path | None,
    *,
    seed: int = 0,
    stopping: Stopping | None = None,
    other: str | None = None,
    targets: torch.Tensor | None = None,
) -> Any:
    """A calibration of a toy with one candidate and diagonals; ``other``: a tensor of the model that is doubled."""
    model = toy_models.llama()
    if other is not None:
        model.get_parameter(other).data.mul_(2.0)
    ids = torch.randint(3, 60, (SEQUENCES, 9), generator=torch.Generator().manual_seed(1))
    weights = {
        p: model.get_parameter(f"{p}.weight") for p in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
    }
    return calibrate(
        model,
        weights,
        ids,
        targets=targets,
        candidates={"ternary": QuantSpec()},
        diagonals="row",
        stopping=stopping,
        seed=seed,
        keep=keep,
    )


def equal(a: Any, b: Any) -> bool:
    """Whether two tables hold the same bits, but for the seconds they took."""
    same = [{k: v for k, v in table.to_json().items() if k != "seconds"} for table in (a, b)]
    return same[0] == same[1] and all(torch.equal(a.diagonals[name], b.diagonals[name]) for name in a.diagonals)


def killed_at(monkeypatch: pytest.MonkeyPatch, keep: Path, number: int, **options: Any) -> None:
    """Run one that dies before it measures sequence ``number`` (from 0)."""
    taken, sample = 0, GaussNewton.sample

    def dying(self: Any, problem: Any, ids: Any) -> Any:
        nonlocal taken
        if taken == number:
            raise KilledError
        taken += 1
        return sample(self, problem, ids)

    with monkeypatch.context() as patch:
        patch.setattr(GaussNewton, "sample", dying)
        with pytest.raises(KilledError):
            measured(keep, **options)


@pytest.fixture(autouse=True)
def keep_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row is written at once."""
    monkeypatch.setattr(partial, "SECONDS", 0.0)


@pytest.mark.parametrize("number", [1, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("stopping", [None, Stopping(start=4, half_width=1e-9)])
def test_it_ends_with_the_same_table_wherever_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, stopping: Stopping | None
) -> None:
    keep = tmp_path / "s.partial.safetensors"
    killed_at(monkeypatch, keep, number, stopping=stopping)
    counted: list[int] = []
    sample = GaussNewton.sample
    monkeypatch.setattr(GaussNewton, "sample", lambda *a: counted.append(1) or sample(*a))
    resumed = measured(keep, stopping=stopping)
    assert len(counted) == SEQUENCES - number
    assert equal(resumed, measured(None, stopping=stopping))


def test_the_seconds_of_one_that_was_killed_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = tmp_path / "s.partial.safetensors"

    def kept() -> dict[str, str]:
        with safe_open(keep, framework="pt") as handle:
            return handle.metadata()

    killed_at(monkeypatch, keep, 4)
    assert 0.0 < float(kept()["seconds"]) < 1000.0
    save_file(load_file(keep), keep, {**kept(), "seconds": "1000.0"})
    killed_at(monkeypatch, keep, 3)
    assert 1000.0 < float(kept()["seconds"]) < measured(keep).seconds < 2000.0


def test_one_that_settles_early_settles_there_after_a_kill_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    easy = Stopping(start=4, half_width=1e9, rank_agreement=0.0)
    keep = tmp_path / "s.partial.safetensors"
    killed_at(monkeypatch, keep, 3, stopping=easy)
    assert measured(keep, stopping=easy).sequences == 4


def test_what_another_calibration_left_or_damage_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(partial, "announce", said.append)
    keep = tmp_path / "s.partial.safetensors"
    killed_at(monkeypatch, keep, 5)
    assert equal(measured(keep, seed=7), measured(None, seed=7))
    assert said == [f"{keep}: left by another calibration; this one begins anew"]
    killed_at(monkeypatch, keep, 5)
    keep.write_bytes(keep.read_bytes()[:-3])
    assert equal(measured(keep), measured(None))
    assert "damaged" in said[-1]


@pytest.mark.parametrize(
    "change",
    [
        {"other": "model.embed_tokens.weight"},
        {"other": "model.norm.weight"},
        {"other": "model.layers.0.mlp.down_proj.weight"},
        {"stopping": Stopping(start=8)},
        {"targets": torch.arange(9).expand(SEQUENCES, 9) > 3},
    ],
    ids=lambda change: next(iter(change)) if "other" not in change else change["other"],
)
def test_rows_of_a_sibling_are_not_mixed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    """The same measured weights, text and seed, and another rest of the model, stopping rule or loss."""
    said: list[str] = []
    monkeypatch.setattr(partial, "announce", said.append)
    keep = tmp_path / "s.partial.safetensors"
    killed_at(monkeypatch, keep, 5)
    assert equal(measured(keep, **change), measured(None, **change))
    assert said == [f"{keep}: left by another calibration; this one begins anew"]


def test_what_a_calibration_measures_is_in_its_key() -> None:
    """Each change by itself: rows of another calibration must never be taken for this one's."""
    model = toy_models.llama()
    ids = torch.ones(2, 4, dtype=torch.long)
    asked: dict[str, Any] = {
        "estimator": GaussNewton(),
        "model": model,
        "weights": {"lm_head": model.lm_head.weight},
        "sequences": ids,
        "counted": None,
        "candidates": {"ternary": {"levels": [-1, 0, 1]}},
        "diagonals": None,
        "seed": 0,
        "stopping": None,
    }
    changes: list[dict[str, Any]] = [
        {},
        {"candidates": {"ternary": {"levels": [-1, 1]}}},
        {"estimator": Fisher()},
        {"diagonals": "row"},
        {"sequences": ids + 1},
        {"seed": 1},
        {"stopping": Stopping()},
        {"counted": ids.bool()},
    ]
    assert len({partial.key_of(**asked | change) for change in changes}) == len(changes)
