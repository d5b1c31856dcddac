"""A toy model, toy blocks and a trainer of both, in fp32 on one thread: a step takes milliseconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import toy_models
from torch import nn
from transformers import TrainerCallback

import hestia
from hestia.data import Blocks
from hestia.plans import Plan
from hestia.training import HestiaTrainer, TrainConfig


def blocks(count: int = 24, length: int = 16, seed: int = 0) -> Blocks:
    """Blocks that a model can learn: each counts upwards from a random start."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(3, 60, (count, 1), generator=generator)
    ids = 3 + (start + torch.arange(length)) % 61
    return Blocks(ids, torch.ones_like(ids, dtype=torch.bool))


def converted(make: Callable[[], Any] = toy_models.llama, recipe: str = "hestia", **options: Any) -> tuple[Any, Plan]:
    """A toy model after ``hestia.apply``, in training mode, and its plan."""
    model = make()
    plan = hestia.plan(model, recipe, options=options)
    hestia.apply(model, plan)
    model.train()
    return model, plan


def trainer(
    folder: Path,
    model: nn.Module,
    plan: Plan,
    *,
    callbacks: list[TrainerCallback] | None = None,
    train: Blocks | None = None,
    teacher: nn.Module | None = None,
    **config: Any,
) -> HestiaTrainer:
    """A trainer of six steps of four blocks that logs, evaluates and saves as told."""
    folder.mkdir(exist_ok=True)
    defaults: dict[str, Any] = {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "bf16": False, "log_every": 1}
    return HestiaTrainer(
        model,
        plan=plan,
        config=TrainConfig(**{**defaults, **config}),
        train=blocks() if train is None else train,
        tuning=blocks(6, seed=1),
        folder=folder,
        callbacks=callbacks,
        teacher=teacher,
    )


def log_rows(folder: Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


class At(TrainerCallback):
    """Calls ``action(model)`` when step ``step`` (from 0) begins, or ends."""

    def __init__(self, step: int, action: Callable[[Any], None], *, end: bool = False) -> None:
        self.step, self.action, self.end = step, action, end

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.end and state.global_step == self.step:
            self.action(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.end and state.global_step == self.step:
            self.action(model)
