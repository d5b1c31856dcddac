"""Training on the Hugging Face Trainer: one clock, exact checkpoints, guards."""

from .callback import QATCallback
from .distillation import Distillation
from .guards import Interrupted
from .teacher import Teacher
from .trainer import HestiaTrainer, TrainConfig, check_loggers

__all__ = ["Distillation", "HestiaTrainer", "Interrupted", "QATCallback", "Teacher", "TrainConfig", "check_loggers"]
