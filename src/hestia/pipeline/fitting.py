"""The middle stages: the learning-rate pilot, training, and the moment at which the weights become integers."""

from __future__ import annotations

from typing import Any

import torch

from .. import loading, nn, processes
from ..errors import ConfigError
from ..evaluation import model_logits, shared_score
from ..evaluation.diagnostics import histograms
from ..export.save import write_frozen
from ..files import write_json
from ..plans import Plan
from ..progress import announce as say
from ..provenance import machine, versions
from ..resources import release
from ..settings import TUNING_BLOCKS
from ..training import Distillation, HestiaTrainer, Interrupted, TrainConfig, checkpoints, pilot
from ..training.logfile import LOG_FILE
from ..training.teacher import hold_in_bf16
from ..training.watch import collapsed
from .artefacts import DIAGNOSTICS_FILE, TRAINING_FILE
from .workspace import Workspace


def train_and_freeze(work: Workspace, plan: Plan) -> int | None:
    """Train the model by its plan, from its newest checkpoint if there is one, and save it frozen.

    Returns:
        The exit status that a signal in the last step asks of this process, now that the model is frozen; else None.
    """
    config = _train_config(work, plan) if plan.trains else None
    stopped: int | None = None
    model: Any = nn.apply(work.load_model(), plan)
    if config is not None:
        checkpoint = checkpoints.newest(work.folder / "checkpoints") if work.resume else None
        trainer = _trainer(work, model, plan, config, f"training {plan.recipe['name']}")
        work.stopwatch.measure("train", lambda: trainer.fit(checkpoint))
        work.stopwatch.at_least("train", trainer.trained)
        stopped = trainer.stopped
    if not processes.first():
        return stopped
    diagnostics = histograms(model, work.load_model())
    codes = nn.freeze(model)
    lost = collapsed(codes)
    for path, how in lost.items():
        say(f"{path}: codes collapsed: {how}")
    write_json(work.folder / DIAGNOSTICS_FILE, {**diagnostics, "collapsed": lost})
    dtype = loading.parent_dtype(work.source, work.config)
    write_frozen(model, codes, work.folder, work.source, dtype, work.tokenizer)
    return stopped


def trial(work: Workspace, plan: Plan, rate: float, steps: int) -> float:
    """Hard loss on the tuning blocks after a whole run in miniature: ``steps`` steps, schedules included."""
    release()  # the trial before
    model = nn.apply(work.load_model(), plan)
    trainer = _trainer(work, model, plan, _config_for(work, rate, steps, save=False), f"pilot at {rate:g}")
    trainer.fit()
    if stopped := processes.largest(trainer.stopped or 0):  # in the last step
        raise Interrupted("stopped in the learning-rate pilot. Continue with --resume.", stopped)
    return shared_score(model_logits(model), work.tuning, description="pilot loss").nll


def _train_config(work: Workspace, plan: Plan) -> TrainConfig:
    o, path = work.options, work.folder / TRAINING_FILE
    if work.settled:
        return _config_for(work, float(work.settled["learning_rate"]), work.steps, save=True)
    rate = o.learning_rate() or _pilot(work, plan)
    config = _config_for(work, rate, work.steps, save=True)
    release()  # the last trial
    parent: Any = work.load_model()
    parent.to(work.device)
    blocks = work.tuning[: config.eval_blocks]
    with torch.autocast(work.device.type, dtype=torch.bfloat16, enabled=work.bf16):  # as the model beside it is scored
        unseen = shared_score(model_logits(parent), blocks, description="scoring the parent").nll
    if processes.first():
        precision = "bf16" if work.bf16 else "fp32"
        settings = {"learning_rate": rate, "steps": work.steps, "batch_size": work.batch_size, "precision": precision}
        where = {"machine": machine(work.device), "versions": versions()}
        write_json(path, {**settings, "parent_hard_loss": unseen, **where})
    return config


