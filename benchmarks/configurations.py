"""Do the configuration files for real models hold together? Each one estimated at full size, and run at two layers.

    python benchmarks/configurations.py [NAME ...]
    python benchmarks/configurations.py --estimates     these alone, which no machine decides; the runs stay as recorded

estimate   `hestia estimate` of the published shapes on one GPU of 80 GB at 400 TFLOP/s and 2 TB/s
run        `hestia quantize --config` on random weights of the real widths, heads and vocabulary, cut to two layers:
           plan, calibration, one training step of a block of 64 tokens on a CPU, every file of the configuration
           exported and verified, in llama.cpp too where it is installed

The run shows that every tensor shape of the model goes through the whole job and into its files. It says nothing about
quality. The tokenizer is that of the bundled model: its ids are a part of the larger vocabulary.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from hestia import progress
from hestia.estimate.whole import Layout, estimate
from hestia.files import read_json, write_json
from hestia.options import Options
from hestia.pipeline import quantize
from hestia.provenance import machine, versions
from hestia.tiny import model_path, text_path

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "configurations.json"
LAYERS, TOKENS = 2, 64
KEPT = ("codes_equal", "max_abs_logit_diff", "kl", "engine")
GPU = {"memory": "80G", "disk": "1T", "flops": "400T", "bandwidth": "2e12"}


def options_of(path: Path, **changes: Any) -> Options:
    """The options of a configuration file, some of them changed."""
    return Options(**{**yaml.safe_load(path.read_text(encoding="utf-8")), **changes})


def estimated(path: Path, shapes: Path) -> dict[str, Any]:
    """Memory, hours and bytes at full size."""
    options = options_of(path, model=str(shapes), device="cuda")
    found = estimate(options, Layout(), **GPU)
    sizes = {file.target: file.bytes for file in found.files}
    return {
        "parameters": found.parameters,
        "quantized": found.quantized,
        "tokens": options.tokens,
        "peak_bytes": found.peak,
        "hours": sum(found.seconds.values()) / 3600.0,
        "files": {name: sizes[name] for name in options.target},
        "on": GPU,
    }


def short_model(shapes: Path, folder: Path) -> Path:
    """Random weights in the shapes of ``shapes``, two layers of them, with the bundled tokenizer."""
    config = json.loads(shapes.read_text(encoding="utf-8"))
    config["num_hidden_layers"] = LAYERS
    for key in ("bos_token_id", "eos_token_id"):
        config[key] = 0
    folder.mkdir()
    write_json(folder / "config.json", config)
    for file in model_path().glob("tokenizer*"):
        shutil.copy(file, folder)
    torch.manual_seed(0)
    parsed = AutoConfig.from_pretrained(folder)
    AutoModelForCausalLM.from_config(parsed, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def dry_run(path: Path, shapes: Path, scratch: Path) -> dict[str, Any]:
    """One step of the whole job at two layers; raises if a file cannot be written, read back or run."""
    model = short_model(shapes, scratch / "model")
    options = options_of(
        path,
        model=str(model),
        data=(str(text_path("train")),),
        eval_data=(str(text_path("held_out")),),
        out=str(scratch / "run"),
        steps=1,
        seq_len=TOKENS,
        batch_size=1,
        accumulation=1,
        calibrate=2,
        eval_tokens=str(2 * TOKENS),
        device="cpu",
    )
    report = quantize(options)
    return {
        "layers": LAYERS,
        "exports": {entry["target"]: {key: entry["verify"][key] for key in KEPT} for entry in report["exports"]},
        "bits_per_weight": report["bits_per_weight"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--estimates", action="store_true")
    given = parser.parse_args()
    progress.enable()
    record: dict[str, Any] = read_json(RESULT) if RESULT.is_file() else {"schema": 1, "rows": {}}
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        if given.names and path.stem not in given.names:
            continue
        shapes = ROOT / "benchmarks" / "estimate" / "configs" / f"{path.stem}.json"
        row = record["rows"].setdefault(path.stem, {})
        row["estimate"] = estimated(path, shapes)
        if not given.estimates:
            with tempfile.TemporaryDirectory() as scratch:
                row["run"] = dry_run(path, shapes, Path(scratch))
            record |= {"machine": machine(torch.device("cpu")), "versions": versions()}
        write_json(RESULT, record)
        found = row["estimate"]
        print(f"{path.stem}: {found['peak_bytes'] / 1e9:.1f} GB, {found['hours']:.1f} h, files {list(found['files'])}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
