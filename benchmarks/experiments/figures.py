"""Figures of the controlled comparison, SVG text from its result files: against tokens, against bits, and the ranking.

A bar is the 95 % t interval of the mean over seeds; in the ranking, of the paired difference to the baseline.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from hestia.evaluation import paired_difference
from hestia.evaluation.comparison import SEEDS_TO_CLAIM
from hestia.files import read_json

from .stages import SCHEMA, Arm, Stage
from .tables import Records, final_records, rows

GREY, DARK, EMBER, BROWN, SLATE, SAND = "#b8becb", "#6b7280", "#c2410c", "#8f5a3c", "#475569", "#c98a4b"
OTHERS = (SLATE, "#3b82a0", "#7a8f3c", "#8b6fa8", "#4f7f6a")
MARKERS = ("s", "^", "D", "v", "P")
"""Of recipes that are neither ours, nor baseline or control, where they are told apart."""
ABLATION = 3
"""The tier of arms that only the tables show."""
APART = 1.025
"""Neighbouring arms stand this factor apart in tokens, so that their intervals do not cover each other."""


def tokens_figure(stage: Stage, folder: Path | None = None) -> str | None:
    """NLL against tokens, of the mean over the texts and of each text; None without two budgets.

    Ablations are left out, and arms with too few seeds at a budget to claim anything there. The legend has a column for
    the references (the line across is the parent as it was), one for arms with a teacher and one for those without,
    hollow and dotted; the lowest at the largest budget stands first, and to the left.
    """
    everything = _budgets(stage, folder)
    if len(everything) < 2:
        return None
    parent = read_json((folder or stage.folder) / "parent.json", schema=SCHEMA)["parent"]
    panels = [None, *stage.texts.test]
    drawing, axes = _drawing(7.2, 6.2, panels=(2, (len(panels) + 1) // 2))
    shown = [arm for arm in stage.arms if arm.tier < ABLATION and any(_enough(records, arm) for records in everything)]
    shown.sort(key=lambda arm: _last_mean(everything, arm))
    for axis, file in zip(axes.flat, panels, strict=False):
        axis.axhline(_nll(parent, file), color=GREY, linewidth=1, label="parent")
        for place, arm in enumerate(shown):
            points = [
                (fmean(r["tokens"] for r in runs), *_mean_interval([_nll(r, file) for r in runs]))
                for records in everything
                if (runs := _enough(records, arm))
            ]
            x, y, half = zip(*sorted(points), strict=True)
            apart = APART ** (place - len(shown) / 2)
            axis.errorbar([v * apart for v in x], y, yerr=half, label=arm.name, **_line(stage, arm))
        axis.set_title(
            "mean of the texts" if file is None else file.partition(".")[0], loc="left", fontsize=10, color=DARK
        )
        axis.set_xscale("log")
        budgets = sorted({next(iter(runs.values()))["tokens"] for records in everything for runs in records.values()})
        axis.set_xticks(budgets, [f"{round(b / 1e5) / 10:g}M" for b in budgets])
        axis.minorticks_off()
        axis.tick_params(labelsize=8)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    drawing.supxlabel("training tokens", fontsize=9)
    drawing.supylabel("nats per token, frozen model", fontsize=9)
    handles, names = axes.flat[0].get_legend_handles_labels()
    columns = _columns(stage, shown)
    for place, (title, arms) in enumerate(columns):
        drawing.legend(
            [handles[names.index(name)] for name in arms],
            arms,
            title=title,
            title_fontproperties={"size": 9, "weight": "bold"},
            alignment="left",
            loc="upper left",
            bbox_to_anchor=(0.08 + 0.32 * place, 1.0),
            frameon=False,
            fontsize=8,
        )
    drawing.tight_layout(rect=(0, 0, 1, 0.95 - 0.03 * max(len(arms) for _, arms in columns)))
    return _svg(drawing)


def bits_figure(stage: Stage, folder: Path | None = None) -> str | None:
    """NLL against stored bits per weight at the largest budget; None where a stage does not ask what bits are worth.

    It does where its arms name a format (``target``), whose files say what a weight costs. Plans that mix widths are
    hollow, and squares where curvature has no part in them; the lines across are the parent as it was, dotted, and the
    control, dashed.
    """
    if stage.arm(stage.baseline).target == "hf":
        return None
    everything = _budgets(stage, folder)
    points: list[tuple[float, float, float, str, bool]] = []
    for name, runs in (everything[-1] if everything else {}).items():
        plans = [plan for r in runs.values() if "bits_per_weight" in (plan := r.get("plan") or {})]
        if plans:
            bits = fmean(plan["bits_per_weight"] for plan in plans)
            mixed = any(len(plan["grids"]) > 1 for plan in plans)
            points.append((bits, *_mean_interval([r["nll"] for r in runs.values()]), name, mixed))
    if len({round(bits, 1) for bits, *_ in points}) < 3:  # closer than a tenth: one width, with other scales
        return None
    drawing, ((axis,),) = _drawing(6.4, 3.8)
    for bits, mean, half, name, mixed in sorted(points):
        arm = stage.arm(name)
        blind = bool(arm.spend)  # lies at the bits of the plan by damage: another colour, and its name below
        colour = DARK if blind else _colour(stage, arm)
        marker, fill = "s" if blind else "o", "none" if mixed else colour
        axis.errorbar(bits, mean, yerr=half, marker=marker, capsize=3, color=colour, markerfacecolor=fill)
        place, side = ((-6, -12), "right") if blind else ((6, 6), "left")
        axis.annotate(
            arm.spend or name, (bits, mean), textcoords="offset points", xytext=place, ha=side, fontsize=8, color=DARK
        )
    lines = [("parent", ":", read_json((folder or stage.folder) / "parent.json", schema=SCHEMA)["parent"]["nll"], 0.02)]
    if stage.control in everything[-1]:
        control = fmean(r["nll"] for r in everything[-1][stage.control].values())
        lines.append(("trained in full precision", "--", control, 0.98))
    for what, style, nll, place in lines:
        axis.axhline(nll, color=DARK, linestyle=style, linewidth=1)
        axis.annotate(what, (place, nll), xycoords=("axes fraction", "data"), textcoords="offset points",
                      xytext=(0, 4), ha="left" if place < 0.5 else "right", fontsize=8, color=DARK)  # fmt: skip
    axis.set_xlabel("stored bits per weight, scales included")
    axis.set_ylabel("nats per token, frozen model")
    drawing.tight_layout()
    return _svg(drawing)


def ranking_figure(stage: Stage, folder: Path | None = None) -> str | None:
    """Every arm's paired difference to the baseline at the largest budget; None where there is none.

    Hollow: too few seeds to claim anything.
    """
    ranked = [made for made in rows(stage, final_records(stage, folder or stage.folder)).values() if made]
    made = [row for row in ranked[-1] if row.difference is not None] if ranked else []
    if not made:
        return None
    drawing, ((axis,),) = _drawing(6.4, 1.1 + 0.3 * len(made))
    for place, row in enumerate(made):
        d = row.difference
        assert d is not None
        colour = _colour(stage, stage.arm(row.name))
        fill = colour if row.pairs >= SEEDS_TO_CLAIM else "none"
        around = [[d.mean - d.low], [d.high - d.mean]]
        axis.errorbar(d.mean, place, xerr=around, fmt="o", capsize=3, color=colour, markerfacecolor=fill)
    axis.axvline(0.0, color=GREY, linewidth=1)
    axis.set_yticks(range(len(made)), [row.name for row in made])
    axis.invert_yaxis()
    axis.set_xlabel(f"nats per token minus {stage.baseline}, 95 % over seeds; left is better")
    drawing.tight_layout()
    return _svg(drawing)


def _budgets(stage: Stage, folder: Path | None) -> list[Records]:
    """The results of each budget that has any, the largest last."""
    return [records for records in final_records(stage, folder or stage.folder).values() if records]


def _enough(records: Records, arm: Arm) -> list[dict[str, Any]]:
    """The runs of an arm; none where they are too few."""
    runs = list(records.get(arm.name, {}).values())
    return runs if len(runs) >= SEEDS_TO_CLAIM else []


def _last_mean(everything: Sequence[Records], arm: Arm) -> float:
    """The mean NLL of an arm at the largest budget that it has enough runs of."""
    budgets = [runs for records in everything if (runs := _enough(records, arm))]
    return fmean(r["nll"] for r in budgets[-1])


def _nll(run: dict[str, Any], file: str | None) -> float:
    """Of one test file, or the mean over them."""
    return run["nll"] if file is None else run["test"][file]["nll"]


def _mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % t interval; 0 with one value."""
    if len(values) < 2:
        return float(values[0]), 0.0
    around = paired_difference(values, [0.0] * len(values))
    return around.mean, around.high - around.mean


