"""Runs against each other: what is paired, what is refused, what is claimed."""

from __future__ import annotations

from typing import Any

import pytest

from hestia.errors import ConfigError
from hestia.evaluation import ScoredRun, compare_runs, paired_difference, paired_p_value
from hestia.evaluation.comparison import pairable, scored_run

PARENT = (2.0, 2.5, 3.0)


def run(arm: str, seed: int, blocks: tuple[float, ...], parent: tuple[float, ...] = PARENT) -> ScoredRun:
    nll = sum(blocks) / len(blocks)
    return ScoredRun(name=f"{arm}-{seed}", arm=arm, seed=seed, nll=nll, block_nll=blocks, parent_block_nll=parent)


def test_two_runs_are_paired_over_blocks() -> None:
    (found,) = compare_runs([run("a", 0, (3.0, 3.5, 4.0)), run("b", 0, (2.9, 3.39, 3.91))])
    assert (found.over, found.name, found.reference, found.adjusted_p) == ("blocks", "b-0", "a-0", None)
    assert found.difference == paired_difference([2.9, 3.39, 3.91], [3.0, 3.5, 4.0])
    assert found.claimed and found.difference.mean < 0


def test_arms_with_common_seeds_are_paired_over_seeds_with_holm() -> None:
    losses = {"a": (3.0, 3.2, 3.1), "b": (2.9, 3.11, 2.99), "c": (3.0, 3.3, 3.05)}
    runs = [run(arm, seed, (nll, nll)) for seed in range(3) for arm, nll in ((k, v[seed]) for k, v in losses.items())]
    runs = [ScoredRun(**{**vars(r), "parent_block_nll": (2.0, 2.1)}) for r in runs]
    by_name = {f.name: f for f in compare_runs(runs) if f.over == "seeds"}
    assert set(by_name) == {"b-0", "c-0"}
    p = {arm: paired_p_value(losses[arm], losses["a"]) for arm in "bc"}
    assert p["b"] < p["c"]
    assert by_name["b-0"].adjusted_p == pytest.approx(2 * p["b"])
    assert by_name["c-0"].adjusted_p == pytest.approx(max(2 * p["b"], p["c"]))
    assert by_name["b-0"].difference == paired_difference(losses["b"], losses["a"])
    assert by_name["b-0"].claimed and not by_name["c-0"].claimed


def test_one_seed_claims_nothing_about_methods() -> None:
    found = compare_runs([run("a", 0, (3.0, 3.1, 3.2)), run("b", 0, (2.0, 2.1, 2.2)), run("b", 1, (2.0, 2.1, 2.2))])
    assert {f.over for f in found} == {"blocks"}


def test_other_parents_or_blocks_are_not_paired() -> None:
    first = run("a", 0, (3.0, 3.1, 3.2))
    other_parent = run("b", 0, (2.0, 2.1, 2.2), parent=(2.0, 2.5, 3.1))
    fewer_blocks = run("c", 0, (2.0, 2.1), parent=(2.0, 2.5))
    assert not pairable(first, other_parent) and not pairable(first, fewer_blocks)
    assert compare_runs([first, other_parent, fewer_blocks]) == []
    assert compare_runs([]) == [] and compare_runs([first]) == []


def test_a_run_is_read_from_its_files() -> None:
    report: dict[str, Any] = {"recipe": "hestia", "seed": 3, "tokens": 10, "learning_rate": 1e-3}
    scores = {"quantized": {"block_nll": [3.0, 4.0]}, "parent": {"block_nll": [2.0, 3.0]}}
    read = scored_run("r", report, scores)
    assert (read.seed, read.nll, read.block_nll, read.parent_block_nll) == (3, 3.5, (3.0, 4.0), (2.0, 3.0))
    assert scored_run("q", {**report, "seed": 4}, scores).arm == read.arm
    assert scored_run("q", {**report, "tokens": 20}, scores).arm != read.arm
    with pytest.raises(ConfigError, match="no per-block losses"):
        scored_run("r", report, {"parent": {"block_nll": [2.0]}})
