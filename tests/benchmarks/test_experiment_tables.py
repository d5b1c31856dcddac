"""Tables and figures of the comparison, from result files written by hand: what wins, what may not, what is missing."""

from __future__ import annotations

import sys
from dataclasses import replace
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
    "questions": [
        {
            "title": "Is it better?",
            "arm": "better",
            "against": ["same", "young", "ste", "unbuilt"],
            "pairs": [["same", "control"]],
        }
    ],
}
LOSSES = {
    "control": (2.00, 2.10, 2.20),
    "ste": (3.00, 3.10, 3.20),
    "better": (2.50, 2.61, 2.69),
    "same": (3.01, 3.08, 3.22),
    "young": (1.00, 1.10),  # far ahead, but two seeds claim nothing
}


TEXTS = {"train": {"sha256": "t"}, "test": {"c": {"blocks": 2}, "d": {"blocks": 2}}}
PARENT = {"name": "toy", "weights_sha256": "w"}


def write_result(job: stages.Job, nll: float, folder: Path, **other: Any) -> None:
    """A result file as the runner writes it, as far as the tables read it."""
    record = {
        "schema": 1,
        "name": job.name,
        "config": job.config(),
        "parent": PARENT,
        "texts": TEXTS,
        "diverged": None,
        "nll": nll,
        "kl_to_parent": nll / 4,
        "top1_agreement": 0.25,
        "zero_share": 0.3,
        "flip_rate": 0.1,
        "test": {"c": {"nll": nll - 0.5}, "d": {"nll": nll + 0.5}},
        "tokens": job.steps * 64,
        "seconds_per_token": {"wall": 9.0, "processor": 2e-4 if job.rate == 0.01 else 1e-4},
        "machine": {"cpu": "Abacus", "threads": 1},
        "versions": {"torch": "2.x", "hestia-lm": "0.1.0"},
    }
    write_json(job.result(folder), {**record, **other})


def finals(stage: stages.Stage, folder: Path, tokens: str) -> dict[tuple[str, int], stages.Job]:
    """(arm, seed) -> job, at one budget; ``unbuilt`` has no tuning runs."""
    return {
        (arm.name, job.seed): job
        for arm in stage.arms
        for job in stages.final_jobs(stage, arm, folder)
        if job.tokens == tokens
    }


@pytest.fixture
def stage(tmp_path: Path) -> stages.Stage:
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(STAGE), encoding="utf-8")
    stage = stages.load(tmp_path / "toy.yaml")
    fill(stage, tmp_path / "results")
    return stage


def fill(stage: stages.Stage, folder: Path) -> None:
    """Parent, tuning runs and final runs of every arm that has losses."""
    scores = {"nll": 2.5, "test": {"c": {"nll": 2.0}, "d": {"nll": 3.0}}}
    parent = {
        "schema": 1,
        "parent": scores,
        "round_to_nearest": scores,
        "model": PARENT,
        "texts": TEXTS,
        "machine": {"cpu": "Abacus", "threads": 1},
        "versions": {"torch": "2.x"},
    }
    write_json(folder / "parent.json", parent)
    for arm in LOSSES:
        for job in stages.tuning_jobs(stage, stage.arm(arm)):
            better = (job.rate == 0.01) == (arm == "better")
            valid = {"valid_nll": 2.75} if better else {"valid_nll": None, "diverged": "step 2"}
            write_result(job, 2.75, folder, **valid)
    for shift, tokens in ((0.0, "256"), (-0.25, "1k")):
        for (arm, seed), job in finals(stage, folder, tokens).items():
            if seed <= len(LOSSES.get(arm, ())):
                write_result(job, LOSSES[arm][seed - 1] + shift, folder)


