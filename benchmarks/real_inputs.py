"""The real inputs of the main job: run each one, keep its report as an immutable result.

    python benchmarks/real_inputs.py --models DIR --data DIR [--only NAME] [--runs DIR]

``--models`` holds stories260K and books-6m, ``--data`` tinystories, gutenberg and openstax. A result that is there
already is left alone, so that an interrupted call takes up where it stopped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from hestia import progress
from hestia.cli.verify import greedy_samples
from hestia.export import llama_cpp
from hestia.files import read_json, write_json
from hestia.options import Options
from hestia.pipeline import quantize

RESULTS = Path(__file__).parent / "results" / "real_inputs"
KEPT = (
    "recipe", "recipe_options", "teacher", "target", "seed", "tokens", "steps", "batch_size", "seq_len",
    "learning_rate", "nll", "kl_to_parent", "top1_agreement", "bits_per_weight", "weights", "seconds",
    "tokens_per_second", "nll_interval", "model", "parent_dtype", "scores", "versions", "machine", "started",
)  # fmt: skip


def inputs(models: Path, data: Path, runs: Path) -> dict[str, Options]:
    """Name -> options of every run: the defaults, and two recipes as they were published, without a teacher."""
    stories = {
        "model": str(models / "stories260K"),
        "data": (str(data / "tinystories" / "train.txt"),),
        "eval_data": (str(data / "tinystories" / "test.txt"),),
        "tokens": "600k",
        "seq_len": 256,
        "eval_tokens": "10M",
        "target": ("hf",),
    }
    books = {
        "model": str(models / "books-6m"),
        "data": (str(data / "gutenberg" / "train.txt.gz"), str(data / "openstax" / "train.txt.gz")),
        "eval_data": (str(data / "gutenberg" / "test.txt.gz"), str(data / "openstax" / "test.txt")),
        "tokens": "1M",
        "seq_len": 256,
        "target": ("gguf:tq2_0", "gguf:q2_0", "gguf:tq1_0", "hf"),
    }
    chosen = {}
    for recipe, teacher in (("hearth", "parent"), ("hestia", "none"), ("bitnet_ste", "none")):
        for name, base in (("stories260K", stories), ("books-6m", books)):
            label = f"{name}-{recipe}"
            chosen[label] = Options(**base, recipe=recipe, teacher=teacher, out=str(runs / label), threads=1)
    return chosen


def main() -> None:
    """Run what has no result yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    progress.enable()
    for name, options in inputs(arguments.models, arguments.data, arguments.runs).items():
        result = RESULTS / f"{name}.json"
        if result.exists() or arguments.only not in name:
            continue
        report = quantize(options, resume=True)
        record = summary(name, report)
        for export in record["exports"]:
            if export["target"] != "hf" and llama_cpp.available():
                export["greedy"] = greedy_samples(Path(options.out) / export["path"], Path(options.out))
        write_json(result, record)
        print(json.dumps({"name": name, "nll": record["nll"], "learning_rate": record["learning_rate"]}))


def summary(name: str, report: dict[str, Any]) -> dict[str, Any]:
    """What of report.json a result keeps: no path of this machine."""
    record: dict[str, Any] = {"schema": 1, "name": name, "command": "python benchmarks/real_inputs.py"}
    record |= {key: report[key] for key in KEPT}
    keys = ("target", "bytes", "sha256", "verify")
    record["exports"] = [{"path": e["path"], **{key: e[key] for key in keys}} for e in report["exports"]]
    return record


def load() -> list[dict[str, Any]]:
    """All results, by name."""
    return [read_json(path) for path in sorted(RESULTS.glob("*.json"))]


if __name__ == "__main__":
    main()
