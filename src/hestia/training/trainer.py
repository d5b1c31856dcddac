"""HestiaTrainer: the Hugging Face Trainer with a data order that is a pure function of seed and step, checkpoints
without pickle, guards, and a log that keeps the soft training loss and the hard loss of the exported model apart.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import SaveStrategy

from .. import digests, processes
from ..data import Blocks
from ..errors import ConfigError
from ..evaluation import model_logits, shared_score
from ..files import read_json, write_text
from ..nn import knobs_of, quantized_modules
from ..nn.shards import whole
from ..plans import Plan
from ..progress import announce
from . import checkpoints, fingerprints
from .arguments import arguments
from .callback import QATCallback
from .config import TrainConfig, set_up, that_moves
from .guards import Interrupted, StopSignals, check_gradients, check_loss, check_state
from .logfile import LOG_FILE, append_row
from .optimizer import adamw, scheduler
from .progress import ProgressBar
from .stream import BlockStream, stack
from .teacher import HeadInput, Teacher, plain_head
from .watch import SpikeWatch, collapsed_layers, saturated_share

CHECKPOINTS = "checkpoints"
SAVE_SECONDS = 30 * 60.0
"""Seconds after which a run that saves at all is saved, wherever ``save_every`` stands."""


class HestiaTrainer(Trainer):
    """Trains a converted model by its plan.

    Args:
        model: converted by ``hestia.apply(model, plan)``.
        plan: its plan.
        config: how to train.
        train: training blocks.
        tuning: blocks set apart from training, for the logged hard loss, by which a pilot chooses the rate.
        folder: the run's folder; log.jsonl and checkpoints/ are written into it.
        description: text of the progress bar.
        callbacks: further callbacks.
        teacher: the model that ``config.distill`` learns from; it is put in evaluation mode and never trained.

    Raises:
        ConfigError: a teacher without ``config.distill`` or the other way round, or one of another vocabulary; one of
            several processes that have not joined.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        plan: Plan,
        config: TrainConfig,
        train: Blocks,
        tuning: Blocks,
        folder: str | Path,
        description: str = "training",
        callbacks: list[TrainerCallback] | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        processes.require_joined()
        folder = Path(folder)
        self.plan, self.config, self.folder, self.tuning = plan, config, folder, tuning
        self._earlier, self._took, self._began = 0.0, 0.0, time.perf_counter()
        self._spikes, self._step_loss = SpikeWatch(), 0.0
        self._collapsed: dict[str, str] = {}
        self._signals = StopSignals()
        self._bar = ProgressBar(description, "loss" if config.distill is None else "loss to the teacher")
        self._started: tuple[float, int] | None = None
        self.last_checkpoint: Path | None = None
        self._evaluated: tuple[int, dict[str, float]] | None = None
        self._teacher = _checked_teacher(teacher, config, model)
        self._head_input = None if teacher is None else _head_input(model, train)
        self._input_ids: Tensor | None = None
        self._train, self._fingerprint = train, None
        set_up(model, train_embeddings=config.train_embeddings, checkpointing=config.gradient_checkpointing)
        noise = {} if config.distill is None else {"noise": config.distill.noise, "vocabulary": _vocabulary(model)}
        stream = BlockStream(train, config.steps * config.batch_size, config.seed, **noise)
        self._use_cache = getattr(getattr(model, "config", None), "use_cache", None)
        super().__init__(
            model=model,
            args=arguments(config, folder / CHECKPOINTS),
            train_dataset=stream,
            eval_dataset=stream,
            data_collator=stack,
            callbacks=[
                QATCallback(plan),
                _SaveCallback(self._signals),
                _WatchCallback(self),
                self._bar,
                *(callbacks or []),
            ],
            compute_loss_func=None if self._teacher is None else self._distilled,
        )
        if self.is_fsdp_enabled:
            raise ConfigError(
                "HestiaTrainer does not shard by FSDP: its checkpoints hold whole tensors of one process. Use DDP "
                "(torchrun, no FSDP configuration), or your own Trainer with hestia.QATCallback (docs/running.md)"
            )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.tokens_per_step = config.batch_size * train.input_ids.shape[1]

    def fit(self, resume: Path | None = None) -> None:
        """Train to the last step, from ``resume`` if given.

        Raises:
            ConfigError: ``resume`` was made by another plan or training configuration, or from other data or another
                teacher; what differs is named.
            DiskSpaceError: there is no room for the next checkpoint; the last one is intact.
            GuardError: loss, gradients, weights, scales or temperatures became NaN or infinite; the last good
                checkpoint is named.
            Interrupted: Ctrl-C or SIGTERM arrived; the run was saved.
        """
        step = 0 if resume is None else self._check_resumed(resume)
        if self.is_world_process_zero():
            self._forget_log_after(step)
            checkpoints.sweep(self.folder / CHECKPOINTS)
        self._began = time.perf_counter()
        try:
            with self._signals:
                self.train(resume_from_checkpoint=str(resume) if resume else None)
        finally:
            if self._use_cache is not None:  # the Trainer switches it off, and the model is saved after it
                self.accelerator.unwrap_model(self.model).config.use_cache = self._use_cache  # type: ignore[arg-type]
            self._bar.close()
            self._took = time.perf_counter() - self._began
        check_state(self.accelerator.unwrap_model(self.model), self.state.global_step, self._last_checkpoint_name())  # type: ignore[arg-type]
        if self.stopped is not None and self.state.global_step < self.config.steps:
            saved = f"saved to {self.last_checkpoint}" if self.last_checkpoint else "there was nothing to save yet"
            raise Interrupted(
                f"stopped at step {self.state.global_step} of {self.config.steps}; {saved}. Continue with --resume.",
                self.stopped,
            )

    @property
    def stopped(self) -> int | None:
        """The exit status that a signal asked for; where it came in the last step ``fit`` returned, and this tells."""
        return self._signals.requested

    @property
    def trained(self) -> float:
        """Seconds of training, those before the checkpoint that was resumed from included."""
        return self._earlier + self._took

    def _check_resumed(self, checkpoint: Path) -> int:
        """The step of a checkpoint; another run's is refused, and what differs is named."""
        record = read_json(checkpoint / checkpoints.STATE, schema=checkpoints.SCHEMA)
        before, now = record["fingerprint"], fingerprints.plain(self.fingerprint())
        before = {**before, "config": that_moves(fingerprints.completed(before["config"], self.config))}
        differing = {name: fingerprints.differences(before.get(name), now[name], name) for name in now}
        if any(differing.values()):
            names = " and another ".join(name for name, lines in differing.items() if lines)
            what = fingerprints.summary([line for lines in differing.values() for line in lines])
            raise ConfigError(f"{checkpoint}: made with another {names} than this run's: {what}. Choose another --out")
        self._spikes.memory = record["memory"]["losses"]
        self._collapsed = dict(record["memory"]["collapsed"])
        self._earlier = float(record["memory"]["seconds"])
        return int(record["step"])

    def _forget_log_after(self, step: int) -> None:
        """Drop the log lines of steps that an interrupted run took and this one takes again."""
        log = self.folder / LOG_FILE
        if log.is_file() and processes.first():
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            write_text(log, "".join(line for line in lines if _step_of(line) <= step))

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run must share, as far as it moves a weight: plan, configuration, data and teacher."""
        if self._fingerprint is None:
            self._fingerprint = {
                "plan": fingerprints.of_plan(self.plan),
                "config": that_moves(asdict(self.config)),
                "data": fingerprints.of_blocks(self._train),
                "teacher": None if self._teacher is None else digests.of_tensors(self._teacher.model.state_dict()),
            }
        return self._fingerprint

    # --- order of the data, optimizer, schedule --------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        return SequentialSampler(dataset)  # type: ignore[arg-type]  # the stream is already in order

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over trainable parameters; matrices decay, vectors do not. Each kind may have a rate of its own."""
        if self.optimizer is None:
            self.optimizer = adamw(model or self.model, self.config)  # type: ignore[arg-type]
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LambdaLR:
        """The warm-up, constant, decay schedule; step k of N has the rate of t = (k + 1) / N."""
        if self.lr_scheduler is None:
            made: Any = optimizer or self.optimizer
            self.lr_scheduler = scheduler(made, self.config.schedule, num_training_steps)
            self._created_lr_scheduler = True
        return self.lr_scheduler  # type: ignore[return-value]

    # --- guards ----------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's micro-batch; its part of the step's loss is kept for the watch over spikes."""
        loss = super().training_step(*args, **kwargs)
        self._step_loss += float(loss)
        return loss

    def watch_step(self) -> None:
        """Report a loss that jumped in the step that just ended; while the pressure grows, so does the loss."""
        loss, self._step_loss = self._step_loss, 0.0
        if self.plan.schedule.pressure((self.state.global_step - 1) / self.config.steps) < 1.0:  # it is counted already
            return
        highest = self._spikes.add(loss)
        if highest is not None:
            self._report(
                {"loss_spike": loss, "highest_before": highest},
                f"step {self.state.global_step}: the loss jumped to {loss:.3f}, from at most {highest:.3f} in the "
                "steps before; if that goes on, try a lower --lr",
            )

    def watch_codes(self) -> None:
        """Report tensors whose codes collapsed since the last look, or came back."""
        before, now = self._collapsed, collapsed_layers(self.accelerator.unwrap_model(self.model))  # type: ignore[arg-type]
        self._collapsed = now
        for path in dict.fromkeys([*before, *now]):
            if before.get(path) != now.get(path):
                what = f"codes collapsed: {now[path]}" if path in now else "codes use both signs again"
                self._report({"collapsed": {path: now.get(path)}}, f"step {self.state.global_step}: {path}: {what}")

    def _report(self, row: dict[str, Any], message: str) -> None:
        if self.is_world_process_zero() and self.config.log_every:
            announce(message)
            append_row(self.folder / LOG_FILE, {"step": self.state.global_step, **row})

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's loss, or the teacher's, refused if it is not finite."""
        self._input_ids = inputs["input_ids"]
        with self._head_input or nullcontext():
            result = super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        loss = result[0] if isinstance(result, tuple) else result
        if processes.world_size() == 1:  # of several, one alone must not stop: the shared gradients tell all at once
            check_loss(loss.detach(), model, self.state.global_step + 1, self._last_checkpoint_name())
        return result

    def _distilled(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        assert self._teacher is not None and self.config.distill is not None and self._input_ids is not None
        following = nn.functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()  # leaving one out copies the rest
        distill, answer = self.config.distill, self._teacher.answer(self._input_ids)
        if self._head_input is None:
            logits = (outputs["logits"] if isinstance(outputs, dict) else outputs[0]).flatten(0, 1)
            return distill.loss(logits, following.to(logits.device), answer, num_items_in_batch)
        assert self._head_input.kept is not None
        hidden, weight = self._head_input.kept.flatten(0, 1), self._head_input.head.weight
        dtype = torch.bfloat16 if self.config.bf16 else None
        return distill.loss_through_head(hidden, weight, following.to(hidden.device), answer, num_items_in_batch, dtype)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Norm, check, clip, in this order: dividing by a bad norm would make every gradient bad."""
        parameters = [p for p in model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        check_gradients(whole(norm), model, self.state.global_step + 1, self._last_checkpoint_name())
        nn.utils.clip_grads_with_norm_(parameters, self.args.max_grad_norm, norm)
        return norm

    def _last_checkpoint_name(self) -> str | None:
        return str(self.last_checkpoint) if self.last_checkpoint else None

    # --- log -------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add knobs, saturation and speed to the Trainer's numbers; append them to log.jsonl."""
        now, step = time.perf_counter(), self.state.global_step
        if self._started is None:
            self._started = (now, step)
        elapsed, done = now - self._started[0], step - self._started[1]
        extra: dict[str, float] = {"tokens": step * self.tokens_per_step, "seconds": self._seconds_now()}
        if "loss" in logs:
            extra |= self._knob_numbers()
            if done > 0:
                extra["tokens_per_second"] = done * self.tokens_per_step / elapsed
        super().log({**logs, **extra}, start_time)
        if self.is_world_process_zero() and self.config.log_every and {"loss", "hard_loss"} & logs.keys():
            row: dict[str, Any] = {"step": step, **logs, **extra}
            row.pop("epoch", None)
            kinds = ("min", "mean", "max")
            if "temperature_mean" in row:
                row["temperature"] = {kind: row.pop(f"temperature_{kind}") for kind in kinds}
            append_row(self.folder / LOG_FILE, row)

    def _knob_numbers(self) -> dict[str, float]:
        model = self.accelerator.unwrap_model(self.model)  # type: ignore[arg-type]
        values = knobs_of(model).values
        factors = [module.temperature_factor for _, module in quantized_modules(model)]
        base = values["temperature"]
        return {
            "pressure": values["pressure"],
            "temperature_min": base * min(factors),
            "temperature_mean": base * sum(factors) / len(factors),
            "temperature_max": base * max(factors),
            "saturated": saturated_share(model),
        }

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The hard loss: NLL of the model as it would be exported now, on the first tuning blocks."""
        if self._evaluated is not None and self._evaluated[0] == self.state.global_step:
            return dict(self._evaluated[1])  # the Trainer asks twice after the last step
        blocks = self.tuning[: self.config.eval_blocks]
        model = self.accelerator.unwrap_model(self.model)  # type: ignore[arg-type]
        result = shared_score(model_logits(model), blocks, description="")  # a bar would tear the training's in two
        metrics = {"hard_loss": result.nll}
        self._evaluated = (self.state.global_step, metrics)
        self.log(metrics)
        self.watch_codes()
        return metrics

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        root = self.folder / CHECKPOINTS
        folder = root / checkpoints.folder_name(self.state.global_step)
        if folder == self.last_checkpoint:
            return
        unwrapped: Any = self.accelerator.unwrap_model(self.model)  # type: ignore[arg-type]
        check_state(unwrapped, self.state.global_step, self._last_checkpoint_name())
        if not self.is_world_process_zero():
            self.last_checkpoint = folder
            return
        checkpoints.save(
            folder,
            model=unwrapped,
            optimizer=self.optimizer,  # type: ignore[arg-type]
            scheduler=self.lr_scheduler,
            trainer_state=_state_record(self.state),
            step=self.state.global_step,
            fingerprint=self.fingerprint(),
            memory={"losses": self._spikes.memory, "collapsed": self._collapsed, "seconds": self._seconds_now()},
        )
        self.last_checkpoint = folder
        checkpoints.rotate(root, self.config.keep, folder)

    def _seconds_now(self) -> float:
        return self._earlier + time.perf_counter() - self._began

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.last_checkpoint = Path(resume_from_checkpoint)
        checkpoints.load_model(self.last_checkpoint, self.model)  # type: ignore[arg-type]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
            checkpoints.load_optimizer(Path(checkpoint), self.model, optimizer, self.lr_scheduler)  # type: ignore[arg-type]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpoints.load_random(Path(checkpoint))


def _head_input(model: nn.Module, train: Blocks) -> HeadInput | None:
    """What keeps the input of the model's head, where the head is a linear layer without a bias and nothing else."""
    device = next(model.parameters()).device
    was_training = model.training
    head = plain_head(model.eval(), train.input_ids[:1, :4].long().to(device))
    model.train(was_training)
    return HeadInput(head) if type(head) is nn.Linear and head.bias is None else None


def _checked_teacher(teacher: nn.Module | None, config: TrainConfig, model: nn.Module) -> Teacher | None:
    if (teacher is None) != (config.distill is None):
        raise ConfigError("a teacher and TrainConfig.distill belong together; give both or neither")
    if teacher is None:
        return None
    made = Teacher(teacher, bf16=config.bf16)
    if made.vocabulary != _vocabulary(model):
        raise ConfigError(f"the teacher has a vocabulary of {made.vocabulary}, the student one of {_vocabulary(model)}")
    return made


def _vocabulary(model: Any) -> int:
    return int(model.get_output_embeddings().weight.shape[0])


class _SaveCallback(TrainerCallback):
    """Saves the run when the last checkpoint is old, and ends it, saved, once a signal has asked for it."""

    def __init__(self, signals: StopSignals) -> None:
        self.signals = signals
        self._saved = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start timing, and go by today's intervals: those of a checkpoint are its first call's."""
        state.compute_steps(args, state.max_steps)
        self._saved = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start timing anew."""
        self._saved = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask the Trainer to save, or to save and stop, all processes after the same step."""
        due = time.perf_counter() - self._saved >= SAVE_SECONDS
        asked = processes.largest(self.signals.requested or int(due))  # an exit status is larger than 1
        if asked and args.save_strategy != SaveStrategy.NO:  # a pilot's state is nobody's checkpoint
            control.should_save = True
        if asked > 1:
            self.signals.requested = asked
            control.should_training_stop = True


class _WatchCallback(TrainerCallback):
    """Looks at every step's loss when the step has ended."""

    def __init__(self, trainer: HestiaTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check the loss of the step that just ended."""
        self.trainer.watch_step()


def _step_of(line: str) -> int:
    """The step of a log line; the pilot's lines have none, half a line from a killed process belongs to no step."""
    try:
        return int(json.loads(line).get("step", 0))
    except (ValueError, TypeError, AttributeError, RecursionError):
        return sys.maxsize


def _state_record(state: TrainerState) -> Mapping[str, Any]:
    record = asdict(state)
    record["log_history"] = []  # log.jsonl has it, and a checkpoint must not grow with the run
    return record
