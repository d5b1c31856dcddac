"""The main job as one Python function, and the stages that the command line's verbs run one by one.

    quantize = prepare data, plan, calibrate, plan again, [pilot], train, freeze, score, export, verify, report

Every stage leaves its artefact in the run's folder; with ``resume`` a stage whose artefact is there is not repeated.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from . import curvature, loading, nn, recipes
from .curvature import parallel
from .data import Blocks, TokenizedText
from .data import cache as token_cache
from .errors import ConfigError
from .evaluation import Score, model_logits, paired_difference, shared_score
from .evaluation.diagnostics import continuations, histograms
from .export import export_model
from .export.frozen import CODES_FILE, MODEL_FOLDER, FrozenModel, save_codes
from .export.refit import refit as refit_scales
from .export.verify import PROBE_FILE, kept_text, require_ok, verify
from .files import read_json, replacing_folder, require_writable, sha256, write_json, write_text
from .jobs import LARGEST_DEFAULT_BATCH, TUNING_BLOCKS, calibrate_on, choose_device, longest_block, prepare_text, spread
from .mixed import candidates, is_mixed
from .options import Options, count, load_config
from .planner import plan as make_plan
from .plans import Plan
from .progress import announce as say
from .provenance import command_line, machine, versions
from .quant import STE, AbsMean, QuantSpec
from .report.html import write_report
from .report.model_card import write_model_card
from .schedules import LearningRateSchedule
from .targets import target as find_target
from .training import Distillation, HestiaTrainer, TrainConfig, check_loggers, checkpoints, pilot
from .training.trainer import LOG_FILE

OPTIONS_FILE, PLAN_FILE, SENSITIVITY_FILE = "run.yaml", "plan.json", "sensitivity.json"
SCORES_FILE, REPORT_FILE, DIAGNOSTICS_FILE = "scores.json", "report.json", "diagnostics.json"
TRAINING_FILE, TIMING_FILE = "training.json", "timing.json"
EXPORTS_FOLDER, CACHE_FOLDER = "exports", "cache"

PROBE_TOKENS = 128
"""Held-out tokens a sequence on which an exported file's logits are compared, at most."""

PROBE_ROWS = 4
PROBE_LOGITS = 1 << 25
"""Sequences, and logits of all of them together, at most: a large vocabulary gets fewer."""

T = TypeVar("T")


def quantize(options: Options, *, resume: bool = False, plan: Plan | None = None) -> dict[str, Any]:
    """From a pretrained checkpoint to verified low-bit files.

    Under torchrun or accelerate every process calls it: they share calibration, training and scoring; the first alone
    writes, freezes, exports and returns the record, the others an empty one.

    Args:
        options: what to do; see ``Options``.
        resume: continue the run in ``options.out``, or start it where none is.
        plan: use this plan instead of making one (``hestia train``).

    Returns:
        The record that report.json holds.

    Raises:
        ConfigError, PlanError: bad input; nothing was written.
        GuardError, Interrupted: training was stopped; the last good checkpoint is kept.
        VerifyError: an exported file differs from the frozen model.
    """
    with parallel.joined():
        return Run(options, resume=resume, plan=plan).execute()


class _Clock:
    """Seconds by stage, kept in the run's folder so that a resumed run still knows them."""

    def __init__(self, path: Path, resume: bool) -> None:
        self.path = path
        self.seconds: dict[str, float] = {}
        if resume and path.is_file():
            self.seconds = {str(k): float(v) for k, v in read_json(path).items()}

    def measure(self, stage: str, work: Callable[[], T]) -> T:
        """Run ``work`` and add its time to ``stage``, whether it succeeds or not."""
        started = time.perf_counter()
        try:
            return work()
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started
            if self.path.parent.is_dir() and parallel.first():
                write_json(self.path, dict(self.seconds))