def _columns(stage: Stage, shown: Sequence[Arm]) -> list[tuple[str, list[str]]]:
    """Titles of the legend of the figure against tokens, and what stands under each, in the order of the arms."""
    trained = [arm for arm in shown if arm.name != stage.control]
    taught, alone = ([arm.name for arm in trained if bool(arm.teacher) is wanted] for wanted in (True, False))
    references = ["parent", *(arm.name for arm in shown if arm.name == stage.control)]
    columns = [("full precision", references), ("the parent teaches", taught), ("from the text alone", alone)]
    return [column for column in columns if column[1]]


def _other_recipes(stage: Stage) -> list[str]:
    """Recipes with no colour of their own, in the stage's order."""
    own = {"hearth", "hestia", stage.arm(stage.baseline).recipe, stage.arm(stage.control).recipe}
    return list(dict.fromkeys(arm.recipe for arm in stage.arms if arm.recipe not in own))


def _colour(stage: Stage, arm: Arm) -> str:
    """Ours, the baseline, the control, or any other."""
    if arm.name == stage.control:
        return DARK
    if arm.recipe == stage.arm(stage.baseline).recipe:
        return SAND
    if arm.recipe in ("hearth", "hestia"):
        return EMBER if arm.recipe == "hearth" else BROWN
    return SLATE


