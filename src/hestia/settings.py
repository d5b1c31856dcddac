"""What the options come to with a given model: recipe and plan, device, blocks, batch, text, curvature."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import curvature, processes, recipes
from .data import Blocks, TokenizedText, epoch_order, pack_all, prepare
from .errors import ConfigError
from .mixed import is_mixed
from .options import Options, count
from .planner import plan as make_plan
from .plans import Plan
from .progress import announce
from .quant import Gaussian, GroupSize, QuantSpec
from .quant.grouping import group_shape
from .recipes import Recipe

LARGEST_DEFAULT_BATCH = 16
"""Blocks a step where --batch-size is not given, at most."""

DEFAULT_BLOCK = 1024
"""Tokens per block where --seq-len is not given, at most."""

TUNING_BLOCKS = 32
"""Training blocks set aside for the logged hard loss and the learning-rate pilot; the held-out text is scored once."""


def recipe_of(options: Options) -> Recipe:
    """The recipe that the options name, with the options that they give it.

    Raises:
        ConfigError: an unknown recipe or option of it.
    """
    return recipes.get(options.recipe, **options.options)


def widths_may_differ(options: Options) -> bool:
    """Whether the plan may give tensors different widths, which needs a sensitivity whatever the recipe."""
    return is_mixed(recipe_of(options), options.bits, options.mix(), options.max_kl)


def plan_of(model: PreTrainedModel, options: Options, **instead: Any) -> Plan:
    """The plan that the options ask for, with other arguments of ``hestia.planner.plan`` in place of theirs.

    Raises:
        ConfigError, PlanError: see there.
    """
    asked: dict[str, Any] = {
        "recipe": recipe_of(options),
        "target": options.target,
        "sensitivity": options.sensitivity,
        "bits": options.bits,
        "widths": options.mix(),
        "max_kl": options.max_kl,
        "group_size": options.group(),
        "skip": options.skip,
        "fallback": options.fallback,
        "allow_partial": options.allow_partial,
    }
    return make_plan(model, **(asked | instead))


def tell_unread_curvature(options: Options) -> None:
    """Say so where curvature is given, or how to measure it, and nothing reads it."""
    given = [f"--{k} {getattr(options, k)}" for k in ("sensitivity", "estimator", "calibrate")
             if getattr(options, k) not in (getattr(Options, k), 0)]  # fmt: skip
    if given and not recipe_of(options).uses_curvature and not widths_may_differ(options):
        announce(
            f"recipe {options.recipe} reads no curvature and all tensors get one width, so this has no effect: "
            f"{', '.join(given)}"
        )


def choose_device(options: Options) -> torch.device:
    """The device asked for, said where it is a GPU or could have been one; threads are set here too.

    Raises:
        ConfigError: CUDA asked for where there is none.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this torch sees no CUDA device")
    if options.device == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        free, size = torch.cuda.mem_get_info()
        announce(f"on {torch.cuda.get_device_name()}, {free / 1e9:.1f} of {size / 1e9:.1f} GB free")
        return torch.device("cuda")
    if shutil.which("nvidia-smi"):
        announce("on the CPU: a GPU is here and torch does not see it, `hestia doctor` says more")
    return torch.device("cpu")


def in_bf16(options: Options, config: Any, device: torch.device) -> bool:
    """Whether training runs under bf16 autocast.

    auto: on a GPU that multiplies bf16 without emulating it (from Ampere on); on a CPU if the model is 128 wide.
    """
    if options.precision != "auto":
        return options.precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return int(getattr(config.get_text_config(), "hidden_size", 1024)) >= 128


def longest_block(config: Any, options: Options, most: int = DEFAULT_BLOCK) -> int:
    """Tokens per block: ``--seq-len``, or the model's maximum, ``most`` at most.

    Raises:
        ConfigError: more than the model has positions for.
    """
    longest = int(getattr(config.get_text_config(), "max_position_embeddings", most) or most)
    chosen = options.seq_len or min(most, longest)
    if chosen > longest:
        raise ConfigError(f"--seq-len {chosen} is longer than the model's {longest} positions")
    return chosen


