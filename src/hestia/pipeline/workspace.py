"""A run's folder, options and stopwatch, and what follows from them once: model, text, blocks, batch, steps."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import loading, processes
from ..data import Blocks, TokenizedText
from ..errors import ConfigError
from ..files import read_json, require_writable
from ..options import Options, count, load_config
from ..schedules import LearningRateSchedule
from ..settings import (
    TUNING_BLOCKS,
    batch_and_steps,
    choose_device,
    in_bf16,
    longest_block,
    prepare_text,
)
from ..training import check_loggers
from .artefacts import CACHE_FOLDER, INPUTS_FILE, OPTIONS_FILE, TIMING_FILE, TRAINING_FILE
from .stopwatch import Stopwatch

HUB = "hub"
"""In inputs.json, the key of a hub data set in place of its files'."""


class Workspace:
    """What every stage of one run starts from; each property is worked out at its first use.

    Args:
        options: what to do.
        resume: continue where an earlier call stopped.

    Raises:
        ConfigError: an option is missing or impossible, or the folder cannot be written.
    """

    def __init__(self, options: Options, *, resume: bool = False) -> None:
        if not options.model:
            raise ConfigError("MODEL is missing: write it first (what follows --data is taken for data)")
        for name, value in (("--data", options.data), ("--out", options.out)):
            if not value:
                raise ConfigError(f"{name} is missing; see `hestia quantize --help`")
        self.options, self.resume = options, resume
        self.folder = Path(options.out)
        require_writable(self.folder)
        check_loggers(options.report_to)
        self.schedule = LearningRateSchedule(
            warmup=options.warmup,
            decay=options.lr_decay,
            final=options.lr_final,
            second_stage=options.second_stage,
            second_factor=options.second_factor,
        )
        self.stopwatch = Stopwatch(self.folder / TIMING_FILE, resume)
        self.device = choose_device(options)
        self.source = loading.resolve(options.model, self._begun_with("model"))
        self.config = loading.load_config(self.source, trust_remote_code=options.trust_remote_code)

    def _begun_with(self, option: str) -> str | None:
        """The commit of a hub id that a run to be continued began with: today's may be another, or out of reach."""
        recorded, begun = self.folder / OPTIONS_FILE, self._inputs_begun_with()
        if not (begun and recorded.is_file()):
            return None
        if load_config(recorded).get(option) != getattr(self.options, option):
            return None
        return _mapping(begun.get(option)).get("commit")

    def _inputs_begun_with(self) -> dict[str, Any]:
        """What inputs.json says of a run to be continued; nothing of another."""
        inputs = self.folder / INPUTS_FILE
        return _mapping(read_json(inputs).get("inputs")) if self.resume and inputs.is_file() else {}

    def hub_data(self) -> dict[str, dict[str, Any]]:
        """Hub data set as given -> the fingerprint that a run to be continued began with, as of a model its commit."""
        begun = self._inputs_begun_with()
        files = {**_mapping(begun.get("eval_data")), **_mapping(begun.get("data"))}
        found = {given: _mapping(_mapping(content).get(HUB)) for given, content in files.items()}
        return {given: kept for given, kept in found.items() if {"config", "revision"} <= kept.keys()}

    @cached_property
    def teacher(self) -> loading.Source | None:
        """The model that --teacher names; None where there is no teacher, or the parent is it."""
        name = self.options.teacher
        return None if name in (None, "parent") else loading.resolve(name, self._begun_with("teacher"))

    def load_model(self) -> PreTrainedModel:
        """The parent, as it was published."""
        return loading.load_model(self.source, trust_remote_code=self.options.trust_remote_code)

    def empty_model(self) -> PreTrainedModel:
        """The parent without weights, on the meta device."""
        return loading.empty_model(self.source, self.config, trust_remote_code=self.options.trust_remote_code)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The parent's tokenizer."""
        return loading.load_tokenizer(self.source, trust_remote_code=self.options.trust_remote_code)

    @cached_property
    def seq_len(self) -> int:
        """Tokens per block."""
        return longest_block(self.config, self.options)

    @cached_property
    def text(self) -> TokenizedText:
        """Training and held-out blocks; of a run that is resumed from its cache."""
        batch = self.settled.get("batch_size")
        text = prepare_text(self.options, self.tokenizer, self.seq_len, self._cache(), self.hub_data(), batch)
        loading.check_vocabulary(self.source, self.config, int(text.record["max_token_id"]))
        return text

    def _cache(self) -> Path | None:
        return self.folder / CACHE_FOLDER if (self.folder / OPTIONS_FILE).is_file() else None

    @property
    def begun(self) -> bool:
        """Whether this continues a run: what such a one was allowed to begin with is not refused any more."""
        return self.resume and (self.folder / OPTIONS_FILE).is_file()

    @cached_property
    def training(self) -> Blocks:
        """The training blocks without the tuning blocks."""
        blocks = self.text.train
        kept = len(blocks) - self.tuning_count()
        return blocks[:kept]

    @cached_property
    def tuning(self) -> Blocks:
        """The last training blocks: logged hard loss and pilot, never trained on, never reported."""
        blocks = self.text.train
        kept = len(blocks) - self.tuning_count()
        return blocks[kept:]

    def tuning_count(self) -> int:
        """How many training blocks are set aside: a twentieth, 1 to ``TUNING_BLOCKS``.

        Raises:
            ConfigError: the text fills less than two blocks.
        """
        blocks = len(self.text.train)
        if blocks < 2:
            raise ConfigError(
                f"the training text fills {blocks} block of {self.seq_len} tokens; at least 2 are needed: "
                "give more --data or a smaller --seq-len"
            )
        return max(1, min(TUNING_BLOCKS, blocks // 20))

    @cached_property
    def scored(self) -> Blocks:
        """The held-out blocks that the report scores: all, or ``--eval-tokens`` of them spread evenly."""
        return self.text.held_out.spread(count(self.options.eval_tokens, "eval_tokens") // self.seq_len)

    @cached_property
    def settled(self) -> dict[str, Any]:
        """training.json of a run that is resumed: what it began to train with, whatever machine goes on; else empty."""
        path = self.folder / TRAINING_FILE
        return read_json(path) if self.resume and path.is_file() else {}

    @cached_property
    def batch_size(self) -> int:
        """Blocks a step."""
        begun = self.settled.get("batch_size", self.options.batch_size)
        return batch_and_steps(replace(self.options, batch_size=begun), self.seq_len, processes.world_size())[0]

    @cached_property
    def steps(self) -> int:
        """Optimizer steps."""
        computed = batch_and_steps(self.options, self.seq_len, processes.world_size())[1]
        return int(self.settled.get("steps", computed))

    @cached_property
    def bf16(self) -> bool:
        """Whether training runs under bf16 autocast."""
        begun = self.settled.get("precision")
        return in_bf16(self.options, self.config, self.device) if begun is None else begun == "bf16"


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
