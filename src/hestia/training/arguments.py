"""What the Hugging Face Trainer is told of a configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from .. import processes
from ..errors import ConfigError, nearest
from ..progress import announce
from .config import TrainConfig


def arguments(config: TrainConfig, folder: Path) -> TrainingArguments:
    """The Trainer's arguments for ``config``; it writes its checkpoints into ``folder``.

    Raises:
        ConfigError: as ``blocks_a_process`` does.
    """
    made = TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=blocks_a_process(config),
        ddp_find_unused_parameters=False,  # every parameter of a causal language model has a part in the loss
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        max_grad_norm=config.clip or math.inf,  # the Trainer would skip norm and guard at 0
        bf16=config.bf16,
        torch_compile=config.compile,
        tf32=False,  # compiling would switch it on for the whole process, scores included
        seed=config.seed,
        logging_steps=max(1, config.log_every),
        logging_strategy="steps" if config.log_every else "no",
        logging_nan_inf_filter=False,  # it would hide a NaN in the log
        eval_strategy="steps" if config.eval_every else "no",
        eval_steps=config.eval_every or None,
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or 500,
        report_to=list(config.report_to) or "none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        use_cpu=config.device == "cpu" or not torch.cuda.is_available(),
    )
    if made.n_gpu > 1:  # the Trainer would take the batch that many times, and copy the model at every step
        if config.log_every:
            announce(f"one of {made.n_gpu} GPUs is used; torchrun --nproc-per-node {made.n_gpu} uses all")
        made._n_gpu = 1
    return made


def blocks_a_process(config: TrainConfig) -> int:
    """Blocks of one process and micro-batch: ``batch_size`` counts those of all processes.

    Raises:
        ConfigError: they cannot be shared out evenly.
    """
    parts = config.accumulation * processes.world_size()
    if config.batch_size % parts:
        raise ConfigError(
            f"--batch-size {config.batch_size} cannot be shared out evenly between {processes.world_size()} processes "
            f"in {config.accumulation} micro-batches; choose a multiple of {parts}"
        )
    return config.batch_size // parts


def check_loggers(names: Sequence[str]) -> None:
    """Check that the Trainer could report to these loggers.

    Raises:
        ConfigError: no such logger (the nearest is named), or its package is not installed.
    """
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(f"--report-to {name!r}: {nearest(name, INTEGRATION_TO_CALLBACK)}")
        if name not in get_available_reporting_integrations():
            raise ConfigError(f"--report-to {name}: its package is not installed; install it first")
