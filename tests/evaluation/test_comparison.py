"""Runs against each other: what is paired, what is refused, what is claimed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from hestia.errors import ConfigError
from hestia.evaluation import ScoredRun, compare_runs, over_blocks, paired_difference, paired_p_value
from hestia.evaluation.comparison import pairable, scored_run
from hestia.options import Options

PARENT = (2.0, 2.5, 3.0)


def run(arm: str, seed: int, blocks: tuple[float, ...], parent: tuple[float, ...] = PARENT) -> ScoredRun:
    nll = sum(blocks) / len(blocks)
    return ScoredRun(name=f"{arm}-{seed}", arm=arm, seed=seed, nll=nll, block_nll=blocks, parent_block_nll=parent)


def test_two_runs_are_paired_over_blocks() -> None:
    (found,) = compare_runs([run("a", 0, (3.0, 3.5, 4.0)), run("b", 0, (2.9, 3.39, 3.91))])
    assert (found.over, found.name, found.reference, found.adjusted_p) == ("blocks", "b-0", "a-0", None)
    assert found.difference == over_blocks([2.9, 3.39, 3.91], [3.0, 3.5, 4.0])
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
    report: dict[str, Any] = {"recipe": "hestia", "seed": 3}
    scores = {"quantized": {"nll": 3.9, "block_nll": [3.0, 4.0], "block_tokens": [5, 45]},
              "parent": {"nll": 2.9, "block_nll": [2.0, 3.0]}}  # fmt: skip
    read = scored_run("r", report, scores, options())
    assert (read.seed, read.nll, read.block_nll, read.parent_block_nll) == (3, 3.9, (3.0, 4.0), (2.0, 3.0))
    assert read.block_tokens == (5, 45)
    older = {"quantized": {"nll": 3.5, "block_nll": [3.0, 4.0]}, "parent": scores["parent"]}
    assert scored_run("r", report, older, options()).block_tokens is None
    for damaged in ({"parent": scores["parent"]}, {**scores, "quantized": [3.0, 4.0]}):
        with pytest.raises(ConfigError, match="no per-block losses"):
            scored_run("r", report, damaged, options())


def options(**told: Any) -> dict[str, Any]:
    return dataclasses.asdict(Options(model="m", data=("a.txt",), out="r", **told))


def arm(told: dict[str, Any] | None, name: str = "r", **report: Any) -> str:
    scores = {"nll": 3.5, "block_nll": [3.0, 4.0]}
    return scored_run(name, {"seed": 0, **report}, {"quantized": scores, "parent": scores}, told).arm


@pytest.mark.parametrize(
    "told",
    [
        {"seed": 1}, {"device": "cpu"}, {"threads": 2}, {"report_to": ("tensorboard",)}, {"log_every": 7},
        {"save_every": 9},
    ],
    ids=str,
)  # fmt: skip
def test_seeds_and_machines_make_no_arm(told: dict[str, Any]) -> None:
    assert arm(options(**told)) == arm({**options(), "out": "elsewhere"})


@pytest.mark.parametrize(
    "told",
    [
        {"bits": 2.0}, {"bits": 1.9, "widths": ("1.58", "4")}, {"group_size": "64"}, {"skip": ("*.v_proj",)},
        {"weight_decay": 0.1}, {"lr_decay": 0.5}, {"precision": "bf16"}, {"embeddings": "freeze"}, {"lr": "1e-3"},
        {"teacher": "none"}, {"options": {"alpha": 1}}, {"tokens": "1M"},
    ],
    ids=str,
)  # fmt: skip
def test_every_other_option_makes_an_arm(told: dict[str, Any]) -> None:
    assert arm(options(**told)) != arm(options())


def test_an_arm_is_what_was_meant_not_how_it_was_typed() -> None:
    """The recipe's options as they were, text by its digests, numbers by their value."""
    spelled = options(tokens="2000000", eval_tokens="131072", lr="0.001")
    assert arm(spelled) == arm(options(tokens="2M", eval_tokens="131_072", lr="1e-3"))
    assert arm(options(), recipe_options={"temperature": 0.05}) != arm(options(), recipe_options={"temperature": 0.1})
    typed = options(options={"temperature": 0.1})
    assert arm(typed, recipe_options={"temperature": 0.1}) == arm(options(), recipe_options={"temperature": 0.1})

    def text(path: str, sha256: str) -> dict[str, Any]:
        return {"data": [{"given": path, "kind": "text", "files": [{"path": path, "sha256": sha256}]}]}

    elsewhere = {**options(), "data": ("./b.txt",)}
    assert arm(options(), data=text("a.txt", "ab")) == arm(elsewhere, data=text("./b.txt", "ab"))
    assert arm(options(), data=text("a.txt", "ab")) != arm(options(), data=text("a.txt", "cd"))
    assert arm(options()) == arm({**options(), "model": "./m"}), "runs of other parents are not paired"