def _pilot(work: Workspace, plan: Plan) -> float:
    first, second = pilot.trial_steps(work.steps)
    say(f"learning-rate pilot: four rates, {first} steps each, then the best two, {second} steps each")
    width = int(getattr(work.config.get_text_config(), "hidden_size", 1024))
    rate = work.stopwatch.measure(
        "pilot",
        lambda: pilot.choose(
            lambda rate, steps: trial(work, plan, rate, steps),
            pilot.rates(width),
            work.steps,
            work.folder / LOG_FILE,
        ),
    )
    say(f"learning rate {rate:g}")
    return rate


def _config_for(work: Workspace, rate: float, steps: int, *, save: bool) -> TrainConfig:
    o = work.options
    return TrainConfig(
        steps=steps,
        batch_size=work.batch_size,
        accumulation=o.accumulation,
        learning_rate=rate,
        schedule=work.schedule,
        weight_decay=o.weight_decay,
        clip=o.clip,
        train_embeddings=o.embeddings == "train",
        scale_rate=o.scale_rate,
        norm_rate=o.norm_rate,
        embedding_rate=o.embedding_rate,
        distill=None
        if o.teacher is None
        else Distillation(divergence=o.distill, weight=o.distill_weight, noise=o.distill_noise),
        bf16=work.bf16,
        gradient_checkpointing=o.gradient_checkpointing,
        compile=o.compile,
        seed=o.seed,
        log_every=(o.log_every or max(1, steps // 50)) if save else 0,
        eval_every=max(1, steps // 10) if save else 0,
        eval_blocks=min(TUNING_BLOCKS, max(8, steps * work.batch_size // 160)),  # about 2 % of the run's time
        save_every=(o.save_every or max(1, steps // 5)) if save else 0,
        report_to=o.report_to if save else (),
        device=work.device.type,
    )


def _trainer(work: Workspace, model: Any, plan: Plan, config: TrainConfig, description: str) -> HestiaTrainer:
    return HestiaTrainer(
        model,
        plan=plan,
        config=config,
        train=work.training,
        tuning=work.tuning,
        folder=work.folder,
        description=description,
        teacher=_teacher(work),
    )


def check_teacher(work: Workspace) -> None:
    """Refuse a teacher that is not there, or whose tokens are not the parent's.

    Raises:
        ConfigError: it is so.
    """
    if work.teacher is None:
        return
    config = loading.load_config(work.teacher, trust_remote_code=work.options.trust_remote_code)
    theirs, ours = (int(c.get_text_config().vocab_size) for c in (config, work.config))
    if theirs != ours:
        raise ConfigError(
            f"--teacher {work.teacher.name} has a vocabulary of {theirs:,}, the parent one of {ours:,}; take another"
        )
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and work.seq_len > longest and not work.begun:
        raise ConfigError(
            f"--teacher {work.teacher.name} has {longest} positions, a block {work.seq_len} tokens: give --seq-len "
            f"{longest}, or take another"
        )
    try:
        tokenizer = loading.load_tokenizer(work.teacher, trust_remote_code=work.options.trust_remote_code)
    except ConfigError as error:
        say(f"--teacher {work.teacher.name}: no tokenizer can be read ({error}); its tokens are taken for the parent's")
        return
    other = loading.first_other_token(tokenizer, work.tokenizer)
    if other is not None:
        place, theirs_is, ours_is = other
        raise ConfigError(
            f"--teacher {work.teacher.name} has another tokenizer than the parent: its token {place} is "
            f"{theirs_is!r}, the parent's {ours_is!r}; take one of the same family"
        )


def _teacher(work: Workspace) -> Any:
    """A model of its own to learn from: the parent again, or the one that --teacher names."""
    if work.options.teacher is None:
        return None
    remote = work.options.trust_remote_code
    model = work.load_model() if work.teacher is None else loading.load_model(work.teacher, trust_remote_code=remote)
    if work.bf16:
        hold_in_bf16(model)
        release()  # what it was in fp32
    return model
