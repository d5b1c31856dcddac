"""One job: the parent, trained by one arm, frozen, scored, written down.

    apply plan -> HestiaTrainer (from its last checkpoint, if there is one) -> freeze -> score -> result

Only the frozen model is scored: codes times snapped scales, kept tensors in the parent's dtype, which is what an export
holds. The control is the same trainer on the same model without quantized layers.

Time is that of the training steps alone, from the start of a step to its end, by wall clock and by processor: on a
machine that is shared with other work the processor's seconds compare, the clock's do not.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from stages import CONTROL, HERE, SCHEMA, Arm, Job, Stage
from texts import StageTexts
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, set_seed

from hestia import curvature, loading, recipes
from hestia.curvature import Sensitivity
from hestia.curvature.allocation import Problem, positional
from hestia.data import Blocks, epoch_order
from hestia.errors import ConfigError, GuardError
from hestia.evaluation import Score, model_logits, score
from hestia.files import read_json, sha256, write_json
from hestia.mixed import is_mixed
from hestia.nn import apply, freeze, quantized_modules, select
from hestia.planner import plan as make_plan
from hestia.plans import Plan
from hestia.provenance import machine, versions
from hestia.quant import GroupSize
from hestia.recipes import Recipe
from hestia.schedules import LearningRateSchedule
from hestia.settings import candidate_specs
from hestia.training import Distillation, HestiaTrainer, Interrupted, QATCallback, TrainConfig, checkpoints
from hestia.training.trainer import CHECKPOINTS

COMMAND = "python benchmarks/experiments/run.py"
SAVE_SECONDS = 60.0
"""About so many seconds lie between two checkpoints."""


class NotThereYet(ConfigError):  # noqa: N818 - it is not a failure
    """An arm that this version of hestia cannot run: its recipe has not been built."""


class Paused(Exception):  # noqa: N818 - it is not a failure
    """The time was up; the job was saved and goes on where it stopped."""


@dataclass(frozen=True)
class Parent:
    """The model that every arm starts from.

    Attributes:
        source: its folder.
        config: its config.json.
        record: name, shape and hash of the weights, for the results.
    """

    source: loading.Source
    config: Any
    record: dict[str, Any]

    def load(self) -> PreTrainedModel:
        """A fresh copy in fp32."""
        return loading.load_model(self.source)


def check_possible(job: Job) -> None:
    """Whether this version of hestia has what the arm needs.

    Raises:
        NotThereYet: it lacks the recipe.
        ConfigError: the recipe is there and refuses the options, or no such loss to a teacher.
    """
    arm = job.arm
    if arm.recipe != CONTROL and arm.recipe not in recipes.names():
        raise NotThereYet(f"recipe {arm.recipe!r} is not there yet")
    _distillation(arm.teacher)
    if unknown := set(arm.factors) - {"scale", "norm", "embedding"}:
        raise ConfigError(f"factors: unknown key {min(unknown)!r}; a learning rate has scale, norm and embedding")
    if len(arm.betas) not in (0, 2):
        raise ConfigError(f"betas: AdamW has two, got {len(arm.betas)}")
    if arm.recipe != CONTROL:
        recipes.get(arm.recipe, **arm.settings)


def device() -> torch.device:
    """Where the trainer trains: the GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def commit() -> str | None:
    """The commit of this checkout, with a plus sign where source files differ from it; None outside of one."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "../../src", ".")
    return head if head is None else head + ("+" if changed else "")


class FullPrecisionTrainer(HestiaTrainer):
    """The same trainer for a model without quantized layers: no knobs to move or to log."""

    def __init__(self, model: nn.Module, **arguments: Any) -> None:
        super().__init__(model, **arguments)
        self.remove_callback(QATCallback)

    def _knob_numbers(self) -> dict[str, float]:
        return {}


class StepTimes(TrainerCallback):
    """Seconds of every step, kept beside the checkpoints, and the end of the time allowed."""

    def __init__(self, path: Path, deadline: float | None) -> None:
        self.path, self.deadline = path, deadline
        kept = read_json(path) if path.is_file() else {}
        self.wall: list[float] = kept.get("wall", [])
        self.cpu: list[float] = kept.get("processor", [])
        self.paused = False
        self._saved = self._wall = time.perf_counter()
        self._cpu = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clocks."""
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop them; ask for a checkpoint now and then, and for the end once the time is up."""
        now = time.perf_counter()
        self.wall.append(now - self._wall)
        self.cpu.append(time.process_time() - self._cpu)
        if state.global_step >= state.max_steps:
            return
        self.paused = self.deadline is not None and time.monotonic() >= self.deadline
        if self.paused or now - self._saved > SAVE_SECONDS:
            self._saved = now
            control.should_save = True
        control.should_training_stop = control.should_training_stop or self.paused

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A resumed job still knows how long its steps took."""
        write_json(self.path, {"wall": self.wall, "processor": self.cpu})