def test_arms_are_told_by_what_was_asked_and_plans_by_their_content() -> None:
    assert arm(options(), learning_rate=1e-3) == arm(options(), learning_rate=3e-3), "what the pilot chose"
    assert arm(options(options={"a": 1, "b": 2})) == arm(options(options={"b": 2, "a": 1}))
    plan, moved, other = (
        arm(options(plan=path, plan_sha256=digest)) for path, digest in (("p", "ab"), ("q", "ab"), ("p", "cd"))
    )
    assert plan == moved != other
    assert arm(None, "a") != arm(None, "b"), "without run.yaml nobody knows"


def test_blocks_are_weighted_by_their_tokens_where_the_scores_tell_them() -> None:
    first, second = run("a", 0, (3.0, 1.5, 1.4)), run("b", 0, (3.1, 1.0, 1.1))
    (plain,) = compare_runs([first, second])
    (weighted,) = compare_runs([first, dataclasses.replace(second, block_tokens=(255, 5, 5))])
    assert plain.difference.mean < 0 < weighted.difference.mean
    pairs = [3.1, 1.0, 1.1], [3.0, 1.5, 1.4]
    assert weighted.difference == over_blocks(*pairs, [255, 5, 5])
    assert weighted.difference.mean == pytest.approx(paired_difference(*pairs, weights=[255, 5, 5]).mean)
    (weighted,) = compare_runs([dataclasses.replace(first, block_tokens=(255, 5, 5)), second])
    assert weighted.difference.mean > 0, "the first run's, where the second does not tell them"


def test_parents_that_score_alike_up_to_rounding_are_one_parent() -> None:
    first = run("a", 0, (3.0, 3.1, 3.2))
    assert pairable(first, run("b", 0, (3.0, 3.1, 3.2), parent=(2.0, 2.5, 3.0005)))
    assert not pairable(first, run("b", 0, (3.0, 3.1, 3.2), parent=(2.0, 2.5, 3.002)))


def test_one_block_makes_no_interval() -> None:
    assert compare_runs([run("a", 0, (3.0,), parent=(2.0,)), run("b", 0, (2.0,), parent=(2.0,))]) == []


def test_the_first_of_two_runs_of_one_seed_counts() -> None:
    told = (("a", 0, 3.0), ("a", 1, 3.5), ("b", 0, 2.75), ("b", 1, 3.0), ("b", 1, 9.0))
    (found,) = (f for f in compare_runs([run(arm, seed, (nll,) * 3) for arm, seed, nll in told]) if f.over == "seeds")
    assert found.difference == paired_difference([2.75, 3.0], [3.0, 3.5])


def test_a_difference_that_chance_makes_once_in_ten_is_not_claimed() -> None:
    losses = {"a": (3.0, 3.2, 3.1), "b": (2.9, 3.2, 2.99)}
    runs = [run(arm, seed, (nll,) * 3) for arm, seeds in losses.items() for seed, nll in enumerate(seeds)]
    (found,) = (f for f in compare_runs(runs) if f.over == "seeds")
    assert found.adjusted_p is not None and 0.05 < found.adjusted_p < 0.5 and not found.claimed


def test_two_seeds_claim_nothing_however_far_apart() -> None:
    losses = {"a": (3.0, 3.2), "b": (2.0, 2.201)}
    runs = [run(arm, seed, (nll,) * 3) for arm, seeds in losses.items() for seed, nll in enumerate(seeds)]
    (found,) = (f for f in compare_runs(runs) if f.over == "seeds")
    assert found.difference.n == 2 and found.adjusted_p is not None and found.adjusted_p < 0.01 and not found.claimed