def _line(stage: Stage, arm: Arm) -> dict[str, Any]:
    """How an arm is drawn against tokens: colour and marker say the recipe, filling and line the teacher."""
    others = _other_recipes(stage)
    style = {
        "color": _colour(stage, arm),
        "capsize": 2.5,
        "markersize": 4.5,
        "linewidth": 1.2,
        "elinewidth": 0.9,
        "marker": "o",
    }
    if arm.name == stage.control:
        return {**style, "linestyle": "--", "marker": "x"}
    if arm.recipe in others:
        place = others.index(arm.recipe) % len(OTHERS)
        style |= {"color": OTHERS[place], "marker": MARKERS[place]}
    alike = [other for other in stage.arms if (other.recipe, bool(other.teacher)) == (arm.recipe, bool(arm.teacher))]
    if alike.index(arm) > 0:  # another setting of the same recipe
        style |= {"marker": "*", "markersize": 7}
    return style if arm.teacher else {**style, "linestyle": ":", "markerfacecolor": "none"}


def _drawing(width: float, height: float, panels: tuple[int, int] = (1, 1)) -> tuple[Any, Any]:
    """A drawing and its axes, a row of them a row."""
    plt.rcParams.update({"svg.hashsalt": "hestia", "svg.fonttype": "none", "font.size": 10})
    drawing, axes = plt.subplots(*panels, figsize=(width, height), squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return drawing, axes


def _svg(drawing: Any) -> str:
    buffer = io.StringIO()
    drawing.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    plt.close(drawing)
    return buffer.getvalue()