def run_job(
    job: Job,
    parent: Parent,
    texts: StageTexts,
    sensitivity: Sensitivity | None,
    work: Path,
    result: Path,
    deadline: float | None = None,
) -> dict[str, Any]:
    """Run a job to its result, or on from its last checkpoint; returns the result, which is written last.

    Args:
        job: with a learning rate.
        parent: what is trained.
        texts: what is read.
        sensitivity: of the parent, for recipes that use curvature.
        work: the job's folder for checkpoints, removed when the result is there.
        result: where the result is written; must not exist.
        deadline: ``time.monotonic()`` after which the job is saved and put aside.

    Raises:
        Paused: the deadline passed.
        NotThereYet: the recipe is not built yet.
    """
    if result.exists():
        raise ConfigError(f"{result} is there; results are never made twice")
    check_possible(job)
    set_seed(job.seed)
    config = _train_config(job)
    model: Any = parent.load()
    plan = _plan(job, model, sensitivity)
    before: dict[str, Tensor] = {}
    if job.arm.recipe != CONTROL:
        apply(model, plan)
        before = {path: layer.codes().codes for path, layer in quantized_modules(model)}
    work.mkdir(parents=True, exist_ok=True)
    times = StepTimes(work / "times.json", deadline)
    kind = FullPrecisionTrainer if job.arm.recipe == CONTROL else HestiaTrainer
    extra: dict[str, Any] = {"teacher": parent.load()} if job.arm.teacher else {}
    trainer = kind(
        model,
        plan=plan,
        config=config,
        train=texts.train,
        tuning=texts.train[:1],  # never read: no hard loss is logged
        folder=work,
        description=job.name,
        callbacks=[times],
        **extra,
    )
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "name": job.name,
        "stage": job.stage.name,
        "command": f"{COMMAND} {job.stage.name}",
        "commit": commit(),
        "config": job.config(),
        "parent": parent.record,
        "texts": texts.record,
        "tokens": job.steps * trainer.tokens_per_step,
        "plan": plan_record(plan, sensitivity) if job.arm.recipe != CONTROL else None,
    }
    try:
        trainer.fit(checkpoints.newest(work / CHECKPOINTS))
        if trainer.stopped is not None:  # in the last step
            raise Interrupted(f"{job.name}: stopped; it goes on at the next call", trainer.stopped)
        if times.paused:
            raise Paused(f"the time is up; {job.name} goes on at the next call")
        record |= {"diverged": None, **_measure(job, parent, texts, model, before)}
    except GuardError as error:
        record |= {"diverged": str(error).partition(". ")[0], "valid_nll": None}
    record |= {
        "seconds_per_token": _per_token(times, trainer.tokens_per_step),
        "versions": versions(),
        "machine": machine(device()),
    }
    write_json(result, record)
    shutil.rmtree(work, ignore_errors=True)
    return record


