"""Tables and figures of the comparison, from result files written by hand: what wins, what may not, what is missing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hestia.errors import ConfigError
from hestia.evaluation import holm, paired_p_value
from hestia.files import write_json

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from experiments import figures, stages, tables

STAGE: dict[str, Any] = {
    "title": "toy",
    "parent": "toy",
    "baseline": "ste",
    "control": "control",
    "texts": {"train": ["a"], "valid": ["b"], "test": ["c", "d"], "pool": "4k", "valid_blocks": 4, "test_blocks": 2},
    "training": {"batch_size": 2, "seq_len": 32},
    "tuning": {"tokens": ["128"], "seeds": [0], "rates": [0.01, 0.001]},
    "final": {"tokens": ["256", "1k"], "seeds": [1, 2, 3]},
    "arms": [
        {"name": "control", "recipe": "full_precision"},
        {"name": "ste", "recipe": "bitnet_ste"},
        {"name": "better", "recipe": "hestia"},
        {"name": "same", "recipe": "hestia"},
        {"name": "young", "recipe": "hestia"},
        {"name": "unbuilt", "recipe": "not_built"},
    ],
    "questions": [{"title": "Is it better?", "arm": "better", "against": ["same", "young", "ste", "unbuilt"]}],
}
LOSSES = {
    "control": (2.00, 2.10, 2.20),
    "ste": (3.00, 3.10, 3.20),
    "better": (2.50, 2.61, 2.69),
    "same": (3.01, 3.08, 3.22),
    "young": (1.00, 1.10),  # far ahead, but two seeds claim nothing
}


def result(nll: float, seed: int, rate: float, tokens: int) -> dict[str, Any]:
    return {
        "schema": 1,
        "diverged": None,
        "nll": nll,
        "kl_to_parent": 0.5,
        "top1_agreement": 0.25,
        "zero_share": 0.3,
        "flip_rate": 0.1,
        "test": {"c": {"nll": nll - 0.5}, "d": {"nll": nll + 0.5}},
        "tokens": tokens,
        "config": {"learning_rate": rate, "seed": seed},
        "seconds_per_token": {"wall": 9.0, "processor": 1e-4 if rate < 0.01 else 2e-4},
        "machine": {"cpu": "Abacus", "threads": 1},
        "versions": {"torch": "2.x", "hestia-lm": "0.1.0"},
    }


@pytest.fixture
def stage(tmp_path: Path) -> stages.Stage:
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(STAGE), encoding="utf-8")
    scores = {"nll": 2.5, "test": {"c": {"nll": 2.0}, "d": {"nll": 3.0}}}
    parent = {
        "schema": 1,
        "parent": scores,
        "round_to_nearest": scores,
        "texts": {"test": {"c": {"blocks": 2}, "d": {"blocks": 2}}},
        "machine": {"cpu": "Abacus", "threads": 1},
        "versions": {"torch": "2.x"},
    }
    write_json(tmp_path / "results" / "parent.json", parent)
    for arm, losses in LOSSES.items():
        rate = 0.01 if arm == "better" else 0.001
        for shift, tokens, name in ((0.0, 256, "256"), (-0.25, 1024, "1k")):
            for seed, nll in enumerate(losses, start=1):
                path = tmp_path / "results" / arm / f"final-{name}-seed{seed}.json"
                write_json(path, result(nll + shift, seed, rate, tokens))
    for rate, nll in ((0.01, 2.75), (0.001, None)):
        write_json(tmp_path / "results" / "better" / f"tune-128-{rate:g}-seed0.json", {"schema": 1, "valid_nll": nll})
    return stages.load(tmp_path / "toy.yaml")


def test_rows_rank_and_judge(stage: stages.Stage, tmp_path: Path) -> None:
    made = {row.name: row for row in tables.rows(stage, tables.final_records(stage, tmp_path / "results")["256"])}
    assert list(made) == ["young", "control", "better", "same", "ste"]
    p = {name: paired_p_value(LOSSES[name], LOSSES["ste"]) for name in ("better", "same")}
    assert [made[n].adjusted_p for n in ("better", "same")] == pytest.approx(holm([p["better"], p["same"]]))
    verdicts = {name: row.verdict for name, row in made.items()}
    assert verdicts == {"better": "**win**", "same": "tie", "young": "2 of 3 seeds", "control": "-", "ste": "-"}
    gap = made["better"].gap
    assert gap is not None and not isinstance(gap, float)
    assert gap.mean == pytest.approx((0.5 + 0.49 + 0.51) / 3)
    assert made["better"].cost == pytest.approx(2.0) and made["same"].cost == pytest.approx(1.0)
    assert made["better"].means["c"] == pytest.approx(2.1)


def test_the_section_says_what_there_is(stage: stages.Stage, tmp_path: Path) -> None:
    text = tables.section(stage, tmp_path / "results")
    assert "Each arm had 2 tuning runs of 128 tokens" in text
    assert "Machine: Abacus, 1 thread(s). torch 2.x" in text
    assert "| better | 3 | 0.01 | 2.6100 (2.5000 to 2.6900) | −0.5000 [" in text
    assert "| better | **0.01: 2.7500**, 0.001: diverged |" in text
    assert "| *round_to_nearest* | 2.0000 | 3.0000 |" in text
    assert "Without a final run so far: unbuilt." in text
    assert tables.section(stage, tmp_path / "nowhere") == ""


def test_a_question_is_answered_over_the_seeds_that_both_have(stage: stages.Stage, tmp_path: Path) -> None:
    records = tables.final_records(stage, tmp_path / "results")["256"]
    found = {answer.other: answer for answer in tables.answers(stage.questions[0], records)}
    assert {name: answer.seeds for name, answer in found.items()} == {"same": 3, "young": 2, "ste": 3}
    p = [paired_p_value(LOSSES["better"], LOSSES[name]) for name in ("same", "ste")]
    assert [found[name].adjusted_p for name in ("same", "ste")] == pytest.approx(holm(p))
    assert found["same"].difference.mean == pytest.approx((-0.51 - 0.47 - 0.53) / 3)
    assert found["same"].texts["d"] == found["same"].difference  # by construction: both texts shift alike
    assert {name: answer.verdict for name, answer in found.items()} == {
        "same": "**win**", "young": "2 of 3 seeds", "ste": "**win**",
    }  # fmt: skip
    assert "| better minus | seeds |" in tables.section(stage, tmp_path / "results")


def test_a_question_about_no_arm_is_refused(tmp_path: Path) -> None:
    asked = {**STAGE, "questions": [{"title": "?", "arm": "better", "against": ["worse"]}]}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(asked), encoding="utf-8")
    with pytest.raises(ConfigError, match="a question 'worse' is no arm"):
        stages.load(tmp_path / "toy.yaml")


def test_a_diverged_run_is_no_result(stage: stages.Stage, tmp_path: Path) -> None:
    path = tmp_path / "results" / "better" / "final-256-seed2.json"
    write_json(path, {"schema": 1, "diverged": "step 3: the loss is nan"})
    made = {row.name: row for row in tables.rows(stage, tables.final_records(stage, tmp_path / "results")["256"])}
    assert made["better"].verdict == "2 of 3 seeds" and len(made["better"].nll) == 2


def test_figures_are_the_same_twice_and_need_results(stage: stages.Stage, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    for draw in (figures.tokens_figure, figures.ranking_figure):
        text = draw(stage, folder)
        assert text is not None and text == draw(stage, folder)
        assert draw(stage, tmp_path / "nowhere") is None
    tokens = figures.tokens_figure(stage, folder)
    assert tokens is not None and all(f">{part}<" in tokens for part in ("mean of the texts", "c", "d", "better"))
    assert ">unbuilt<" not in tokens
    ranking = figures.ranking_figure(stage, folder)
    assert ranking is not None and ">better<" in ranking and ">ste<" not in ranking


def test_bits_are_drawn_where_arms_differ_in_them(stage: stages.Stage, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    assert figures.bits_figure(stage, folder) is None  # no result says what its weights cost
    for bits, (arm, grids) in enumerate({"ste": 1, "better": 1, "same": 2}.items(), start=1):
        for seed, nll in enumerate(LOSSES[arm], start=1):
            plan = {"bits_per_weight": float(bits), "grids": dict.fromkeys(map(str, range(grids)), 1)}
            write_json(folder / arm / f"final-1k-seed{seed}.json", {**result(nll, seed, 0.001, 1024), "plan": plan})
    drawn = figures.bits_figure(stage, folder)
    assert drawn is not None
    assert all(f">{name}<" in drawn for name in ("ste", "better", "same", "trained in full precision"))
    assert ">young<" not in drawn
