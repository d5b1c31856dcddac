"""Training on the Hugging Face Trainer: one clock, exact checkpoints, guards."""

from .callback import QATCallback
from .distillation import Distillation, Teacher
from .guards import Interrupted
from .trainer import HestiaTrainer, TrainConfig, check_loggers

__all__ = ["Distillation", "HestiaTrainer", "Interrupted", "QATCallback", "Teacher", "TrainConfig", "check_loggers"]