def test_rows_rank_and_judge(stage: stages.Stage, tmp_path: Path) -> None:
    made = {row.name: row for row in tables.rows(stage, tables.final_records(stage, tmp_path / "results"))["256"]}
    assert list(made) == ["control", "better", "ste", "same", "young"], "two seeds stand last, however low"
    p = [paired_p_value(LOSSES[name], LOSSES["ste"]) for name in ("better", "same")]
    # the other budget is shifted, so its differences are the same; young and unbuilt belong to the family all the same
    family = holm([*p, *p, *[1.0] * 4])
    assert [made[n].adjusted_p for n in ("better", "same")] == pytest.approx(family[:2])
    verdicts = {name: row.verdict for name, row in made.items()}
    assert verdicts == {"better": "**win**", "same": "tie", "young": "2 of 3 seeds", "control": "-", "ste": "-"}
    gap = made["better"].gap
    assert gap is not None and not isinstance(gap, float)
    assert gap.mean == pytest.approx((0.5 + 0.49 + 0.51) / 3)
    assert made["better"].cost == pytest.approx(2.0) and made["same"].cost == pytest.approx(1.0)


def test_the_section_says_what_there_is(stage: stages.Stage, tmp_path: Path) -> None:
    text = tables.section(stage, tmp_path / "results")
    assert "Each arm had 2 tuning runs of 128 tokens" in text
    assert "Machine: Abacus, 1 thread(s). torch 2.x" in text
    assert "| better | 3 | 0.01 | 2.6100 (2.5000 to 2.6900) | 0.1100 | −0.5000 [" in text
    assert "| better | **0.01: 2.7500**, 0.001: diverged | the highest tried |" in text
    assert "| *round_to_nearest* | 2.0000 | 3.0000 |" in text
    assert "over seeds 1, 2, 3;" in text and "| better | 2.1000 (0.50) | 3.1000 (0.50) |" in text
    assert "| young | 1.0" not in text, "it lacks the third seed that the others are averaged over"
    assert "Without a final run so far: unbuilt." in text
    assert tables.section(stage, tmp_path / "nowhere") == ""


def test_a_question_is_answered_over_the_seeds_that_both_have(stage: stages.Stage, tmp_path: Path) -> None:
    everything = tables.final_records(stage, tmp_path / "results")
    found = {answer.other: answer for answer in tables.answers(stage, stage.questions[0], everything)["256"]}
    assert {name: answer.seeds for name, answer in found.items()} == {"same": 3, "young": 2, "ste": 3, "control": 3}
    p = [paired_p_value(LOSSES["better"], LOSSES[name]) for name in ("same", "ste")]
    p.append(paired_p_value(LOSSES["same"], LOSSES["control"]))
    adjusted = holm([*p, *p, *[1.0] * 4])  # over the five differences that are asked for, at two budgets
    assert [found[name].adjusted_p for name in ("same", "ste", "control")] == pytest.approx(adjusted[:3])
    assert found["same"].difference.mean == pytest.approx((-0.51 - 0.47 - 0.53) / 3)
    assert found["same"].texts["d"] == found["same"].difference  # by construction: both texts shift alike
    assert found["same"].kl.mean == pytest.approx(found["same"].difference.mean / 4)
    assert {name: answer.verdict for name, answer in found.items()} == {
        "same": "**win**", "young": "2 of 3 seeds", "ste": "**win**", "control": "loss",
    }  # fmt: skip
    section = tables.section(stage, tmp_path / "results")
    assert "Holm's correction is over 10." in section and "| same − control | 3 | +1.0033 [" in section
    assert " | d | KL to the parent |" in section and "] | −0.1258 [" in section


def test_a_text_on_which_the_control_is_no_better_has_no_gap(stage: stages.Stage, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    write_result(finals(stage, folder, "256")["control", 2], 2.1, folder, test={"c": {"nll": 9.0}, "d": {"nll": 2.6}})
    assert "| better | 2.1000 (-) | 3.1000 (0.50) |" in tables.section(stage, folder)


def test_a_question_about_no_arm_is_refused(tmp_path: Path) -> None:
    asked = {**STAGE, "questions": [{"title": "?", "arm": "better", "against": ["worse"]}]}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(asked), encoding="utf-8")
    with pytest.raises(ConfigError, match="a question 'worse' is no arm"):
        stages.load(tmp_path / "toy.yaml")


