"""Every architecture in every export target, loaded by the engine that people use: the matrix of docs/exporting.md.

    python benchmarks/exports/matrix.py            measure, and write the table and its numbers
    python benchmarks/exports/matrix.py --check    the table says what the recorded numbers say

Toy models with random weights (``toy_architectures``), because what is compared is arithmetic: bytes, then logits. A
cell is the largest difference of a logit from the frozen model, and for llama.cpp, which rounds activations, the KL
divergence in units of the one that an emulation of that rounding gives (1.0 is all explained).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "export_matrix.json"
DOCUMENT = ROOT / "docs" / "exporting.md"
BEGIN, END = "<!-- begin: benchmarks/exports/matrix.py -->", "<!-- end: benchmarks/exports/matrix.py -->"
IDS = [[(i * 7919 + k * 31) % 380 for i in range(48)] for k in range(2)]


def cell(run: Path, target: str, path: Path) -> dict[str, Any]:
    """Export, verify and run one file."""
    import torch
    import toy_architectures

    from hestia.errors import HestiaError
    from hestia.export import export_model
    from hestia.export.verify import verify

    frozen = toy_architectures.FrozenModel(run)
    try:
        export_model(frozen, target, path)
    except HestiaError as error:
        assert not path.exists()
        return {"refused": str(error).replace(f"{run}/model/config.json: ", "").replace(f"{run}/model: ", "")}
    result = verify(path, run, target=target, token_ids=torch.tensor(IDS))
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return result.to_json()


def measure() -> dict[str, Any]:
    """All cells."""
    import torch
    import toy_architectures

    from hestia.export import llama_cpp, mlx_engine
    from hestia.provenance import machine, versions
    from hestia.quant import BINARY, INT2, INT3, INT4, TERNARY, Gaussian, QuantSpec
    from hestia.targets import TARGETS

    # Ternary but for a type that only binary weights fit and the target that mixes all widths.
    of_target = {"gguf:q1_0": (BINARY,), "gguf:mixed": (BINARY, TERNARY, INT2, INT3, INT4)}
    assert llama_cpp.available() and mlx_engine.available(), "needs llama-cpp-python and mlx-lm"
    cells: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, architecture in {**toy_architectures.ARCHITECTURES, **toy_architectures.REFUSED}.items():
            cells[kind] = {}
            for target in TARGETS:
                specs = [QuantSpec(grid=grid, scale=Gaussian()) for grid in of_target.get(target, (TERNARY,))]
                run = folder / f"{kind}-{'-'.join(spec.grid.name for spec in specs)}"
                if not run.exists():
                    toy_architectures.freeze(architecture.build(), run, specs, tokenizer=architecture.tokenizer())
                cells[kind][target] = cell(run, target, folder / "out.gguf")
                print(f"{kind:24} {target:12} {brief(cells[kind][target])}", file=sys.stderr)
    engines = {}
    for package in ("transformers", "compressed-tensors", "llama-cpp-python", "mlx-lm", "mlx"):
        try:
            engines[package] = version(package)
        except PackageNotFoundError:
            engines[package] = None
    return {
        "schema": 1,
        "command": "python benchmarks/exports/matrix.py",
        "engines": engines,
        "versions": versions(),
        "machine": machine(torch.device("cpu")),
        "cells": cells,
    }


def brief(entry: dict[str, Any]) -> str:
    """One cell of the table."""
    if "refused" in entry:
        return "refused"
    if not entry["ok"]:
        return f"**differs**: {entry['differences'][0]}"
    if entry["engine"] is None:
        return "exact bytes, not run"
    text = f"exact, {entry['max_abs_logit_diff']:.1g}" if entry["max_abs_logit_diff"] else "exact, 0"
    emulated = entry.get("kl_emulated", 0.0)
    return f"{text} ({entry['kl'] / emulated:.2f})" if emulated > 1e-10 else text


def table(record: dict[str, Any]) -> str:
    """The Markdown between the markers."""
    targets = list(next(iter(record["cells"].values())))
    engines = ", ".join(f"{name} {number}" for name, number in record["engines"].items() if number)
    lines = [
        f"Engines: {engines}. Each cell: bytes compared, loaded and run; the largest difference of a logit from the "
        "frozen model; in brackets, for llama.cpp, the KL divergence divided by the one that emulating its activation "
        "rounding gives.",
        "",
        f"| architecture | {' | '.join(f'`{t}`' for t in targets)} |",
        f"|:--|{'--:|' * len(targets)}",
    ]
    refusals: list[str] = []
    for kind, row in record["cells"].items():
        shown = []
        for entry in row.values():
            text = brief(entry)
            if text == "refused":
                if entry["refused"] not in refusals:
                    refusals.append(entry["refused"])
                text = f"refused [{refusals.index(entry['refused']) + 1}]"
            shown.append(text)
        lines.append(f"| {kind} | {' | '.join(shown)} |")
    lines += ["", *(f"{i}. {message}" for i, message in enumerate(refusals, start=1))]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        record = json.loads(RESULT.read_text())
    else:
        record = measure()
        RESULT.write_text(json.dumps(record, indent=1) + "\n")
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    text = f"{before}{BEGIN}\n{table(record)}\n{END}{after}"
    if not parser.parse_args().check:
        DOCUMENT.write_text(text)
    elif text != DOCUMENT.read_text():
        print(f"{DOCUMENT} does not say what {RESULT} says; run benchmarks/exports/matrix.py", file=sys.stderr)
        return 1
    bad = [(kind, t) for kind, row in record["cells"].items() for t, e in row.items() if e.get("ok") is False]
    print(f"{len(bad)} cells differ: {bad}" if bad else "every file is exact or refused", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
