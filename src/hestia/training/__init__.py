"""Training on the Hugging Face Trainer: one clock, exact checkpoints, guards."""

from .arguments import check_loggers
from .callback import QATCallback
from .config import TrainConfig
from .distillation import Distillation
from .guards import Interrupted
from .teacher import Teacher
from .trainer import HestiaTrainer

__all__ = ["Distillation", "HestiaTrainer", "Interrupted", "QATCallback", "Teacher", "TrainConfig", "check_loggers"]
