"""Two processes over gloo train as one: same losses within float tolerance, same codes; either resumes the other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_training
from processes import run
from safetensors.torch import load_file

import hestia
from hestia import processes as group
from hestia.errors import ConfigError
from hestia.training import TrainConfig
from hestia.training.arguments import blocks_a_process

WORKER = Path(__file__).parent / "train_worker.py"


def numbers(folder: Path) -> dict[tuple[int, str], float]:
    """(step, "loss" or "hard_loss") -> value, of log.jsonl."""
    found = {}
    for row in toy_training.log_rows(folder):
        for name in ("loss", "hard_loss"):
            if name in row:
                assert (row["step"], name) not in found, "every line is written once"
                found[row["step"], name] = row[name]
    return found


def train(world: int, folder: Path, *flags: str) -> list[dict[str, Any]]:
    """Train, and return what each process says of the trained model."""
    return [json.loads(out.splitlines()[-1]) for out in run(world, WORKER, folder, *flags)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    train(1, folder)
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The same run by two processes, and what they say."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    return folder, train(2, folder)


def same_run(one: Path, two: Path, tolerance: float = 1e-4) -> None:
    assert numbers(two) == pytest.approx(numbers(one), rel=tolerance)
    theirs = load_file(two / "weights.safetensors")
    for name, weight in load_file(one / "weights.safetensors").items():
        # Adam turns the rounding of a tiny gradient into a step of the learning rate, for a few weights
        close = torch.isclose(theirs[name], weight, rtol=1e-3, atol=1e-3).float().mean()
        assert close > 0.99, name


@pytest.mark.slow
def test_two_processes_train_as_one(alone: Path, together: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, said = together
    same_run(alone, folder)
    assert said[0] == said[1], "both scored the whole text"
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-000003", "step-000006"]


@pytest.mark.slow
def test_codes_of_two_processes_are_those_of_one_from_the_same_weights(
    together: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, _ = together
    model, _ = toy_training.converted()
    model.load_state_dict(load_file(folder / "weights.safetensors"), strict=False)
    codes = load_file(folder / "codes.safetensors")
    for path, tensor in hestia.freeze(model).items():
        assert torch.equal(codes[f"{path}.codes"], tensor.codes)
        assert torch.equal(codes[f"{path}.scales"], tensor.scales)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_resumes_with_another_number_of_processes(
    before: int, after: int, alone: Path, together: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder = shutil.copytree(alone if before == 1 else together[0], tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "step-000006")
    train(after, folder, "resume")
    same_run(alone, folder)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("bf16", "checkpointing"), ("teacher",)])
def test_bf16_checkpointing_and_a_teacher(flags: tuple[str, ...], tmp_path: Path) -> None:
    train(1, tmp_path / "one", *flags)
    train(2, tmp_path / "two", *flags)
    assert numbers(tmp_path / "two") == pytest.approx(numbers(tmp_path / "one"), rel=2e-2 if "bf16" in flags else 1e-4)


PILOT = """
import sys
from pathlib import Path
import torch
from hestia import processes
from hestia.data import Blocks
from hestia.evaluation import shared_score
from hestia.training import pilot

blocks = Blocks(torch.arange(8).view(4, 2), torch.ones(4, 2, dtype=torch.bool))

def trial(rate, steps):
    bad = 2 if rate == 0.3 else -1  # block 1, which the second process scores
    return shared_score(lambda ids: torch.zeros(*ids.shape, 8) + torch.where(ids == bad, torch.nan, rate)[..., None]
                        * torch.arange(8), blocks).nll

with processes.joined():
    print(pilot.choose(trial, [0.3, 0.2, 0.1], 20, Path(sys.argv[1])))
"""


@pytest.mark.slow
def test_a_rate_that_diverges_on_one_process_is_passed_over_by_all(tmp_path: Path) -> None:
    script = tmp_path / "pilot_worker.py"
    script.write_text(PILOT, encoding="utf-8")
    alone, together = (run(world, script, tmp_path / f"{world}.jsonl") for world in (1, 2))
    assert together == alone * 2
    assert float(alone[0]) in (0.1, 0.2)


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(steps=1, batch_size=6, accumulation=2, learning_rate=1e-3)
    assert blocks_a_process(config) == 3
    monkeypatch.setattr(group, "world_size", lambda: 2)
    with pytest.raises(ConfigError, match=r"--batch-size 6 .* 2 processes in 2 micro-batches; choose a multiple of 4"):
        blocks_a_process(config)