def _measure(
    job: Job, parent: Parent, texts: StageTexts, model: PreTrainedModel, before: dict[str, Tensor]
) -> dict[str, Any]:
    """Freeze and score: valid files always, test files for final runs alone."""
    out: dict[str, Any] = {}
    if before:
        after = freeze(model)
        weights = sum(tensor.codes.numel() for tensor in after.values())
        zeros = sum(int((tensor.codes == 0).sum()) for tensor in after.values())
        flipped = sum(int((tensor.codes.cpu() != before[path]).sum()) for path, tensor in after.items())
        out |= {"zero_share": zeros / weights, "flip_rate": flipped / weights, "quantized_weights": weights}
    loading.cast_parameters(model, loading.parent_dtype(parent.source, parent.config))
    model.float()  # the stored numbers, in fp32 arithmetic
    valid = {name: score(model_logits(model), blocks, description="") for name, blocks in texts.valid.items()}
    out["valid"] = {name: result.nll for name, result in valid.items()}
    out["valid_nll"] = statistics.fmean(out["valid"].values())
    if job.phase == "tune":
        return out
    original: Any = parent.load()
    of_parent = model_logits(original.to(device()))
    test = {
        name: score(model_logits(model), blocks, parent=of_parent, description="")
        for name, blocks in texts.test.items()
    }
    out["test"] = {name: _numbers(result) for name, result in test.items()}
    for key in ("nll", "kl_to_parent", "top1_agreement"):
        out[key] = statistics.fmean(entry[key] for entry in out["test"].values())
    return out


def _numbers(result: Score) -> dict[str, Any]:
    return {
        "nll": result.nll,
        "kl_to_parent": result.kl_to_parent,
        "top1_agreement": result.top1_agreement,
        "block_nll": [round(value, 5) for value in result.block_nll.tolist()],
    }


def _per_token(times: StepTimes, tokens: int) -> dict[str, float] | None:
    """Median seconds of a step, by token; the first steps pay for warming up and are left out."""
    skip = min(3, len(times.wall) - 1)
    if not times.wall:
        return None
    wall, cpu = times.wall[skip:], times.cpu[skip:]
    return {"wall": statistics.median(wall) / tokens, "processor": statistics.median(cpu) / tokens, "steps": len(wall)}


def _train_config(job: Job) -> TrainConfig:
    assert job.rate is not None
    shared = job.stage.training
    return TrainConfig(
        steps=job.steps,
        batch_size=shared.batch_size,
        learning_rate=job.rate,
        schedule=LearningRateSchedule(warmup=shared.warmup, decay=shared.decay, final=shared.final),
        weight_decay=shared.weight_decay,
        clip=shared.clip,
        train_embeddings=shared.train_embeddings,
        bf16=shared.bf16,
        seed=job.seed,
        log_every=0,
        distill=_distillation(job.arm.teacher),
        save_every=job.steps + 1,  # the callback asks for checkpoints by time
        keep=1,
        scale_rate=job.arm.factors.get("scale", 1.0),
        norm_rate=job.arm.factors.get("norm", 1.0),
        embedding_rate=job.arm.factors.get("embedding", 1.0),
        betas=(job.arm.betas[0], job.arm.betas[1]) if job.arm.betas else TrainConfig.betas,
    )


def _distillation(teacher: Mapping[str, Any]) -> Distillation | None:
    """``{loss: forward_kl, weight: 1, noise: 0.1}`` of an arm as the trainer takes it; None without a teacher."""
    if not teacher:
        return None
    names = {"loss": "divergence", "weight": "weight", "noise": "noise"}
    if unknown := set(teacher) - set(names):
        raise ConfigError(f"teacher: unknown key {min(unknown)!r}; a teacher has loss, weight and noise")
    return Distillation(**{names[key]: value for key, value in teacher.items()})


def _plan(job: Job, model: nn.Module, sensitivity: Sensitivity | None) -> Plan:
    """The arm's plan. The control has one too, which nobody applies: it is in the fingerprint of its checkpoints."""
    arm, group = job.arm, job.config()["group_size"]
    if arm.recipe == CONTROL:
        return make_plan(model, "round_to_nearest", group_size=group)
    curvature_of = sensitivity if needs_curvature(arm) else None
    recipe = recipes.get(arm.recipe, **arm.settings)
    blind = {"damages": _first_and_last(model, recipe, arm, group), "widths": recipe.widths} if arm.spend else {}
    return make_plan(model, recipe, arm.target, curvature_of, bits=arm.bits, group_size=group, **blind)


