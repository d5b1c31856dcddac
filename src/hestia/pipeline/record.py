"""report.json: everything that a reader of the run needs, in one record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import loading
from ..files import read_json, write_json
from ..plans import Plan
from ..provenance import command_line, machine, versions
from ..report.html import write_report
from ..report.model_card import write_model_card
from .artefacts import REPORT_FILE, TRAINING_FILE
from .workspace import Workspace


def record_of(work: Workspace, plan: Plan, scores: dict[str, Any], exports: list[dict[str, Any]]) -> dict[str, Any]:
    """What report.json holds but for the baselines and the total time, which only the caller knows."""
    training = read_json(work.folder / TRAINING_FILE) if (work.folder / TRAINING_FILE).is_file() else {}
    tokens = work.steps * work.batch_size * work.seq_len if plan.trains else 0
    seconds = work.stopwatch.seconds
    return {
        "schema": 1,
        "recipe": plan.recipe["name"],
        "recipe_options": {k: v for k, v in plan.recipe.items() if k != "name"},
        "teacher": _teacher(work) if plan.trains else None,
        "target": exports[0]["target"],  # the one whose bits stand below: the plan's first may have been refused
        "seed": work.options.seed,
        "tokens": tokens,
        "learning_rate": training.get("learning_rate"),
        "parent_hard_loss": training.get("parent_hard_loss"),
        "precision": training.get("precision"),
        "nll": {kind: scores[kind]["nll"] for kind in ("parent", "round_to_nearest", "quantized")},
        "kl_to_parent": scores["quantized"]["kl_to_parent"],
        "top1_agreement": scores["quantized"]["top1_agreement"],
        "bits_per_weight": {
            "quantized_layers": 8.0 * exports[0]["quantized_bytes"] / plan.quantized_weights,
            "whole_model": 8.0 * exports[0]["bytes"] / (plan.quantized_weights + plan.kept_weights),
        },
        "weights": {"quantized": plan.quantized_weights, "kept": plan.kept_weights},
        "seconds": {
            "calibrate": seconds.get("calibrate", 0.0),
            "pilot": seconds.get("pilot", 0.0),
            "train": seconds.get("train", 0.0),
            "export": seconds.get("export", 0.0),
        },
        "tokens_per_second": tokens / seconds["train"] if seconds.get("train") else None,
        "exports": exports,
        "scores": {
            kind: {k: v for k, v in scores[kind].items() if not k.startswith("block_")}
            for kind in ("parent", "round_to_nearest", "quantized")
        },
        "nll_interval": {k: scores[k] for k in ("quantized_minus_round_to_nearest",) if scores[k] is not None},
        "steps": work.steps if plan.trains else 0,
        "batch_size": work.batch_size,
        "seq_len": work.seq_len,
        "model": loading.describe(work.source, work.config),
        "license": loading.license_of(work.source),
        "parent_dtype": str(loading.parent_dtype(work.source, work.config)).removeprefix("torch."),
        "data": work.text.record,
        "command": command_line(),
        "versions": training.get("versions") or versions(),  # those that trained, not those that finished the run
        "machine": training.get("machine") or machine(work.device),
        "started": work.stopwatch.started.isoformat(timespec="seconds"),
    }


def _teacher(work: Workspace) -> dict[str, Any] | None:
    o = work.options
    if o.teacher is None:
        return None
    return {"model": o.teacher, "divergence": o.distill, "weight": o.distill_weight, "noise": o.distill_noise}


def publish(run: Path, record: dict[str, Any]) -> None:
    """Write a run's report.json, and what people read of it: report.html and the model card."""
    write_json(run / REPORT_FILE, record)
    write_report(run)
    write_model_card(run)
