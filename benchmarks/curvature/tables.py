"""Tables and figures of the curvature benchmarks, from their result files and from nothing else."""

from __future__ import annotations

import io
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from hestia.curvature.intervals import mean_interval
from hestia.files import read_json

RESULTS = Path(__file__).parents[1] / "results" / "curvature"
LABELS = {"ternary": "ternary", "int2": "2 bits", "int3": "3 bits", "int4": "4 bits"}
GREY, DARK, EMBER, SLATE = "#b8becb", "#6b7280", "#c2410c", "#475569"
WINNER = "quadratic (gnb)"


def load(kind: str) -> dict[str, dict[str, Any]]:
    """Model -> record of one kind: ``metrics``, ``plans`` or ``trained``."""
    return {r["name"]: r for r in (read_json(path) for path in sorted(RESULTS.glob(f"{kind}-*.json")))}


def metrics_table(record: dict[str, Any]) -> str:
    """Spearman with the measured KL, 95 % bootstrap interval in brackets, best at ternary first; seconds."""
    head = " | ".join(LABELS.values())
    lines = [f"| {record['name']}: metric | {head} | seconds |", "|---|" + "--:|" * (len(LABELS) + 1)]
    rows = sorted(record["spearman"].items(), key=lambda item: -item[1]["ternary"]["spearman"])
    for name, row in rows:
        cells = [
            f"{row[k]['spearman']:.2f} [{row[k]['low']:.2f}, {row[k]['high']:.2f}]".replace("-", "−") for k in LABELS
        ]
        title = name.replace("|", "\\|")
        lines.append(f"| {title} | {' | '.join(cells)} | {row['seconds']:.1f} |")
    return "\n".join(lines)


def plans_table(record: dict[str, Any]) -> str:
    """KL of the rounded model by budget; below it the paired differences of the default score to the controls."""
    budgets = record["budgets"]
    head = " | ".join(f"{b['budget']:g} bits" for b in budgets)
    lines = [f"| {record['name']}: plan by | {head} |", "|---|" + "--:|" * len(budgets)]
    for name in budgets[0]["scores"]:
        cells = [f"{b['scores'][name]['kl']:.3f}" for b in budgets]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for control in ("positional", "random", "uniform"):
        cells = [f"{b['controls'][control]['kl']:.3f} at {b['controls'][control]['bits']:.2f}" for b in budgets]
        lines.append(f"| {control} (control) | {' | '.join(cells)} |")
    for control in ("positional", "random", "uniform"):
        cells = [_interval(b["scores"][WINNER][f"minus_{control}"]) for b in budgets]
        lines.append(f"| **{WINNER} − {control}** | {' | '.join(cells)} |")
    cells = [_interval(b["scores"][WINNER]["at_uniform"]["minus_uniform"]) for b in budgets]
    lines.append(f"| **the same at uniform's own bits** | {' | '.join(cells)} |")
    return "\n".join(lines)


def trained_table(record: dict[str, Any]) -> str:
    """KL of the trained and frozen model by budget, mean over seeds; below it the paired differences over seeds."""
    rows = record["rows"]
    budgets = sorted({row["budget"] for row in rows})
    kl = {(row["budget"], row["arm"], row["seed"]): row["kl"] for row in rows}
    bits = {(row["budget"], row["arm"]): row["bits"] for row in rows}
    head = " | ".join(f"{budget:g} bits" for budget in budgets)
    lines = [f"| {record['name']}, trained: plan by | {head} |", "|---|" + "--:|" * len(budgets)]

    def over_seeds(budget: float, arm: str) -> dict[int, float]:
        return {seed: value for (b, a, seed), value in kl.items() if (b, a) == (budget, arm)}

    for arm in (WINNER, f"{WINNER}, at uniform's bits", "positional", "random", "uniform"):
        cells = [f"{fmean(over_seeds(b, arm).values()):.3f} at {bits[b, arm]:.2f}" for b in budgets]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    for ours, theirs in ((WINNER, "positional"), (WINNER, "random"), (f"{WINNER}, at uniform's bits", "uniform")):
        cells = []
        for budget in budgets:
            a, b = over_seeds(budget, ours), over_seeds(budget, theirs)
            mean, half = mean_interval([a[seed] - b[seed] for seed in sorted(a)])
            cells.append(_interval({"mean": mean, "low": mean - half, "high": mean + half}))
        lines.append(f"| **{ours} − {theirs}** | {' | '.join(cells)} |")
    return "\n".join(lines)


def _interval(difference: dict[str, float]) -> str:
    text = f"{difference['mean']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]"
    return text.replace("-", "−")


def section() -> str:
    """Markdown for docs/curvature.md and RESULTS.md; empty without results."""
    parts: list[str] = []
    for record in load("metrics").values():
        count, length = record["sequences"], record["tokens_a_sequence"]
        parts += [
            f"Truth: {record['tensors']} tensors, one rounded at a time, KL on {count['truth']} held-out sequences of "
            f"{length} tokens. Metrics: {count['calibration']} calibration sequences, one thread of "
            f"{record['machine']['cpu']}, seed {record['seed']}. Spearman over tensors [95 % bootstrap interval].",
            "",
            metrics_table(record),
            "",
        ]
    for record in load("plans").values():
        parts += [
            "KL to the parent in nats per token, whole model rounded by the plan, no training, on "
            f"{record['held_out_sequences']} held-out sequences. Differences: paired over sequences, 95 % t interval.",
            "",
            plans_table(record),
            "",
        ]
    for record in load("trained").values():
        seeds = len({row["seed"] for row in record["rows"]})
        parts += [
            f"The same plans after {record['steps']} steps of {record['batch_size']} sequences by recipe hestia "
            f"(alpha 0, learning rate {record['learning_rate']:g}), frozen, on {record['held_out_sequences']} held-out "
            f"sequences; mean of {seeds} seeds. Differences: paired over seeds, 95 % t interval.",
            "",
            trained_table(record),
            "",
        ]
    return "\n".join(parts).strip()


def plans_figure() -> str | None:
    """KL against stored bits: default score, positional, uniform, random, a panel a model, as SVG text."""
    records = load("plans")
    if not records:
        return None
    plt.rcParams.update({"svg.hashsalt": "hestia", "svg.fonttype": "none", "font.size": 10})
    drawing, axes = plt.subplots(1, len(records), figsize=(4.4 * len(records), 3.2), squeeze=False)
    for axis, (model, record) in zip(axes[0], records.items(), strict=True):
        budgets = record["budgets"]
        for name, colour in (("random", GREY), ("uniform", DARK), ("positional", SLATE)):
            points = [(b["controls"][name]["bits"], b["controls"][name]["kl"]) for b in budgets]
            axis.plot(*zip(*points, strict=True), "o--", color=colour, markersize=4, linewidth=1, label=name)
        points = [(b["scores"][WINNER]["bits"], b["scores"][WINNER]["kl"]) for b in budgets]
        axis.plot(*zip(*points, strict=True), "o-", color=EMBER, markersize=5, label=WINNER)
        axis.set_yscale("log")
        axis.set_title(model, loc="left", fontsize=10, color=DARK)
        axis.set_xlabel("stored bits per weight, scales included")
        axis.set_ylabel("KL to parent, nats per token")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=9)
    drawing.tight_layout()
    buffer = io.StringIO()
    drawing.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    plt.close(drawing)
    return buffer.getvalue()