def batch_and_steps(options: Options, seq_len: int, parts: int) -> tuple[int, int]:
    """Blocks a step, the user's or as many as leave at least 300 steps, 16 at most; and optimizer steps.

    Args:
        options: of the run.
        seq_len: tokens per block.
        parts: processes that share the training.

    Raises:
        ConfigError: a batch that processes and micro-batches cannot share evenly.
    """
    total, shares = count(options.tokens, "tokens"), options.accumulation * parts
    size = options.batch_size
    if size is None:
        size = max(1, min(LARGEST_DEFAULT_BATCH, total // (300 * seq_len)))
        size = max(shares, size - size % shares)
    if size % shares:
        if parts == 1:
            raise ConfigError(f"--accumulation {shares} does not divide --batch-size {size}; choose a multiple of it")
        raise ConfigError(
            f"--batch-size {size} cannot be shared out evenly between {parts} processes in "
            f"{options.accumulation} micro-batches; choose a multiple of {shares}"
        )
    return size, options.steps or max(1, total // (size * seq_len))


def prepare_text(
    options: Options,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    cache: Path | None,
    begun: Mapping[str, Mapping[str, Any]] | None = None,
    batch: int | None = None,
) -> TokenizedText:
    """Training and held-out blocks as the options ask for; ``cache`` is only read, ``begun`` pins hub data sets.

    ``batch`` is that of a run that goes on, whatever today's number of processes would make it.
    """
    tokens = count(options.tokens, "tokens")
    batch = batch or batch_and_steps(options, seq_len, processes.world_size())[0]
    if options.steps is not None:
        tokens = options.steps * (options.batch_size or max(batch, LARGEST_DEFAULT_BATCH)) * seq_len
    return prepare(
        options.data,
        options.eval_data or None,
        tokenizer,
        seq_len=seq_len,
        joiner=options.joiner,  # type: ignore[arg-type]
        separator=options.separator,
        column=options.text_column,
        held_out_share=options.held_out_share,
        seed=options.seed,
        cache=cache,
        keep=False,
        max_train_tokens=tokens + tokens // 10 + TUNING_BLOCKS * seq_len,
        max_held_out_tokens=count(options.eval_tokens, "eval_tokens"),
        begun=begun,
    )


def all_blocks(options: Options, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Blocks:
    """Every block of ``--data``, up to ``--eval-tokens``; nothing is held out."""
    text = pack_all(
        options.data,
        tokenizer,
        seq_len=seq_len,
        joiner=options.joiner,  # type: ignore[arg-type]
        separator=options.separator,
        column=options.text_column,
        max_tokens=count(options.eval_tokens, "eval_tokens"),
    )
    return text.spread(count(options.eval_tokens, "eval_tokens") // seq_len)


def candidate_specs(widths: Sequence[int], group_size: GroupSize) -> dict[str, QuantSpec]:
    """Label -> quantizer of every bit width, by the scale rule that suits them all.

    Raises:
        PlanError: a group size that does not divide a row of ``widths`` inputs.
    """
    for columns in sorted(set(widths)):
        group_shape((1, columns), group_size)
    return {grid.name: QuantSpec(grid=grid, group_size=group_size, scale=Gaussian()) for grid in recipes.GRIDS.values()}


def calibrate_on(
    model: PreTrainedModel,
    paths: Sequence[str],
    candidates: Mapping[str, QuantSpec],
    blocks: Blocks,
    options: Options,
    fingerprint: Mapping[str, Any],
    keep: Path | None = None,
) -> curvature.Sensitivity:
    """Curvature of the named tensors on at most ``--calibrate`` blocks drawn by seed; ``keep`` holds what is done."""
    weights = {path: model.get_parameter(f"{path}.weight") for path in paths}
    rows = epoch_order(len(blocks), options.seed, 0)[: options.calibrate]
    return curvature.calibrate(
        model,
        weights,
        blocks.input_ids[rows].long(),
        targets=blocks.loss_mask[rows],
        estimator=options.estimator,
        candidates=candidates,
        diagonals=options.group(),
        stopping=curvature.Stopping(),
        seed=options.seed,
        fingerprint=fingerprint,
        keep=keep,
    )
