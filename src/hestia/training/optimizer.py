"""AdamW and the learning rate: who decays, who has a rate of its own, and what the rate is at each step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..schedules import LearningRateSchedule
from .config import TrainConfig


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over ``parameter_groups``."""
    groups = parameter_groups(model, config)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def scheduler(
    optimizer: torch.optim.Optimizer, schedule: LearningRateSchedule, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Step k of N has the rate that ``schedule`` gives at t = (k + 1) / N."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule.factor(min(1.0, (step + 1) / steps)))


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """AdamW's groups, by decay and by factor on the learning rate, without empty ones.

    With all factors 1 they are two: matrices, which decay, and vectors, which do not.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {(True, 1.0): [], (False, 1.0): []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        matrix, factor = parameter.ndim >= 2, 1.0
        if id(parameter) in embeddings:
            factor = config.embedding_rate
        elif "._hestia." in name:
            factor = config.scale_rate
        elif not matrix:
            factor = config.norm_rate
        groups.setdefault((matrix, factor), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if matrix else 0.0,
            "lr": config.learning_rate * factor,
        }
        for (matrix, factor), parameters in groups.items()
        if parameters
    ]
