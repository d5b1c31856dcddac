"""RESULTS.md, the README's table and figure, from the result files and from nothing else.

python benchmarks/make_results.py          write them
python benchmarks/make_results.py --check  exit 1 if they are not what the result files say
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from curvature import tables as curvature
from experiments import tables as experiments

from hestia.files import read_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FIGURE = ROOT / "docs" / "figures" / "nll.svg"
PLANS_FIGURE = ROOT / "docs" / "figures" / "plans.svg"
MODELS = {
    "stories260K": "stories260K (0.26M), TinyStories test",
    "books-6m": "books-6m (5.8M), Gutenberg + OpenStax test",
}
ARMS = ("parent", "round_to_nearest", "bitnet_ste", "hestia", "hearth")


def load() -> dict[str, dict[str, dict[str, Any]]]:
    """model -> recipe -> result."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path in sorted((RESULTS / "real_inputs").glob("*.json")):
        record = read_json(path, schema=1)
        found.setdefault(record["model"]["name"], {})[record["recipe"]] = record
    return found


def arms(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Row name -> numbers, for one model; parent and rounding are scored in every run and agree."""
    some = next(iter(runs.values()))
    rows: dict[str, dict[str, Any]] = {"parent": some["scores"]["parent"]}
    rows["round_to_nearest"] = some["scores"]["round_to_nearest"]
    for name, run in runs.items():
        rows[name] = {**run["scores"]["quantized"], "run": run}
    return {name: rows[name] for name in ARMS if name in rows}


def _method(name: str, row: dict[str, Any]) -> str:
    """The recipe, and that it had a teacher."""
    return f"{name} + teacher" if row.get("run", {}).get("teacher") else name


def table(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The honest table in Markdown."""
    lines = [
        "| model, held-out text | arm | nats a token | KL to parent | top-1 | learning rate | tokens |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for model, title in MODELS.items():
        for name, row in arms(found[model]).items() if model in found else ():
            run = row.get("run")
            kl = f"{row['kl_to_parent']:.3f}" if row.get("kl_to_parent") is not None else "-"
            top = f"{100 * row['top1_agreement']:.1f} %" if row.get("top1_agreement") is not None else "-"
            rate, tokens = (f"{run['learning_rate']:g}", f"{run['tokens']:,}") if run else ("-", "-")
            lines.append(f"| {title} | {_method(name, row)} | {row['nll']:.3f} | {kl} | {top} | {rate} | {tokens} |")
    return "\n".join(lines)


def exports_table(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Every exported file and what its verification found."""
    lines = [
        "| run | target | bytes | codes equal | engine | largest logit difference | KL |",
        "|---|---|--:|---|---|--:|--:|",
    ]
    for runs in found.values():
        for run in runs.values():
            for export in run["exports"]:
                check = export["verify"]
                cells = (
                    run["name"],
                    export["target"],
                    f"{export['bytes']:,}",
                    "yes" if check["codes_equal"] else "NO",
                    check["engine"] or "not installed",
                    _number(check["max_abs_logit_diff"]),
                    _number(check["kl"]),
                )
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def greedy(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Greedy text of llama.cpp beside the frozen model's."""
    lines: list[str] = []
    for runs in found.values():
        for run in runs.values():
            for export in run["exports"]:
                for sample in export.get("greedy", ()):
                    lines += [f"**{run['name']}, {export['target']}**", ""]
                    for key in ("prompt", "frozen", "llama.cpp"):
                        lines.append(f"- {key}: {' '.join(sample[key].split())}")
                    lines.append("")
    return "\n".join(lines)


def speed() -> str:
    """The speed results, one line each; the ratio is to the first arm of its group."""
    lines = ["| what | arm | median | ratio |", "|---|---|--:|--:|"]
    for path in sorted((RESULTS / "speed").glob("*.json")):
        record = read_json(path)
        groups = record.get("seconds") or {part: record[part] for part in ("step", "calibration")}
        for group, rows in groups.items():
            for name, row in rows.items():
                cells = (f"{path.stem}: {group}", name, f"{1000 * row['median']:.1f} ms", f"{row['ratio']:.2f}")
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def running() -> str:
    """Resuming, checkpoints, two processes and estimated memory, from their result files."""
    folder = RESULTS / "running"
    kills, cost, two = (read_json(folder / f"{name}.json") for name in ("kills", "checkpoint_cost", "scale_out"))
    memory = read_json(RESULTS / "estimate" / "memory.json")["rows"]
    done = kills["sum"]
    rounds = len(next(iter(two["tokens_per_second"].values())))
    lines = [
        f"- `python benchmarks/kills.py`: {done['kills']} kills, {done['exact_resumes']} exact resumes, "
        f"{done['during_a_checkpoint_write']} of them during a checkpoint write; at most {done['most_steps_lost']} "
        f"steps lost, with a checkpoint every {kills['save_every']}.",
        f"- `python benchmarks/checkpoint_cost.py`: {cost['seconds_a_checkpoint']:.2f} s a checkpoint of "
        f"{cost['bytes_a_checkpoint'] / 1e6:.0f} MB, {100 * cost['share']:.2f} % of a run at the default interval.",
        f"- `python benchmarks/scale_out.py`: two processes of one thread reach {two['ratio']:.2f} of one process with "
        f"two threads (medians of {rounds} rounds).",
        "- `python benchmarks/memory.py`: peak resident memory that `hestia estimate` predicts, against the measured "
        "one. The allocator's share was fitted on these very models.",
        "",
        "| model and stage | predicted | measured | error |",
        "|---|--:|--:|--:|",
    ]
    for name, row in memory.items():
        predicted, measured = (f"{row[key] / 2**20:,.0f} MiB" for key in ("predicted", "measured"))
        lines.append(f"| {name} | {predicted} | {measured} | {100 * row['error']:+.1f} % |".replace("-", "−"))
    return "\n".join(lines)


def configurations() -> str:
    """The files of ``configs/``: what they cost by estimate, and what their run at two layers showed."""
    rows = read_json(RESULTS / "configurations.json")["rows"]
    lines = [
        "| configs/ | parameters | low-bit | tokens | memory | hours | first file | run at two layers |",
        "|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for name, row in rows.items():
        found, files = row["estimate"], row["estimate"]["files"]
        first = next(iter(files))
        checks = [
            f"{target} {'equal' if check['codes_equal'] else 'DIFFERS'}"
            for target, check in row["run"]["exports"].items()
        ]
        cells = (
            f"{name}.yaml",
            f"{found['parameters'] / 1e6:,.0f}M",
            f"{found['quantized'] / 1e6:,.0f}M",
            found["tokens"],
            f"{found['peak_bytes'] / 1e9:.0f} GB",
            f"{found['hours']:.1f}",
            f"{files[first] / 1e6:,.0f} MB {first}",
            ", ".join(checks),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Nats a token of every arm, a row a model, as SVG text."""
    models = [m for m in MODELS if m in found]
    plt.rcParams.update(
        {"svg.hashsalt": "hestia", "svg.fonttype": "none", "font.size": 10, "font.family": "sans-serif"}
    )
    drawing, axes = plt.subplots(len(models), 1, figsize=(7.2, 1.8 * len(models)), squeeze=False)
    colours = dict(zip(ARMS, ("#6b7280", "#b8becb", "#c98a4b", "#8f5a3c", "#c2410c"), strict=True))
    for axis, model in zip(axes[:, 0], models, strict=True):
        rows = arms(found[model])
        for place, (name, row) in enumerate(rows.items()):
            axis.barh(place, row["nll"], height=0.66, color=colours[name])
            axis.text(row["nll"], place, f" {row['nll']:.2f}", va="center", color="#6b7280")
        axis.set_yticks(range(len(rows)), [_method(name, row) for name, row in rows.items()])
        axis.invert_yaxis()
        axis.set_title(MODELS[model], loc="left", fontsize=10, color="#6b7280")
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0, colors="#6b7280")
        axis.set_xticks([])
    drawing.text(0.995, 0.01, "nats a token, lower is better", ha="right", color="#6b7280", fontsize=9)
    drawing.tight_layout()
    buffer = io.StringIO()
    drawing.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    plt.close(drawing)
    return buffer.getvalue()


def _filled(path: Path, block: str) -> str:
    """The text of ``path`` with ``block`` between its result marks."""
    text = path.read_text(encoding="utf-8")
    marked = f"<!-- results -->\n{block}\n<!-- /results -->"
    return re.sub(r"<!-- results -->.*?<!-- /results -->", lambda _: marked, text, flags=re.DOTALL)


def comparison() -> list[str]:
    """Lines of the controlled comparison: every stage that has results; nothing before the first one."""
    sections = [text for stage in experiments.all_stages() if (text := experiments.section(stage))]
    opening = ["## The controlled comparison", "", "How to run and read it: docs/benchmarks.md.", ""]
    return [*opening, *sections] if sections else []


def comparison_figures() -> dict[Path, str]:
    """Path -> SVG text of the figures that the results allow."""
    found: dict[Path, str] = {}
    for stage in experiments.all_stages():
        for kind, draw in (
            ("tokens", experiments.tokens_figure),
            ("ranking", experiments.ranking_figure),
            ("bits", experiments.bits_figure),
        ):
            if (text := draw(stage)) is not None:
                found[FIGURE.with_name(f"stage_{stage.name}_{kind}.svg")] = text
    return found


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def main() -> int:
    """Write or check every generated text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    found = load()
    machines = {
        f"{r['machine']['cpu']}, {r['machine']['threads']} thread(s)" for v in found.values() for r in v.values()
    }
    page = "\n".join(
        [
            "# Results",
            "",
            "Generated by `python benchmarks/make_results.py` from the files in `benchmarks/results`; do not edit.",
            "",
            "## The real inputs of the main job",
            "",
            "One seed (0) each: a demonstration, not a comparison of methods. All arms of a model are scored on the",
            "same held-out blocks, with the frozen, exported weights. Each recipe's learning rate is its own pilot's.",
            "Command: `python benchmarks/real_inputs.py --models DIR --data DIR`.",
            f"Machine: {'; '.join(sorted(machines))}.",
            "",
            table(found),
            "",
            *comparison(),
            "## Exports and their verification",
            "",
            exports_table(found),
            "",
            "## Speed",
            "",
            speed(),
            "",
            "## Running",
            "",
            running(),
            "",
            "## Configurations of real models",
            "",
            "`python benchmarks/configurations.py`: memory and hours are `hestia estimate` for one GPU of 80 GB at 400",
            "TFLOP/s and 2 TB/s, **not measured**; the last column is the job on random weights of the real widths,",
            "cut to two layers, every file read back and compared.",
            "",
            configurations(),
            "",
            "## Curvature",
            "",
            "Commands: `python benchmarks/curvature/metrics.py --models DIR --data DIR`, and `plans.py` beside it.",
            "",
            curvature.section(),
            "",
            "## Greedy text, llama.cpp beside the frozen model",
            "",
            "llama.cpp rounds activations to 8 bits, so the two may part at a near tie.",
            "",
            greedy(found),
        ]
    )
    guide = ROOT / "docs" / "curvature.md"
    written = {
        ROOT / "benchmarks" / "RESULTS.md": page,
        ROOT / "README.md": _filled(ROOT / "README.md", table(found)),
        guide: _filled(guide, curvature.section()),
    }
    if check:
        stale = [path for path, text in written.items() if not path.exists() or path.read_text("utf-8") != text]
        print("\n".join(f"stale: {path.relative_to(ROOT)}" for path in stale) or "all generated texts are current")
        return 1 if stale else 0
    plans = curvature.plans_figure()
    figures = {FIGURE: figure(found), **({PLANS_FIGURE: plans} if plans is not None else {}), **comparison_figures()}
    for path, text in {**written, **figures}.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
