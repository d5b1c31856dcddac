"""A run's folder as the pipeline writes it, made up: every artefact, with numbers that look like a real run's."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

PROJECTIONS = {
    "self_attn.q_proj": (256, 256),
    "self_attn.k_proj": (128, 256),
    "self_attn.v_proj": (128, 256),
    "self_attn.o_proj": (256, 256),
    "mlp.gate_proj": (768, 256),
    "mlp.up_proj": (768, 256),
    "mlp.down_proj": (256, 768),
}
LAYERS = 6
PATHS = {f"model.layers.{i}.{p}": shape for i in range(LAYERS) for p, shape in PROJECTIONS.items()}


def report() -> dict[str, Any]:
    """report.json with every key, promised and extra."""
    return {
        "schema": 1,
        "recipe": "hestia",
        "target": "gguf:tq2_0",
        "seed": 0,
        "tokens": 600_000,
        "learning_rate": 6e-3,
        "nll": {"parent": 3.3171, "round_to_nearest": 7.9184, "quantized": 3.6022},
        "kl_to_parent": 0.3108,
        "top1_agreement": 0.7124,
        "bits_per_weight": {"quantized_layers": 2.0625, "whole_model": 3.1127},
        "weights": {"quantized": 4_718_592, "kept": 1_051_904},
        "seconds": {"calibrate": 6.4, "train": 85.2, "total": 121.9},
        "tokens_per_second": 7042.3,
        "exports": [
            {
                "target": "gguf:tq2_0",
                "path": "exports/gguf-tq2_0/model.gguf",
                "bytes": 2_311_424,
                "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
                "verify": {"codes_equal": True, "max_abs_logit_diff": 0.113, "kl": 2.1e-4, "engine": "llama.cpp b6912"},
            },
            {
                "target": "hf",
                "path": "exports/hf",
                "bytes": 2_298_112,
                "sha256": "60303ae22b998861bce3b28f33eec1be758a213c86c93c076dbe9f558c11c752",
                "verify": {"codes_equal": True, "max_abs_logit_diff": 0.0, "kl": 0.0, "engine": "transformers 5.23.0"},
            },
        ],
        "command": [
            "hestia",
            "quantize",
            "models/books-6m",
            "--data",
            "my books.txt",
            "--out",
            "run",
            "--tokens",
            "600k",
        ],
        "versions": {"python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0", "hestia": "0.1.0"},
        "machine": {"cpu": "x86_64", "threads": 2, "device": "cpu"},
        "model": {"id": "books-6m", "commit": None},
        "parent_dtype": "bfloat16",
        "data": {
            "train": {"files": ["my books.txt"], "tokens": 1_204_224},
            "held_out": {"blocks": 213, "tokens": 54_528},
        },
        "started": "2026-11-22T00:12:44+00:00",
        "license": "apache-2.0",
        "baselines": [
            {
                "recipe": "round_to_nearest",
                "nll": 7.9184,
                "kl_to_parent": 4.91,
                "top1_agreement": 0.081,
                "seconds": 0.4,
            },
            {"recipe": "bitnet_ste", "nll": 3.6981, "kl_to_parent": 0.402, "top1_agreement": 0.668, "seconds": 81.0},
        ],
        "nll_interval": {"quantized_minus_round_to_nearest": {"mean": -4.316, "low": -4.371, "high": -4.262}},
    }


def plan() -> dict[str, Any]:
    """plan.json as Plan.to_json writes it."""
    return {
        "schema": 1,
        "recipe": {"name": "hestia", "alpha": 0.4},
        "trains": True,
        "targets": ["gguf:tq2_0"],
        "schedule": {"rho": 0.2, "temperature": 0.3, "hold": None, "decay": "cosine", "end_temperature": 0.0},
        "layers": {
            path: {
                "shape": list(shape),
                "temperature_factor": 1.0 + 0.02 * (i % 9 - 4),
                "stored": {"gguf:tq2_0": "TQ2_0"},
                "levels": [-1.0, 0.0, 1.0],
                "group_size": "row",
                "scale": {"name": "absmean", "eps": 1e-5},
                "estimator": {"name": "softmax"},
            }
            for i, (path, shape) in enumerate(PATHS.items())
        },
        "kept": {
            "model.embed_tokens.weight": {"reason": "embedding", "weights": 1_048_576},
            "model.norm.weight": {"reason": "norm", "weights": 256},
            **{f"model.layers.{i}.input_layernorm.weight": {"reason": "norm", "weights": 256} for i in range(LAYERS)},
        },
    }


def sensitivity() -> dict[str, Any]:
    """sensitivity.json: one trace of 42 rests on few sequences."""
    draw = random.Random(0)
    tensors = {}
    for i, (path, (rows, columns)) in enumerate(PATHS.items()):
        mean = math.exp(draw.gauss(0.0, 0.9) + 0.25 * (LAYERS - i // len(PROJECTIONS)))
        tensors[path] = {
            "trace": 1.18 * mean,
            "standard_error": 0.09 * mean,
            "geometric_mean": mean,
            "low": 0.86 * mean,
            "high": 1.16 * mean,
            "largest_share": 0.171 if i == 4 else 0.034,
            "weights": rows * columns,
            "samples": [mean, 1.1 * mean],
        }
    return {
        "schema": 2,
        "estimator": "gauss_newton",
        "seed": 0,
        "sequences": 64,
        "scored_positions": 16_320,
        "tensors": tensors,
    }


def log(steps: int = 300) -> list[dict[str, Any]]:
    """log.jsonl: four pilots, a training row every two steps, a hard loss every 50."""
    draw = random.Random(1)
    lines: list[dict[str, Any]] = [
        {"pilot": {"learning_rate": rate, "steps": 12, "tuning_loss": held_out}}
        for rate, held_out in ((2e-3, 4.31), (6e-3, 4.18), (1.8e-2, 4.62), (5.4e-2, None))
    ]
    for step in range(0, steps + 1, 2):
        t = step / steps
        heat = 0.3 if t < 0.2 else 0.15 * (1 + math.cos(math.pi * (t - 0.2) / 0.8))
        lines.append(
            {
                "step": step,
                "tokens": 2000 * step,
                "loss": 3.45 + 1.3 * min(1.0, 5 * t) * math.exp(-4 * t) + draw.gauss(0.0, 0.05),
                "learning_rate": 6e-3 * min(1.0, 20 * t, 10 * (1 - t) + 0.1),
                "grad_norm": math.exp(draw.gauss(-0.2, 0.25)),
                "pressure": min(1.0, 5 * t),
                "temperature": {"min": 0.86 * heat, "mean": heat, "max": 1.16 * heat},
                "saturated": 0.3 + 0.65 * t * t,
                "tokens_per_second": 7000.0,
                "seconds": 0.28 * step,
            }
        )
        if step % 50 == 0:
            lines.append({"step": step, "hard_loss": 3.6 + 4.3 * math.exp(-9 * t)})
    return lines


def diagnostics() -> dict[str, Any]:
    """diagnostics.json: Gaussian weights that training parts at the thresholds."""
    edges = [-3.0 + 0.1 * i for i in range(61)]
    middles = [0.5 * (a + b) for a, b in zip(edges, edges[1:], strict=False)]

    def bell(x: float, middle: float, width: float) -> float:
        return math.exp(-0.5 * ((x - middle) / width) ** 2) / width

    before = [round(20_000 * bell(x, 0.0, 1.25)) for x in middles]
    after = [
        round(5_000 * (2 * bell(x, 0.0, 0.35) + bell(x, 1.05, 0.4) + bell(x, -1.05, 0.4) + bell(x, 0.0, 1.4)))
        for x in middles
    ]
    shown = [path for path in PATHS if path.endswith(("q_proj", "down_proj"))]
    return {
        "schema": 1,
        "histograms": {path: {"edges": edges, "before": before, "after": after} for path in shown},
        "codes": {path: {"zero_share": 0.31 + 0.001 * i, "flipped_share": 0.124} for i, path in enumerate(PATHS)},
        "samples": [
            {
                "prompt": "It was a truth universally acknowledged",
                "parent": ", that the young man had been a long time in the house, and had not been seen since the "
                "morning.\n\n“My dear sir,” said he, “I am very glad to see you.”",
                "quantized": ", that the old man was in the world, and the young lady had been so much in the "
                "house of the house.\n\n“I do not know,” said the old man, “what is the matter.”",
            },
            {
                "prompt": "The cell membrane",
                "parent": " is made of a double layer of lipids.",
                "quantized": " is a cell.",
            },
        ],
    }


def make_run(
    folder: Path,
    *,
    report: dict[str, Any] | None = None,
    log_text: str | None = None,
    **artefacts: dict[str, Any] | None,
) -> Path:
    """Write a run into ``folder``; ``plan=None`` and the like leave that artefact out, a dict replaces it."""
    folder.mkdir(parents=True, exist_ok=True)
    records = {"report": report or globals()["report"](), "plan": plan(), "sensitivity": sensitivity()}
    records |= {"diagnostics": diagnostics(), **artefacts}
    for name, record in records.items():
        if record is not None:
            (folder / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")
    text = "\n".join(json.dumps(line) for line in log()) + "\n" if log_text is None else log_text
    (folder / "log.jsonl").write_text(text, encoding="utf-8")
    (folder / "run.yaml").write_text("tokens: 600k\nlr: auto\nseed: 0\ndata: [my books.txt]\n", encoding="utf-8")
    return folder
