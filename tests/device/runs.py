"""Runs of a toy on the CPU and on the pretended device; for each, what both gave. Usage: runs.py PARENT TEXT OUT SCALE

One JSON object goes to standard output: what the verbs say, [on the CPU, on the device], and run -> the scores of both
reports.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import toy_models
from second_device import DEVICE, REFUSED, TRAINED_ON, Elsewhere, pretended
from toy_training import converted, log_rows, trainer

import hestia
from hestia import jobs, loading, recipes, settings
from hestia.evaluation import model_logits, score
from hestia.options import Options
from hestia.training import Distillation

FEW: dict[str, Mapping[str, Any]] = {
    "the default": {"target": ("hf", "gguf:q4_0")},
    "the published method, bf16": {"recipe": "hestia", "teacher": "none", "calibrate": 2, "precision": "bf16"},
    "a budget": {"bits": 2.8, "calibrate": 2},
}
ALL: dict[str, Mapping[str, Any]] = {
    **{f"recipe {name}": {"recipe": name, "teacher": "none"} for name in recipes.names()},
    **{
        f"estimator {name}": {"recipe": "hestia", "teacher": "none", "calibrate": 2, "estimator": name}
        for name in ("gnb", "fisher", "hutchinson", "hutchpp", "xtrace", "eigen")
    },
    "estimator kl, a budget": {"bits": 2.8, "calibrate": 2, "estimator": "kl"},
    "akl, noise, accumulation": {"distill": "akl", "distill_weight": 0.5, "distill_noise": 0.1, "accumulation": 2},
    "reverse kl, checkpointing": {"distill": "reverse_kl", "gradient_checkpointing": True},
    "frozen embeddings, groups, mlx": {"embeddings": "freeze", "group_size": "32", "target": ("mlx",)},
    "a pilot": {"lr": "auto"},
}


def refuses() -> None:
    """The device itself: what it lets pass, and what not."""
    with pretended():
        there, first = torch.ones(2, 3).to(DEVICE), torch.tensor([0])
        number = there.sum()
        assert isinstance(there, Elsewhere) and there.device == DEVICE
        assert (there * torch.tensor(2.0))[first].sum().item() == 6.0
        refused = [
            lambda: there + torch.ones(2, 3),
            lambda: torch.stack([number, torch.tensor(1.0)]),
            lambda: torch.tensor(1.0).add_(number),
            lambda: torch.ones(2)[first.to(DEVICE)],
            lambda: there.index_put_((first,), torch.ones(3)),
        ]
        for mix in refused:
            try:
                mix()
            except (RuntimeError, IndexError):
                pass
            else:
                raise AssertionError("tensors of two devices went through")
    assert len(REFUSED) == len(refused)
    REFUSED.clear()


def resumes(folder: Path) -> None:
    """A run that goes on from a checkpoint ends in the weights of one that was not stopped."""
    with pretended():
        ends = []
        for first in (None, folder / "whole" / "checkpoints" / "step-000003"):
            model, plan = converted(recipe="hearth")
            run = folder / ("whole" if first is None else "rest")
            given = {"teacher": toy_models.llama(), "distill": Distillation(weight=1.0)}
            trainer(run, model, plan, save_every=3, **given).fit(first)
            ends.append({name: weight.cpu() for name, weight in model.state_dict().items()})
        assert log_rows(folder / "rest")[0]["step"] == 4, "it began anew"
        assert ends[0].keys() == ends[1].keys()
        for name, weight in ends[0].items():
            assert torch.equal(weight, ends[1][name]), name
    assert not REFUSED and {DEVICE} == TRAINED_ON


def verbs(parent: str, text: str) -> list[Any]:
    """What calibrate and eval say, and the score of a student here against its parent wherever that lies."""
    options = Options(model=parent, data=(text,), seq_len=32, calibrate=4, eval_tokens="1024")
    source = loading.resolve(parent)
    student, blocks = loading.load_model(source), settings.all_blocks(options, loading.load_tokenizer(source), 32)
    elsewhere = loading.load_model(source).to(settings.choose_device(options))
    crossed = score(model_logits(student), blocks, parent=model_logits(elsewhere))
    return [
        jobs.calibrate_model(options).traces,
        jobs.evaluate_model(options, against=parent),
        jobs.evaluate_model(options, protocol="hestia"),
        crossed.to_json(),
    ]


def outcome(parent: str, text: str, out: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Scores, and whether every file is what was trained."""
    quick = {"steps": 8, "seq_len": 32, "batch_size": 4, "lr": "3e-3", "precision": "fp32", "eval_tokens": "1024"}
    report = hestia.quantize(Options(model=parent, data=(text,), out=str(out), **{**quick, **options}))
    assert not REFUSED, REFUSED
    return {
        "device": report["machine"]["device"],
        "nll": report["nll"],
        "kl": report["kl_to_parent"],
        "verified": [export["verify"]["codes_equal"] for export in report["exports"]],
    }


if __name__ == "__main__":
    parent, text, folder, scale = sys.argv[1:]
    torch.set_num_threads(1)
    refuses()
    resumes(Path(folder))
    found: dict[str, list[Any]] = {}
    torch.backends.cuda.enable_flash_sdp(False)  # the CPU's own attention kernel rounds otherwise than its parts
    said_here = verbs(parent, text)
    with pretended():
        said_there = verbs(parent, text)
    assert not REFUSED, REFUSED
    for number, (name, options) in enumerate((ALL if scale == "all" else FEW).items()):
        here = outcome(parent, text, Path(folder) / f"{number}-here", options)
        TRAINED_ON.clear()
        with pretended():
            found[name] = [here, outcome(parent, text, Path(folder) / f"{number}-there", options)]
        assert ({DEVICE} if name != "recipe round_to_nearest" else set()) == TRAINED_ON, name
    print(json.dumps({"verbs": [said_here, said_there], "runs": found}))