def _first_and_last(model: nn.Module, recipe: Recipe, arm: Arm, group: GroupSize) -> dict[str, dict[float, float]]:
    """Damages whose best plan is the one that raises the first and last layers: none at its widths, 1 at any other."""
    alone = {w: make_plan(model, recipe, arm.target, bits=w, group_size=group) for w in recipe.widths}
    sizes = {width: plan.stored_bytes(arm.target) for width, plan in alone.items()}
    layers = alone[recipe.widths[0]].layers
    problem = Problem.of(
        {path: {width: sizes[width][path] for width in alone} for path in layers},
        {path: layer.weights for path, layer in layers.items()},
        {path: dict.fromkeys(alone, 0.0) for path in layers},
    )
    chosen = positional(problem, problem.bytes_for(arm.bits)).widths
    return {path: {width: float(width != chosen[path]) for width in alone} for path in layers}


def needs_curvature(arm: Arm) -> bool:
    """Whether the plan is made from the parent's curvature: the recipe asks for it, or it decides tensors' widths."""
    if arm.recipe == CONTROL:
        return False
    recipe = recipes.get(arm.recipe, **arm.settings)
    return recipe.uses_curvature or (is_mixed(recipe, arm.bits, None, None) and not arm.spend)


def plan_record(plan: Plan, sensitivity: Sensitivity | None) -> dict[str, Any]:
    """What the plan made of recipe and curvature: options in full, temperature factors, bits."""
    factors = [layer.temperature_factor for layer in plan.layers.values()]
    curved = None if sensitivity is None else {"estimator": sensitivity.estimator, "sequences": sensitivity.sequences}
    return {
        "recipe": dict(plan.recipe),
        "schedule": plan.schedule.to_json(),
        "temperature_factors": {"min": min(factors), "mean": statistics.fmean(factors), "max": max(factors)},
        "geometric_mean_factor": statistics.geometric_mean(factors),
        "layers": len(factors),
        "target": plan.targets[0],
        "bits_per_weight": plan.spending.bits if plan.spending else plan.bits_per_weight(plan.targets[0]),
        "grids": dict(Counter(layer.spec.grid.name for layer in plan.layers.values())),
        "sensitivity": curved,
    }


def open_parent(folder: Path) -> Parent:
    """The parent in ``folder``."""
    source = loading.resolve(str(folder))
    config = loading.load_config(source)
    record = {**loading.describe(source, config), "weights_sha256": _weights_hash(folder)}
    return Parent(source, config, record)


def _weights_hash(folder: Path) -> str:
    return sha256(folder / "model.safetensors")


def parent_scores(stage: Stage, parent: Parent, texts: StageTexts, path: Path) -> dict[str, Any]:
    """The parent itself and its rounding on the same blocks, once a stage: where every arm starts."""
    if path.is_file():
        return read_json(path, schema=SCHEMA)
    model, rounded = parent.load().to(device()), parent.load().to(device())
    group: Any = stage.training.group_size
    apply(rounded, make_plan(rounded, "round_to_nearest", group_size=group))
    freeze(rounded)
    record: dict[str, Any] = {"schema": SCHEMA, "name": "parent", "model": parent.record, "texts": texts.record}
    for name, candidate in (("parent", model), ("round_to_nearest", rounded)):
        files = {
            file: _numbers(score(model_logits(candidate), blocks, parent=model_logits(model), description=""))
            for file, blocks in texts.test.items()
        }
        keys = ("nll", "kl_to_parent", "top1_agreement")
        record[name] = {"test": files, **{k: statistics.fmean(f[k] for f in files.values()) for k in keys}}
    record |= {"versions": versions(), "machine": machine(device())}
    write_json(path, record)
    return record


def parent_sensitivity(stage: Stage, parent: Parent, train: Blocks, path: Path) -> Sensitivity:
    """The curvature of the parent, measured once a stage on training blocks and kept beside the results."""
    if path.is_file():
        return Sensitivity.load(path)
    model: Any = parent.load()
    linears = select(model, ()).candidates
    specs = candidate_specs([linear.in_features for linear in linears.values()], "row")
    rows = epoch_order(len(train), 0, 0)[: stage.sensitivity_sequences]
    found = curvature.calibrate(
        model,
        {name: model.get_parameter(f"{name}.weight") for name in linears},
        train.input_ids[rows].long(),
        candidates=specs,
        stopping=curvature.Stopping(),
        fingerprint=parent.record,
    )
    found.save(path)
    return found
