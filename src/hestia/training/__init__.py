"""Training on the Hugging Face Trainer: one clock, exact checkpoints, guards."""

from .arguments import check_loggers
from .callback import QATCallback
from .checkpoints import load_latents
from .clock import Clock
from .config import TrainConfig
from .distillation import Distillation
from .guards import Interrupted
from .teacher import Teacher
from .trainer import HestiaTrainer

__all__ = [
    "Clock",
    "Distillation",
    "HestiaTrainer",
    "Interrupted",
    "QATCallback",
    "Teacher",
    "TrainConfig",
    "check_loggers",
    "load_latents",
]
