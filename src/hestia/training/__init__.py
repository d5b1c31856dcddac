"""Training on the Hugging Face Trainer: one clock, exact checkpoints, guards."""

from .callback import QATCallback
from .guards import Interrupted
from .trainer import HestiaTrainer, TrainConfig, check_loggers

__all__ = ["HestiaTrainer", "Interrupted", "QATCallback", "TrainConfig", "check_loggers"]