class Run:
    """One run: options, folder, and the stages in order.

    Args:
        options: what to do.
        resume: continue where an earlier call stopped.
        plan: a plan made beforehand.
    """

    def __init__(self, options: Options, *, resume: bool = False, plan: Plan | None = None) -> None:
        for name, value in (("MODEL", options.model), ("--data", options.data), ("--out", options.out)):
            if not value:
                raise ConfigError(f"{name} is missing; see `hestia quantize --help`")
        self.options, self.resume, self.given_plan = options, resume, plan
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
        self.clock = _Clock(self.folder / TIMING_FILE, resume)
        self.started = datetime.now(UTC)
        self.device = choose_device(options)
        self.baselines: list[dict[str, Any]] = []
        self.reference: dict[str, Any] | None = None
        """scores.json of another run by the same plan and text, whose parent and rounding need no second scoring."""
        self.source = loading.resolve(options.model)
        self.config = loading.load_config(self.source, trust_remote_code=options.trust_remote_code)

    # --- the stages --------------------------------------------------------------------------------------------------

    def execute(self) -> dict[str, Any]:
        """All stages, then the record of report.json."""
        set_seed(self.options.seed)
        self._check_folder()
        return self.clock.measure("total", self._stages)

    def _stages(self) -> dict[str, Any]:
        started = time.perf_counter()
        plan = self.plan_without_curvature()
        text = self.text
        self._check_inputs()
        self._open_folder()
        say(f"{len(text.train):,} training blocks, {len(text.held_out):,} held-out blocks of {self.seq_len} tokens")
        plan = self._plan(plan)
        frozen = self._frozen(plan)
        scores = self._scores(plan)
        if not parallel.first():
            parallel.barrier()
            return {}
        exports = [self._export(name, frozen) for name in plan.targets]
        total = self.clock.seconds.get("total", 0.0) + time.perf_counter() - started
        record = self._report(plan, scores, exports, total)
        parallel.barrier()
        return record

    def _check_folder(self) -> None:
        """Refuse a folder that holds something else; nothing is written yet."""
        recorded = self.folder / OPTIONS_FILE
        if recorded.is_file():
            before = Options(**load_config(recorded))
            ignored = {"threads", "device", "report_to", "log_every"}
            differing = [
                f"{item.name} is {getattr(before, item.name)!r} there and {getattr(self.options, item.name)!r} here"
                for item in dataclasses.fields(Options)
                if item.name not in ignored and getattr(before, item.name) != getattr(self.options, item.name)
            ]
            if differing:
                raise ConfigError(f"{self.folder} holds a different run: {'; '.join(differing)}. Choose another --out")
            if not self.resume:
                raise ConfigError(f"{self.folder} already holds this run; continue it with --resume")
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ConfigError(f"{self.folder} exists and is not a run of hestia; choose another --out")

    def _check_inputs(self) -> None:
        """Refuse what only a later stage would stumble over: too little text, an odd batch, damaged weights."""
        self._tuning_count()
        _ = self.batch_size
        if not (self.folder / OPTIONS_FILE).is_file():
            self._load_model()

    def _open_folder(self) -> None:
        """The first write: options and tokens, after everything that can be refused has been checked."""
        parallel.barrier()  # every process has looked at the folder as it was
        if not parallel.first():
            parallel.barrier()
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / OPTIONS_FILE, self.options.to_yaml())
        if not (self.folder / CACHE_FOLDER).is_dir():
            text = self.text
            token_cache.save(self.folder / CACHE_FOLDER, text.record["key"], text.train, text.held_out, text.record)
        parallel.barrier()

    def plan_without_curvature(self) -> Plan:
        """The plan before calibration: refuses at once what could not be exported at the end."""
        if self.given_plan is not None:
            nn.apply(self._empty_model(), self.given_plan)  # refuses a plan of another model
            return self.given_plan
        if not self.is_mixed or self.options.sensitivity is not None:
            return self._make_plan(self.options.sensitivity)
        if self.options.calibrate == 0:
            raise ConfigError(
                f"--calibrate 0 leaves nothing to spend --bits {self.options.bits:g} by; "
                "give --sensitivity FILE, or let it calibrate"
            )
        return self._make_plan(None, alike=True)

    @cached_property
    def is_mixed(self) -> bool:
        """Whether the plan may give tensors different widths, which needs a sensitivity whatever the recipe."""
        o = self.options
        return is_mixed(recipes.get(o.recipe, **o.options), o.bits, o.mix(), o.max_kl)

    def _empty_model(self) -> PreTrainedModel:
        return loading.empty_model(self.source, self.config, trust_remote_code=self.options.trust_remote_code)

    def _make_plan(self, sensitivity: str | curvature.Sensitivity | None, *, alike: bool = False) -> Plan:
        """The plan; ``alike`` takes all weights for equally sensitive, to see whether any plan meets the budget."""
        o = self.options
        model = self._empty_model()
        even = {path: {width: 4.0**-width for width in recipes.GRIDS} for path in nn.select(model, o.skip).candidates}
        return make_plan(
            model,
            recipes.get(o.recipe, **o.options),
            o.target,
            sensitivity,
            bits=o.bits,
            widths=o.mix(),
            max_kl=math.inf if alike and o.max_kl is not None else o.max_kl,
            damages=even if alike else None,
            group_size=o.group(),
            skip=o.skip,
            fallback=o.fallback,
            allow_partial=o.allow_partial or alike,
        )

    def _plan(self, plan: Plan) -> Plan:
        path = self.folder / PLAN_FILE
        if self.resume and path.is_file():
            made = Plan.load(path)
            if self.given_plan is not None and made.to_json() != self.given_plan.to_json():
                raise ConfigError(f"{self.folder} holds a run by another plan than the one given. Choose another --out")
            return made
        recipe = recipes.get(self.options.recipe, **self.options.options)
        if self.given_plan is None and (recipe.uses_curvature or self.is_mixed):
            sensitivity = self._sensitivity(plan)
            if sensitivity is not None:
                plan = self._make_plan(sensitivity)
        if parallel.first():
            plan.save(path)
        return plan

    def _sensitivity(self, plan: Plan) -> curvature.Sensitivity | None:
        path = self.folder / SENSITIVITY_FILE
        given = Path(self.options.sensitivity) if self.options.sensitivity else path
        if self.options.sensitivity or (self.resume and path.is_file()):
            sensitivity = curvature.Sensitivity.load(given)
        elif self.options.calibrate == 0:
            return None
        else:
            model: Any = self._load_model()
            model.to(self.device)
            paths, candidates = self._to_measure(plan)
            identity = loading.fingerprint(self.source, self.config)
            sensitivity = self.clock.measure(
                "calibrate",
                lambda: calibrate_on(model, paths, candidates, self.training, self.options, identity),
            )
        if parallel.first():
            sensitivity.save(path)
        return sensitivity

    def _to_measure(self, plan: Plan) -> tuple[list[str], dict[str, QuantSpec]]:
        """The tensors that calibration looks at, and by label every quantizer that they may get."""
        if not self.is_mixed:
            return list(plan.layers), {layer.spec.grid.name: layer.spec for layer in plan.layers.values()}
        o = self.options
        specs = candidates(recipes.get(o.recipe, **o.options), o.group(), o.mix())
        return list(nn.select(self._empty_model(), o.skip).candidates), specs

    def _frozen(self, plan: Plan) -> FrozenModel:
        if not (self.resume and (self.folder / CODES_FILE).is_file()):
            self._train_and_freeze(plan)
            parallel.barrier()
        return FrozenModel(self.folder)

    def _train_and_freeze(self, plan: Plan) -> None:
        model: Any = nn.apply(self._load_model(), plan)
        if plan.trains:
            checkpoint = checkpoints.newest(self.folder / "checkpoints") if self.resume else None
            config = self._train_config(plan)
            trainer = self._trainer(model, plan, config, f"training {plan.recipe['name']}")
            self.clock.measure("train", lambda: trainer.fit(checkpoint))
        if not parallel.first():
            return
        write_json(self.folder / DIAGNOSTICS_FILE, histograms(model, self._load_model()))
        codes = nn.freeze(model)
        loading.cast_parameters(model, loading.parent_dtype(self.source, self.config))
        with replacing_folder(self.folder / MODEL_FOLDER) as temporary:
            loading.save(model, self.source, temporary)
        save_codes(self.folder / CODES_FILE, codes)

    def _train_config(self, plan: Plan) -> TrainConfig:
        o, path = self.options, self.folder / TRAINING_FILE
        if self.resume and path.is_file():
            rate = float(read_json(path)["learning_rate"])
        else:
            rate = o.learning_rate() or self._pilot(plan)
            if parallel.first():
                write_json(path, {"learning_rate": rate, "steps": self.steps, "batch_size": self.batch_size})
        return self._config_for(rate, self.steps, save=True)

    def _config_for(self, rate: float, steps: int, *, save: bool) -> TrainConfig:
        o = self.options
        return TrainConfig(
            steps=steps,
            batch_size=self.batch_size,
            accumulation=o.accumulation,
            learning_rate=rate,
            schedule=self.schedule,
            weight_decay=o.weight_decay,
            clip=o.clip,
            train_embeddings=o.embeddings == "train",
            scale_rate=o.scale_rate,
            norm_rate=o.norm_rate,
            embedding_rate=o.embedding_rate,
            distill=Distillation(divergence=o.distill, weight=o.distill_weight) if o.teacher is not None else None,
            teacher=o.teacher or "",
            bf16=self.bf16,
            gradient_checkpointing=o.gradient_checkpointing,
            compile=o.compile,
            seed=o.seed,
            log_every=(o.log_every or max(1, steps // 50)) if save else 0,
            eval_every=max(1, steps // 10) if save else 0,
            eval_blocks=min(TUNING_BLOCKS, max(8, steps * self.batch_size // 160)),  # about 2 % of the run's time
            save_every=(o.save_every or max(1, steps // 5)) if save else 0,
            report_to=o.report_to if save else (),
        )

    def _pilot(self, plan: Plan) -> float:
        first, second = pilot.trial_steps(self.steps)
        say(f"learning-rate pilot: four rates, {first} steps each, then the best two, {second} steps each")
        width = int(getattr(self.config.get_text_config(), "hidden_size", 1024))
        rate = self.clock.measure(
            "pilot",
            lambda: pilot.choose(
                lambda rate, steps: self.trial(plan, rate, steps),
                pilot.rates(width),
                self.steps,
                self.folder / LOG_FILE,
            ),
        )
        say(f"learning rate {rate:g}")
        return rate

    def trial(self, plan: Plan, rate: float, steps: int) -> float:
        """Hard loss on the tuning blocks after a whole run in miniature: ``steps`` steps, schedules included."""
        model = nn.apply(self._load_model(), plan)
        self._trainer(model, plan, self._config_for(rate, steps, save=False), f"pilot at {rate:g}").fit()
        return shared_score(model_logits(model), self.tuning, description="pilot loss").nll

    def _trainer(self, model: Any, plan: Plan, config: TrainConfig, description: str) -> HestiaTrainer:
        return HestiaTrainer(
            model,
            plan=plan,
            config=config,
            train=self.training,
            held_out=self.tuning,
            folder=self.folder,
            description=description,
            teacher=self._teacher(),
        )

    def _teacher(self) -> Any:
        """A model of its own to learn from: the parent again, or the one that --teacher names."""
        name = self.options.teacher
        if name is None:
            return None
        return self._load_model() if name == "parent" else loading.load_model(loading.resolve(name))

    def _scores(self, plan: Plan) -> dict[str, Any]:
        """Parent, round-to-nearest and frozen model on the same held-out blocks."""
        path = self.folder / SCORES_FILE
        if self.resume and path.is_file():
            return read_json(path)
        blocks = self.scored
        parent: Any = self._load_model()
        parent.to(self.device)
        if self.reference is None:
            of_parent = _numbers(shared_score(model_logits(parent), blocks, description="scoring the parent"))
            rounded = nn.apply(self._load_model(), round_to_nearest_twin(plan)).to(self.device)
            of_rounded = _numbers(self._score_against(parent, rounded, blocks, "scoring round-to-nearest"))
            del rounded
        else:
            of_parent, of_rounded = self.reference["parent"], self.reference["round_to_nearest"]
        frozen: Any = loading.load_model(loading.Source(str(self.folder), str(self.folder / MODEL_FOLDER)))
        frozen.to(self.device)
        of_frozen = _numbers(self._score_against(parent, frozen, blocks, "scoring the frozen model"))
        if not parallel.first():
            return {}
        ours, theirs = of_frozen["block_nll"], of_rounded["block_nll"]
        interval = paired_difference(ours, theirs).to_json() if len(ours) > 1 else None
        diagnostics = read_json(self.folder / DIAGNOSTICS_FILE)
        diagnostics["samples"] = continuations(parent, frozen, self.tokenizer, blocks)
        write_json(self.folder / DIAGNOSTICS_FILE, diagnostics)
        record = {
            "parent": of_parent,
            "round_to_nearest": of_rounded,
            "quantized": of_frozen,
            "quantized_minus_round_to_nearest": interval,
            "blocks": len(blocks),
        }
        write_json(path, record)
        return record

    def _score_against(self, parent: PreTrainedModel, model: Any, blocks: Blocks, description: str) -> Score:
        return shared_score(model_logits(model), blocks, parent=model_logits(parent), description=description)

    def _export(self, name: str, frozen: FrozenModel) -> dict[str, Any]:
        path = self.folder / EXPORTS_FOLDER / name.replace(":", "-")
        if name.startswith("gguf"):
            path = path / f"{Path(self.options.model).name}-{name.split(':')[1]}.gguf"
        probe, o = self._verification_text(), self.options
        return self.clock.measure(
            "export", lambda: export_and_verify(frozen, name, path, o.fallback, probe, head=o.head)
        )

    def _verification_text(self) -> Tensor:
        """Held-out tokens on which exported files are run; the run keeps them for ``hestia verify``."""
        kept = kept_text(self.folder)
        if kept is not None:
            return kept
        vocabulary = int(getattr(self.config.get_text_config(), "vocab_size", 1 << 17))
        tokens = min(PROBE_TOKENS, self.scored.input_ids.shape[1])
        rows = max(1, min(PROBE_ROWS, PROBE_LOGITS // (tokens * vocabulary)))
        probe = self.scored.input_ids[:rows, :tokens].long()
        write_json(self.folder / PROBE_FILE, {"schema": 1, "input_ids": probe.tolist()})
        return probe

    # --- what the stages share ---------------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The parent's tokenizer."""
        return loading.load_tokenizer(self.source, trust_remote_code=self.options.trust_remote_code)

    @cached_property
    def seq_len(self) -> int:
        """Tokens a block."""
        return longest_block(self.config, self.options)

    @cached_property
    def text(self) -> TokenizedText:
        """Training and held-out blocks; tokenized once and cached in the run."""
        text = prepare_text(self.options, self.tokenizer, self.seq_len, self._cache())
        largest, size = int(text.record["max_token_id"]), int(self.config.get_text_config().vocab_size)
        if largest >= size:
            raise ConfigError(
                f"{self.source.name}: its tokenizer makes token id {largest}, the model knows {size} tokens; "
                "they do not belong together"
            )
        return text

    def _cache(self) -> Path | None:
        return self.folder / CACHE_FOLDER if (self.folder / OPTIONS_FILE).is_file() else None

    @cached_property
    def training(self) -> Blocks:
        """The training blocks without the tuning blocks."""
        blocks = self.text.train
        kept = len(blocks) - self._tuning_count()
        return blocks[:kept]

    @cached_property
    def tuning(self) -> Blocks:
        """The last training blocks: logged hard loss and pilot, never trained on, never reported."""
        blocks = self.text.train
        kept = len(blocks) - self._tuning_count()
        return blocks[kept:]

    def _tuning_count(self) -> int:
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
        return spread(self.text.held_out, count(self.options.eval_tokens, "eval_tokens") // self.seq_len)

    @cached_property
    def batch_size(self) -> int:
        """Blocks a step: the user's, or as many as leave at least 300 steps, 16 at most."""
        if self.options.batch_size is not None:
            size = self.options.batch_size
        else:
            tokens = count(self.options.tokens, "tokens")
            size = max(1, min(LARGEST_DEFAULT_BATCH, tokens // (300 * self.seq_len)))
            size = max(self.options.accumulation, size - size % self.options.accumulation)
        if size % self.options.accumulation:
            raise ConfigError(f"--accumulation {self.options.accumulation} does not divide --batch-size {size}")
        return size

    @cached_property
    def steps(self) -> int:
        """Optimizer steps."""
        tokens = count(self.options.tokens, "tokens")
        return self.options.steps or max(1, tokens // (self.batch_size * self.seq_len))

    @property
    def bf16(self) -> bool:
        """Whether training runs under bf16 autocast; auto says yes but for very narrow models on a CPU."""
        if self.options.precision != "auto":
            return self.options.precision == "bf16"
        width = int(getattr(self.config.get_text_config(), "hidden_size", 1024))
        return width >= 128 or self.device.type == "cuda"

    def _load_model(self) -> PreTrainedModel:
        return loading.load_model(self.source, trust_remote_code=self.options.trust_remote_code)

    # --- the report --------------------------------------------------------------------------------------------------

    def _report(
        self, plan: Plan, scores: dict[str, Any], exports: list[dict[str, Any]], total: float
    ) -> dict[str, Any]:
        training = read_json(self.folder / TRAINING_FILE) if (self.folder / TRAINING_FILE).is_file() else {}
        tokens = self.steps * self.batch_size * self.seq_len if plan.trains else 0
        seconds = self.clock.seconds
        record: dict[str, Any] = {
            "schema": 1,
            "recipe": plan.recipe["name"],
            "recipe_options": {k: v for k, v in plan.recipe.items() if k != "name"},
            "target": plan.targets[0],
            "seed": self.options.seed,
            "tokens": tokens,
            "learning_rate": training.get("learning_rate"),
            "nll": {kind: scores[kind]["nll"] for kind in ("parent", "round_to_nearest", "quantized")},
            "kl_to_parent": scores["quantized"]["kl_to_parent"],
            "top1_agreement": scores["quantized"]["top1_agreement"],
            "bits_per_weight": {
                "quantized_layers": 8.0 * exports[0]["quantized_bytes"] / plan.quantized_weights,
                "whole_model": 8.0 * exports[0]["bytes"] / (plan.quantized_weights + plan.kept_weights),
            },
            "weights": {"quantized": plan.quantized_weights, "kept": plan.kept_weights},
            "seconds": {
                "calibrate": seconds.get("calibrate", 0.0),
                "pilot": seconds.get("pilot", 0.0),
                "train": seconds.get("train", 0.0),
                "export": seconds.get("export", 0.0),
                "total": total,
            },
            "tokens_per_second": tokens / seconds["train"] if seconds.get("train") else None,
            "exports": exports,
            "baselines": self.baselines,
            "scores": {
                kind: {k: v for k, v in scores[kind].items() if k != "block_nll"}
                for kind in ("parent", "round_to_nearest", "quantized")
            },
            "nll_interval": {k: scores[k] for k in ("quantized_minus_round_to_nearest",) if scores[k] is not None},
            "steps": self.steps if plan.trains else 0,
            "batch_size": self.batch_size,
            "seq_len": self.seq_len,
            "model": loading.fingerprint(self.source, self.config),
            "license": loading.license_of(self.source),
            "parent_dtype": str(loading.parent_dtype(self.source, self.config)).removeprefix("torch."),
            "data": self.text.record,
            "command": command_line(),
            "versions": versions(),
            "machine": machine(self.device),
            "started": self.started.isoformat(timespec="seconds"),
        }
        write_json(self.folder / REPORT_FILE, record)
        write_report(self.folder)
        write_model_card(self.folder)
        return record


def _numbers(result: Score) -> dict[str, Any]:
    """A score as scores.json keeps it: the means, and every block's NLL for paired comparisons."""
    return {**result.to_json(), "block_nll": result.block_nll[result.block_tokens > 0].tolist()}


def round_to_nearest_twin(plan: Plan) -> Plan:
    """The plan that rounds the same tensors to the same levels and groups, without training, shift or constraint."""
    recipe = recipes.get("round_to_nearest")
    scales = {grid.values: recipe.spec_for(bits, "row").scale for bits, grid in recipes.GRIDS.items()}

    def rounded(spec: QuantSpec) -> QuantSpec:
        return QuantSpec(
            grid=dataclasses.replace(spec.grid, block=0),
            group_size=spec.group_size,
            scale=scales.get(spec.grid.values) or AbsMean(),
            estimator=STE(),
        )

    layers = {
        path: dataclasses.replace(layer, spec=rounded(layer.spec), temperature_factor=1.0)
        for path, layer in plan.layers.items()
    }
    return dataclasses.replace(
        plan, recipe=recipe.to_json(), trains=False, schedule=recipe.schedule(), layers=layers, correction=None
    )


def export_and_verify(
    frozen: FrozenModel,
    target: str,
    path: Path,
    fallback: bool,
    token_ids: Tensor | None = None,
    *,
    head: str = "auto",
    refit: bool = False,
) -> dict[str, Any]:
    """Write one file, read it back, compare, run it on ``token_ids``, and return its entry of report.json.

    Args:
        frozen: the run's frozen model.
        target: the file format.
        path: the folder or file to write.
        fallback: let single tensors use another exact type of the format.
        token_ids: text to run the file on; None takes what the run keeps.
        head: how a GGUF file stores embedding and head.
        refit: re-fit scales that are too fine for the target; the entry then says what that cost.

    Raises:
        ExportError: the format cannot hold the model exactly; nothing was written.
        VerifyError: the written file differs from the frozen model.
    """
    if path.is_dir():
        shutil.rmtree(path)  # an earlier attempt of this very run
    path.unlink(missing_ok=True)
    run, changed = frozen.run, None
    if refit:
        traces = None
        if (run / SENSITIVITY_FILE).is_file():
            traces = curvature.Sensitivity.load(run / SENSITIVITY_FILE).traces
        text = token_ids if token_ids is not None else kept_text(run)
        say(f"re-fitting scales to {target}")
        changed = refit_scales(frozen, find_target(target), traces, text)
        if changed is not None:
            frozen = FrozenModel(changed.folder)
            token_ids = text
    say(f"exporting {target}")
    entry = export_model(frozen, target, path, fallback=fallback, head=head)
    result = verify(path, frozen.run, target=target, token_ids=token_ids if token_ids is not None else kept_text(run))
    require_ok(result)
    entry |= {"path": os.path.relpath(path, run), "sha256": digest(path), "verify": result.to_json()}
    return entry if changed is None else {**entry, "refit": changed.to_json()}


def record_export(run: Path, entry: dict[str, Any]) -> None:
    """Put an export that was made after the run into its report and model card, if it has them."""
    if not (run / REPORT_FILE).is_file():
        return
    record = read_json(run / REPORT_FILE)
    others = [e for e in record.get("exports", []) if e.get("path") != entry["path"]]
    write_json(run / REPORT_FILE, {**record, "exports": [*others, entry]})
    write_report(run)
    write_model_card(run)


def digest(path: Path) -> str:
    """SHA-256 of a file; of a folder, over the names and hashes of its files."""
    if path.is_file():
        return sha256(path)
    listing = "".join(f"{p.relative_to(path)} {sha256(p)}\n" for p in sorted(path.rglob("*")) if p.is_file())
    return hashlib.sha256(listing.encode()).hexdigest()
