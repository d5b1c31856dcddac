"""TrainConfig: how a model is trained, and which part of that moves a weight; and the model made ready for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..schedules import LearningRateSchedule
from .distillation import Distillation

_BYSTANDERS = {"log_every", "eval_every", "save_every", "eval_blocks", "keep", "report_to", "device"}


def set_up(model: Any, *, train_embeddings: bool, checkpointing: bool) -> None:
    """Freeze a model's embeddings, and let it recompute activations, where that is asked for."""
    if not train_embeddings:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.requires_grad_(False)
    if checkpointing:  # transformers renamed it on the way to 6.0
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train; the defaults are the paper's where it gives one (Hestia, arXiv:2601.20745).

    Attributes:
        steps: optimizer steps.
        batch_size: blocks per step in all, over processes and accumulation.
        accumulation: micro-batches per step.
        learning_rate: peak rate.
        schedule: warm-up, constant, decay.
        betas, weight_decay, clip: AdamW and gradient clipping (0: none); vectors (norms, biases) are not decayed.
        scale_rate, norm_rate, embedding_rate: factors on the learning rate of learned scales, of norms and biases (all
            other vectors), and of embeddings (with a tied head).
        distill: the teacher's share in the loss; None trains on cross entropy alone.
        train_embeddings: False freezes embeddings, and with them a tied head.
        bf16: bf16 autocast over fp32 weights.
        gradient_checkpointing: recompute activations in the backward pass.
        compile: run the model through torch.compile.
        seed: order of the data and every random draw.
        log_every, eval_every, save_every: steps; 0 means never. A run that is saved is so every half hour, too.
        eval_blocks: tuning blocks of the logged hard loss.
        keep: checkpoints that rotation leaves.
        report_to: the Trainer's loggers, such as ("tensorboard",).
        device: "cpu", "cuda", or "auto": CUDA where there is any.

    Raises:
        ConfigError: a device there is not, a number of steps, blocks or micro-batches under 1, a rate that is not
            positive, or a factor on it, a decay or a clip that is negative or infinite, or betas outside of [0, 1).
    """

    steps: int
    batch_size: int
    learning_rate: float
    accumulation: int = 1
    schedule: LearningRateSchedule = field(default_factory=LearningRateSchedule)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    clip: float = 1.0
    scale_rate: float = 1.0
    norm_rate: float = 1.0
    embedding_rate: float = 1.0
    distill: Distillation | None = None
    train_embeddings: bool = True
    bf16: bool = True
    gradient_checkpointing: bool = False
    compile: bool = False
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 0
    eval_blocks: int = 32
    keep: int = 2
    report_to: tuple[str, ...] = ()
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device must be auto, cpu or cuda, got {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device is cuda, and this torch sees no CUDA device")
        for name in ("steps", "batch_size", "accumulation"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if not 0.0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate must be a positive number, got {self.learning_rate}")
        for name in ("scale_rate", "norm_rate", "embedding_rate", "weight_decay", "clip"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be 0 or a positive number, got {getattr(self, name)}")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(f"betas must lie in [0, 1), got {self.betas}")


def that_moves(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that moves a weight."""
    return {name: value for name, value in config.items() if name not in _BYSTANDERS}