def test_a_diverged_run_is_no_result_and_is_named(stage: stages.Stage, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    write_result(finals(stage, folder, "256")["better", 2], 2.6, folder, diverged="step 3: the loss is nan")
    made = {row.name: row for row in tables.rows(stage, tables.final_records(stage, folder))["256"]}
    assert made["better"].verdict == "2 of 3 seeds" and len(made["better"].nll) == 2
    assert "Diverged: better, 256 tokens, seed 2." in tables.section(stage, folder)


@pytest.mark.parametrize("arm", ["control", "same"])
@pytest.mark.parametrize("change", ["config", "parent", "texts"])
def test_a_result_of_something_else_is_refused(stage: stages.Stage, tmp_path: Path, arm: str, change: str) -> None:
    folder = tmp_path / "results"
    job = finals(stage, folder, "256")[arm, 1]
    other = {"config": {**job.config(), "seed": 7}, "parent": {**PARENT, "name": "b"}, "texts": {**TEXTS, "train": {}}}
    write_result(job, 2.0, folder, **{change: other[change]})
    with pytest.raises(ConfigError, match=f"another {'seed' if change == 'config' else change}"):
        tables.section(stage, folder)


def test_verdicts_before_every_seed_is_there_say_so(stage: stages.Stage, tmp_path: Path) -> None:
    longer = replace(stage, final=replace(stage.final, seeds=(1, 2, 3, 4)))
    made = {row.name: row for row in tables.rows(longer, tables.final_records(longer, tmp_path / "results"))["256"]}
    assert made["better"].verdict == "**win** so far, 3 of 4 seeds" and made["young"].verdict == "2 of 4 seeds"


def test_figures_are_the_same_twice_and_need_results(stage: stages.Stage, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    for draw in (figures.tokens_figure, figures.ranking_figure):
        text = draw(stage, folder)
        assert text is not None and text == draw(stage, folder)
        assert draw(stage, tmp_path / "nowhere") is None
    tokens = figures.tokens_figure(stage, folder)
    assert tokens is not None and all(
        f">{part}<" in tokens for part in ("mean of the texts", "c", "d", "parent", "better")
    )
    assert ">unbuilt<" not in tokens
    legend = [">full precision<", ">control<", ">from the text alone<", ">better<", ">ste<"]
    assert [tokens.index(entry) for entry in legend] == sorted(tokens.index(entry) for entry in legend)
    assert ">the parent teaches<" not in tokens  # no arm has a teacher
    ranking = figures.ranking_figure(stage, folder)
    assert ranking is not None and ">better<" in ranking and ">ste<" not in ranking


def test_bits_are_drawn_where_arms_differ_in_them(stage: stages.Stage, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    assert figures.bits_figure(stage, folder) is None and "| bits |" not in tables.section(stage, folder)
    folder = tmp_path / "stored"
    stage = replace(stage, arms=tuple(replace(arm, target="gguf:mixed") for arm in stage.arms))
    fill(stage, folder)
    assert figures.bits_figure(stage, folder) is None  # no result says what its weights cost
    jobs = finals(stage, folder, "1k")
    for bits, (arm, grids) in enumerate({"ste": 1, "better": 1, "same": 2}.items(), start=1):
        for seed, nll in enumerate(LOSSES[arm], start=1):
            plan = {"bits_per_weight": float(bits), "grids": dict.fromkeys(map(str, range(grids)), 1)}
            write_result(jobs[arm, seed], nll, folder, plan=plan)
    drawn = figures.bits_figure(stage, folder)
    assert drawn is not None
    assert all(f">{name}<" in drawn for name in ("ste", "better", "same", "parent", "trained in full precision"))
    assert ">young<" not in drawn
    page = tables.section(stage, folder)
    assert "| arm | bits | seeds |" in page and "| better | 2.000 |" in page and "| control | - |" in page
